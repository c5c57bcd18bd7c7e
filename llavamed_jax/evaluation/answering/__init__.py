"""Asking: a model that is loaded here or a server answers questions, and each answer is kept."""
