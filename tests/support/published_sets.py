"""Writes small data sets in the layouts in which they are published: `write(folder, names)`."""

import csv
import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from llavamed_jax.datasets.mmmu_med import SUBJECTS

SIGNS = ("CT", "MRI", "ultrasound", "radiograph")


def picture(number: int, size: int = 16) -> bytes:
    """A picture that no other number has: a grey disc, whose place and radius follow from the number."""
    y, x = np.mgrid[:size, :size] / size
    inside = (x - 0.3 - number % 5 / 12) ** 2 + (y - 0.3 - number % 7 / 17) ** 2 < (0.1 + number % 3 / 12) ** 2
    file = io.BytesIO()
    Image.fromarray((40 + number % 40 + 150 * inside).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def _parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def vqa_rad(root: Path, n: int) -> None:
    rows = []
    for i in range(2 * n):
        is_closed = i % 2 == 0
        rows.append({"qid": str(i), "phrase_type": "freeform" if i < n else "test_freeform", "qid_linked_id": f"l{i}",
                     "image_case_url": "x", "image_name": f"{i // 2}.jpg", "image_organ": "CHEST",
                     "evaluation": "evaluated", "question": f"Is sign {i} there?" if is_closed else f"Where is sign {i}?",
                     "question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL",
                     "question_type": "PRES" if is_closed else "POS", "answer": ("yes", "no")[i // 2 % 2] if is_closed else "left lung",
                     "answer_type": "CLOSED" if is_closed else "OPEN"})
        _put(root / "VQA_RAD Image Folder" / f"{i // 2}.jpg", picture(i // 2))
    _put(root / "VQA_RAD Dataset Public.json", json.dumps(rows))


def slake(root: Path, n: int, splits: tuple[str, ...] = ("train", "validate")) -> None:
    for at, split in enumerate(splits):
        rows = []
        for i in range(at * n, at * n + n):
            is_closed = i % 2 == 0
            rows.append({"img_id": i, "img_name": f"xmlab{i // 2}/source.jpg", "qid": i, "q_lang": "en", "location": "Lung",
                         "modality": SIGNS[i % 2], "content_type": "Organ", "triple": ["vhead", "_", "_"],
                         "question": f"Is it {i}?" if is_closed else f"What is {i}?", "answer": ("Yes", "No")[i // 2 % 2] if is_closed else "Liver",
                         "answer_type": "CLOSED" if is_closed else "OPEN", "base_type": "vqa"})
            _put(root / "imgs" / f"xmlab{i // 2}" / "source.jpg", picture(i // 2 + 100))
        _put(root / f"{split}.json", json.dumps(rows))


def pathvqa(root: Path, n: int) -> None:
    for split in ("train", "val", "test"):
        rows = [{"image": f"{split}_{i // 2:04}", "question": f"Is {i} there?" if i % 2 else f"What is {i}?", "answer": "yes" if i % 2 else "cells"}
                for i in range(n)]
        for row in rows:
            _put(root / "images" / split / f"{row['image']}.jpg", picture(len(split) + int(row["image"][-4:]) + 200))
        _put(root / "qas" / split / f"{split}_qa.pkl", pickle.dumps(rows))


def pmc_vqa(root: Path, n: int) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(("index", "Figure_path", "Caption", "Question", *(f"Choice {each}" for each in "ABCD"), "Answer", "split"))
    for i in range(n):
        _put(root / "figures" / f"PMC{i}.jpg", picture(i + 300))
        choices = [f" {letter}:{sign} " for letter, sign in zip("ABCD", SIGNS, strict=True)]
        writer.writerow((i, f"PMC{i}.jpg", "c", f"How was figure {i} made?", *choices, "ABCD"[i % 4], "test"))
    _put(root / "test_2.csv", file.getvalue())


def omnimedvqa(root: Path, n: int) -> None:
    rows = [{"dataset": "ACRIMA", "question_id": f"ACRIMA_{i}", "question_type": "Modality Recognition", "question": f"Which is {i}?",
             "gt_answer": SIGNS[i % 4], "image_path": f"Images/ACRIMA/{i}.png", "modality_type": "CT",
             **{f"option_{letter}": sign for letter, sign in zip("ABCD", SIGNS, strict=True)}} for i in range(n)]
    for i in range(n):
        _put(root / "Images" / "ACRIMA" / f"{i}.png", picture(i + 400))
    _put(root / "QA_information" / "Open-access" / "ACRIMA.json", json.dumps(rows))


def medxpertqa_mm(root: Path, n: int) -> None:
    rows = [{"id": f"MM-{i}", "question": f"Which is {i}?", "options": dict(zip("ABCDE", (*SIGNS, "PET"), strict=True)), "label": "ABCDE"[i % 5],
             "images": [f"MM-{i}-{k}.jpeg" for k in range(1 + i % 2)], "medical_task": "Diagnosis", "body_system": "Nervous",
             "question_type": "Reasoning"} for i in range(n)]
    for row in rows:
        for k, name in enumerate(row["images"]):
            _put(root / "images" / name, picture(int(row["id"][3:]) + 500 + 50 * k))
    _put(root / "MM" / "test.jsonl", "\n".join(map(json.dumps, rows)))


def mmmu_med(root: Path, n: int) -> None:
    for number, subject in enumerate(SUBJECTS):
        rows = [{"id": f"validation_{subject}_{i}", "question": "What is <image 1>?", "options": str(list(SIGNS)), "answer": "ABCD"[i % 4],
                 "question_type": "multiple-choice", "img_type": "['CT']", "subfield": "x",
                 "image_1": {"bytes": picture(50 * number + i + 600), "path": None}} for i in range(n)]
        _parquet(root / subject / "validation-00000-of-00001.parquet", rows)


def medframeqa(root: Path, n: int) -> None:
    rows = [{"question_id": f"q{i}", "question": f"Which is {i}?", "options": list(SIGNS), "correct_answer": "ABCD"[i % 4], "organ": "heart",
             "modality": "CT", **{f"image_{k}": {"bytes": picture(9 * i + k + 900), "path": None} if k < 4 else None for k in range(1, 6)}}
            for i in range(n)]
    _parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def iu_xray(root: Path, n: int) -> None:
    """R2Gen's layout; every second study has two views."""
    rows = {split: [{"id": f"CXR{1000 * at + i}_IM-0001", "report": f"The heart is normal in size. There are {i} nodules. No effusion.",
                     "image_path": [f"CXR{1000 * at + i}/{k}.png" for k in range(1 + i % 2)], "split": split} for i in range(n)]
            for at, split in enumerate(("train", "val", "test"))}
    for row in (row for each in rows.values() for row in each):
        for name in row["image_path"]:
            _put(root / "images" / name, picture(int(row["id"][3:].partition("_")[0]) + 7 * int(name[-5])))
    _put(root / "annotation.json", json.dumps(rows))


SETS = {each.__name__: each for each in (vqa_rad, slake, pathvqa, pmc_vqa, omnimedvqa, medxpertqa_mm, mmmu_med, medframeqa, iu_xray)}
PLAIN = tuple(name for name in SETS if name not in ("mmmu_med", "medframeqa"))  # without the extra [parquet]


def write(folder: Path, names=tuple(SETS), n: int = 4) -> Path:
    """Writes sets of `n` questions (a subject, in MMMU), each into a folder of its name; returns the folder."""
    for name in names:
        SETS[name](folder / name, n)
    return folder
