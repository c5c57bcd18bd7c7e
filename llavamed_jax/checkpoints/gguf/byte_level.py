"""Writes `tokenizer.json` for byte-level BPE, by the rule that `tokenizer.ggml.pre` names.

The rule says how a text is split before pairs are merged. Each is that of the model's own `tokenizer.json`. For
`smollm` transformers 5.24 takes another rule when it reads GGUF: it does not split numbers into digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.vocabulary import CONTROL, PRE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from llavamed_jax.errors import UserError, cut, short

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Rule(NamedTuple):
    """How texts are split.

    Attributes:
      pattern: the expression of the pieces; None for single digits and then GPT-2's own expression.
      is_composed: whether texts are normalised to NFC first.
      ignores_merges: whether a piece that is a token is taken whole.
    """

    pattern: str | None
    is_composed: bool = False
    ignores_merges: bool = False


_RULES = {
    "smollm": _Rule(None),
    "llama-bpe": _Rule(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignores_merges=True),
    "qwen2": _Rule(rf"{_WORDS}|\p{{N}}|{_REST}", is_composed=True),
}


def write(file: GgufFile, vocabulary: Vocabulary, directory: Path) -> str:
    """Writes `tokenizer.json`.

    Args:
      file: the GGUF file.
      vocabulary: its vocabulary.
      directory: an existing directory.

    Returns:
      The class of transformers that follows the file.

    Raises:
      UserError: another rule than the known ones, or merges that are missing or do not fit the tokens.
    """
    name = file.get(PRE, str)
    if name not in _RULES:
        raise UserError(f"{file.path} has {PRE} {short(name)}; one of {', '.join(_RULES)} was expected")
    if file.get("tokenizer.ggml.add_space_prefix", bool, False):
        raise UserError(f"{file.path} has tokenizer.ggml.add_space_prefix true; false was expected of byte-level BPE")
    merges = [tuple(pair.split(" ")) for pair in file.strings("tokenizer.ggml.merges")]
    odd = next((pair for pair in merges if len(pair) != 2), None)
    if odd is not None:
        raise UserError(f"{file.path} has {short(' '.join(odd))} in tokenizer.ggml.merges; two tokens with a blank "
                        "between them were expected")
    try:
        tokenizer = _pipeline(_RULES[name], vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception for a merge of tokens that do not exist
        raise UserError(f"{file.path} has a tokenizer that cannot be built: "
                        f"{cut(' '.join(str(error).split()), 200).rstrip('.')}") from None
    tokenizer.save(str(directory / "tokenizer.json"))
    return "PreTrainedTokenizerFast"


def _pipeline(rule: _Rule, vocabulary: Vocabulary, merges: list[tuple[str, ...]]) -> Any:
    """Returns the `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {text: i for i, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds)) if kind != UNUSED}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=rule.ignores_merges))
    if rule.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    first = (pre_tokenizers.Digits(individual_digits=True) if rule.pattern is None
             else pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None)])
    tokenizer.decoder = decoders.ByteLevel()
    named = {name: (vocabulary.texts[i], i) for name, i in vocabulary.ids.items()}
    start, end = (["bos"] if vocabulary.has_bos else []), (["eos"] if vocabulary.has_eos else [])
    if start or end:
        pieces = [*(named[name][0] for name in start), "$A", *(named[name][0] for name in end)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=[named[name] for name in {*start, *end}])
    for kinds, is_special, add in (((CONTROL, UNKNOWN), True, tokenizer.add_special_tokens),
                                   ((USER_DEFINED,), False, tokenizer.add_tokens)):
        add([AddedToken(text, normalized=False, special=is_special)
             for text, kind in zip(vocabulary.texts, vocabulary.kinds) if kind in kinds])
    return tokenizer
