"""Cuts `samples/vqa_rad/` out of the whole VQA-RAD: 60 images with all their questions, and training files from them.

    python samples/make_vqa_rad.py --source "path/to/VQA-RAD" --out samples/vqa_rad

`--source` holds the official `VQA_RAD Dataset Public.json` and `images/` (osf.io/89kps). Running it again writes the
same bytes. Nothing of the held-out images reaches a training file or the tokenizer, and of the other images only the
rows that VQA-RAD counts as training rows (`phrase_type` without `test_`).
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import re
from pathlib import Path

import sentencepiece
from PIL import Image, ImageDraw

from llavamed_jax.evaluation.scoring.controls import ORGAN_ANSWERS, ORGAN_QUESTION
from llavamed_jax.utils.paths import local

ANNOTATIONS = "VQA_RAD Dataset Public.json"

# Chosen by eye from contact sheets: one image a case, none with a scanner's overlay of patient data.
IMAGES = {
    "HEAD": """17153 20375 20626 23631 27142 31116 31928 35191 39301 40096
               40500 42951 46943 53207 53816 55245 57317 57520 59131 60254""",
    "CHEST": """16174 16810 17675 17738 17848 18461 21776 22037 23989 25587
                31217 31394 31400 32084 32962 33331 33481 45557 49914 55464""",
    "ABD": """19605 19853 20260 21604 22156 22828 23008 23648 24967 25105
              25758 26158 27198 28180 29219 31757 33689 33889 37275 43648""",
}
HELD_OUT_EVERY = 4  # the 4th, 8th, … image of each organ in the order above: five of twenty, not chosen by eye
CAPTION_BAND = 32  # rows at the bottom in which MedPix prints the name of the person who uploaded the image

CAPTION_REQUEST = "Describe the image concisely."
MODALITIES = {
    "CT": r"\bct\b|computed tomography",
    "MRI": r"\bmri?\b|flair|\bdwi\b|diffusion|\bt[12]\b",
    "X-ray": r"x[- ]?ray|\bcxr\b|plain film|radiograph",
}
PLANES = {"axial": r"axial|transverse", "coronal": r"coronal", "sagittal": r"sagittal",
          "PA": r"\bpa\b|postero-?anterior|posterior[- ]anterior", "AP": r"\bap\b|antero-?posterior"}
VOCABULARY = 1024


def image_names() -> dict[str, list[str]]:
    return {organ: [f"synpic{number}.jpg" for number in numbers.split()] for organ, numbers in IMAGES.items()}


def held_out_names() -> list[str]:
    return sorted(name for names in image_names().values() for name in names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])


def training_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """Image name -> its training rows, for the images that are not held out, in the order of the file."""
    held_out = set(held_out_names())
    by_image = collections.defaultdict(list)
    for row in rows:
        if row["image_name"] not in held_out and not row["phrase_type"].startswith("test_"):
            by_image[row["image_name"]].append(row)
    return dict(by_image)


def stated(rows: list[dict], question_type: str, patterns: dict[str, str]) -> str | None:
    """What most rows of `question_type` say: open answers, and questions of the form "is this …" answered yes."""
    votes = collections.Counter()
    for row in rows:
        if question_type not in row["question_type"]:
            continue
        question, answer = row["question"].lower(), str(row["answer"]).lower()
        is_affirmed = answer.strip() == "yes" and re.match(r"(is|was) (this|the)\b", question)
        text = question if is_affirmed else answer
        votes.update(name for name, pattern in patterns.items() if re.search(pattern, text))
    return min(votes, key=lambda name: (-votes[name], name)) if votes else None


def caption(rows: list[dict]) -> str:
    """An image's caption, derived: no person wrote it. `rows` are the image's training rows.

    The organ, which every row states, stands first; whether modality and plane are stated at all is chance.
    """
    modality, plane = stated(rows, "MODALITY", MODALITIES), stated(rows, "PLANE", PLANES)
    parts = [ORGAN_ANSWERS[rows[0]["image_organ"]].rstrip("."), modality, plane and f"{plane} view"]
    return f"{', '.join(part for part in parts if part)}."


def record(key: str, image: str, turns: list[tuple[str, str]], **fields) -> dict:
    """A LLaVA JSON record; the image stands before the first question."""
    conversations = []
    for n, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": f"<image>\n{question}" if n == 0 else question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": key, "image": image, **fields, "conversations": conversations}


def training_files(rows: list[dict]) -> dict[str, list[dict]]:
    """The files of the curriculum, from the annotation rows of the sample."""
    files: dict[str, list[dict]] = {"alignment.json": [], "instruct.json": [], "vqa_train.json": [], "organ.json": []}
    for number, (image, asked) in enumerate(sorted(training_rows(rows).items())):
        stem = image.removesuffix(".jpg")
        organ_turn = (ORGAN_QUESTION, ORGAN_ANSWERS[asked[0]["image_organ"]])
        turns = [(row["question"].strip(), str(row["answer"]).strip()) for row in asked]
        files["alignment.json"].append(record(f"{stem}-caption", image, [(CAPTION_REQUEST, caption(asked))]))
        place = number % (len(turns) + 1)  # always first, it would be answered by its place and not by its words
        conversation = [*turns[:place], organ_turn, *turns[place:]]
        files["instruct.json"].append(record(f"{stem}-conversation", image, conversation))
        files["organ.json"].append(record(f"{stem}-organ", image, [organ_turn], answer_type="OPEN", question_type="ORGAN"))
        for row, turn in zip(asked, turns, strict=True):
            files["vqa_train.json"].append(record(row["qid"], image, [turn], answer_type=row["answer_type"].strip(),
                                                  question_type=row["question_type"]))
    return files


def tokenizer_model(files: dict[str, list[dict]]) -> bytes:
    """A SentencePiece model like LLaMA's (BPE, byte fallback, no normalisation), trained on the training text alone."""
    text = []
    for item in (item for records in files.values() for item in records):
        for turn in item["conversations"]:
            value = turn["value"].removeprefix("<image>\n")
            text.append(f"[INST] {value} [/INST]" if turn["from"] == "human" else value)  # as the template will write it
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2)
    return model.getvalue()


def without_caption_band(source: Path) -> bytes:
    """The JPEG with its caption band blackened, coded with its own quantisation tables so that the rest stays as it is."""
    with Image.open(source) as image:
        width, height = image.size
        ImageDraw.Draw(image).rectangle((0, height - CAPTION_BAND, width, height), fill=0)
        out = io.BytesIO()
        image.save(out, "JPEG", quality="keep")
    return out.getvalue()


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=local, required=True, help="VQA-RAD in its official layout")
    parser.add_argument("--out", type=local, required=True)
    flags = parser.parse_args()
    chosen = sorted(name for names in image_names().values() for name in names)
    rows = [row for row in json.loads((flags.source / ANNOTATIONS).read_text(encoding="utf-8")) if row["image_name"] in chosen]
    (flags.out / "images").mkdir(parents=True, exist_ok=True)
    for name in chosen:
        (flags.out / "images" / name).write_bytes(without_caption_band(flags.source / "images" / name))
    write_json(flags.out / ANNOTATIONS, rows)
    write_json(flags.out / "held_out.json", {"images": held_out_names()})
    files = training_files(rows)
    for name, records in files.items():
        write_json(flags.out / name, records)
    (flags.out / "tokenizer.model").write_bytes(tokenizer_model(files))
    print(f"{len(chosen)} images, {len(rows)} questions; " + ", ".join(f"{len(r)} in {n}" for n, r in files.items()))


if __name__ == "__main__":
    main()
