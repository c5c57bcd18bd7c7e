"""Reads GGUF, llama.cpp's file of a language model, into the config, tensors and tokenizer files of transformers."""
