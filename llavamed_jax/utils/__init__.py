"""Helpers for every room; they import the standard library, `errors` and small libraries, and no other room."""
