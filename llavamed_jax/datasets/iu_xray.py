"""Reads IU X-Ray (Demner-Fushman et al. 2016): chest X-rays, one or several a study, and the findings of their reports.

Three layouts are read:

- R2Gen's (Chen et al. 2020), with which most papers report: `annotation.json`, an object of `train`, `val` and `test`
  with rows `{id, report, image_path}`, and `images/`;
- Open-i's own: `ecgen-radiology/*.xml` and the PNG files in `NLMCXR_png/` or `images/`;
- Kaggle's: `indiana_reports.csv`, `indiana_projections.csv` and `images/images_normalized/` or `images/`.

The last two state no split. There a study belongs to `train`, `validation` or `test` (70, 10 and 20 %) by a hash of its
id. They have the whole report; the reference text is its section FINDINGS, as in R2Gen's file. Studies without findings
or without an image are left out and counted.
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.published_choices import folder_of
from llavamed_jax.datasets.registry import SPLITS, DataSet, Selection
from llavamed_jax.datasets.rows import Row, one_of, read_table
from llavamed_jax.datasets.sample import CAPTION, VqaSample, all_images, check_images
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import open_file, read_bytes, read_json
from llavamed_jax.utils.hashes import sha256

log = logging.getLogger(__name__)

NAME = "iu_xray"
INSTRUCTION = "Write the findings of the report on this chest X-ray."
ANNOTATION, REPORTS, PROJECTIONS = "annotation.json", "indiana_reports.csv", "indiana_projections.csv"
_XML, _KEYS = "ecgen-radiology", {"train": "train", "validation": "val", "test": "test"}
_IMAGES = ("images/images_normalized", "NLMCXR_png", "images")
_STUDY = re.compile(rb'"id"\s*:\s*"CXR\d+')  # MIMIC-CXR's annotation.json has the same form and other ids
_HEAD = 4096
_TENTHS = {"train": range(7), "validation": range(7, 8), "test": range(8, 10)}

Study = tuple[str, str, list[Path]]
"""An id, the findings, and the paths of the images."""


def read_iu_xray(selected: Selection) -> list[VqaSample]:
    """Reads the studies of a split; `answer` is the findings.

    Args:
      selected: `root` is the folder. `images` is the folder of the images, by default that of the layout. `question` is
        what is asked about every study; None asks for the findings.

    Raises:
      UserError: a file or an image is missing or invalid, a row lacks a field, or the split is unknown.
    """
    one_of("IU X-Ray's split", selected.split, SPLITS)
    root = Path(selected.root)
    folder = folder_of(root, selected.images, *_IMAGES)
    form = form_of(root)
    if form == ANNOTATION:
        studies = list(_annotated(root / ANNOTATION, selected.split, folder))
    else:
        every = _from_tables(root, folder) if form == REPORTS else _from_xml(root, folder)
        studies = [study for study in every if split_of(study[0]) == selected.split]
    question = INSTRUCTION if selected.question is None else selected.question.strip()
    if not question:
        raise UserError("data.question is empty; what is asked about every study of IU X-Ray was expected")
    usable = [study for study in studies if study[1] and study[2]]
    if len(usable) < len(studies):
        without = sum(not text for _, text, _ in studies)
        log.warning("%s: %d of %d studies are left out: %d have no findings, and %d have findings but no image", root,
                    len(studies) - len(usable), len(studies), without, len(studies) - len(usable) - without)
    samples = [VqaSample(identity, images[0], question, text, CAPTION, more_images=tuple(images[1:]))
               for identity, text, images in usable]
    check_images(all_images(samples))
    return samples


def form_of(root: Path) -> str:
    """Returns the file or folder that the layout of `root` is recognised by; raises UserError if there is none."""
    if (root / ANNOTATION).is_file():
        return ANNOTATION
    if (root / REPORTS).is_file():
        return REPORTS
    if any((root / _XML).glob("*.xml")):
        return _XML
    raise UserError(f"{root} holds neither {ANNOTATION} nor {REPORTS} nor {_XML}/*.xml{detect.hint(root, NAME)}")


def split_of(identity: str) -> str:
    """Returns the split of a study in the layouts that state none: seven tenths train, one validation, two test."""
    tenth = int(sha256(identity)[:8], 16) % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


def _annotated(file: Path, split: str, folder: Path) -> Iterator[Study]:
    key = _KEYS[split]
    for row in Row(read_json(file), str(file), NAME).rows(key):
        yield str(row.identity("id")), row.text("report"), _paths(row, folder)


def _paths(row: Row, folder: Path) -> list[Path]:
    value = row["image_path"]
    names = value if isinstance(value, list) else [value]
    return [Row({"image_path": name}, row.name, NAME).image("image_path", folder) for name in names]


def _from_tables(root: Path, folder: Path) -> Iterator[Study]:
    """Yields the studies of Kaggle's tables; frontal images stand before lateral ones."""
    shown: dict[str, list[tuple[bool, Path]]] = {}
    for row in read_table(root / PROJECTIONS, ("uid", "filename", "projection"), NAME, may_be_longer=True):
        is_lateral = row.text("projection").lower() != "frontal"
        shown.setdefault(row.words("uid"), []).append((is_lateral, row.image("filename", folder)))
    for row in read_table(root / REPORTS, ("uid", "findings"), NAME, may_be_longer=True):
        identity = row.words("uid")
        views = sorted(shown.get(identity, ()), key=lambda view: view[0])
        yield f"CXR{identity}", row.text("findings"), [path for _, path in views]


