"""Asks servers of OpenAI's protocol, with limits on replies and without leaking keys."""
