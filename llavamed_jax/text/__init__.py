"""Prompts, conversations, chat templates and tokenizers: everything between messages and token ids."""
