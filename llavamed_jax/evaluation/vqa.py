"""Questions of a medical VQA set x a model -> `predictions.jsonl`.

One line a question with the keys of the original's answer files: `question_id`, `prompt`, `text`, `answer_id`,
`model_id`, `metadata`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from llavamed_jax.checkpoints.files import read_json
from llavamed_jax.data import datasets
from llavamed_jax.data.datasets import VqaSample
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation import sharing
from llavamed_jax.evaluation.asking import Answer, Asking, Generation

if TYPE_CHECKING:  # scoring predictions that exist must not import jax
    from llavamed_jax.assistant import LlavaMed
    from llavamed_jax.evaluation.partial import Partial


def load_samples(
    name: str, root: str, split: str, protocol: str, held_out: str = ""
) -> tuple[list[VqaSample], list[VqaSample]]:
    """The questions to ask, and the training rows that candidates, majority answer and leakage counts come from.

    Args:
      name: `vqa_rad` or `slake`; `root` holds its official layout.
      split: `train`, `validation` or `test`.
      protocol: `clean` or `paper`, VQA-RAD's training rows.
      held_out: a JSON file `{"images": [names]}`. Then the rows of exactly these images are asked, whatever their
        split, and all rows of the other images count as training rows.
    Raises:
      UsageError: a data set that is not known, or an empty root. UserError: what the readers find wrong.
    """
    readers = {"vqa_rad": _read_vqa_rad, "slake": _read_slake}
    if name not in readers:
        raise UsageError(f"the data set {name!r} is not known; data.name may be {' or '.join(readers)}")
    if not root:
        raise UsageError(f"data.root is empty; the folder with {name} was expected: --config.data.root=DIR")
    read = readers[name]
    if not held_out:
        return read(root, split, protocol), read(root, "train", protocol)
    if split != "test":
        raise UsageError(f"data.split is {split!r}; beside data.held_out, which asks rows of both splits, it may be test only")
    if name != "vqa_rad":
        raise UsageError(f"data.held_out holds out images of VQA-RAD; {name} has splits without common images: data.split")
    names = _held_out_images(held_out)
    rows = datasets.read_vqa_rad(root, "all", "clean")  # each row once, without the rephrasings of the paper's protocol
    asked = [sample for sample in rows if Path(sample.image).name in names]
    unknown = names - {Path(sample.image).name for sample in asked}
    if unknown:
        raise UserError(f"{held_out} holds out images of which {root} has no row: {', '.join(sorted(unknown))}")
    return asked, [sample for sample in rows if Path(sample.image).name not in names]


def _read_vqa_rad(root: str, split: str, protocol: str) -> list[VqaSample]:
    if split not in ("train", "test"):
        raise UsageError(f"VQA-RAD has no split {split!r}; data.split may be train or test")
    return datasets.read_vqa_rad(root, split, protocol)


def _read_slake(root: str, split: str, protocol: str) -> list[VqaSample]:
    if split not in ("train", "validation", "test"):
        raise UsageError(f"SLAKE has no split {split!r}; data.split may be train, validation or test")
    return datasets.read_slake(root, split)


def _held_out_images(path: str) -> set[str]:
    images = read_json(Path(path)).get("images")
    if not isinstance(images, list) or not images:
        raise UserError(f'data.held_out: {path} was expected to be {{"images": [at least one name]}}')
    return {str(image) for image in images}


def ask(
    model: LlavaMed,
    questions: Sequence[tuple[str, str]],
    generation: Generation,
    title: str = "questions",
    partial: Partial | None = None,
) -> list[Answer]:
    """Asks a model about images: (question, image path) pairs -> answers in the same order.

    Pairs of one image are asked next to each other. A prompt that with its image is longer than the model takes (the
    checkpoint's `tokenizer_model_max_length`) is cut from the right, as the original does, which loses the end of the
    instruction: it is counted, and a warning says how many. Each answer goes into `partial` as it comes; what stands there
    is not asked again. Of several processes each asks its share, and the first gets all answers. What a question draws
    follows from itself, so an interrupted run gives the answers of an uninterrupted one.

    Raises:
      UserError: after all others were answered, questions that could not be: how many, and why the first.
    """
    answers: dict[int, Answer] = {} if partial is None else dict(partial.answers)
    image_order = {image: position for position, image in reversed(list(enumerate(image for _, image in questions)))}
    mine = sharing.share([image for _, image in questions])
    left = sorted((i for i in mine if i not in answers), key=lambda i: image_order[questions[i][1]])
    failed: dict[int, UserError] = {}
    advance, close = _progress(len(mine), len(mine) - len(left), sharing.titled(title))
    asking = Asking(model, questions, failed)
    found = asking.beams(left, generation) if generation.num_beams > 1 else asking.each(left, generation)
    with contextlib.closing(found):
        for i, answer in found:
            answers[i] = answer
            if partial is not None:
                partial.add(i, answer)
            advance(1)
    close()
    answers, failed = sharing.collected(len(questions), mine, answers, failed)
    if failed:
        question, image = questions[min(failed)]
        raise UserError(f"{len(failed)} of {len(questions)} {title} could not be answered; the first, {question!r} about "
                        f"{Path(image).name}: {failed[min(failed)]}")
    _warn([answers[i] for i in range(len(questions))], model.engine.max_prompt)
    return [answers[i] for i in range(len(questions))]


def _warn(answers: Sequence[Answer], limit: int) -> None:
    """Says how many prompts were cut and how many answers are not finished."""
    cut = [answer.tokens_cut for answer in answers if answer.tokens_cut]
    if cut:
        print(
            f"warning: {len(cut)} of {len(answers)} prompts were longer than {limit} tokens"
            f" and lost their end ({sum(cut)} tokens in all), as in the original",
            file=sys.stderr,
        )
    unfinished = sum(answer.finish_reason == "length" for answer in answers)
    if unfinished:
        print(f"warning: {unfinished} of {len(answers)} answers reached max_new_tokens and are not finished", file=sys.stderr)


def _progress(total: int, kept: int, title: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A bar on a terminal; in a pipe a line for each tenth. Both on stderr, so that stdout holds results only; `kept`
    questions were answered before, which the rate does not count."""
    if sys.stderr.isatty():
        bar = tqdm(total=total, initial=kept, desc=title, unit="question", file=sys.stderr)
        return bar.update, bar.close
    done, printed, begun = kept, kept, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if done == total or done - printed >= total / 10:
            printed = done
            rate = (done - kept) / max(time.monotonic() - begun, 1e-9)
            print(f"{title}: {done} of {total}, {rate:.1f} a second", file=sys.stderr, flush=True)

    return advance, lambda: None


def predict(
    model: LlavaMed,
    samples: Sequence[VqaSample],
    generation: Generation,
    model_id: str,
    shown: Sequence[str] | None = None,
    title: str = "questions",
    partial: Partial | None = None,
) -> list[dict]:
    """Predictions in the order of `samples`; `partial` as in `ask`.

    Args:
      shown: the image that each question is asked about, where it is not the sample's own (control runs).
    """
    shown = shown or [str(sample.image) for sample in samples]
    prompts = [sample.question.replace("<image>", "").strip() for sample in samples]
    answers = ask(model, list(zip(prompts, shown, strict=True)), generation, title, partial)
    return [
        {
            "question_id": sample.question_id,
            "prompt": prompt,
            "text": answer.text,
            "answer_id": answer_id(model_id, sample.question_id, prompt, Path(image).name, answer.text),
            "model_id": model_id,
            "metadata": {"image": Path(image).name, "finish_reason": answer.finish_reason}
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


def model_name(path: str) -> str:
    """The last part of a checkpoint's path; with the parent's before it where the last part alone says nothing."""
    resolved = Path(path.partition("@")[0])
    if resolved.name.startswith("checkpoint-"):
        return f"{resolved.parent.name}_{resolved.name}"
    if resolved.parent.name == "checkpoints":
        return f"{resolved.parent.parent.name}_{resolved.name}"
    return resolved.name or str(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: under the final name it is whole or absent.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON escapes it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(utf8(text))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def utf8(text: str) -> bytes:
    """The bytes that `write_text` writes."""
    return text.encode("utf-8", errors="backslashreplace")


def to_jsonl(objects: Sequence[Mapping]) -> str:
    """Objects as lines of JSON."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
