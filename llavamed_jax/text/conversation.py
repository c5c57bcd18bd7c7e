"""Prompts of conversations, and the label masks of training text.

Source: `llava/conversation.py` of LLaVA-Med v1.0 and v1.5 and of LLaVA, and `llava/train/train.py` of v1.0 and LLaVA.

A conversation is a list of turns, texts that alternate and begin with the user's; a last turn of None leaves the
assistant's place open. `<image>` in a text marks an image. The templates are in `llavamed_jax.text.templates`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from llavamed_jax.config import IGNORE, IMAGE_TOKEN
from llavamed_jax.errors import UserError, short
from llavamed_jax.text.styles import STYLES
from llavamed_jax.text.templates import Template

IMAGE_MARKER = "<image>"
# The reasons for which a template refuses messages, here and in the chat templates of exported models.
ONE_MESSAGE = "is for captions: it holds one message"
FIRST_MESSAGE = "needs a first message of the user that is not empty"


def render(template: Template, turns: Sequence[str | None], system: str | None = None) -> str:
    """Writes the prompt of a conversation.

    Args:
      template: the template.
      turns: the texts; None leaves the assistant's place open.
      system: replaces the template's own system text.

    Returns:
      The prompt.

    Raises:
      UserError: there are no turns, or the template cannot hold them.
    """
    if not turns:
        raise UserError("the conversation has no turns; at least one was expected")
    if system is not None:
        template = replace(template, system=system)
    return _write(template, [*template.examples, *turns])


def _write(template: Template, turns: Sequence[str | None]) -> str:
    text = "".join(_pieces(template, turns))
    return text.strip() if template.is_stripped else text


def _pieces(template: Template, turns: Sequence[str | None]) -> list[str]:
    """Returns the head of a prompt and the text of each turn."""
    style, words = template.form, template.words
    if style.is_single and any(turns[1:]):
        raise UserError(f"the template {template.name} {ONE_MESSAGE}, {len(turns)} were given")
    if style.needs_first and not turns[0]:
        raise UserError(f"the template {template.name} {FIRST_MESSAGE}")
    if style.is_trimmed:
        words["system"] = words["system"].strip()
    out = [style.begin + ("" if template.system is None else style.head.format(**words))]
    for i, turn in enumerate(turns):
        is_written = turn is not None if style.writes_empty else bool(turn)
        is_last = i == len(turns) - 1
        if i % 2:
            piece = style.answer_at(is_last) if is_written else style.empty_answer
        elif not is_written:
            piece = style.empty_question
        else:
            piece = style.question if i else style.first_question(bool(template.system))
        thought = ""
        if turn and i % 2 and style.thought_end is not None:
            thought, turn = _split_thought(turn, style.thought_end, is_last)
        is_trimmed = turn and (template.is_stripped or style.is_trimmed)
        out.append(piece.format(**words, thought=thought, text=turn.strip() if is_trimmed else turn))
    return out


def _split_thought(answer: str, end: str, is_last: bool) -> tuple[str, str]:
    """Returns the reasoning and the text of an answer, as Qwen3's template finds them."""
    if end not in answer:
        return "", answer.lstrip("\n") if is_last else answer
    thought = answer.split(end)[0].rstrip("\n").split(end.replace("/", ""))[-1]
    return thought.strip("\n"), answer.split(end)[-1].lstrip("\n")


# ---- training text -------------------------------------------------------------------------------------------------


def image_first(text: str, marker: str = IMAGE_MARKER) -> str:
    """Moves the image's marker before the text, as upstream's `preprocess_multimodal` does.

    Args:
      text: the text of a turn; without a marker it is returned unchanged.
      marker: the text of one image; if the model has start and end tokens, it includes them.

    Returns:
      The text with one marker in front.
    """
    if IMAGE_MARKER not in text:
        return text
    text = text.replace(IMAGE_MARKER, "").strip()
    return (IMAGE_MARKER + "\n" + text).strip().replace(IMAGE_MARKER, marker)


