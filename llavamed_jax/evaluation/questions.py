"""Which questions an eval config asks, which training rows stand beside them, and the same questions as a training file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets import counts, detect
from llavamed_jax.datasets import sample as data_questions
from llavamed_jax.datasets.records import normalize
from llavamed_jax.datasets.registry import SETS, Selection
from llavamed_jax.datasets.sample import VqaSample, check_ids
from llavamed_jax.datasets.slake import LANGUAGES
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils.files import read_json, write_text
from llavamed_jax.utils.hashes import sha256

log = logging.getLogger(__name__)

Reader = Callable[[str, str], list[VqaSample]]  # (root, split) -> its questions

# Keys of `data` that only some sets have.
FURTHER = ("language", "images", "question", "train")
_DESCRIBING = ("question_type", "organ", "modality")  # which LLaVA-Med's own test format has room for


def load_samples(
    name: str, root: str, split: str, protocol: str, held_out: str = "", **more: str
) -> tuple[list[VqaSample], list[VqaSample]]:
    """The questions to ask, and the training rows that candidates, majority answer and leakage counts come from.

    Args:
      name: a name of `datasets.registry.SETS`; `root` holds its official layout, or is a file.
      split: `train`, `validation` or `test`.
      protocol: `clean` or `paper`, VQA-RAD's training rows.
      held_out: a JSON file `{"images": [names]}`. Then the rows of exactly these images are asked, whatever their
        split, and all rows of the other images count as training rows.
      more: the keys of `FURTHER`, where the set has them: SLAKE's `language`, the folder of the `images`, the `question` about images
        to be described, and `train`, a file of training rows in place of the one beside the questions.
    Raises:
      UsageError: a data set that is not known, or an empty root. UserError: what the readers find wrong, ids that several
        questions have.
    """
    read = _reader(name, root, split, protocol, more)
    if held_out:
        return _held_out(name, root, split, held_out)
    samples = read(root, split)
    if detect.set_at(Path(root), name) != name:
        log.warning("%s: nothing says that its parquet files are %s (a dataset card, the set's number of rows); they are read, and called "
                    "parquet", root, SETS[name].label)
    check_ids(samples, f"{root}, split {split},")
    return tuple(data_questions.one_name_each(samples, _training_rows(name, root, read, more.get("train", ""))))


def further(data: ConfigDict) -> dict[str, str]:
    """The keys of `FURTHER` that a config has."""
    return {key: data[key] for key in FURTHER if key in data}


def describe(cfg: ConfigDict, samples: list[VqaSample]) -> str:
    """One line that says what is asked, and whether it is the whole of the published set."""
    data = cfg.data
    if data.held_out:
        images = len({sample.image for sample in samples})
        return f"{data.name}: {len(samples)} questions about {images} images held out by {data.held_out}"
    name = set_name(data)
    variant = SETS[name].variant(_selection(data.root, data.split, cfg.protocol, further(data)))
    return counts.describe(samples, name, data.split, variant)


def set_name(data: ConfigDict) -> str:
    """What the questions are called in `metrics.json` and the report: `data.name`, where the files say nothing else."""
    return detect.set_at(Path(data.root), data.name)


def source_files(data: ConfigDict) -> list[Path]:
    """The files that the questions were read from, for their hashes."""
    root = Path(data.root)
    if root.is_file():
        return [root]
    files = SETS[data.name].files if data.name in SETS else None  # chat questions are no set of the registry
    if files:
        return files(root, data.split)
    return sorted([*root.glob("*.json"), *root.glob("*.jsonl")]) or detect.parquet_files(root, data.split)


def questions_hash(samples: Sequence[VqaSample]) -> str:
    """A hash of the questions as they are scored, whatever files they came in: which split was asked, to the letter.

    Of an image's path as many parts count as tell most images apart: SLAKE's are all called source.jpg.
    """
    paths = {str(s.image): Path(s.image).parts for s in samples}
    length = next((n for n in range(1, 9) if 2 * len({parts[-n:] for parts in paths.values()}) > len(paths)), 9)
    names = {image: "/".join(parts[-length:]) for image, parts in paths.items()}
    rows = [[str(s.question_id), names[str(s.image)], s.question, str(s.answer), s.answer_type, list(s.options)] for s in samples]
    return sha256(json.dumps(rows, ensure_ascii=True).encode())


def write_llava(cfg: ConfigDict, path: str | Path) -> str:
    """Writes the configured questions in LLaVA's format, for training; returns a line that says what was written.

    Images are absolute paths, so that the file may lie anywhere. Open and closed questions make a file that the set `llava_med`
    reads. Raises UserError where the file exists or a question can be no
    training record, and leaves nothing then.
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
        record["image"] = str(sample.image.absolute())  # a name, not a list: other trainers read no list
        record |= {key: value for key in _DESCRIBING if (value := getattr(sample, key)) is not None}
        normalize(record, Path(), f"question {sample.question_id} of {data.root}", index)  # what is written can be read
        records.append(record)
    write_text(path, "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n")
    return f"{describe(cfg, samples)}: written to {path}"


