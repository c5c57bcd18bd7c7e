"""Tokenizer files for exported models, with which transformers' tokenizers give the original's ids.

The converters of transformers do not: 5.x orders the merges by piece where SentencePiece goes by score, so that two blanks
in a row split differently, and with either `legacy` text beside `<image>` has another prefix than the original, which
encodes each chunk between images on its own (spec 3.6). So `tokenizer.json` is written here, from the SentencePiece model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llavamed_jax.checkpoints.files import read_json, write_json
from llavamed_jax.errors import UserError

IMAGE, PAD = "<image>", "<pad>"
_PLACEMENT = dict(single_word=False, lstrip=False, rstrip=False)


class _Added(NamedTuple):
    """A token that is cut out of the text before the rest is split into pieces."""

    id: int
    text: str
    is_special: bool
    is_normalized: bool = False  # looked for after normalization


class _Source(NamedTuple):
    json: dict  # as tokenizer.json
    added: list[_Added]
    names: dict[str, str]  # of bos_token, eos_token and unk_token


def write_tokenizer(rows: int, files: Mapping[str, Path], out: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and, where it exists, `tokenizer.model`; `<image>` and `<pad>` are `rows`
    and `rows` + 1.

    Of a checkpoint that has `tokenizer.json` alone, that file is kept, and text after every special token gets the prefix
    of a beginning: the same ids but after `</s>` where the checkpoint says `"legacy": false`.
    Raises:
      UserError: the tokenizer cannot be read, or has not one piece a row.
    """
    file = files.get("tokenizer.model") or files["tokenizer.json"]
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    try:
        source = _from_json(file, settings) if file.suffix == ".json" else _from_sentencepiece(file, files, settings)
        pieces = max([*source.json["model"]["vocab"].values(), *(token.id for token in source.added)]) + 1
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # RuntimeError: SentencePiece
        raise UserError(f"the tokenizer {file} cannot be read ({type(error).__name__})") from None
    if pieces != rows:  # <image> would not be the row that the config says it is
        raise UserError(f"the tokenizer has {pieces} pieces; {rows} were expected, one a row of the embedding table")

    is_normalized = any(token.is_normalized for token in source.added)
    added = [*source.added, _Added(rows, IMAGE, True, is_normalized), _Added(rows + 1, PAD, True, is_normalized)]
    entries = {t.id: dict(content=t.text, special=t.is_special, normalized=t.is_normalized, **_PLACEMENT) for t in added}
    tokenizer = {**source.json, "added_tokens": [{"id": i, **entry} for i, entry in entries.items()]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write_json(out / "tokenizer_config.json", dict(
        # `legacy`, so that slow classes, too, give text after <image> the prefix that the original gives it.
        **source.names, tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True, add_eos_token=False, pad_token=PAD,
        clean_up_tokenization_spaces=False, padding_side="left", model_max_length=settings.get("model_max_length", 2048),
        processor_class="LlavaProcessor", added_tokens_decoder={str(i): entry for i, entry in entries.items()}))
    if "tokenizer.model" in files:  # what llama.cpp and slow tokenizers read
        shutil.copyfile(files["tokenizer.model"], out / "tokenizer.model")


def _from_sentencepiece(file: Path, files: Mapping[str, Path], settings: dict) -> _Source:
    """A `tokenizer.json` that splits as the SentencePiece model does."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    core = dict(bos_token=model.bos_id(), eos_token=model.eos_id(), unk_token=model.unk_id())
    names = {kind: pieces[i] for kind, i in core.items()}
    added = {i: _Added(i, pieces[i], True) for i in sorted(core.values())}
    added = [*added.values(), *(token for token in _added_tokens(files, settings) if token.id not in added)]
    prefix = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if settings.get("legacy") is False:
        prefix += _only_where_the_original_begins([token.text for token in added])
        added = [token._replace(is_normalized=True) for token in added]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)
              if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    return _Source({
        "version": "1.0", "truncation": None, "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": prefix}, "pre_tokenizer": None,
        "post_processor": _begins_with(names["bos_token"], core["bos_token"]),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": names["unk_token"], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(scores)},
    }, added, names)


def _begins_with(bos: str, bos_id: int) -> dict:
    """The post-processor that puts the beginning-of-sequence token before a text."""
    first, second = ([{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": letter, "type_id": n}}]
                     for n, letter in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def _merges(scores: Mapping[str, float]) -> list[str]:
    """All ways to join two pieces into a third, in the order in which SentencePiece joins: best score of the result first."""
    rank = {piece: i for i, piece in enumerate(scores)}
    pairs = [(-score, rank[piece], rank[piece[:cut]], f"{piece[:cut]} {piece[cut:]}") for piece, score in scores.items()
             for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
    return [pair for *_, pair in sorted(pairs)]


def _only_where_the_original_begins(specials: list[str]) -> list[dict]:
    """Normalizers for `"legacy": false`: the prefix at the beginning and after `<image>`, but not after other special tokens.

    They see the whole text, special tokens included, because those are looked for after normalization.
    """
    special = "|".join(map(re.escape, [IMAGE, PAD, *specials]))
    return [{"type": "Replace", "pattern": {"Regex": rf"\A▁(?={special})"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": rf"{IMAGE}(?!{special}|\z)"}, "content": f"{IMAGE}▁"}]


def _from_json(file: Path, settings: dict) -> _Source:
    """The checkpoint's own `tokenizer.json`, each text between special tokens prefixed as a beginning."""
    tokenizer = read_json(file)
    names = {f"{kind}_token": _content(settings.get(f"{kind}_token")) or default
             for kind, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    added = [_Added(t["id"], t["content"], t["special"]) for t in tokenizer["added_tokens"]]
    ids = {**tokenizer["model"]["vocab"], **{token.text: token.id for token in added}}
    tokenizer["post_processor"] = _begins_with(names["bos_token"], ids[names["bos_token"]])
    if (tokenizer.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        tokenizer["pre_tokenizer"] |= {"prepend_scheme": "always"}
    return _Source(tokenizer, added, names)


def _added_tokens(files: Mapping[str, Path], settings: dict) -> list[_Added]:
    """Tokens beyond the SentencePiece model, from either of the files that transformers keeps them in."""
    added = {text: _Added(i, text, False) for text, i in
             (read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}).items()}
    for i, entry in settings.get("added_tokens_decoder", {}).items():
        added[entry["content"]] = _Added(int(i), entry["content"], bool(entry.get("special")))
    return sorted(added.values())


def _content(token) -> str | None:
    """The text of a token that transformers writes as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token
