"""Looks at a training file: counts, lengths, images, duplicates, leakage into an evaluation, and examples."""
