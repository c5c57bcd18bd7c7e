"""This project's own tree: the base that a run began with, and the steps that it saved."""
