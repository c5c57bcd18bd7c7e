"""Warns once if versions of transformers read a tokenizer directory differently, or if a setting is not applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from llavamed_jax.errors import UserError, short, warn_once

# Texts on which conversions of one SentencePiece model are known to differ: text behind special tokens, runs of blanks,
# leading white space, characters spelt as bytes. {} is a special token.
_PROBES = ("a{}b", "a{} b", "a{}\nb", " a", "a  b   c", "\na", "é胸 🫁", "Is there a pleural effusion?")
# Keys of tokenizer_config.json, the values that change nothing, and the effect of not applying another value.
_NOT_APPLIED = {
    "clean_up_tokenization_spaces": ((False, None), "decoded answers keep spaces before punctuation"),
    "split_special_tokens": ((False, None), "a special token that is spelt out in a text becomes its id"),
    "sp_model_kwargs": (({}, None), "SentencePiece runs with its own settings"),
}


class Tokenizer(Protocol):
    """The part of a `text.tokenizer.Tokenizer` that is compared here."""

    file: Path
    settings: Mapping[str, Any]
    eos_token: str
    bos_id: int | None
    has_bos: bool

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encodes a text, as `text.tokenizer.Tokenizer.encode` does."""
        ...

    def bytes_of(self, i: int) -> bytes:
        """Returns the bytes of a token, as `text.tokenizer.Tokenizer.bytes_of` does."""
        ...


def say_differences(directory: Path, tokenizer: Tokenizer, other: Tokenizer | UserError | None) -> None:
    """Prints a warning for each difference.

    Args:
      directory: the tokenizer's directory.
      tokenizer: the tokenizer that is used.
      other: the tokenizer of the other file, or the error that it raised; None if there is only one file.
    """
    for sentence in (*_of_files(tokenizer, other), *_of_settings(tokenizer)):
        warn_once(f"{directory}: {sentence}")


def _of_files(tokenizer: Tokenizer, other: Tokenizer | UserError | None) -> Iterator[str]:
    name, reason = tokenizer.file.name, {
        "tokenizer.json": "as transformers' processors and fast classes do",
        "tokenizer.model": "as the originals' code does"}.get(tokenizer.file.name)
    if isinstance(other, UserError):
        yield f"{name} is used; the other tokenizer file cannot be used: {other}"
    elif other is not None:
        special = tokenizer.eos_token or "\n"
        for probe in (each.format(special) for each in _PROBES):
            found, others = tokenizer.encode(probe), other.encode(probe)
            if found != others:
                yield (f"{name} is used, {reason}. It encodes {short(probe)} as {found}, but {other.file.name} encodes "
                       f"it as {others}. The slow classes of transformers 4 read tokenizer.model; its fast classes and "
                       "transformers 5 read tokenizer.json")
                return


def _of_settings(tokenizer: Tokenizer) -> Iterator[str]:
    settings = tokenizer.settings
    for key, (nothing, what) in _NOT_APPLIED.items():
        if settings.get(key) not in nothing:
            yield f"tokenizer_config.json has {key} {short(settings[key])}, which is not applied: {what}"
    if tokenizer.file.suffix == ".json":
        around = tokenizer.encode("")
        if around not in ([], [tokenizer.bos_id]):
            yield (f"tokenizer.json adds the ids {around} to every text, although the bos_token of the other files is "
                   f"{tokenizer.bos_id}; tokenizer.json is followed, as in transformers, so check that prompts do not "
                   "end with an end-of-sequence token")
        asked = settings.get("add_bos_token")
        if asked is not None and asked != tokenizer.has_bos:
            yield (f"tokenizer_config.json has add_bos_token {asked}, but tokenizer.json does the opposite; "
                   "tokenizer.json is followed, as in transformers 5 (LlamaTokenizerFast of transformers 4 follows "
                   "tokenizer_config.json)")
    elif settings.get("add_eos_token"):
        yield ("tokenizer_config.json has add_eos_token True, which is not applied, because a prompt must not end "
               "with an end-of-sequence token")
    elif settings.get("add_prefix_space") is False and _puts_a_blank_before(tokenizer):
        yield "tokenizer_config.json has add_prefix_space False, which is not applied, as in transformers before 4.38"


def _puts_a_blank_before(tokenizer: Tokenizer) -> bool:
    """Returns whether the file itself puts a blank before a text."""
    return b"".join(map(tokenizer.bytes_of, tokenizer.encode("a", bos=False))).startswith(b" ")
