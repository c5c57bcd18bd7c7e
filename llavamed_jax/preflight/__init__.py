"""Compiles the programs of a run for machines that are not here, and reports the memory and traffic they need."""