def _selection(root: str, split: str, protocol: str, more: Mapping[str, str]) -> Selection:
    return Selection(root, split, protocol, more.get("images") or None, more.get("language"), more.get("question"))


def _reader(name: str, root: str, split: str, protocol: str, more: Mapping[str, str]) -> Reader:
    """What reads a split of a data set. Raises UsageError for settings that name none."""
    if name not in SETS:
        raise UsageError(f"the data set {name!r} is not known; data.name may be {' or '.join(SETS)}")
    if not root:
        raise UsageError(f"data.root is empty; the folder with {name} was expected: --config.data.root=DIR")
    if split not in SETS[name].splits:
        raise UsageError(f"data.split is {split!r}; of {name} it may be {_either(SETS[name].splits)}")
    if (language := more.get("language", "en")) not in LANGUAGES:
        raise UsageError(f"data.language is {language!r}; {_either(LANGUAGES)} was expected")
    return lambda root, split: SETS[name].questions(_selection(root, split, protocol, more))


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _training_rows(name: str, root: str, read: Reader, train: str) -> list[VqaSample]:
    """Files of one's own need no training rows; the published sets have them, and their numbers need them."""
    if train:
        return read(train, "train")
    files = [*filter(Path.is_file, detect.split_files(Path(root), "train")), *detect.parquet_files(Path(root), "train")]
    if SETS[name].has_training_rows or files:
        return read(root, "train")
    log.warning("%s has no train.json and data.train names no file: what follows from training rows (answer candidates, their "
                "majority answer, leakage) is left out", root)
    return []


def _held_out(name: str, root: str, split: str, held_out: str) -> tuple[list[VqaSample], list[VqaSample]]:
    if split != "test":
        raise UsageError(f"data.split is {split!r}; beside data.held_out, which asks rows of both splits, it may be test only")
    if SETS[name].read_whole is None:
        raise UsageError(f"data.held_out holds out images of VQA-RAD; {name} has splits without common images: data.split")
    names = _held_out_images(held_out)
    rows = SETS[name].read_whole(root)
    asked = [sample for sample in rows if Path(sample.image).name in names]
    unknown = names - {Path(sample.image).name for sample in asked}
    if unknown:
        raise UserError(f"{held_out} holds out images of which {root} has no row: {', '.join(sorted(unknown))}")
    return tuple(data_questions.one_name_each(asked, [sample for sample in rows if Path(sample.image).name not in names]))


def _held_out_images(path: str) -> set[str]:
    images = read_json(Path(path)).get("images")
    if not isinstance(images, list) or not images:
        raise UserError(f'data.held_out: {path} was expected to be {{"images": [at least one name]}}')
    return {str(image) for image in images}
