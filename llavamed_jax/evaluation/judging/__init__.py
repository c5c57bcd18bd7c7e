"""Judging: a language model behind an address reads answers."""
