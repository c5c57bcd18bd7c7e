"""Text to ids and back, as the slow `LlamaTokenizer` of the original's transformers did it.

Ids come from SentencePiece itself wherever `tokenizer.model` exists: the tokenizers that transformers 5 builds from the
same file split differently around special tokens. What the slow class added to SentencePiece is little and stands here:
special tokens are cut out of the text first, and each piece of text in between gets its own dummy prefix `▁` (`legacy`,
the default) or, with `"legacy": false` in `tokenizer_config.json` (Vicuna 1.5), only the first one does. The class of
LLaVA-Med v1.0's days knew the first way only, and took away the white space beside added tokens (`Tokenizer.as_v1`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from llavamed_jax.checkpoints.files import read_json
from llavamed_jax.errors import UserError

# One character of its own outside every vocabulary piece: SentencePiece spells it as a byte and starts afresh after it.
_SEPARATOR = "\n"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # what `find_tokenizer` looks for, in this order


class Tokenizer:
    """Ids of text. Make one with `load`.

    Attributes:
      vocab_size: number of ids that stand for text, added tokens included; a model's table may be longer (padded).
      bos_id, eos_id, unk_id: special ids, None where there is none; bos_token, eos_token: their text, or "".
      pad_id: the id that the original pads with and compares against: `unk` (spec 3.7), or `eos` without one.
      is_legacy: whether text after a special token gets a dummy prefix.
      is_stripping: whether white space beside added tokens is dropped, but beside begin, end and unknown of a sequence kept.
    """

    def __init__(self, backend, added: dict[str, int], special: set[str], is_legacy: bool = True, *, bos: str | None = None,
                 is_stripping: bool = False):
        """`bos` is the text of the token to begin with, where it is not the SentencePiece model's own (quirk Q10)."""
        self._backend, self._given, self._bos = backend, (added, special), bos
        self.bos_id, self.eos_id, self.unk_id = backend.bos_id, backend.eos_id, backend.unk_id
        self.pad_id = self.unk_id if self.unk_id is not None else self.eos_id
        self.is_legacy, self.is_stripping = is_legacy, is_stripping
        core = {backend.piece(i): i for i in (self.bos_id, self.eos_id, self.unk_id) if i is not None}
        self._added, self._core = {**core, **added}, core
        self.bos_id = self._added.get(bos, self.bos_id)
        self._text_of = {i: text for text, i in self._added.items()}
        self.bos_token, self.eos_token = (self._text_of.get(i, "") for i in (self.bos_id, self.eos_id))
        self._special_ids = set(core.values()) | {i for text, i in added.items() if text in special}
        self.vocab_size = max([backend.size - 1, *self._added.values()]) + 1
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = "(" + "|".join(map(re.escape, longest_first)) + ")"

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`; special tokens written out in it (`</s>`) become their ids.

        Raises:
          UserError: half a surrogate pair, which no UTF-8 can say.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has half a surrogate pair at character {error.start}; whole characters were expected") from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        is_first = True
        for part in self._split(text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._backend.encode(part, has_prefix=self.is_legacy or is_first)
            if part:
                is_first = False
        return ids

    def _split(self, text: str) -> list[str]:
        """Text and added tokens in turn, text first and last."""
        parts = re.split(self._splitter, text)
        if self.is_stripping:
            for i, part in enumerate(parts):
                if i % 2 and part not in self._core:
                    parts[i - 1], parts[i + 1] = parts[i - 1].rstrip(), parts[i + 1].lstrip()
        return parts

    def id_of(self, token: str) -> int | None:
        """The id of a special or added token, None where there is no such token."""
        return self._added.get(token)

    def as_v1(self, tokens: Sequence[str]) -> "Tokenizer":
        """As the slow class of LLaVA-Med v1.0's transformers; those of `tokens` that are missing are added at the end."""
        added, special = self._given
        missing = [token for token in tokens if token not in self._added]
        added = {**added, **{token: self.vocab_size + i for i, token in enumerate(missing)}}
        return Tokenizer(self._backend, added, special | {*missing}, bos=self._bos, is_stripping=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens. Ids that stand for no text (the padding of a table) give none.

        Decoding a growing list gives growing text, except that an unfinished UTF-8 sequence shows as U+FFFD.
        """
        out, run = [], []
        for i in map(int, ids):
            if i in self._special_ids:
                continue
            if i in self._text_of:
                out += [self._backend.decode(run), self._text_of[i]]
                run = []
            elif 0 <= i < self._backend.size:
                run.append(i)
        return "".join(out) + self._backend.decode(run)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads `path`: a directory with `tokenizer.model` or `tokenizer.json`, or one of these files itself.

        Raises:
          UserError: no tokenizer there, or a file that cannot be read.
        """
        path = Path(path)
        file = find_tokenizer(path) if path.is_dir() else path
        if file is None:
            raise UserError(f"{path} holds no tokenizer: tokenizer.model or tokenizer.json was expected")
        if not file.is_file():
            raise UserError(f"the tokenizer file {file} does not exist")
        directory = file.parent if file.name in TOKENIZERS else None  # under another name, its neighbours are not its own
        settings = _settings(directory / "tokenizer_config.json") if directory else {}
        if file.suffix == ".json":
            backend = _HfBackend(file, settings)
            added, special = backend.added()
        else:
            backend = _SentencePieceBackend(file)
            added, special = _added_tokens(directory, settings) if directory else ({}, set())
        # transformers: a missing or null `legacy` means the old behaviour.
        return cls(backend, added, special, is_legacy=settings.get("legacy") is not False, bos=_bos(directory, settings))


def find_tokenizer(directory: Path) -> Path | None:
    """The file in `directory` that ids are read from: SentencePiece's own before transformers' conversion of it."""
    return next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)


class _SentencePieceBackend:
    def __init__(self, file: Path):
        import sentencepiece

        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file} is not a SentencePiece model") from error
        self.size = self._sp.vocab_size()
        self.bos_id, self.eos_id, self.unk_id = (
            i if i >= 0 else None for i in (self._sp.bos_id(), self._sp.eos_id(), self._sp.unk_id()))
        self._fresh = len(self._sp.encode(_SEPARATOR))

    def piece(self, i: int) -> str:
        return self._sp.id_to_piece(i)

    def encode(self, text: str, has_prefix: bool) -> list[int]:
        if has_prefix:
            return self._sp.encode(text)
        return self._sp.encode(_SEPARATOR + text)[self._fresh:]

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)


class _HfBackend:
    """`tokenizer.json` through the `tokenizers` library; it splits special tokens itself, so text reaches it in pieces."""

    def __init__(self, file: Path, settings: dict):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        names = [_content(settings.get(f"{kind}_token")) or default
                 for kind, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))]
        self.bos_id, self.eos_id, self.unk_id = map(self._tokenizer.token_to_id, names)
        self._fresh = len(self.encode(_SEPARATOR, True))

    def added(self) -> tuple[dict[str, int], set[str]]:
        tokens = self._tokenizer.get_added_tokens_decoder()
        return {t.content: i for i, t in tokens.items()}, {t.content for t in tokens.values() if t.special}

    def piece(self, i: int) -> str:
        return self._tokenizer.id_to_token(i)

    def encode(self, text: str, has_prefix: bool) -> list[int]:
        if has_prefix:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(_SEPARATOR + text, add_special_tokens=False).ids[self._fresh:]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _added_tokens(directory: Path, settings: dict) -> tuple[dict[str, int], set[str]]:
    """Tokens beyond the SentencePiece model and which of them are special, from transformers' three files."""
    special = set()
    try:
        added = {text: int(i) for text, i in _settings(directory / "added_tokens.json").items()}
        for i, entry in settings.get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(i)
            if entry.get("special"):
                special.add(entry["content"])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the added tokens of the tokenizer in {directory} cannot be read ({error}); a text and an id each were "
                        "expected") from None
    for value in _settings(directory / "special_tokens_map.json").values():
        special.update(filter(None, map(_content, value if isinstance(value, list) else [value])))
    return added, special


def _bos(directory: Path | None, settings: dict) -> str | None:
    """What the files say that a sequence begins with. v1.0's training could replace it, and saved that (quirk Q10)."""
    names = [settings] + ([_settings(directory / "special_tokens_map.json")] if directory else [])
    return next((text for text in (_content(each.get("bos_token")) for each in names) if text), None)


def _content(token) -> str | None:
    """The text of a token that transformers writes as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _settings(file: Path) -> dict:
    """The object in a file of transformers' that need not be there."""
    return read_json(file) if file.is_file() else {}
