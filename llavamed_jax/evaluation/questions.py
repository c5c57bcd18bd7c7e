"""Loads the questions and training rows that an eval config names, and writes the questions as a training file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets import counts, detect
from llavamed_jax.datasets import sample as data_questions
from llavamed_jax.datasets.find import has_split
from llavamed_jax.datasets.records import normalize
from llavamed_jax.datasets.registry import SETS, Selection
from llavamed_jax.datasets.sample import VqaSample, check_ids
from llavamed_jax.datasets.slake import LANGUAGES
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.utils.files import read_json, write_text
from llavamed_jax.utils.hashes import sha256

log = logging.getLogger(__name__)

Reader = Callable[[str, str], list[VqaSample]]  # (root, split) -> its questions

# Keys of `data` that only some sets have.
FURTHER = ("language", "images", "question", "train")
_DESCRIBING = ("question_type", "organ", "modality")  # fields that LLaVA-Med's own test format has room for


def load_samples(
    name: str, root: str, split: str, protocol: str, held_out: str = "", **more: str
) -> tuple[list[VqaSample], list[VqaSample]]:
    """Returns the questions to ask, and the training rows.

    The answer candidates, the majority answer and the leakage counts are computed from the training rows.

    Args:
      name: a name in `datasets.registry.SETS`.
      root: the folder with the official layout of the set, or a file.
      split: `train`, `validation` or `test`.
      protocol: `clean` or `paper`, which selects VQA-RAD's training rows.
      held_out: a JSON file `{"images": [names]}`, or "". If it is given, the rows of exactly these images are asked,
        from all splits, and all rows of the other images count as training rows.
      **more: the keys of `FURTHER` that the set has: SLAKE's `language`, the folder `images`, the `question` about
        images to be described, and `train`, a file of training rows that replaces the one beside the questions.

    Raises:
      UsageError: the data set is unknown or the root is empty.
      UserError: a reader finds an error in the data, or several questions have the same id.
    """
    read = _reader(name, root, split, protocol, more)
    if held_out:
        return _held_out(name, root, split, held_out)
    samples = read(root, split)
    if detect.set_at(Path(root), name) != name:
        log.warning("%s: its parquet files cannot be recognized as %s (by a dataset card or the number of rows); they "
                    "are read and reported as parquet", root, SETS[name].label)
    check_ids(samples, f"{root}, split {split},")
    return tuple(data_questions.one_name_each(samples, _training_rows(name, root, read, more.get("train"))))


def further(data: ConfigDict) -> dict[str, str]:
    """Returns the keys of `FURTHER` that a config has, with their values."""
    return {key: data[key] for key in FURTHER if key in data}


def describe(cfg: ConfigDict, samples: list[VqaSample]) -> str:
    """Returns one line that says what is asked, and whether it is the complete published set."""
    data = cfg.data
    if data.held_out:
        images = len(set(data_questions.all_images(samples)))
        return (f"{data.name}: {count_of(len(samples), 'question')} about {count_of(images, 'image')} held out by "
                f"{data.held_out}")
    name = set_name(data)
    variant = SETS[name].variant(_selection(data.root, data.split, cfg.protocol, further(data)))
    return counts.describe(samples, name, data.split, variant)


def set_name(data: ConfigDict) -> str:
    """Returns the name of the questions in `metrics.json` and the report.

    This is `data.name`, or `parquet` if nothing shows that the parquet files at `data.root` are those of `data.name`.
    """
    return detect.set_at(Path(data.root), data.name)


def source_files(data: ConfigDict) -> list[Path]:
    """Returns the files and folders that the questions were read from; the report states their hashes."""
    root = Path(data.root)
    if root.is_file():
        return [root]
    found = sorted([*root.glob("*.json"), *root.glob("*.jsonl")])
    if data.name not in SETS:  # chat questions, which have no splits
        return found
    if files := SETS[data.name].files:
        return files(root, data.split)
    has_split = any(map(Path.is_file, detect.split_files(root, data.split)))
    return found if has_split else [*found, *detect.parquet_files(root, data.split)]  # the hub's have JSON beside them


def questions_hash(samples: Sequence[VqaSample]) -> str:
    """Returns a hash of the questions as they are scored, independent of the files that they were read from.

    Each image counts with as many trailing parts of its path as are needed to tell most images apart, because all
    images of SLAKE are called source.jpg.
    """
    paths = {str(image): Path(image).parts for image in data_questions.all_images(samples)}
    length = next((n for n in range(1, 9) if 2 * len({parts[-n:] for parts in paths.values()}) > len(paths)), 9)
    names = {image: "/".join(parts[-length:]) for image, parts in paths.items()}
    rows = [[str(s.question_id), names[str(s.image)], s.question, str(s.answer), s.answer_type, list(s.options)]
            + ([[names[str(image)] for image in s.more_images]] if s.more_images else [])
            + ([s.right] if s.right is not None else [])
            for s in samples]
    return sha256(json.dumps(rows, ensure_ascii=True).encode())


def content_hash(*lists: Sequence[VqaSample]) -> str:
    """Returns a hash of every field of the samples, for instance of the questions and the training rows.

    An image counts by the name of its file and by its place among all images.
    """
    shown = [data_questions.own_images(samples) for samples in lists]
    marks = {image: [place, Path(image).name] for place, image in enumerate(
        dict.fromkeys(image for each in shown for images in each for image in images))}
    rows = [[vars(sample) | {"image": None, "more_images": [marks[image] for image in images]}
             for sample, images in zip(samples, each, strict=True)] for samples, each in zip(lists, shown, strict=True)]
    return sha256(json.dumps(rows, default=str))


def write_llava(cfg: ConfigDict, path: str | Path) -> str:
    """Writes the configured questions in LLaVA's format, for training.

    Image paths are absolute, so the file may lie anywhere. The data set `llava_med` reads a file of open and closed
    questions.

    Args:
      cfg: an eval config.
      path: the file to write; it must not exist.

    Returns:
      One line that says what was written.

    Raises:
      UserError: the file exists, or a question cannot become a training record. No file is written then.
    """
    path, data = Path(path), cfg.data
    if path.exists():
        raise UserError(f"{path} exists; a new file was expected")
    if data.held_out:
        samples, _ = load_samples(data.name, data.root, data.split, cfg.protocol, data.held_out)
    else:
        samples = _reader(data.name, data.root, data.split, cfg.protocol, further(data))(data.root, data.split)
    records = []
    for index, sample in enumerate(samples):
        record = data_questions.to_llava(sample)
        images = [str(image.absolute()) for image in sample.images]
        record["image"] = images if len(images) > 1 else images[0]  # a string: other trainers do not read a list of one
        record |= {key: value for key in _DESCRIBING if (value := getattr(sample, key)) is not None}
        # Raises if the record could not be read again.
        normalize(record, Path(), f"question {sample.question_id} of {data.root}", index)
        records.append(record)
    write_text(path, "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n")
    return f"{describe(cfg, samples)}: written to {path}"


def _selection(root: str, split: str, protocol: str, more: Mapping[str, str]) -> Selection:
    return Selection(root, split, protocol, more.get("images") or None, more.get("language"), more.get("question"))


def _reader(name: str, root: str, split: str, protocol: str, more: Mapping[str, str]) -> Reader:
    """Returns the function that reads a split of a data set. Raises UsageError for invalid settings."""
    if name not in SETS:
        raise UsageError(f"data.name is {name!r}; {' or '.join(SETS)} was expected")
    if not root:
        raise UsageError(f"data.root is empty; the folder with {name} was expected: --config.data.root=DIR")
    if split not in SETS[name].splits:
        raise UsageError(f"data.split is {split!r}; {_either(SETS[name].splits)} was expected for {name}")
    if (language := more.get("language", "en")) not in LANGUAGES:
        raise UsageError(f"data.language is {language!r}; {_either(LANGUAGES)} was expected")
    return lambda root, split: SETS[name].questions(_selection(root, split, protocol, more))


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _training_rows(name: str, root: str, read: Reader, train: str | None) -> list[VqaSample]:
    """Returns the training rows. Users' own files may lack them, and so may some published sets; others must have them.

    Args:
      name: the set.
      root: the folder of its questions.
      read: reads a split of a folder.
      train: the config key `data.train`; None if the set has no such key.
    """
    if train:
        return read(train, "train")
    files = [*filter(Path.is_file, detect.split_files(Path(root), "train")), *detect.parquet_files(Path(root), "train")]
    if SETS[name].has_training_rows or files:
        return read(root, "train")
    if train is not None:
        log.warning("%s has no train.json and data.train is empty: metrics that need training rows (answer candidates, "
                    "leakage) are left out, and majority answers are those of the questions themselves", root)
    elif SETS[name].use_training_rows and Path(root).is_dir() and has_split(name, Path(root), "train"):
        try:
            return read(root, "train")
        except UserError as error:  # the files of the questions do not depend on these
            log.warning("%s: the training rows cannot be read, so majority answers are those of the questions "
                        "themselves: %s", root, error)
    return []


def _held_out(name: str, root: str, split: str, held_out: str) -> tuple[list[VqaSample], list[VqaSample]]:
    if split != "test":
        raise UsageError(f"data.split is {split!r}; test was expected with data.held_out, which asks rows of both "
                         "splits")
    if SETS[name].read_whole is None:
        raise UsageError(f"data.held_out is for VQA-RAD only; the splits of {name} have no common images, so use "
                         "data.split")
    names = _held_out_images(held_out)
    rows = SETS[name].read_whole(root)
    asked = [sample for sample in rows if Path(sample.image).name in names]
    unknown = names - {Path(sample.image).name for sample in asked}
    if unknown:
        raise UserError(f"{held_out} names images that no row of {root} has: {', '.join(sorted(unknown))}")
    return tuple(data_questions.one_name_each(
        asked, [sample for sample in rows if Path(sample.image).name not in names]))


def _held_out_images(path: str) -> set[str]:
    images = read_json(Path(path)).get("images")
    if not isinstance(images, list) or not images:
        raise UserError(f'data.held_out: {path} has no list of images; {{"images": [at least one name]}} was expected')
    return {str(image) for image in images}