def _from_xml(root: Path, folder: Path) -> Iterator[Study]:
    """Yields the studies of Open-i's files, in the order of their numbers."""
    number = lambda file: (int(file.stem) if file.stem.isdecimal() else 0, file.stem)
    for file in sorted((root / _XML).glob("*.xml"), key=number):
        data = read_bytes(file, f"the data file {file}")
        try:
            tree = ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of a declared encoding
            raise UserError(f"{file} is not XML: {error}") from None
        study = tree.find(".//uId")
        identity = (study.get("id") if study is not None else None) or f"CXR{file.stem}"
        sections = (section for section in tree.iter("AbstractText") if section.get("Label") == "FINDINGS")
        text = " ".join(" ".join("".join(section.itertext()).split()) for section in sections)
        yield identity, text, [folder / f"{image.get('id')}.png" for image in tree.iter("parentImage")]


def _is_at(path: Path) -> bool:
    if (path / REPORTS).is_file() or any((path / _XML).glob("*.xml")):
        return True
    if not (path / ANNOTATION).is_file():
        return False
    with open_file(path / ANNOTATION) as file:
        return bool(_STUDY.search(file.read(_HEAD)))


def _files(root: Path, split: str) -> list[Path]:
    form = form_of(root)
    return [root / REPORTS, root / PROJECTIONS] if form == REPORTS else [root / form]


def _has_split(root: Path, split: str) -> bool:
    """Returns whether the layout has studies of a split: `annotation.json` states them, the others are divided here."""
    return form_of(root) != ANNOTATION or bool(read_json(root / ANNOTATION).get(_KEYS[split]))


DATA_SET = DataSet(
    name=NAME,
    label="IU X-Ray",
    sign=f"{ANNOTATION}, {REPORTS} or {_XML}/",
    read=read_iu_xray,
    row="{id, report, image_path}",
    follows=("images", "question"),
    is_at=_is_at,
    is_row=lambda keys: {"report", "image_path"} <= keys,
    variant=lambda selected: "R2Gen" if (Path(selected.root) / ANNOTATION).is_file() else "",
    # Of R2Gen's file, as papers that report with it count them.
    published={("train", "R2Gen"): (2069, None, None, None), ("validation", "R2Gen"): (296, None, None, None),
               ("test", "R2Gen"): (590, None, None, None)},
    has_training_rows=True,
    files=_files,
    has_split=_has_split,
)
