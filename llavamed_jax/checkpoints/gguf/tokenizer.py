"""Writes the tokenizer of a GGUF file as transformers' files: its vocabulary, its special tokens, its chat templates.

`tokenizer.ggml.model` names the algorithm. `gpt2` is byte-level BPE (`byte_level.py`), whose file is `tokenizer.json`.
`llama` is SentencePiece's BPE (`sentence_piece.py`), whose file is `tokenizer.model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.gguf import byte_level, sentence_piece
from llavamed_jax.checkpoints.gguf.config import EMBEDDING
from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary
from llavamed_jax.errors import UserError, short, warn
from llavamed_jax.utils.files import write_json

_WRITERS: dict[str, Callable[[GgufFile, Vocabulary, Path], str]] = {
    "gpt2": byte_level.write, "llama": sentence_piece.write}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Writes the tokenizer files into a directory.

    Args:
      file: the GGUF file.
      directory: an existing directory.

    Raises:
      UserError: a kind of tokenizer or a rule that is not known here, or metadata that are missing or damaged.
    """
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in _WRITERS:
        raise UserError(f"{file.path} has tokenizer.ggml.model {short(kind)}; {' or '.join(_WRITERS)} was expected")
    vocabulary = read_vocabulary(file, kind)
    rows = file.tensors[EMBEDDING].shape[0]
    if len(vocabulary.texts) != rows:
        raise UserError(f"{file.path} has {len(vocabulary.texts)} tokens and {rows} rows in {EMBEDDING}; the same "
                        "number was expected")
    of_class = _WRITERS[kind](file, vocabulary, directory)
    write_json(directory / "tokenizer_config.json", _settings(file, vocabulary, of_class))
    _write_templates(file, directory)


def _settings(file: GgufFile, vocabulary: Vocabulary, of_class: str) -> dict[str, Any]:
    """Returns `tokenizer_config.json`."""
    roles = {role: vocabulary.texts[i] for name, role in _ROLES.items() if (i := vocabulary.ids.get(name)) is not None}
    architecture = file.get("general.architecture", str)
    added = {str(i): dict(content=text, lstrip=False, rstrip=False, single_word=False, normalized=False,
                          special=kind != USER_DEFINED)
             for i, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds))
             if kind in (CONTROL, UNKNOWN, USER_DEFINED)}
    # transformers 4 and 5 have other defaults. llama.cpp splits text behind a special token as at a beginning.
    prefix = (dict(legacy=True, add_prefix_space=sentence_piece.has_prefix(file))
              if of_class == sentence_piece.CLASS else {})
    return {**roles, **prefix, "added_tokens_decoder": added, "add_bos_token": vocabulary.has_bos,
            "add_eos_token": vocabulary.has_eos, "clean_up_tokenization_spaces": False,
            "model_max_length": file.get(f"{architecture}.context_length", int), "tokenizer_class": of_class}


def _write_templates(file: GgufFile, directory: Path) -> None:
    """Writes the chat templates where transformers looks for them: the default one, and others by name."""
    named = {name: f"{_TEMPLATE}.{name}" for name in (file.strings(_TEMPLATES) if _TEMPLATES in file.keys else ())}
    if _TEMPLATE in file.keys:
        (directory / "chat_template.jinja").write_text(file.get(_TEMPLATE, str), encoding="utf-8")
    for name, key in named.items():
        if not re.fullmatch(r"\w[\w-]{0,63}", name):
            warn(f"{file.path} has a chat template named {short(name)}, which is left out: it cannot name a file")
        elif name != "default" or _TEMPLATE not in file.keys:
            folder = directory / "additional_chat_templates"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.jinja").write_text(file.get(key, str), encoding="utf-8")
