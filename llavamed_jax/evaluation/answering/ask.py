"""Asks questions about images and makes the lines of `predictions.jsonl` from the answers.

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

from llavamed_jax.datasets.sample import Shown, VqaSample, own_images
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering import sharing
from llavamed_jax.evaluation.answering.answerer import Answer, Answerer, Generation
from llavamed_jax.evaluation.scoring.predictions import image_names
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils import signals
from llavamed_jax.utils.progress import progress

if TYPE_CHECKING:  # for an annotation only
    from llavamed_jax.evaluation.answering.resume import Partial


_MOST_REASONS = 8  # finish reasons that are printed, one a line: a server may state another one for each answer


def ask(
    answerer: Answerer,
    questions: Sequence[tuple[str, Shown]],
    generation: Generation,
    title: str = "questions",
    partial: Partial | None = None,
) -> list[Answer]:
    """Asks questions about images, and returns the answers in the same order.

    Questions about one image are asked one after another. A warning says how many prompts were cut and how many answers
    are not finished. If there are several processes, each asks its share, and the first process gets all answers. The
    random numbers for a question depend on the question alone, so an interrupted and resumed run gives the same answers
    as an uninterrupted one.

    Args:
      answerer: answers the questions.
      questions: (question, paths of its images) pairs.
      generation: how answers are generated.
      title: a plural noun for the questions, for the progress bar and for errors.
      partial: keeps each answer as soon as it is there. Questions whose answers it already holds are not asked.

    Returns:
      One answer for each question.

    Raises:
      UserError: some questions could not be answered. It is raised after all others were answered; it says how many
        failed, and gives the first error.
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
        question, images = questions[min(failed)]
        raise UserError(f"{len(failed)} of {len(questions)} {title} could not be answered; the first, {question!r} "
                        f"about {' and '.join(Path(path).name for path in images)}: {failed[min(failed)]}")
    _warn([answers[i] for i in range(len(questions))])
    return [answers[i] for i in range(len(questions))]


def _warn(answers: Sequence[Answer]) -> None:
    """Prints how many prompts were cut, and how many answers ended otherwise than by `stop`."""
    cut = [answer.tokens_cut for answer in answers if answer.tokens_cut]
    if cut:
        print(
            f"warning: {len(cut)} of {len(answers)} prompts were longer than the model accepts"
            f" and were cut at the end, as in the original ({sum(cut)} tokens in all)",
            file=sys.stderr,
        )
    blind = sum(not answer.has_question for answer in answers)
    if blind:
        print(f"warning: the model saw no word of {blind} of {len(answers)} questions, because the prompt was too long",
              file=sys.stderr)
    unfinished = sum(answer.finish_reason == "length" for answer in answers)
    if unfinished:
        print(f"warning: {unfinished} of {len(answers)} answers reached max_new_tokens and are incomplete",
              file=sys.stderr)
    others = Counter(answer.finish_reason for answer in answers if answer.finish_reason not in ("stop", "length"))
    for reason, count in others.most_common(_MOST_REASONS):
        print(f"warning: {count} of {len(answers)} answers ended with finish_reason {reason!r}", file=sys.stderr)
    if len(others) > _MOST_REASONS:
        rest = others.total() - sum(count for _, count in others.most_common(_MOST_REASONS))
        print(f"warning: {rest} of {len(answers)} answers ended with {len(others) - _MOST_REASONS} other values of "
              "finish_reason",
              file=sys.stderr)


def predict(
    answerer: Answerer,
    samples: Sequence[VqaSample],
    generation: Generation,
    shown: Sequence[Shown] | None = None,
    title: str = "questions",
    partial: Partial | None = None,
    control: str | None = None,
) -> list[dict]:
    """Asks the questions of `samples`, and returns one prediction for each, in the same order.

    `metadata` states what was shown: `image`, the shortest end of its path that no other image has, `more_images` if
    there are several, and `control`, which is null if the question's own images were shown.

    Args:
      answerer: answers the questions.
      samples: the questions.
      generation: how answers are generated.
      shown: the images that each question is asked about, in a control; None shows the samples' own images.
      title: a plural noun for the questions, as in `ask`.
      partial: keeps the answers, as in `ask`.
      control: the name of the control; None for the own images.
    """
    own = own_images(samples)
    shown = shown or own
    prompts = [_prompt(sample) for sample in samples]
    names = image_names([path for paths in (*own, *shown) for path in paths])
    answers = ask(answerer, list(zip(prompts, shown, strict=True)), generation, title, partial)
    return [
        {
            "question_id": sample.question_id,
            "prompt": prompt,
            "text": answer.text,
            "answer_id": answer_id(answerer.name, sample.question_id, prompt, *map(names.get, paths), answer.text),
            "model_id": answerer.name,
            "metadata": {"image": names[paths[0]], "control": control, "finish_reason": answer.finish_reason}
            | ({"more_images": [names[path] for path in paths[1:]]} if len(paths) > 1 else {})
            | ({"prompt_tokens_cut": answer.tokens_cut} if answer.tokens_cut else {})
            | ({} if answer.has_question else {"has_question": False}),
        }
        for sample, prompt, paths, answer in zip(samples, prompts, shown, answers, strict=True)
    ]


def _prompt(sample: VqaSample) -> str:
    """Returns the text of a question; markers stay only if the set places the images."""
    return sample.question if sample.is_placed else sample.question.replace(IMAGE_MARKER, "").strip()


_SHORT_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def answer_id(*parts: object) -> str:
    """Returns a 22-character id in the form of shortuuid.

    The original's ids are random; this one is a hash of `parts`, so that equal answers of two runs have equal ids.
    """
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([str(part) for part in parts])).int
    digits = []
    for _ in range(22):
        number, digit = divmod(number, len(_SHORT_ALPHABET))
        digits.append(_SHORT_ALPHABET[digit])
    return "".join(reversed(digits))
