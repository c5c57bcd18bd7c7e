"""Scoring: from predictions to numbers, their intervals, comparisons and controls."""
