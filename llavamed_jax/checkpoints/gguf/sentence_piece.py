"""Writes `tokenizer.model` for a tokenizer of SentencePiece: GGUF holds every piece of it, its score and its kind."""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.vocabulary import BYTE, CONTROL, NORMAL, PRE, UNKNOWN, USER_DEFINED, Vocabulary
from llavamed_jax.errors import UserError, cut, short

CLASS = "LlamaTokenizer"  # the class of transformers that follows the file
_SPACE = "\u2581"
_ADDED = -1000.0  # the score that llama.cpp's converters write for a token whose score they do not know
_UNKNOWN_KEY = "tokenizer.ggml.unknown_token_id"


def write(file: GgufFile, vocabulary: Vocabulary, directory: Path) -> str:
    """Writes `tokenizer.model`.

    The normaliser is that of LLaMA and Mistral: texts stay as they are, blanks become `▁`, and one is put before a text
    unless the file says otherwise.

    Args:
      file: the GGUF file.
      vocabulary: its vocabulary.
      directory: an existing directory.

    Returns:
      The class of transformers that follows the file.

    Raises:
      UserError: a rule for splitting, a list of scores that does not fit the tokens or has none of a
        `tokenizer.model`, or no unknown token.
    """
    if (rule := file.get(PRE, str, "default")) != "default":
        raise UserError(f"{file.path} has {PRE} {short(rule)} for a tokenizer of SentencePiece; default was expected")
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if key in file.keys and (key.endswith("charsmap") or file.get(key, bool)):
            raise UserError(f"{file.path} has {key}, which LLaMA's tokenizer does not have; it was expected to be "
                            "missing")
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.texts):
        raise UserError(f"{file.path} has {len(vocabulary.texts)} tokens and {len(scores)} values in "
                        "tokenizer.ggml.scores; the same number was expected")
    normal = [score for score, kind in zip(scores, vocabulary.kinds) if kind == NORMAL]
    if normal and set(normal) == {_ADDED}:  # `LlamaHfVocab` of the converters, which read a tokenizer.json
        raise UserError(f"{file.path} has the score {_ADDED:g} for all tokens in tokenizer.ggml.scores, so nothing "
                        "says how a text is split; the scores of a tokenizer.model were expected")
    content = _model(vocabulary, scores, _unknown(file, vocabulary), has_prefix(file))
    try:
        import sentencepiece
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # RuntimeError, with the reason in the library's own words
        raise UserError(f"{file.path} has a tokenizer that cannot be built: "
                        f"{cut(' '.join(str(error).split()), 200).rstrip('.')}") from None
    (directory / "tokenizer.model").write_bytes(content)
    return CLASS


def has_prefix(file: GgufFile) -> bool:
    """Returns whether a blank is put before a text, as the file says or as llama.cpp does by default."""
    return file.get("tokenizer.ggml.add_space_prefix", bool, True)


def _unknown(file: GgufFile, vocabulary: Vocabulary) -> int:
    """Returns the id of the unknown token, of which SentencePiece needs exactly one.

    The converters since July 2024 write every special token of `added_tokens_decoder` as a control token, the unknown
    one included. llama.cpp then takes `unknown_token_id`, and 0 if the file does not name it.

    Raises:
      UserError: several tokens are unknown ones, or a piece of text is.
    """
    found = [i for i, kind in enumerate(vocabulary.kinds) if kind == UNKNOWN]
    if len(found) > 1:
        raise UserError(f"{file.path} has {len(found)} tokens of kind {UNKNOWN} (unknown) in "
                        "tokenizer.ggml.token_type; one was expected of a tokenizer of SentencePiece")
    i = found[0] if found else vocabulary.ids.get("unknown", 0)
    if vocabulary.kinds[i] not in (UNKNOWN, CONTROL, USER_DEFINED):
        raise UserError(f"{file.path} has no token of kind {UNKNOWN} (unknown) in tokenizer.ggml.token_type, and "
                        f"{short(vocabulary.texts[i])} with the id {i} ({_UNKNOWN_KEY}, or 0 without it) is of kind "
                        f"{vocabulary.kinds[i]}; kind {UNKNOWN}, {CONTROL} or {USER_DEFINED} was expected")
    return i


def _model(vocabulary: Vocabulary, scores: list[float], unknown: int, has_prefix: bool) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for i, (text, kind, score) in enumerate(zip(vocabulary.texts, vocabulary.kinds, scores)):
        # llama.cpp's converter writes the blanks of such tokens as blanks.
        piece = text.replace(" ", _SPACE) if kind == USER_DEFINED else text
        model.pieces.add(piece=piece, score=score, type=UNKNOWN if i == unknown else kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = proto.TrainerSpec.BPE, len(vocabulary.texts)
    trainer.byte_fallback = BYTE in vocabulary.kinds
    trainer.unk_id, trainer.unk_piece = unknown, vocabulary.texts[unknown]
    for name, role in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        i = vocabulary.ids.get(name, -1)
        setattr(trainer, f"{role}_id", i)
        if i >= 0:
            setattr(trainer, f"{role}_piece", vocabulary.texts[i])
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", has_prefix
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()
