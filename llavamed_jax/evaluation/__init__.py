"""Evaluation: questions, answers, scores and report. `run.py` composes them."""
