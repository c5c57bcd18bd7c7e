"""Reads special and added tokens from a checkpoint's tokenizer files, as transformers reads them.

A token may occur in several files. `tokenizer_config.json` gives tokens their roles; if it has no
`added_tokens_decoder` (which transformers before 4.34 did not write), `special_tokens_map.json` takes precedence, in
transformers 4.28, 4.36 and 5.24 alike. Added tokens come from `added_tokens_decoder` and `added_tokens.json`; those of
`tokenizer.json` come from that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import read_json

FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CORE = ("bos_token", "eos_token", "unk_token")  # those of every vocabulary
# In the order in which transformers assigns ids to those that are missing in the vocabulary.
ROLES = (*CORE, "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # the second is transformers 5's name
_FLAGS = {"special": "is_special", "lstrip": "strips_left", "rstrip": "strips_right", "single_word": "is_single_word",
          "normalized": "is_normalized"}
_LARGEST_ID = 2**20 - 1  # four times the largest known vocabulary; the embedding table grows with it
_ADDED = "the added tokens"


class Token(NamedTuple):
    """A token that is cut out of a text before the rest is split into pieces.

    Attributes:
      text: the token as it is written in texts.
      id: None if no file gives one; it is then the vocabulary's, or the next free one.
      is_special: whether decoded text leaves the token out.
      strips_left: whether white space before the token is dropped.
      strips_right: whether white space behind the token is dropped.
      is_single_word: whether the token is cut out only between blanks or the ends of the text.
      is_normalized: whether the token is searched for after normalization.
      is_bare: whether a file names the token by a string that transformers 4.28 does not convert to an object; it drops
        white space beside such tokens.
    """

    text: str
    id: int | None = None
    is_special: bool = False
    strips_left: bool = False
    strips_right: bool = False
    is_single_word: bool = False
    is_normalized: bool = False
    is_bare: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """The checked contents of the files.

    Attributes:
      roles: the token of each role in `ROLES` that a file names; null and "" name no token.
      others: special tokens without a role.
      added: tokens with ids of their own, by id.
      settings: the whole of `tokenizer_config.json`.
    """

    roles: Mapping[str, Token]
    others: tuple[Token, ...]
    added: tuple[Token, ...]
    settings: Mapping[str, Any]

    @property
    def is_legacy(self) -> bool:
        """Whether each text between special tokens is split as at a beginning.

        True if missing or null, as in transformers 4.
        """
        return self.settings.get("legacy") is not False

    @property
    def has_bos(self) -> bool:
        """Whether a text begins with the beginning-of-sequence token when `tokenizer.model` is read.

        True if the setting is missing, False if it is null, as in transformers 4.
        """
        return self.settings.get("add_bos_token", True) is True

    @property
    def is_llama(self) -> bool:
        """Whether transformers 4 reads the files with LLaMA's classes, its choice for LLaMA and Mistral."""
        name = self.settings.get("tokenizer_class")
        return not isinstance(name, str) or "Llama" in name


def read_special_tokens(files: Mapping[str, Path]) -> SpecialTokens:
    """Reads a checkpoint's files.

    Args:
      files: paths by the names in `FILES`; each may be missing.

    Returns:
      The tokens and settings.

    Raises:
      UserError: a file is not a JSON object, a value has another type than transformers writes, or an id occurs twice.
    """
    config, own_map, added = (read_json(files[name]) if name in files else {} for name in FILES)
    for key in ("legacy", "add_bos_token", "add_eos_token"):
        if not isinstance(config.get(key), bool | None):
            raise _wrong(files["tokenizer_config.json"], key, config[key], "true or false")
    decoder = config.get("added_tokens_decoder")
    roles, others = {}, {}
    for name, content in (("tokenizer_config.json", config),
                          ("special_tokens_map.json", own_map if decoder is None else {})):
        # LLaMA's class converts strings of tokenizer_config.json to objects for the first three roles and the padding.
        made = (*ROLES[:3], "pad_token") if name == "tokenizer_config.json" else ()
        roles |= {role: token._replace(is_bare=token.is_bare and role not in made)
                  for role, token in _roles(files.get(name), content)}  # the later file takes precedence
        others |= {token.text: token for token in _lists(files.get(name), content)}
    tokens = {token.text: token for token in _from_added_tokens(files.get("added_tokens.json"), added)}
    tokens |= {token.text: token for token in _from_decoder(files.get("tokenizer_config.json"), decoder)}
    # An object in a list has flags of its own; for a string or a role, those of the list of added tokens apply.
    tokens |= {text: token._replace(id=tokens[text].id) for text, token in others.items()
               if text in tokens and not token.is_bare}
    special = {*others, *(token.text for token in roles.values())}
    tokens = [token._replace(is_special=token.is_special or token.text in special) for token in tokens.values()]
    _check_ids(tokens, files)
    return SpecialTokens(roles, tuple(others.values()), tuple(sorted(tokens, key=lambda token: token.id)), config)


