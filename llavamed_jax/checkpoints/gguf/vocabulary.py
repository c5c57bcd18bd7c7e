"""The vocabulary in the metadata of a GGUF file: texts, kinds, special ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.errors import UserError, short

# Kinds of tokens (`gguf.TokenType`), which are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TOKENS, KINDS, PRE = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.pre"
_BOS_BY_DEFAULT = ("llama-bpe",)  # the rules whose texts begin with BOS if the file does not say


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
      texts: the text of each token.
      kinds: the kind of each token, NORMAL to BYTE.
      ids: `bos`, `eos`, `unknown` and `padding` -> id, as far as the file names them.
      has_bos: whether a text begins with `bos`.
      has_eos: whether a text ends with `eos`.
    """

    texts: list[str]
    kinds: list[int]
    ids: Mapping[str, int]
    has_bos: bool
    has_eos: bool


def read_vocabulary(file: GgufFile, kind: str) -> Vocabulary:
    """Reads the vocabulary.

    Args:
      file: the GGUF file.
      kind: `tokenizer.ggml.model`, on which llama.cpp's default for BOS depends.

    Raises:
      UserError: lists of different lengths, an unknown kind of token, a token twice, an id without a token.
    """
    texts, kinds = file.strings(TOKENS), file.integers(KINDS)
    if len(kinds) != len(texts):
        raise UserError(f"{file.path} has {len(texts)} tokens and {len(kinds)} values in {KINDS}; "
                        "the same number was expected")
    if odd := set(kinds) - set(range(NORMAL, BYTE + 1)):
        raise UserError(f"{file.path} has {short(min(odd))} in {KINDS}; {NORMAL} to {BYTE} was "
                        "expected")
    if len(set(texts)) != len(texts):
        seen: set[str] = set()
        twice = next(text for text in texts if text in seen or seen.add(text))
        raise UserError(f"{file.path} has the token {short(twice)} twice in {TOKENS}; each once was "
                        "expected")
    ids = {}
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        i = file.get(key, int, None)
        if i is not None and not 0 <= i < len(texts):
            raise UserError(f"{file.path} has {key} {i}; an id below {len(texts)} was expected")
        if i is not None:
            ids[name] = i
    begins = kind == "llama" or file.get(PRE, str, "") in _BOS_BY_DEFAULT
    has = {}
    for name, otherwise in (("bos", begins and "bos" in ids), ("eos", False)):
        has[name] = file.get(f"tokenizer.ggml.add_{name}_token", bool, otherwise)
        if has[name] and name not in ids:
            raise UserError(f"{file.path} has tokenizer.ggml.add_{name}_token true and lacks "
                            f"tokenizer.ggml.{name}_token_id; an id was expected")
    return Vocabulary(texts, kinds, ids, has["bos"], has["eos"])
