"""Converts text to ids and back, as the version of transformers did that a checkpoint was trained with.

With `tokenizer.model`, ids come from SentencePiece itself, as from the slow `LlamaTokenizer` of the originals'
transformers: the tokenizer that transformers 5 builds from the same file splits text differently around special tokens.
The slow class adds little to SentencePiece: special tokens are cut out of the text first, and each piece of text in
between gets its own dummy prefix `▁` (`legacy`, the default); with `"legacy": false` in `tokenizer_config.json` (Vicuna
1.5) only the first piece does. The class of LLaVA-Med v1.0's transformers had only the first way, and dropped the white
space beside added tokens (`Tokenizer.as_v1`).

With `tokenizer.json`, whole texts go through the tokenizers library, which follows the file. Versions differ in whether
a text begins with the beginning-of-sequence token: transformers 4's `LlamaTokenizerFast`, with which the originals ran,
follows `add_bos_token` and adds the token if the setting is missing; transformers 5 follows the file
(`of_transformers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UsageError, UserError, cut
from llavamed_jax.text.special_tokens import CORE, FILES, SpecialTokens, Token, read_special_tokens
from llavamed_jax.text.tokenizer_backends import SentencePiece, Tokenizers
from llavamed_jax.text.tokenizer_generations import say_differences
from llavamed_jax.utils import paths

TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # `find_tokenizer` looks for these, in this order
_NOTHING = SpecialTokens({}, (), (), {})


class Tokenizer:
    """Converts text to ids and back. `load` makes one from files.

    Args:
      backend: the library that splits text into pieces.
      said: the contents of the files beside the backend's file.
      is_v1: whether text is split as in transformers 4.28.
      of_transformers: whether the checkpoint has transformers' own layout; `tokenizer.json` is then followed as it is.

    Attributes:
      vocab_size: number of ids that stand for text, added tokens included; a model's table may be longer (padded).
      bos_id: id of the beginning-of-sequence token; None if there is no such token.
      eos_id: id of the end-of-sequence token; None if there is no such token.
      unk_id: id of the unknown token; None if there is no such token.
      special_tokens: the texts of `bos_token`, `eos_token` and the other roles that the files give, for chat templates.
      pad_id: the id that the original pads with and compares against: `unk`, or `eos` without one.
      has_bos: whether sequences begin with `bos_id`.
      is_legacy: whether text after a special token is split as at a beginning.
    """

    def __init__(self, backend: SentencePiece | Tokenizers, said: SpecialTokens = _NOTHING, is_v1: bool = False,
                 of_transformers: bool = False):
        """Raises UserError if a file of the backend is damaged."""
        self._backend, self._said, self._is_v1 = backend, said, is_v1
        own = {"bos_token": backend.bos, "eos_token": backend.eos, "unk_token": backend.unk}
        roles = {**{role: Token(text, is_special=True) for role, text in own.items() if text is not None}, **said.roles}
        self._named = (*roles.values(), *said.others)
        self._alone = {token.text for token in self._named}  # without legacy, no lone prefix stays before these
        added = {token.text: token for token in (*getattr(backend, "added", ()), *said.added)}
        self._cut = self._with_ids({**{token.text: token for token in self._named}, **added})
        self.bos_id, self.eos_id, self.unk_id = (self._cut[roles[role].text].id if role in roles else None
                                                 for role in CORE)
        self.pad_id = self.unk_id if self.unk_id is not None else self.eos_id
        self._text_of = {token.id: token.text for token in self._cut.values()}
        self._special_ids = {token.id for token in self._cut.values() if token.is_special}
        self.vocab_size = max([backend.size - 1, *self._text_of]) + 1
        longest_first = sorted(self._cut, key=len, reverse=True)
        self._splitter = "(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)()"
        self.has_bos = said.has_bos and self.bos_id is not None
        self.is_legacy = said.is_legacy
        self._follows_file = self._is_whole and (of_transformers or not said.is_llama)
        named = said.roles if self._follows_file else roles
        self.special_tokens = {role: token.text for role, token in named.items()}
        if self._is_whole:
            self.is_legacy = self._begins_anew()
        if self._follows_file:
            self.has_bos = self.bos_id is not None and backend.encode_whole("", True)[:1] == [self.bos_id]

    def _with_ids(self, tokens: Mapping[str, Token]) -> dict[str, Token]:
        """Gives each token its id: the one of its file, else of the vocabulary, else the next free one."""
        out, free = {}, max([self._backend.size - 1, *(t.id for t in tokens.values() if t.id is not None)]) + 1
        for text, token in tokens.items():
            i = self._backend.id_of(text) if token.id is None else token.id
            if i is None:
                i, free = free, free + 1
            out[text] = token._replace(id=i)
        return out

    @property
    def _is_whole(self) -> bool:
        """Whether the library cuts special tokens out itself, so that it gets whole texts."""
        return isinstance(self._backend, Tokenizers) and not self._is_v1

    def _begins_anew(self) -> bool:
        """Returns whether `tokenizer.json` splits text behind a special token as at a beginning."""
        special = next((t for t in (self.special_tokens.get("eos_token"), *self._cut) if t is not None), None)
        if special is None:
            return True
        return self._backend.encode_whole(special + "a", False)[-1:] == self._backend.encode_whole("a", False)[-1:]

    @property
    def file(self) -> Path:
        """The file that pieces come from."""
        return self._backend.file

    @property
    def settings(self) -> Mapping[str, Any]:
        """The whole of `tokenizer_config.json`; empty if there is no such file."""
        return self._said.settings

    @property
    def bos_token(self) -> str:
        """The text of the token that sequences begin with, or ""."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        """The text of the token that ends a sequence, or ""."""
        return self.special_tokens.get("eos_token", "")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encodes a text; special tokens written out in it (`</s>`) become their ids.

        Args:
          text: the text.
          bos: False leaves out the ids that the files put before a whole sequence (and, in `tokenizer.json`, behind
            it).

        Returns:
          Token ids.

        Raises:
          UserError: the text has a lone surrogate, which UTF-8 cannot encode, or the tokenizer's file is damaged.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has half a surrogate pair at character {error.start}; whole characters were "
                            "expected") from None
        if self._follows_file:
            return self._backend.encode_whole(text, bos)
        ids = [self.bos_id] if bos and self.has_bos else []
        if self._is_whole:
            return ids + self._backend.encode_whole(text, False)
        anew = self.is_legacy or self._is_v1
        parts = self._split(text if anew or not text else "▁" + text.replace("▁", " "))
        if not anew and len(parts) > 1 and parts[0] == "▁" and parts[1] in self._alone:
            del parts[0]
        for part in parts:
            ids += [self._cut[part].id] if part in self._cut else self._backend.encode(part, has_prefix=anew)
        return ids

    def _split(self, text: str) -> list[str]:
        """Cuts a text at special tokens, the longest at each place, as the slow classes' `tokenize` does."""
        parts = [part for part in re.split(self._splitter, text) if part]
        for i, part in enumerate(parts):
            token = self._cut.get(part)
            if token is None:
                continue
            left, right = parts[i - 1] if i else "", parts[i + 1] if i + 1 < len(parts) else ""
            strips_left, strips_right = self._strips(token)
            if strips_right and right:
                right = parts[i + 1] = right.lstrip()
            if strips_left and left:
                left = parts[i - 1] = left.rstrip()
            if token.is_single_word and not self._is_v1:
                if left and left[-1] != " ":
                    parts[i - 1:i + 1] = left + part, ""
                elif right and right[0] != " ":
                    parts[i:i + 2] = "", part + right
        return [part for part in parts if part]

    def _strips(self, token: Token) -> tuple[bool, bool]:
        """Returns whether white space before and behind a token is dropped.

        transformers 4.28 drops it beside every token that no file names by an object.
        """
        if not self._is_v1:
            return token.strips_left, token.strips_right
        named = next((each for each in self._named if each.text == token.text and not each.is_bare), None)
        return (named.strips_left, named.strips_right) if named is not None else (True, True)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a special or added token; None if there is no such token."""
        return self._cut[token].id if token in self._cut else None

    def token_of(self, i: int | None) -> str | None:
        """Returns the special or added token with an id; None if there is no such token."""
        return self._text_of.get(i)

    def as_v1(self, tokens: Sequence[str]) -> "Tokenizer":
        """Returns the tokenizer as the slow class of LLaVA-Med v1.0's transformers reads it.

        Args:
          tokens: tokens to add at the end of the vocabulary unless the tokenizer has them.

        Returns:
          A tokenizer with the same backend.
        """
        missing = [token for token in tokens if token not in self._cut]
        added = [Token(token, self.vocab_size + i, is_special=True) for i, token in enumerate(missing)]
        said = SpecialTokens(self._said.roles, self._said.others, (*self._said.added, *added), self._said.settings)
        return Tokenizer(self._backend, said, is_v1=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text without special tokens. Ids that stand for no text (the padding of a table) are skipped.

        The text of a growing list of ids grows, except that an incomplete UTF-8 sequence is decoded as U+FFFD.

        Args:
          ids: token ids.

        Returns:
          The text.
        """
        kept = [i for i in map(int, ids) if i not in self._special_ids]
        if self._is_whole:
            return self._backend.decode([i for i in kept if 0 <= i < self._backend.size])
        out, run = [], []
        for i in kept:
            if i in self._text_of:
                out += [self._backend.decode(run), self._text_of[i]]
                run = []
            elif 0 <= i < self._backend.size:
                run.append(i)
        return "".join(out) + self._backend.decode(run)

    def bytes_of(self, i: int) -> bytes:
        """Returns the bytes that a token adds to a text; empty for special tokens and for ids that stand for no text.

        The first token of a text also has the white space that `decode` strips from the beginning.
        """
        if i in self._special_ids or not 0 <= i < max(self._backend.size, self.vocab_size):
            return b""
        return self._text_of[i].encode() if i in self._text_of else self._backend.bytes_of(i)

    @classmethod
    def load(cls, path: str | Path, of_transformers: bool = False) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
          path: a directory with `tokenizer.model` or `tokenizer.json`, or one of these files.
          of_transformers: whether the checkpoint has transformers' own layout. Its processors prefer `tokenizer.json`
            and follow it; the originals' code reads `tokenizer.model`.

        Returns:
          The tokenizer.

        Raises:
          UserError: there is no tokenizer, or a file cannot be read.
        """
        paths.check("the tokenizer", path)
        path = Path(path)
        try:
            path.stat()
        except FileNotFoundError:
            raise UsageError(f"the tokenizer file {cut(str(path))} does not exist") from None
        except (OSError, ValueError) as error:  # an invalid name, or no permission
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"the tokenizer file {cut(str(path))!r} cannot be opened: {reason}") from None
        if not path.is_dir() and path.name not in TOKENIZERS:  # files beside one of another name may not belong to it
            if not path.is_file():
                raise UserError(f"the tokenizer file {path} does not exist")
            return cls._of_file(path, _NOTHING, of_transformers)
        directory = path if path.is_dir() else path.parent
        said = read_special_tokens({name: directory / name for name in FILES if (directory / name).is_file()})
        # Classes other than LLaMA's are fast classes, which read tokenizer.json.
        file = find_tokenizer(path, of_transformers or not said.is_llama) if path.is_dir() else path
        if file is None:
            raise UserError(f"{path} holds no tokenizer: tokenizer.model or tokenizer.json was expected")
        if not file.is_file():
            raise UserError(f"the tokenizer file {file} does not exist")
        tokenizer, other = cls._of_file(file, said, of_transformers), None
        beside = next(directory / name for name in TOKENIZERS if name != file.name)
        if path.is_dir() and beside.is_file():
            try:
                other = cls._of_file(beside, said, of_transformers)
            except UserError as error:
                other = error
        say_differences(directory, tokenizer, other)
        return tokenizer

    @classmethod
    def _of_file(cls, file: Path, said: SpecialTokens, of_transformers: bool) -> "Tokenizer":
        if file.suffix == ".json":
            return cls(Tokenizers(file, (*said.added, *said.roles.values(), *said.others)), said,
                       of_transformers=of_transformers)
        return cls(SentencePiece(file), said)


def find_tokenizer(directory: Path, of_transformers: bool = False) -> Path | None:
    """Returns the tokenizer's file in a directory; None if there is no such file.

    Args:
      directory: the checkpoint's directory.
      of_transformers: as in `Tokenizer.load`.

    Returns:
      The path of `tokenizer.model` or `tokenizer.json`.
    """
    names = reversed(TOKENIZERS) if of_transformers else TOKENIZERS
    return next((directory / name for name in names if (directory / name).is_file()), None)
