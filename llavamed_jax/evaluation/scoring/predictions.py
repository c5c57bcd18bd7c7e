"""Reads a file of predictions, and checks that the predictions are answers to the given questions.

Ids alone are not enough: two data sets may both number their questions from 1, and the answers of a control have the
ids of the ordinary answers. So the other fields of a prediction (`prompt`, `metadata.image`, `metadata.control`) have
to agree with the question, if they are present.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from llavamed_jax.datasets.sample import CHOICE, VqaSample
from llavamed_jax.errors import UserError, at, cut, short, some
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils.files import parse_jsonl, read_bytes

_OF_CONTENT = re.compile(r"[0-9a-f]{32}")  # the name of an image that was read from a parquet file


def read_predictions(path: str | Path) -> list[dict]:
    """Reads `predictions.jsonl`: one object a line, with at least `question_id` and the string `text`.

    Raises:
      UserError: the file cannot be read, or a line is not such an object. The error names the line.
    """
    try:
        text = read_bytes(path, f"the file of predictions {path}").decode("utf-8-sig")
    except OSError as error:
        raise at(path, f"the predictions {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the predictions {path} are not UTF-8 text (byte {error.start}); lines of JSON were "
                        "expected") from None
    predictions = []
    for where, prediction in parse_jsonl(text, lambda number: f"{path}, line {number}"):
        is_prediction = isinstance(prediction, dict) and "question_id" in prediction
        if not is_prediction or not isinstance(prediction.get("text"), str):
            raise UserError(f'{where} is not a prediction; an object with "question_id" and "text" was expected')
        predictions.append(prediction)
    return predictions


def join(samples: Sequence[VqaSample], predictions: Iterable[Mapping]) -> list[str]:
    """Returns the predicted text of each sample, joined by question id (10 and "10" are the same id).

    Args:
      samples: the questions.
      predictions: the predictions, in any order.

    Raises:
      UserError: questions without a prediction, predictions for questions that are not asked, or ids that occur twice
        on either side. One error lists all of them.
    """
    predictions = list(predictions)
    texts = {str(prediction["question_id"]): prediction["text"] for prediction in predictions}
    asked = Counter(str(sample.question_id) for sample in samples)
    answered = Counter(str(prediction["question_id"]) for prediction in predictions)
    problems = {
        "without a prediction": [name for name in asked if name not in answered],
        "predicted more than once": [name for name, count in answered.items() if count > 1],
        "predicted but not asked": [name for name in answered if name not in asked],
        "asked more than once": [name for name, count in asked.items() if count > 1],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(ids)} {what} ({some([cut(name) for name in ids])})"
                          for what, ids in problems.items() if ids)
        raise UserError(f"the predictions do not fit the {len(samples)} questions: {found}")
    return [texts[str(sample.question_id)] for sample in samples]


def check_asked(samples: Sequence[VqaSample], predictions: Iterable[Mapping],
                is_control_allowed: bool = False) -> dict[str, int]:
    """Checks that joined predictions have the prompts and images of their questions.

    Args:
      samples: the questions.
      predictions: one prediction for each question.
      is_control_allowed: whether predictions may state that they belong to a control; then they may have other images.

    Returns:
      A phrase for what predictions do not state -> the number of such predictions.

    Raises:
      UserError: predictions have another prompt or image, or belong to a control. The error states how many, with an
        example of each kind.
    """
    by_id = {str(prediction["question_id"]): prediction for prediction in predictions}
    names = image_names(str(sample.image) for sample in samples)
    wrong: dict[str, list[str]] = {"answer another prompt": [], "are about another image": [],
                                   "belong to a control": []}
    counts = {"state no prompt and are joined by question_id": 0, "state no image": 0,
              "have a prompt with more text than the question": 0}
    for sample in samples:
        line = by_id[str(sample.question_id)]
        prompt, image, control = line.get("prompt"), _stated_image(line), _metadata(line).get("control")
        counts["state no prompt and are joined by question_id"] += not isinstance(prompt, str)
        counts["state no image"] += image is None
        if isinstance(prompt, str) and (said := _plain(prompt)) != (asked := _plain(sample.question)):
            is_longer = _has_whole(said, asked)
            counts["have a prompt with more text than the question"] += is_longer
            # Our multiple-choice prompts list the options; those of other programs may lack them.
            if not is_longer and not (sample.answer_type == CHOICE and said and asked.startswith(said)):
                wrong["answer another prompt"].append(
                    f"{_named(sample)}{short(prompt)}, not {short(sample.question)}")
        if control is not None:
            wrong["belong to a control"] += [] if is_control_allowed else [f"{_named(sample)}{short(control)}"]
        elif image is not None and not _is_image(image, names[str(sample.image)]):
            wrong["are about another image"].append(
                f"{_named(sample)}{short(image)}, not {short(names[str(sample.image)])}")
    if any(wrong.values()):
        found = "; ".join(f"{len(each)} {what} ({each[0]})" for what, each in wrong.items() if each)
        raise UserError(f"the predictions do not answer the {len(samples)} questions: {found}")
    return counts


def prompt_counts(predictions: Iterable[Mapping]) -> dict[str, int]:
    """Returns `n_prompts_cut` and `n_without_question`, as far as the predictions state them."""
    said = [_metadata(prediction) for prediction in predictions]
    return {"n_prompts_cut": sum(bool(each.get("prompt_tokens_cut")) for each in said),
            "n_without_question": sum(each.get("has_question") is False for each in said)}


def _named(sample: VqaSample) -> str:
    return f"question {cut(str(sample.question_id))}: "


def image_names(images: Iterable[str]) -> dict[str, str]:
    """Returns, for each path, its shortest end that no other path has, such as `x.jpg` or `xmlab1/source.jpg`."""
    paths = {image: PurePosixPath(image).parts for image in dict.fromkeys(images)}
    ends, left, length = {}, list(paths), 1
    while left:
        counts = Counter(paths[image][-length:] for image in left)
        ends |= {image: paths[image][-length:] for image in left if counts[paths[image][-length:]] == 1
                 or length >= len(paths[image])}
        left, length = [image for image in left if image not in ends], length + 1
    return {image: str(PurePosixPath(*ends[image])) for image in paths}


def _metadata(prediction: Mapping) -> Mapping:
    found = prediction.get("metadata")
    return found if isinstance(found, dict) else {}


def _stated_image(prediction: Mapping) -> str | None:
    """Returns the name of the image that a prediction states; None if it states none."""
    for value in (_metadata(prediction).get("image"), prediction.get("image")):
        if isinstance(value, str) and value and not value.startswith("data:"):
            return value
    return None


def _is_image(stated: str, name: str) -> bool:
    """Returns whether a stated path may be the image `name`: the shorter path is the end of the longer one.

    An image from a parquet file has a name that we made from its content. It is comparable only with such names, so
    any other stated name is accepted.
    """
    parts, wanted = PurePosixPath(stated.replace("\\", "/")).parts, PurePosixPath(name).parts
    if _OF_CONTENT.match(wanted[-1]) and not _OF_CONTENT.match(parts[-1] if parts else ""):
        return True
    length = min(len(parts), len(wanted))
    return length > 0 and parts[-length:] == wanted[-length:]


def _plain(text: str) -> str:
    """Removes the image marker, case, runs of blanks and empty lines from a prompt."""
    lines = (" ".join(line.split()) for line in text.replace(IMAGE_MARKER, "\n").splitlines())
    return "\n".join(filter(None, lines)).casefold()


def _has_whole(prompt: str, question: str) -> bool:
    """Returns whether a prompt contains a question as complete sentences: "what is it?" does not contain "is it?"."""
    return question != "" and re.search(rf"(?:\A|\n|[.!?:>\])][ ]?){re.escape(question)}(?=\s|\Z)", prompt) is not None