def _roles(file: Path | None, content: Mapping[str, Any]) -> Iterator[tuple[str, Token]]:
    for role in ROLES:
        token = _token(file, role, content.get(role))
        if token is not None:
            yield role, token


def _lists(file: Path | None, content: Mapping[str, Any]) -> Iterator[Token]:
    for key in _LISTS:
        value = content.get(key)
        if isinstance(value, dict):  # transformers 5 may name each token
            value = list(value.values())
        if not isinstance(value, list | None):
            raise _wrong(file, key, value, "a list of tokens")
        for each in value or ():
            token = _token(file, key, each)
            if token is not None:
                yield token


def _token(file: Path | None, key: str, value: Any) -> Token | None:
    """Reads a token that transformers writes as a text or as an object; returns None for null and an empty text."""
    if value is None or value == "":
        return None
    content = value if isinstance(value, dict) else {"content": value}
    text, flags = content.get("content"), {name: content.get(key, False) for key, name in _FLAGS.items()}
    if not isinstance(text, str) or not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(file, key, value, "a text, or an object with its content and flags")
    return Token(text, **{**flags, "is_special": True}, is_bare=isinstance(value, str))


def _from_added_tokens(file: Path | None, content: Mapping[str, Any]) -> Iterator[Token]:
    for text, i in content.items():
        if not text:
            raise _wrong(file, text, i, "a token's text and its id", _ADDED)
        yield Token(text, _id(file, text, i))


def _from_decoder(file: Path | None, decoder: Any) -> Iterator[Token]:
    if not isinstance(decoder, dict | None):
        raise _wrong(file, "added_tokens_decoder", decoder, "an object of ids and tokens", _ADDED)
    for key, entry in (decoder or {}).items():
        where = f"added_tokens_decoder {key}"
        token = _token(file, where, entry) if isinstance(entry, dict) else None
        if token is None:
            raise _wrong(file, where, entry, "an object with the token's content", _ADDED)
        i = int(key) if key.isdecimal() and len(key) < 12 else key
        yield token._replace(id=_id(file, where, i), is_special=entry.get("special", False))


def _id(file: Path | None, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_ID:
        raise _wrong(file, key, value, f"a whole number from 0 to {_LARGEST_ID}", _ADDED)
    return value


def _check_ids(tokens: list[Token], files: Mapping[str, Path]) -> None:
    texts: dict[int, str] = {}
    for token in tokens:
        other = texts.setdefault(token.id, token.text)
        if other != token.text:
            file = next(files[name] for name in ("added_tokens.json", "tokenizer_config.json") if name in files)
            raise UserError(f"{_ADDED} of the tokenizer in {file.parent}: the id {token.id} stands for {short(other)} "
                            f"and for {short(token.text)}; one token per id was expected")


def _wrong(file: Path, key: str, value: Any, expected: str, what: str = "the special tokens") -> UserError:
    return UserError(f"{what} of the tokenizer in {file.parent}: {file.name} has {short(value)} for {short(key)}; "
                     f"{expected} was expected")