def training_turns(template: Template, conversation: Sequence[dict]) -> list[tuple[str, str]]:
    """Checks a LLaVA conversation and returns its turns; a leading answer is dropped, except with `plain`.

    Only the v0 procedure accepts any speakers in any order, as the original does.

    Args:
      template: the template to train with.
      conversation: objects with `from` (human or gpt) and `value`.

    Returns:
      (speaker, text) of each turn.

    Raises:
      UserError: the value is not a list of {from, value}, a speaker is unknown, speakers do not alternate, or no turn
        is left.
    """
    turns, labels, start = _read_turns(conversation), template.labels, 0
    if labels != "v0":
        unknown = sorted({speaker for speaker, _ in turns} - {"human", "gpt"})
        if unknown:
            raise UserError(f"the conversation has a turn from {short(unknown[0])}; human or gpt was expected")
        start = 1 if turns and turns[0][0] == "gpt" else 0
        turns = turns[start:]
        for i, (speaker, _) in enumerate(turns):
            if speaker != ("human", "gpt")[i % 2]:
                raise UserError(f"turn {start + i} of the conversation is from {speaker}; human and gpt were expected "
                                "to alternate")
    end = template.form.thought_end
    if end is not None and any(speaker == "gpt" and end in text for speaker, text in turns):
        raise UserError(f"an answer of the conversation has {end}, and the template {template.name} writes an empty "
                        "think block before an answer; answers without reasoning were expected")
    if not turns:
        raise UserError("the conversation is empty; at least one question and its answer were expected")
    if labels == "plain" and (start or len(turns) != 2 or IMAGE_MARKER not in turns[0][1]):
        raise UserError(f"the template {template.name} needs a conversation of two turns: <image>, then its caption")
    return turns


