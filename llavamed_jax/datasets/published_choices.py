"""What the readers of published multiple-choice sets share: the prompt, the right option, and ids that repeat.

All of these sets are asked with the prompt of MedEvalKit, with which published tables were made. The images stand
before the text, as that toolkit shows them to LLaVA-Med. The files have rows that cannot be scored, because no option
is the stated answer; such rows are left out and counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llavamed_jax.datasets.rows import Row
from llavamed_jax.datasets.sample import CHOICE, LETTERS, VqaSample, all_images, check_images
from llavamed_jax.errors import cut, short
from llavamed_jax.text.conversation import IMAGE_MARKER

log = logging.getLogger(__name__)


def prompt(question: str, lines: Sequence[str]) -> str:
    """Returns the prompt: the question, the options as they are listed, and the instruction."""
    return "\n".join(["", f"Question: {question}", "Options: ", *lines,
                      "Answer with the option's letter from the given choices directly."])


def right_place(answer: str, options: Sequence[str], answer_is: str = "") -> int | None:
    """Returns the index of the right option: by its letter, or else by its text; None if the answer is neither.

    Args:
      answer: the stated answer.
      options: the texts of the options.
      answer_is: "letter" or "text" if the set states which one it is; "" looks for a letter first.
    """
    if not answer.strip():
        return None
    letter = LETTERS.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    if answer_is != "text" and 0 <= letter < len(options):
        return letter
    return options.index(answer) if answer_is != "letter" and answer in options else None


class Questions:
    """Collects the questions of a published set.

    Args:
      name: what warnings call the file or folder.
    """

    def __init__(self, name: str):
        self._name, self._samples, self._unusable = name, [], []

    def add(self, row: Row, identity: int | str, images: Sequence[Path], question: str, options: Sequence[str],
            lines: Sequence[str], place: int | None, text: str = "", **fields: str | bool | None) -> None:
        """Adds a multiple-choice question.

        Args:
          row: the row, for errors.
          identity: the id.
          images: the paths of the images.
          question: the question as published.
          options: the texts of the options.
          lines: the options as the prompt lists them.
          place: the index of the right option; None leaves the row out.
          text: the prompt; "" makes it of `question` and `lines`.
          **fields: `is_numbered` of `add_sample`, and further fields of the sample.

        Raises:
          UserError: the row has too few options or no image.
        """
        if not 2 <= len(options) <= len(LETTERS):
            raise row.error(f"has {len(options)} options; 2 to {len(LETTERS)} were expected")
        if place is None:
            self._unusable.append(row.name)
            return
        self.add_sample(row, identity, images, text or prompt(question, lines), options[place], CHOICE,
                        options=tuple(options), right=place, lines=tuple(lines), **fields)

    def add_sample(self, row: Row, identity: int | str, images: Sequence[Path], text: str, answer: str, kind: str,
                   is_numbered: bool = False, **fields) -> None:
        """Adds a question of any kind; `is_numbered` writes `<image_1>: ` and so on before the images.

        Raises:
          UserError: the row has no image.
        """
        if not images:
            raise row.error("has no image; at least one was expected")
        names = [f"<image_{number}>: " if is_numbered else "" for number in range(1, len(images) + 1)]
        text = "".join(f"{name}{IMAGE_MARKER}\n" for name in names) + text
        self._samples.append(VqaSample(identity, images[0], text, answer, kind, more_images=tuple(images[1:]),
                                       is_placed=True, **fields))

    def done(self) -> list[VqaSample]:
        """Returns the questions with an id of their own each, and warns of the rows that were left out.

        Raises:
          UserError: an image is missing.
        """
        if self._unusable:
            log.warning("%s: %d rows were left out, because their answer is none of their options; the first is %s",
                        self._name, len(self._unusable), cut(self._unusable[0]))
        check_images(all_images(self._samples))
        seen: Counter = Counter()
        found = []
        for sample in self._samples:
            seen[str(sample.question_id)] += 1
            nth = seen[str(sample.question_id)]
            found.append(sample if nth == 1 else replace(sample, question_id=f"{sample.question_id}#{nth}"))
        return found


def as_published(row: Row, key: str) -> str:
    """Returns a text with its surrounding blanks. Raises UserError if it is no text."""
    row.text(key)
    return str(row[key])


def texts(row: Row, key: str) -> list[str]:
    """Returns the texts of a list, which may be empty texts. Raises UserError for anything else."""
    value = row[key]
    if not isinstance(value, (list, tuple)):
        raise row.error(f"has the {key} {short(value)}; a list of texts was expected")
    return [Row({key: each}, row.name, "choices").text(key) for each in value]


def folders_of(root: Path, images: str | Path | None, *names: str) -> list[Path]:
    """Returns the folders of the images: `images`, or those of `names` in `root` that exist, or `root` itself."""
    return [Path(images)] if images else [root / name for name in names if (root / name).is_dir()] or [root]


def folder_of(root: Path, images: str | Path | None, *names: str) -> Path:
    """Returns the first of `folders_of`."""
    return folders_of(root, images, *names)[0]
