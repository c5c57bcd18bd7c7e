"""Questions shared out among several processes, and their answers brought together in the first."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.parallel import distributed

ELSEWHERE = Answer("", "stop")  # what a process that is not the first has in place of an answer


def share(images: Sequence[str], index: int | None = None, count: int | None = None) -> list[int]:
    """The places of the questions that a process asks, ascending; those about one image are asked by one process.

    Images with many questions are given out first, each to whom has the fewest questions so far: a function of `images` alone,
    so that all processes agree, and one that is started again has the same share.

    Args:
      images: of each question.
      index, count: default: this process, of all.
    """
    index = distributed.process_index() if index is None else index
    count = distributed.process_count() if count is None else count
    load, owner = [0] * count, {}
    for image, questions in Counter(images).most_common():  # equal ones in the order of their first question
        owner[image] = load.index(min(load))
        load[owner[image]] += questions
    return [i for i, image in enumerate(images) if owner[image] == index]


def collected(total: int, mine: Sequence[int], answers: Mapping[int, Answer], failed: Mapping[int, UserError],
              ) -> tuple[dict[int, Answer], dict[int, UserError]]:
    """Answers and failures of all processes, by the question's place; in others than the first `ELSEWHERE` throughout.

    Args:
      total: number of questions; mine: the places of this process's.
    Raises:
      UserError: questions that no process was asked, for each has shared out others.
    """
    if distributed.process_count() == 1:
        return dict(answers), dict(failed)
    found = {i: dataclasses.asdict(answers[i]) for i in mine if i in answers}
    everyone = distributed.gather(json.dumps([found, {i: str(error) for i, error in failed.items()}]).encode())
    if not everyone:
        return dict.fromkeys(range(total), ELSEWHERE), {}
    parts = [json.loads(part) for part in everyone]
    all_answers = {int(i): Answer(**answer) for part, _ in parts for i, answer in part.items()}
    all_failed = {int(i): UserError(sentence) for _, part in parts for i, sentence in part.items()}
    if wrong := set(range(total)) ^ (all_answers.keys() | all_failed.keys()):
        raise UserError(f"{len(wrong)} of {total} questions were asked by no process, or are no questions here: the same config and "
                        "data were expected in all processes")
    return all_answers, all_failed


def titled(title: str) -> str:
    """What progress says of a share."""
    count = distributed.process_count()
    return title if count == 1 else f"{title}, process {distributed.process_index()} of {count}"
