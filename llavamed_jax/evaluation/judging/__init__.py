"""Judges answers with a language model behind an API."""
