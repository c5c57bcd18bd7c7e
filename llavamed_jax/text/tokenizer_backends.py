"""The libraries that split text into pieces: SentencePiece for `tokenizer.model`, tokenizers for `tokenizer.json`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError, cut, short
from llavamed_jax.text.special_tokens import Token

# A character in no piece of any vocabulary: SentencePiece encodes it as a byte, and the next text begins a new piece.
_SEPARATOR = "\n"


class SentencePiece:
    """SentencePiece with a `tokenizer.model`.

    Special tokens that are written out in a text are ordinary text here: callers cut them out first.

    Args:
      file: the path of the model.

    Attributes:
      size: number of pieces.
      bos: the text of the beginning-of-sequence piece; None if the model has no such piece.
      eos: the text of the end-of-sequence piece; None if the model has no such piece.
      unk: the text of the unknown piece; None if the model has no such piece.
    """

    def __init__(self, file: Path):
        import sentencepiece

        self.file = file
        try:
            with _silent():
                self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
            self.size = self._model.vocab_size()
            self._ids = {self._model.id_to_piece(i): i for i in reversed(range(self.size))}
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is damaged: one of its pieces is not UTF-8 ({error.reason})") from None
        except Exception as error:  # RuntimeError or OSError on a file that cannot be read, others on a damaged one
            raise UserError(f"{file} is not a SentencePiece model") from error
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.unk_id())
        self.bos, self.eos, self.unk = (self._model.id_to_piece(i) if 0 <= i < self.size else None for i in ids)
        self._fresh = len(self._encode(_SEPARATOR))

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece; None if there is no such piece."""
        return self._ids.get(piece)

    def encode(self, text: str, has_prefix: bool) -> list[int]:
        """Encodes a text.

        Args:
          text: the text.
          has_prefix: whether the text stands at a beginning and gets the dummy prefix, and not behind another text.

        Returns:
          Token ids.
        """
        return self._encode(text) if has_prefix else self._encode(_SEPARATOR + text)[self._fresh:]

    def _encode(self, text: str) -> list[int]:
        with _naming(self.file):
            return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text."""
        with _naming(self.file):
            return self._model.decode(list(ids))

    def bytes_of(self, i: int) -> bytes:
        """Returns the bytes of a piece, with a space for `▁`."""
        if not 0 <= i < self.size or self._model.is_control(i) or self._model.is_unused(i):
            return b""
        return _bytes_of(self._model.id_to_piece(i), self._model.is_byte(i))


class Tokenizers:
    """The tokenizers library with a `tokenizer.json`.

    The library cuts special tokens out itself and adds begin and end of sequence as the file says.

    Args:
      file: the path of the file.
      more: tokens of other files, which are added if `tokenizer.json` lacks them.

    Attributes:
      size: number of ids.
      added: the tokens that the file, or another file of the checkpoint, adds to the vocabulary.
      bos: `<s>` if the vocabulary has it, else None.
      eos: `</s>` if the vocabulary has it, else None.
      unk: `<unk>` if the vocabulary has it, else None.
    """

    def __init__(self, file: Path, more: Sequence[Token] = ()):
        """Reads the file and adds the missing tokens.

        Raises:
          UserError: the file cannot be read, or a token would get another id than its file says.
        """
        import tokenizers

        self.file = file
        with _naming(file, "is not a tokenizer.json"), _silent():
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            for token in more:
                if self._tokenizer.token_to_id(token.text) is None:
                    self._add(token)
            self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            self.added = tuple(Token(token.content, i, token.special) for i, token in
                               self._tokenizer.get_added_tokens_decoder().items())
        self.bos, self.eos, self.unk = (text if self.id_of(text) is not None else None
                                        for text in ("<s>", "</s>", "<unk>"))
        with _silent():  # a damaged file fails here
            self.encode_whole("", True)
            self._fresh = len(self.encode(_SEPARATOR, True))

    def _add(self, token: Token) -> None:
        import tokenizers

        added = tokenizers.AddedToken(
            token.text, lstrip=token.strips_left, rstrip=token.strips_right, single_word=token.is_single_word,
            normalized=token.is_normalized, special=token.is_special)
        (self._tokenizer.add_special_tokens if token.is_special else self._tokenizer.add_tokens)([added])
        i = self._tokenizer.token_to_id(token.text)
        if token.id is not None and i != token.id:
            raise UserError(f"{self.file} lacks the token {short(token.text)}, whose id is {token.id}; the next free "
                            f"id is {i}")

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a token; None if there is no such token."""
        return self._tokenizer.token_to_id(piece)

    def encode_whole(self, text: str, is_sequence: bool) -> list[int]:
        """Encodes a whole text; `is_sequence` adds begin and end of sequence as the file says."""
        with _naming(self.file):
            return self._tokenizer.encode(text, add_special_tokens=is_sequence).ids

    def encode(self, text: str, has_prefix: bool) -> list[int]:
        """Encodes a text, at a beginning if `has_prefix`, else behind another text."""
        ids = self.encode_whole(text if has_prefix else _SEPARATOR + text, False)
        return ids if has_prefix else ids[self._fresh:]

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text, special tokens included."""
        with _naming(self.file):
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def bytes_of(self, i: int) -> bytes:
        """Returns the bytes of a token: of its characters in GPT-2's alphabet, or as SentencePiece writes pieces."""
        token = self._tokenizer.id_to_token(i)
        if token is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return _bytes_of(token, _BYTE_PIECE.fullmatch(token) is not None)

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's alphabet, in which each character stands for a byte."""
        return "ByteLevel" in str(json.loads(self._tokenizer.to_str()).get("decoder"))


def _bytes_of(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF, _BYTE_PIECE = _byte_alphabet(), re.compile(r"<0x[0-9A-Fa-f]{2}>")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides what C++ and Rust code writes to stderr: a backtrace on a damaged file, for which an exception follows."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _naming(file: Path, what: str = "cannot be used") -> Iterator[None]:
    """Converts the libraries' exceptions to UserError with one sentence.

    tokenizers raises bare Exception; a panic of its Rust code raises a class that is not an Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        words = cut(" ".join(str(error).split()), 200).rstrip(".")
        raise UserError(f"{file} {what}: {words or type(error).__name__}") from None
