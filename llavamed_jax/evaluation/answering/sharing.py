"""Distributes questions over processes, and gathers the answers in the first process."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from llavamed_jax.datasets.sample import Shown
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.parallel import distributed

ELSEWHERE = Answer("", "stop")  # placeholder for an answer in all processes but the first


def share(images: Sequence[Shown], index: int | None = None, count: int | None = None) -> list[int]:
    """Returns the indices of the questions that a process asks, ascending.

    All questions about one image go to one process. Images are assigned in descending order of their number of
    questions, each to the process that has the fewest questions so far. The result depends on `images` alone, so all
    processes agree and a restarted process gets the same share.

    Args:
      images: the paths of each question's images.
      index: index of the process; None means this process.
      count: number of processes; None means all of this run.
    """
    index = distributed.process_index() if index is None else index
    count = distributed.process_count() if count is None else count
    load, owner = [0] * count, {}
    # `most_common` keeps images with equal counts in the order of their first question.
    for image, questions in Counter(images).most_common():
        owner[image] = load.index(min(load))
        load[owner[image]] += questions
    return [i for i, image in enumerate(images) if owner[image] == index]


def collected(total: int, mine: Sequence[int], answers: Mapping[int, Answer], failed: Mapping[int, UserError],
              ) -> tuple[dict[int, Answer], dict[int, UserError]]:
    """Gathers answers and errors of all processes in the first process.

    Args:
      total: number of questions.
      mine: indices of this process's questions.
      answers: this process's answers, by index of the question.
      failed: this process's errors, by index of the question.

    Returns:
      All answers and all errors, by index of the question; in the other processes, `ELSEWHERE` for every question.

    Raises:
      UserError: the shares do not add up to all questions, because the processes read different data or configs.
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
        raise UserError(f"the processes disagree about {len(wrong)} of {total} questions; the same config and data "
                        "were expected in all processes")
    return all_answers, all_failed


def titled(title: str) -> str:
    """Returns the title of a progress bar; it names the process if there are several."""
    count = distributed.process_count()
    return title if count == 1 else f"{title}, process {distributed.process_index()} of {count}"
