"""Trains a model by a recipe: the loop, its step and state, rows of data, saved steps, and logs."""
