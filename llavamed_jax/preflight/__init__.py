"""Machines that are not here: the programs that would run there, compiled, and what they would need."""
