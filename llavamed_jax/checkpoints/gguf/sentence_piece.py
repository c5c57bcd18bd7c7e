"""Writes `tokenizer.model` for a tokenizer of SentencePiece: GGUF holds every piece of it, its score and its kind."""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.vocabulary import BYTE, PRE, UNKNOWN, USER_DEFINED, Vocabulary
from llavamed_jax.errors import UserError, cut, short

_SPACE = "\u2581"


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
      UserError: a rule for splitting, or a list of scores that does not fit the tokens.
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
    if vocabulary.kinds.count(UNKNOWN) != 1:
        raise UserError(f"{file.path} has {vocabulary.kinds.count(UNKNOWN)} tokens of kind {UNKNOWN} (unknown) in "
                        "tokenizer.ggml.token_type; one was expected of a tokenizer of SentencePiece")
    content = _model(vocabulary, scores, file.get("tokenizer.ggml.add_space_prefix", bool, True))
    try:
        import sentencepiece
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # RuntimeError, with the reason in the library's own words
        raise UserError(f"{file.path} has a tokenizer that cannot be built: "
                        f"{cut(' '.join(str(error).split()), 200).rstrip('.')}") from None
    (directory / "tokenizer.model").write_bytes(content)
    return "LlamaTokenizer"


def _model(vocabulary: Vocabulary, scores: list[float], has_prefix: bool) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for text, kind, score in zip(vocabulary.texts, vocabulary.kinds, scores):
        # llama.cpp's converter writes the blanks of such tokens as blanks.
        piece = text.replace(" ", _SPACE) if kind == USER_DEFINED else text
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = proto.TrainerSpec.BPE, len(vocabulary.texts)
    trainer.byte_fallback = BYTE in vocabulary.kinds
    trainer.unk_id = vocabulary.kinds.index(UNKNOWN)
    trainer.unk_piece = vocabulary.texts[trainer.unk_id]
    for name, role in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        i = vocabulary.ids.get(name, -1)
        setattr(trainer, f"{role}_id", i)
        if i >= 0:
            setattr(trainer, f"{role}_piece", vocabulary.texts[i])
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", has_prefix
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()
