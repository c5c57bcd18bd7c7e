"""Questions about images -> answers -> the lines of `predictions.jsonl`, whoever answers.

A prediction has the keys of the original's answer files: `question_id`, `prompt`, `text`, `answer_id`, `model_id`,
`metadata`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering import sharing
from llavamed_jax.evaluation.answering.answerer import Answer, Answerer, Generation
from llavamed_jax.evaluation.scoring.predictions import image_names
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils import signals
from llavamed_jax.utils.progress import progress

if TYPE_CHECKING:  # it imports this file
    from llavamed_jax.evaluation.answering.resume import Partial


_MOST_REASONS = 8  # for which answers end, each in a line: a server may name one for each answer


def ask(
    answerer: Answerer,
    questions: Sequence[tuple[str, str]],
    generation: Generation,
    title: str = "questions",
    partial: Partial | None = None,
) -> list[Answer]:
    """Asks about images: (question, image path) pairs -> answers in the same order.

    Pairs of one image are asked next to each other. Prompts that were cut and answers that are not finished
    are counted, and a warning says how many. Each answer goes into `partial` as it comes; what stands there
    is not asked again. Of several processes each asks its share, and the first gets all answers. What a question draws follows
    from itself, so an interrupted run gives the answers of an uninterrupted one.

    Raises:
      UserError: after all others were answered, questions that could not be: how many, and why the first.
    """
    answers: dict[int, Answer] = {} if partial is None else dict(partial.answers)
    image_order = {image: position for position, image in reversed(list(enumerate(image for _, image in questions)))}
    mine = sharing.share([image for _, image in questions])
    left = sorted((i for i in mine if i not in answers), key=lambda i: image_order[questions[i][1]])
    failed: dict[int, UserError] = {}
    advance, close = progress(len(mine), len(mine) - len(left), sharing.titled(title))
    with contextlib.closing(answerer.answers(questions, left, generation, failed)) as found:
        for i, answer in found:
            answers[i] = answer
            if partial is not None:
                partial.add(i, answer)
            advance(1)
            signals.check()
    close()
    answers, failed = sharing.collected(len(questions), mine, answers, failed)
    if failed:
        question, image = questions[min(failed)]
        raise UserError(f"{len(failed)} of {len(questions)} {title} could not be answered; the first, {question!r} about "
                        f"{Path(image).name}: {failed[min(failed)]}")
    _warn([answers[i] for i in range(len(questions))])
    return [answers[i] for i in range(len(questions))]


def _warn(answers: Sequence[Answer]) -> None:
    """Says how many prompts were cut and how many answers are not finished."""
    cut = [answer.tokens_cut for answer in answers if answer.tokens_cut]
    if cut:
        print(
            f"warning: {len(cut)} of {len(answers)} prompts were longer than the model takes"
            f" and lost their end ({sum(cut)} tokens in all), as in the original",
            file=sys.stderr,
        )
    unfinished = sum(answer.finish_reason == "length" for answer in answers)
    if unfinished:
        print(f"warning: {unfinished} of {len(answers)} answers reached max_new_tokens and are not finished", file=sys.stderr)
    others = Counter(answer.finish_reason for answer in answers if answer.finish_reason not in ("stop", "length"))
    for reason, count in others.most_common(_MOST_REASONS):
        print(f"warning: {count} of {len(answers)} answers ended for the reason {reason!r}", file=sys.stderr)
    if len(others) > _MOST_REASONS:
        rest = others.total() - sum(count for _, count in others.most_common(_MOST_REASONS))
        print(f"warning: {rest} of {len(answers)} answers ended for {len(others) - _MOST_REASONS} other reasons", file=sys.stderr)


def predict(
    answerer: Answerer,
    samples: Sequence[VqaSample],
    generation: Generation,
    shown: Sequence[str] | None = None,
    title: str = "questions",
    partial: Partial | None = None,
    control: str | None = None,
) -> list[dict]:
    """Predictions in the order of `samples`; `partial` as in `ask`.

    `metadata` says what was shown: `image`, the end of its path that no other image has, and `control`, null for the own image.

    Args:
      shown: the image that each question is asked about, where it is not the sample's own (control runs).
      control: the name of the control.
    """
    shown = shown or [str(sample.image) for sample in samples]
    prompts = [sample.question.replace(IMAGE_MARKER, "").strip() for sample in samples]
    names = image_names([*(str(sample.image) for sample in samples), *shown])
    answers = ask(answerer, list(zip(prompts, shown, strict=True)), generation, title, partial)
    return [
        {
            "question_id": sample.question_id,
            "prompt": prompt,
            "text": answer.text,
            "answer_id": answer_id(answerer.name, sample.question_id, prompt, names[image], answer.text),
            "model_id": answerer.name,
            "metadata": {"image": names[image], "control": control, "finish_reason": answer.finish_reason}
            | ({"prompt_tokens_cut": answer.tokens_cut} if answer.tokens_cut else {}),
        }
        for sample, prompt, image, answer in zip(samples, prompts, shown, answers, strict=True)
    ]


_SHORT_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def answer_id(*parts: object) -> str:
    """A 22-character id in shortuuid's form; of the content, where the original's is random, so that runs can be compared."""
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([str(part) for part in parts])).int
    digits = []
    for _ in range(22):
        number, digit = divmod(number, len(_SHORT_ALPHABET))
        digits.append(_SHORT_ALPHABET[digit])
    return "".join(reversed(digits))
