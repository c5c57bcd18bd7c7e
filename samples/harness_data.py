"""SLAKE as lmms-eval and VLMEvalKit read it from the disk, since neither finds it without a hub.

    python samples/harness_data.py --source FOLDER --out DIR [--split validation] [--most N]

FOLDER is SLAKE in its official layout. The English questions of the split are written three times:

    DIR/lmms/slake_local.yaml    a task for lmms-eval (`--include_path DIR/lmms --tasks slake_local`): its own prompt and rule
    DIR/LMUData/SLAKE_*.tsv      two tables for VLMEvalKit: questions about yes or no, and all others
    DIR/slake/                   the same questions in the official layout, for `eval.py`
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.datasets import detect  # noqa: E402
from llavamed_jax.datasets.rows import read_rows  # noqa: E402
from llavamed_jax.datasets.sample import VqaSample  # noqa: E402
from llavamed_jax.datasets.slake import read_slake  # noqa: E402
from llavamed_jax.evaluation.scoring import vlmevalkit  # noqa: E402
from llavamed_jax.utils.files import write_text  # noqa: E402

TASK = "slake_local"
TABLES = {"SLAKE_YORN": "ImageYORNDataset", "SLAKE_GQA": "ImageVQADataset"}  # VLMEvalKit's name of a set -> its class
# What is behind `slake_en` of lmms-eval, with images that lie on the disk.
_YAML = """dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
task: slake_local
test_split: test
output_type: generate_until
process_docs: !function utils.process_docs
doc_to_visual: !function utils.slake_doc_to_visual
doc_to_text: !function utils.slake_doc_to_text
doc_to_messages: !function utils.slake_doc_to_messages
doc_to_target: "answer"
process_results: !function utils.slake_process_results
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
metric_list:
  - metric: slake_accuracy
    aggregation: !function utils.slake_aggregate_accuracy
    higher_is_better: true
  - metric: slake_open_accuracy
    aggregation: !function utils.slake_aggregate_open_accuracy
    higher_is_better: true
  - metric: slake_closed_accuracy
    aggregation: !function utils.slake_aggregate_closed_accuracy
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
metadata:
  version: 0.0
"""
_UTILS = '''"""lmms-eval's own functions for SLAKE; only the images come from the disk."""

import datasets
from lmms_eval.tasks.slake.utils import *
from lmms_eval.tasks.slake.utils import slake_process_docs_en


def process_docs(dataset):
    return slake_process_docs_en(dataset).cast_column("image", datasets.Image())
'''


def for_lmms_eval(samples: Sequence[VqaSample], out: Path) -> None:
    """Writes a task: `slake_local.yaml`, `utils.py` and `questions.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"qid": s.question_id, "img_name": str(s.image), "image": str(s.image), "question": s.question, "answer": str(s.answer),
             "q_lang": s.language, "answer_type": s.answer_type, "modality": s.modality, "content_type": s.question_type} for s in samples]
    write_text(out / f"{TASK}.yaml", _YAML)
    write_text(out / "utils.py", _UTILS)
    write_text(out / "questions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def for_vlmevalkit(samples: Sequence[VqaSample], out: Path) -> None:
    """Writes `SLAKE_YORN.tsv` and `SLAKE_GQA.tsv`. An image stands in its first row; the others name that row's index."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        chosen = [s for s in samples if vlmevalkit.is_yes_no(str(s.answer)) == (name == "SLAKE_YORN")]
        first: dict[str, object] = {}
        with open(out / f"{name}.tsv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "image", "question", "answer", "category"])
            for s in chosen:
                place = first.setdefault(str(s.image), s.question_id)
                image = base64.b64encode(Path(s.image).read_bytes()).decode() if place == s.question_id else place
                answer = str(s.answer).capitalize() if name == "SLAKE_YORN" else s.answer
                writer.writerow([s.question_id, image, s.question, answer, s.answer_type])


def for_eval(samples: Sequence[VqaSample], source: Path, out: Path, split: str) -> None:
    """Writes the questions in the official layout; images and training rows are links to the source."""
    out.mkdir(parents=True, exist_ok=True)
    file = detect.split_file(source, split, "slake")
    wanted = {str(s.question_id) for s in samples}
    rows = [row.value for row in read_rows(file, "slake") if str(row["qid"]) in wanted]
    training = [] if split == "train" else [detect.split_file(file.parent, "train", "slake")]
    for path in (out / "imgs", *detect.split_files(out, "train"), *detect.split_files(out, split)):
        path.unlink(missing_ok=True)  # of an earlier source or split
    for path in (file.parent / "imgs", *training):
        (out / path.name).symlink_to(path)
    write_text(out / f"{split}.json", json.dumps(rows, ensure_ascii=False))


def write(source: Path, out: Path, split: str = "validation", most: int | None = None) -> list[VqaSample]:
    """Writes everything; returns the questions.

    Args:
      source: the folder of SLAKE.
      out: the folder of what is written.
      split: `train`, `validation` or `test`.
      most: how many questions, evenly spread over the split; None takes all.
    """
    samples = read_slake(source.resolve(), split, "en")
    if most is not None and most < len(samples):
        samples = [samples[i * len(samples) // most] for i in range(most)]
    for_lmms_eval(samples, out / "lmms")
    for_vlmevalkit(samples, out / "LMUData")
    for_eval(samples, source.resolve(), out / "slake", split)
    return samples


def main() -> int:
    from llavamed_jax.errors import UserError
    from llavamed_jax.utils.paths import local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=local, required=True, help="the folder of SLAKE")
    parser.add_argument("--out", type=local, required=True, help="where everything goes")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--most", type=int, metavar="N", help="only so many questions (default: all)")
    flags = parser.parse_args()
    try:
        samples = write(flags.source, flags.out, flags.split, flags.most)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(samples)} questions in {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
