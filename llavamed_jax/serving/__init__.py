"""The server: an OpenAI-compatible API on one generation engine (extra `[serve]`)."""
