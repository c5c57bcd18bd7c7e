"""Verifies checkpoints: compares two of them, and checks a released one from its hub to its scores."""
