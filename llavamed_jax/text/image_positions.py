"""Images in a text: markers become ids, and an id becomes the P positions that an image takes in the model.

P is the number of positions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.text.tokenizer import Tokenizer

# v1.0's image tokens. Its training (`llava/train/train.py`) with `--version v0` adds [PAD] before them to a tokenizer
# that has none.
PAD, PATCH, START, END = "[PAD]", "<im_patch>", "<im_start>", "<im_end>"


def encode(text: str, tokenizer: Tokenizer, image: str | None, bos: bool) -> list[int]:
    """Encodes a prompt; each `<image>` becomes one IMAGE_TOKEN.

    Args:
      text: a prompt with `<image>` markers.
      tokenizer: the model's tokenizer.
      image: the token of an image in transformers' texts, with which the text is encoded as a whole. None encodes each
        text between images on its own, as the originals do (`tokenizer_image_token`).
      bos: whether the beginning-of-sequence id comes first.

    Returns:
      Token ids.
    """
    if image is not None:
        ids, image_id = tokenizer.encode(text.replace(IMAGE_MARKER, image), bos=bos), tokenizer.id_of(image)
        return [IMAGE_TOKEN if i == image_id else i for i in ids]
    ids = []
    for i, part in enumerate(text.split(IMAGE_MARKER)):
        ids += [IMAGE_TOKEN] * (i > 0) + tokenizer.encode(part, bos=i == 0 and bos)
    return ids


def encode_v1(text: str, tokenizer: Tokenizer, has_start_end: bool) -> list[int]:
    """Encodes a prompt of v1.0's templates; each `<image>` and each `<im_patch>` becomes an IMAGE_TOKEN.

    Args:
      text: a prompt with `<image>` markers, which may already stand between `<im_start>` and `<im_end>`.
      tokenizer: the tokenizer of `v1_tokenizer`.
      has_start_end: whether the ids of `<im_start>` and `<im_end>` stand around an image.

    Returns:
      Token ids.
    """
    image = f"{START}{PATCH}{END}" if has_start_end else PATCH
    text = text.replace(f"{START}{IMAGE_MARKER}{END}", IMAGE_MARKER).replace(IMAGE_MARKER, image)
    patch = tokenizer.id_of(PATCH)
    return [IMAGE_TOKEN if i == patch else i for i in tokenizer.encode(text)]


def v1_tokenizer(tokenizer: Tokenizer, rows: int | None, is_v0: bool, has_start_end: bool) -> Tokenizer:
    """Adds v1.0's image tokens; missing ones get the ids that v1.0's training would have given them.

    Args:
      tokenizer: the checkpoint's tokenizer.
      rows: rows of the model's embedding table; None if there is no model.
      is_v0: whether the template is one of `--version v0`, whose training adds [PAD]; used if `rows` is None.
      has_start_end: whether the model has `<im_start>` and `<im_end>`.

    Returns:
      The tokenizer with the tokens.

    Raises:
      UserError: the embedding table has no rows for the start and end tokens.
    """
    has_pad = is_v0 if rows is None else rows - tokenizer.vocab_size > 3
    tokenizer = tokenizer.as_v1([PAD] * has_pad + [PATCH, *([START, END] if has_start_end else [])])
    if has_start_end and rows is not None and max(tokenizer.id_of(START), tokenizer.id_of(END)) >= rows:
        raise UserError(f"the tokenizer lacks {START} and {END}, and the embedding table of {rows} rows has no free "
                        "rows for them; `python -m convert build --add_image_tokens` adds tokens and rows")
    return tokenizer


def expand_images(ids: Sequence[int], patches: int, labels: Sequence[int] | None = None):
    """Expands each image to `patches` consecutive IMAGE_TOKENs with the label IGNORE.

    A run of IMAGE_TOKEN with a length that is a multiple of `patches` (> 1) is unchanged; a shorter run counts as that
    many images.

    Args:
      ids: token ids.
      patches: P, the number of positions of an image.
      labels: one label an id, or None.

    Returns:
      The ids, or (ids, labels) if labels were given.

    Raises:
      UserError: a run has another length (the error has its position), or ids and labels differ in length.
    """
    if labels is not None and len(labels) != len(ids):
        raise UserError(f"{len(labels)} labels were given for {len(ids)} ids")
    out, out_labels, start = [], [], 0
    while start < len(ids):
        end = start
        while end < len(ids) and ids[end] == IMAGE_TOKEN:
            end += 1
        run = end - start
        if run == 0:
            out.append(ids[start])
            out_labels.append(labels[start] if labels is not None else IGNORE)
            start += 1
            continue
        if run > patches and run % patches:
            raise UserError(f"position {start} begins a run of {run} image tokens; 1 or {patches} per image were "
                            "expected")
        length = run if run % patches == 0 else run * patches
        out += [IMAGE_TOKEN] * length
        out_labels += [IGNORE] * length
        start = end
    return out if labels is None else (out, out_labels)


def image_token(config: LlavaConfig | None, tokenizer: Tokenizer | None) -> str | None:
    """Returns the token of an image in transformers' texts; None for the originals', which have no such token."""
    if tokenizer is None or config is not None and config.source != "transformers":
        return None
    named = tokenizer.token_of(config.image_token_id) if config is not None else None
    if named is not None and named not in tokenizer.special_tokens.values():
        return named
    return IMAGE_MARKER if tokenizer.id_of(IMAGE_MARKER) is not None else None
