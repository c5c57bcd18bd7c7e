"""Scores predictions: metrics with intervals, comparisons of models, and controls."""
