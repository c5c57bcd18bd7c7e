"""193 chat questions in the format of LLaVA-Med's, made of `samples/vqa_rad`: 143 of a conversation, 50 descriptions, the
published numbers in each domain, eight with two domains, 14 without mentions."""

import json
import re
from pathlib import Path

from llavamed_jax.datasets.qa50 import FILE
from llavamed_jax.datasets.vqa_rad import read_vqa_rad

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
CONFIG = str(ROOT / "configs" / "eval" / "chat.py")
_KEYS = ("chest_xray", "mri", "ct_scan", "histology", "gross")  # in the published file's order
_PLAN = (
    [("chest_xray",)] * 33 + [("chest_xray", "ct_scan")] * 4 + [("mri",)] * 38 + [("histology",)] * 40 + [("histology", "gross")] * 4
    + [("gross",)] * 34 + [("ct_scan",)] * 40
)  # fmt: skip


def chat_records() -> list[dict]:
    """The records; images come several questions at a time, as in the published file."""
    rows = {(row.image.name, row.question): row for row in read_vqa_rad(SAMPLE, "all")}
    rows = [rows[key] for key in sorted(rows)[:193]]
    records = []
    for i, (row, domains) in enumerate(zip(rows, _PLAN, strict=True)):
        mention = {"tokens": f"It's the {row.organ.lower()} ( Fig. {i} ) .", "entities": [{"type": "figure", "entity_id": str(i)}]}
        records.append({
            "question_id": i, "image": row.image.name, "pair_id": row.image.stem, "text": f"{row.question}\n<image>",
            "gpt4_answer": f"The answer is {row.answer}.", "fig_caption": f"{row.organ} of patient {row.image.stem}",
            "in_text_mention": None if i % 14 == 3 else [mention], "domain": {key: key in domains for key in _KEYS},
            "type": "detailed_description" if i % 4 == 1 or i in (2, 6) else "conversation", "fig_label": f"Figure {i}",
        })  # fmt: skip
    return records


def write_chat_set(folder: Path, records: list[dict] | None = None) -> Path:
    """Writes the file into a folder; the images are the sample's own (`images.load`)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text("".join(json.dumps(record) + "\n" for record in records or chat_records()), encoding="utf-8")
    return path


def chat_answers(records: list[dict]) -> list[dict]:
    """Predictions of which each is a text of its own."""
    return [{"question_id": each["question_id"], "text": f"answer {each['question_id']}", "model_id": "tested"} for each in records]


REMINDER = "Mind the form"


def scores(number: int) -> tuple[int, int]:
    """What the judge of the tests gives the answer of this number."""
    return 5 + number % 6, 1 + number * 7 % 10


def is_unread(number: int, is_reminded: bool) -> bool:
    """Whether its reply about this answer cannot be read: one in ten, of which one in seven not at the second time either."""
    return number % 10 == 4 and (not is_reminded or number % 70 == 4)


def judge(body: dict) -> str:
    """Replies to a chat prompt of `chat_answers`."""
    text = body["messages"][-1]["content"]
    number = int(re.search(r"\[Assistant 2\]\nanswer (\d+)\n", text)[1])
    if is_unread(number, REMINDER in text):
        return "I give them 9/10 and 7/10."
    return "{} {}\nBecause of the caption.".format(*scores(number))
