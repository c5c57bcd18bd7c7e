"""Each set of predictions is joined once and scored once, whatever else an evaluation makes of it."""

import json
import sys
from collections import Counter

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli import eval_parts
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.evaluation import metrics, run  # noqa: F401  (run: every module that holds a counted function)
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.scoring import captions, predictions, statistics, strict
from llavamed_jax.utils.files import to_jsonl
from tests.support.answerers import StandIn
from tests.support.chat_set import ROOT, SAMPLE

SAMPLES = read_vqa_rad(SAMPLE, "test")
OPEN, CLOSED = (sum(sample.answer_type == kind for sample in SAMPLES) for kind in ("OPEN", "CLOSED"))
FAMILIES = 2  # paper and strict


class Says(StandIn):
    """Answers with the question's last word, and so sometimes right, sometimes wrong."""

    name, model = "says", None

    def answers(self, questions, asked, generation, failed):
        yield from ((i, Answer("yes" if i % 2 else questions[i][0].split()[-1], "stop")) for i in asked)


@pytest.fixture
def counts(monkeypatch):
    """How often each function is called, through whichever module."""
    found = Counter()

    def count(module, name):
        real = getattr(module, name)

        def counted(*args, **kwargs):
            found[name] += 1
            return real(*args, **kwargs)

        for each in [each for key, each in sys.modules.items() if key.startswith("llavamed_jax.evaluation")]:
            if getattr(each, name, None) is real:
                monkeypatch.setattr(each, name, counted)

    for module, name in ((predictions, "join"), (predictions, "check_asked"), (metrics, "open_values"), (metrics, "closed_values"),
                         (metrics, "bleu"), (strict, "open_scores"), (statistics, "resample"), (strict, "read_choice"),
                         (captions, "item_values")):
        count(module, name)
    monkeypatch.setattr(eval_parts, "local", lambda args: Says())
    return found


def num_groups(workdir):
    """How many parts of the questions have intervals of their own in `metrics.json`."""
    return sum(map(len, json.loads((workdir / "metrics.json").read_text())["groups"].values()))


def evaluate(workdir, name, *more):
    config = str(ROOT / "configs" / "eval" / f"{name}.py")
    return cli.main(["--config", config, "--workdir", str(workdir), *map(str, more)])


def test_controls_and_comparison_score_each_set_once(counts, tmp_path):
    """Own images, images exchanged, noise, and another model's file: four sets."""
    (tmp_path / "b.jsonl").write_text(to_jsonl([{"question_id": s.question_id, "text": str(s.answer)} for s in SAMPLES]))
    where = [f"--config.data.root={SAMPLE}", "--checkpoint", "runs/x", "--control", "image", "--against", tmp_path / "b.jsonl"]
    assert evaluate(tmp_path / "w", "vqa_rad", *where) == 0
    assert counts == {"join": 4, "check_asked": 4, "open_values": 4 * OPEN, "closed_values": 4 * CLOSED, "bleu": 4 * OPEN,
                      "open_scores": 4 * OPEN, "resample": 4 * FAMILIES + num_groups(tmp_path / "w")}  # fmt: skip
    found = json.loads((tmp_path / "w" / "metrics.json").read_text())
    assert found["against"]["strict"]["open_f1"]["other"] == 100 and found["control"]["noise"]["difference"]["open_f1"] == 0


def test_a_file_is_joined_once(counts, tmp_path):
    (tmp_path / "b.jsonl").write_text(to_jsonl([{"question_id": s.question_id, "text": "yes"} for s in SAMPLES]))
    assert evaluate(tmp_path / "w", "vqa_rad", f"--config.data.root={SAMPLE}", "--predictions", tmp_path / "b.jsonl") == 0
    assert counts == {"join": 1, "check_asked": 1, "open_values": OPEN, "closed_values": CLOSED,
                      "bleu": OPEN, "open_scores": OPEN, "resample": FAMILIES + num_groups(tmp_path / "w")}  # fmt: skip


@pytest.mark.parametrize("name, row, scored", [
    ("choices", {"question": "Which?", "options": ["left", "right"], "answer": "left"}, "read_choice"),
    ("captions", {"caption": "A clear lung."}, "item_values"),
])  # fmt: skip
def test_choices_and_captions_are_read_once(name, row, scored, counts, tmp_path):
    pictures = sorted((SAMPLE / "images").iterdir())[:3]
    rows = [row | {("question_id" if name == "choices" else "id"): i, "image": picture.name} for i, picture in enumerate(pictures)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    where = [f"--config.data.root={tmp_path}", f"--config.data.images={SAMPLE / 'images'}", "--checkpoint", "x", "--control", "image"]
    assert evaluate(tmp_path / "w", name, *where) == 0
    assert counts.pop("resample") == 3 * (3 if name == "captions" else 2) + num_groups(tmp_path / "w")
    assert counts == {"join": 3, "check_asked": 3, scored: 9}
