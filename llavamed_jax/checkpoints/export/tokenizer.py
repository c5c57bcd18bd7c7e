"""Writes tokenizer files for exported models, with which transformers' tokenizers give the original's ids.

The converters of transformers do not: 5.x orders the merges by piece where SentencePiece orders them by score, so that
two spaces in a row split differently, and with either value of `legacy` text beside `<image>` has another prefix than
in the original, which encodes each chunk between images by itself (`tokenizer_image_token`). So this module writes
`tokenizer.json` from the SentencePiece model.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llavamed_jax.errors import UserError
from llavamed_jax.text.special_tokens import CORE, SpecialTokens, Token, read_special_tokens
from llavamed_jax.text.tokenizer_backends import Tokenizers
from llavamed_jax.utils.files import read_json, write_json

IMAGE, PAD = "<image>", "<pad>"


# How far the rows of a table may differ from the pieces: a table may be padded, for example to a multiple of 128 on
# each of 8 devices, and some published tokenizers have tokens without rows. Beyond that the tokenizer is another
# model's.
_SPARE, _LACKING = 1024, 16


class _Source(NamedTuple):
    json: dict  # content of tokenizer.json
    added: list[Token]
    names: dict[str, str]  # the texts of bos_token, eos_token and unk_token, if they exist

    @property
    def pieces(self) -> int:
        return 1 + max([*self.json["model"]["vocab"].values(), *(token.id for token in self.added)])

    @property
    def ids(self) -> tuple[int, int]:
        """The ids of `<image>` and `<pad>`: their own, or the next free ones, as `tokenizers` numbers new tokens."""
        own = {token.text: token.id for token in self.added}
        free = itertools.count(self.pieces)
        return tuple(own[text] if text in own else next(free) for text in (IMAGE, PAD))


def ids_in_transformers(rows: int, files: Mapping[str, Path]) -> tuple[int, int]:
    """Returns the ids of `<image>` and `<pad>` in transformers' layout.

    Args:
      rows: rows of the embedding table.
      files: tokenizer files by name; without a tokenizer the ids are the first two after the table.

    Raises:
      UserError: the tokenizer cannot be read, or belongs to another model than the table.
    """
    if not {"tokenizer.model", "tokenizer.json"} & files.keys():
        return rows, rows + 1
    source = _source(files)
    if not -_LACKING <= rows - source.pieces <= _SPARE:
        raise UserError(f"the tokenizer has {source.pieces} pieces, but the embedding table has {rows} rows; at most "
                        f"{_SPARE} fewer or {_LACKING} more pieces than rows were expected")
    return source.ids


def _source(files: Mapping[str, Path], follows_file: bool = False) -> _Source:
    file, said = files.get("tokenizer.model") or files["tokenizer.json"], read_special_tokens(files)
    try:
        source = (_from_json(file, said, follows_file) if file.suffix == ".json" else _from_sentencepiece(file, said))
        source.ids  # noqa: B018  raises for a damaged vocabulary
    except UserError:
        raise
    except Exception as error:  # SentencePiece raises RuntimeError; a damaged file may raise anything
        raise UserError(f"the tokenizer {file} cannot be read ({type(error).__name__})") from None
    return source


def write_tokenizer(files: Mapping[str, Path], out: Path, of_transformers: bool = False) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and, if it exists, `tokenizer.model`.

    A text begins with the beginning-of-sequence token exactly if it does so here. transformers 5, and its plain fast
    class in 4, follow `tokenizer.json`. `LlamaTokenizerFast` of transformers 4 follows `add_bos_token` instead, and
    puts its own `<s>` in place of a role that is not named; processors before 4.42 take it for any tokenizer. So
    `add_bos_token` says what `tokenizer.json` does, absent roles are null, and byte-level tokenizers, which are not
    LLaMA's, have the plain fast class.

    `<image>` and `<pad>` have the ids of `ids_in_transformers`. If a checkpoint has only `tokenizer.json`, that file is
    kept, and text after every special token gets the prefix of a beginning: the ids are the same except after `</s>` if
    the checkpoint has `"legacy": false`.

    Args:
      files: the checkpoint's tokenizer files by name.
      out: the directory of the export.
      of_transformers: whether the checkpoint has transformers' own layout; `tokenizer.json` is then followed as it is.

    Raises:
      UserError: the tokenizer cannot be read.
    """
    source, said = _source(files, of_transformers), read_special_tokens(files)
    is_normalized, ids = any(token.is_normalized for token in source.added), dict(
        zip((IMAGE, PAD), source.ids, strict=True))
    more = [Token(text, i, is_special=True, is_normalized=is_normalized)
            for text, i in ids.items() if i >= source.pieces]
    entries = {token.id: dict(content=token.text, special=token.is_special, normalized=token.is_normalized,
                              lstrip=token.strips_left,
                              rstrip=token.strips_right, single_word=token.is_single_word)
               for token in (*source.added, *more)}
    tokenizer = {**source.json, "added_tokens": [{"id": i, **entry} for i, entry in entries.items()]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    # LLaMA's classes put a blank before a text, whatever the file says; the plain fast class follows the file.
    is_llamas = not _is_byte_level(tokenizer) and _puts_a_blank_first(tokenizer)
    write_json(out / "tokenizer_config.json", dict(
        # `legacy` makes slow classes, too, give text after <image> the original's prefix.
        **{role: source.names.get(role) for role in CORE},
        tokenizer_class="LlamaTokenizer" if is_llamas else "PreTrainedTokenizerFast", legacy=True,
        add_bos_token=_puts_bos_first(out / "tokenizer.json", source.names.get("bos_token")), add_eos_token=False,
        pad_token=PAD,
        clean_up_tokenization_spaces=False, padding_side="left",
        model_max_length=said.settings.get("model_max_length", 2048),
        processor_class="LlavaProcessor", added_tokens_decoder={str(i): entry for i, entry in entries.items()}))
    if "tokenizer.model" in files:  # llama.cpp and slow tokenizers read it
        shutil.copyfile(files["tokenizer.model"], out / "tokenizer.model")


def _from_sentencepiece(file: Path, said: SpecialTokens) -> _Source:
    """Returns a `tokenizer.json` that splits as the SentencePiece model does."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)} | {token.text: token.id for token in said.added}
    own = zip(CORE, (model.bos_id(), model.eos_id(), model.unk_id()), strict=True)
    roles = {role: Token(pieces[i]) for role, i in own if i >= 0} | {
        role: token for role, token in said.roles.items() if token.text in ids}
    in_use = {token.text: token for token in (*roles.values(), *said.others) if token.text in ids}
    named = {text: token._replace(id=ids[text], is_special=True) for text, token in in_use.items()} | {
        t.text: t for t in said.added}
    added = sorted((token._replace(is_normalized=False) for token in named.values()), key=lambda token: token.id)
    has_prefix = _has_dummy_prefix(model)
    prefix = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if not has_prefix and said.is_legacy:  # without `legacy` the original writes the prefix itself
        del prefix[0]
    if not said.is_legacy:
        prefix += _only_where_the_original_begins(list(in_use), [text for text in named if text not in in_use])
        added = [token._replace(is_normalized=True) for token in added]
    names = {role: roles[role].text for role in CORE if role in roles}
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)
              if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    return _Source({
        "version": "1.0", "truncation": None, "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": prefix}, "pre_tokenizer": None,
        "post_processor": (_begins_with(names["bos_token"], ids[names["bos_token"]])
                           if said.has_bos and "bos_token" in names else None),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else [])]},
        "model": {"type": "BPE", "dropout": None, "unk_token": names.get("unk_token"),
                  "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(scores)},
    }, added, names)


def _has_dummy_prefix(model: Any) -> bool:
    """Returns whether a SentencePiece model puts a blank before a text, which its decoder then drops."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    return proto.ModelProto.FromString(model.serialized_model_proto()).normalizer_spec.add_dummy_prefix


def _puts_a_blank_first(tokenizer: Mapping) -> bool:
    """Returns whether the normalizer or the pre-tokenizer of a `tokenizer.json` puts a blank before a text."""
    first = tokenizer.get("pre_tokenizer") or {}
    scheme = first.get("prepend_scheme", "always" if first.get("add_prefix_space", True) else "never")
    return "'Prepend'" in str(tokenizer.get("normalizer")) or first.get("type") == "Metaspace" and scheme != "never"


def _is_byte_level(tokenizer: Mapping) -> bool:
    """Returns whether tokens are written in GPT-2's alphabet."""
    return "ByteLevel" in str(tokenizer.get("decoder"))


def _puts_bos_first(file: Path, bos: str | None) -> bool:
    """Returns whether a `tokenizer.json` puts the beginning-of-sequence token before a text."""
    if bos is None:
        return False
    backend = Tokenizers(file)
    return backend.encode_whole("", True)[:1] == [backend.id_of(bos)]


def _begins_with(bos: str, bos_id: int) -> dict:
    """Returns the post-processor that puts the beginning-of-sequence token before a text."""
    first, second = ([{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": letter, "type_id": n}}]
                     for n, letter in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def _merges(scores: Mapping[str, float]) -> list[str]:
    """Returns all ways to join two pieces into a third, in SentencePiece's order: best score of the result first."""
    rank = {piece: i for i, piece in enumerate(scores)}
    pairs = [(-score, rank[piece], rank[piece[:cut]], f"{piece[:cut]} {piece[cut:]}") for piece, score in scores.items()
             for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
    return [pair for *_, pair in sorted(pairs)]


def _only_where_the_original_begins(roles: list[str], others: list[str]) -> list[dict]:
    """Returns normalizers for `"legacy": false`, which put the prefix only where the original does.

    The prefix comes at the beginning and after `<image>`, but not after other special tokens, and not before tokens
    with a role; before `others` it stands alone. The normalizers see the whole text with special tokens, since those
    are searched after normalization; they also see each token by itself, since the search is for the normalized token.
    """
    before = "|".join(map(re.escape, [IMAGE, PAD, *roles]))
    alone = "".join(rf"|{re.escape(text)}\z" for text in others)
    return [{"type": "Replace", "pattern": {"Regex": rf"\A▁(?={before}{alone})"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": rf"{IMAGE}(?!{before}|\z)"}, "content": f"{IMAGE}▁"}]


def _from_json(file: Path, said: SpecialTokens, follows_file: bool = False) -> _Source:
    """Returns the checkpoint's own `tokenizer.json`, with the prefix of a beginning after every special token.

    It begins a text as `text.tokenizer.Tokenizer` does with the same files: as the file says, or of LLaMA's classes as
    `add_bos_token` says unless `follows_file`.
    """
    tokenizer = read_json(file)
    added = [Token(t["content"], t["id"], t["special"], t["lstrip"], t["rstrip"], t["single_word"], t["normalized"])
             for t in tokenizer["added_tokens"]]
    ids = {**tokenizer["model"]["vocab"], **{token.text: token.id for token in added}}
    names = {role: said.roles[role].text if role in said.roles else default
             for role, default in zip(CORE, ("<s>", "</s>", "<unk>"), strict=True)}
    names = {role: text for role, text in names.items() if text in ids}
    if "bos_token" in names and said.is_llama and not follows_file:
        tokenizer["post_processor"] = (_begins_with(names["bos_token"], ids[names["bos_token"]])
                                       if said.has_bos else None)
    merges = tokenizer["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        # As tokenizers before 0.20 wrote them, which read no pairs.
        tokenizer["model"] = {**tokenizer["model"], "merges": [" ".join(pair) for pair in merges]}
    first = tokenizer.get("pre_tokenizer") or {}
    if first.get("type") == "Metaspace" and _puts_a_blank_first(tokenizer):
        first["prepend_scheme"] = "always"
    return _Source(tokenizer, added, names)