def _read_turns(conversation: Sequence[dict]) -> list[tuple[str, str]]:
    """Returns (speaker, text) of each turn; numbers, which the released files contain, become text."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise UserError(f"the conversation is {short(conversation)}; a list of {{from, value}} was expected")
    for i, turn in enumerate(conversation):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or not isinstance(value, (str, int, float)):
            raise UserError(f"turn {i} of the conversation is {short(turn)}; {{from: human or gpt, value: text}} was "
                            "expected")
    return [(turn["from"], str(turn["value"])) for turn in conversation]


def supervise(template: Template, turns: Sequence[tuple[str, str]], encode: Callable[[str], list[int]], *,
              pad_id: int | None, marker_length: int, is_legacy: bool = True, max_length: int | None = None,
              image_length: int = 1) -> tuple[list[int], list[int]]:
    """Computes ids and labels (not shifted) of a conversation.

    With a language model's own template (`exact`) the text of each answer and the token that ends the answer are
    supervised. A token that begins before an answer and ends in it is the answer's.

    Other templates follow the arithmetic of the originals' `train.py`. The originals find answers by encoding parts of
    the text separately and counting ids, so the labels are exactly those that the released models were trained with,
    including defects. If the counts of v1 or llama_2 do not add up, no token of the sample is supervised, and callers
    count such samples; if those of v0 do not add up, the spans are shifted (quirk Q11).

    Args:
      template: the template to train with.
      turns: (speaker, text).
      encode: text to ids, beginning-of-sequence first, an image as one IMAGE_TOKEN.
      pad_id: the id that the original pads with; it is unk, so an unk in the text makes the counts differ.
      marker_length: the number of ids of a text that is one image, which plain leaves out.
      is_legacy: whether the tokenizer splits text behind a special token as at a beginning; if not, v1 corrects its
        counts.
      max_length: samples of this length or longer are not checked for a mismatch.
      image_length: the number of ids of an image in the original's counts: P in v1.0, with P patch tokens an image,
        else 1.

    Returns:
      Ids and labels; labels are IGNORE where no loss is computed.

    Raises:
      UserError: the template has no text that ends an answer.
    """
    def measure(ids: Sequence[int]) -> int:
        return sum(image_length if i == IMAGE_TOKEN else 1 for i in ids)

    procedure = template.labels
    if procedure in ("v1", "llama_2") and not template.sep2:
        raise UserError(f"the template {template.name} has no end-of-answer text (sep2), which is needed to find the "
                        "supervised tokens")
    text = _training_text(template, procedure, turns)
    ids = np.asarray(encode(text))
    lengths = np.where(ids == IMAGE_TOKEN, image_length, 1)
    is_masked = np.zeros(lengths.sum(), bool)  # indexed by the original's positions
    if procedure == "exact":
        spans = _outside_of_answers(template, turns, encode, ids)
    elif procedure == "plain":
        spans = [slice(marker_length)]
    elif procedure == "v0":
        spans = _questions_of_v0(template, turns, lambda part: measure(encode(part)))
    else:
        # Not in llama_2: upstream's procedure for it has no correction for tokenizers that are not legacy.
        correction = 1 if procedure == "v1" and not is_legacy else 0
        *spans, tail = _questions_of_rounds(template, text, lambda part: measure(encode(part)), correction)
        is_mismatch = tail.start != lengths[ids != pad_id].sum()
        spans.append(slice(None) if is_mismatch and (max_length is None or tail.start < max_length) else tail)
    for span in spans:
        is_masked[span] = True
    labels = np.where(is_masked[np.cumsum(lengths) - lengths], IGNORE, ids)
    return ids.tolist(), labels.tolist()


def _training_text(template: Template, procedure: str, turns: Sequence[tuple[str, str]]) -> str:
    if procedure == "plain":
        return IMAGE_MARKER + turns[1][1] + template.sep
    if procedure == "v0":
        return "".join(_v0_pieces(template, turns)) + "### "
    return render(template, [text for _, text in turns])


def _outside_of_answers(template: Template, turns, encode: Callable[[str], list[int]],
                        ids: np.ndarray) -> Iterator[slice]:
    """Yields the spans between answers. An answer ends with a special token, at which every tokenizer cuts a text."""
    head, *pieces = _pieces(template, [text for _, text in turns])
    cursor, before = 0, head
    for i, piece in enumerate(pieces):
        if i % 2:
            form = template.form.answer_at(i == len(pieces) - 1)
            header, closing = (part.format(**template.words, thought="") for part in re.split("{text}{end}", form))
            opened, closed = encode(before + header), encode(before + piece.removesuffix(closing))
            if closed != ids[:len(closed)].tolist():
                yield slice(None)
                return
            yield slice(cursor, next((n for n, i in enumerate(opened) if i != ids[n]), len(opened)))
            cursor = len(closed)
        before += piece
    yield slice(cursor, None)


def _v0_pieces(template: Template, turns: Sequence[tuple[str, str]]) -> list[str]:
    """Returns the system text and each turn as v0 trains with them; the template's own form differs (quirk Q14)."""
    style, roles = STYLES["V0"], dict(zip(("human", "gpt"), template.roles, strict=True))
    said = [style.question.format(user=roles.get(speaker.lower(), "unknown"), text=text) for speaker, text in turns]
    return [style.head.format(system=template.system), *said]


def _questions_of_v0(template: Template, turns, measure: Callable[[str], int]) -> Iterator[slice]:
    """Yields the spans of the system text and the questions.

    The "###" before a question is supervised: it ends the answer.
    """
    header, *pieces = _v0_pieces(template, turns)
    cursor = measure(header)
    yield slice(cursor)
    for (speaker, _), piece in zip(turns, pieces, strict=True):
        length = measure(piece)
        if speaker == "human":
            yield slice(cursor + 2, cursor + length)
        cursor += length


def _questions_of_rounds(template: Template, text: str, measure: Callable[[str], int],
                         correction: int) -> Iterator[slice]:
    """Yields the spans of the beginning-of-sequence id, each round up to its answer, and the text after the rounds."""
    before_answer = template.form.before_answer.format(**template.words)
    cursor = 1
    yield slice(cursor)
    for i, round_text in enumerate(text.split(template.sep2)):
        parts = round_text.split(before_answer)
        if len(parts) != 2:
            break
        shift = correction if i else 0
        yield slice(cursor, cursor + measure(parts[0] + before_answer) - 2 - shift)
        cursor += measure(round_text) - shift
    yield slice(cursor, None)
