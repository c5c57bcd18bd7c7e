"""Asks questions to a loaded model or to a server, and keeps each answer."""
