"""Evaluates a model: asks questions, scores the answers and writes a report. `run.py` puts the parts together."""
