"""`--against`, published numbers, TensorBoard's scalars: what `eval.py` lays beside a score, on the command line and on the disk."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from llavamed_jax.cli import eval as cli
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.evaluation import published
from llavamed_jax.evaluation.report import tensorboard
from llavamed_jax.evaluation.scoring import registry, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.utils.files import to_jsonl

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
CONFIG = str(ROOT / "configs" / "eval" / "vqa_rad.py")
SAMPLES = read_vqa_rad(SAMPLE, "test")


def write(path, text_of, model="m"):
    lines = [{"question_id": s.question_id, "text": text_of(s), "model_id": model} for s in SAMPLES]
    path.write_text(to_jsonl(lines))
    return lines


def evaluate(workdir, predictions, *options):
    where = ["--config", CONFIG, f"--config.data.root={SAMPLE}", "--workdir", str(workdir)]
    return cli.main([*where, "--predictions", str(predictions), *options])


# --- another model's answers ---


def test_two_files_are_compared_in_pairs(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", lambda s: s.answer)
    second = write(tmp_path / "b.jsonl", lambda s: "yes" if s.answer_type == "CLOSED" else s.answer, "other/model")
    assert evaluate(tmp_path / "w", tmp_path / "a.jsonl", "--against", str(tmp_path / "b.jsonl")) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    against = metrics["against"]
    assert list(against) == ["file", "model_id", "sha256", "paper", "strict"]
    assert against["file"] == str(tmp_path / "b.jsonl") and against["model_id"] == "other/model"
    assert against["sha256"] == hashlib.sha256((tmp_path / "b.jsonl").read_bytes()).hexdigest()
    for family in ("paper", "strict"):
        other = score.score(AnswerSet(SAMPLES, second, read_vqa_rad(SAMPLE, "train")))[family]
        for name, row in against[family].items():
            assert list(row) == ["value", "other", "difference", "low", "high", "p"]
            assert row["value"] == metrics[family][name] and row["other"] == other[name]
    row = against["strict"]["closed_accuracy"]
    assert row["value"] == 100 and 0 < row["other"] < 100 and row["difference"] == 100 - row["other"] and row["p"] < 0.01
    assert against["strict"]["open_exact"]["difference"] == 0 and against["strict"]["open_exact"]["p"] == 1
    table = score.compare(*(AnswerSet(SAMPLES, each, read_vqa_rad(SAMPLE, "train")) for each in (first, second)))
    assert against["strict"] == table["strict"]
    out = capsys.readouterr().out
    assert f"against {tmp_path / 'b.jsonl'}:" in out and f"{row['other']:.1f}" in out and f"{row['difference']:.1f}" in out
    page = (tmp_path / "w" / "report.html").read_text()
    assert "Against another model" in page and "other/model" in page and against["sha256"][:12] in page


@pytest.mark.parametrize("spoil, message", [
    (lambda lines: lines[1:], f"1 without a prediction ({SAMPLES[0].question_id})"),
    (lambda lines: [*lines, lines[0]], f"1 predicted more than once ({SAMPLES[0].question_id})"),
    (lambda lines: [*lines, lines[0] | {"question_id": "strange"}], "1 predicted but not asked (strange)"),
    (lambda lines: lines[2:] + [lines[3], {"question_id": 0, "text": ""}], f"2 without a prediction ({SAMPLES[0].question_id}, "),
    (lambda lines: [lines[0] | {"text": None}, *lines[1:]], 'line 1 is not a prediction; an object with "question_id" and "text" was expected'),
    (lambda lines: [lines[0] | {"text": ["yes"]}, *lines[1:]], 'line 1 is not a prediction; an object with "question_id" and "text" was expected'),
    (lambda lines: [lines[0], {"text": "no id"}], 'line 2 is not a prediction; an object with "question_id" and "text" was expected'),
])  # fmt: skip
@pytest.mark.parametrize("which", ["--predictions", "--against"])
def test_files_that_do_not_fit_are_one_sentence(spoil, message, which, tmp_path, capsys):
    lines = write(tmp_path / "good.jsonl", lambda s: "yes")
    (tmp_path / "bad.jsonl").write_text(to_jsonl(spoil(lines)))
    files = ["good.jsonl", "bad.jsonl"] if which == "--against" else ["bad.jsonl", "good.jsonl"]
    assert evaluate(tmp_path / "w", tmp_path / files[0], "--against", str(tmp_path / files[1])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert "bad.jsonl" in error or which == "--predictions"
    assert not (tmp_path / "w").exists(), "what fails leaves nothing"


@pytest.mark.parametrize("content, message", [
    (b'{"question_id": 1, "text": "caf\xe9"}\n', "are not UTF-8 text (byte 31)"),
    (b"\xff\xfe{\x00", "are not UTF-8 text (byte 0)"),
    (b"", "without a prediction"), (b"[]", "line 1 is not a prediction"), (b"\0\0\0", "line 1 is not valid JSON"),
    (b'{"question_id": 1, "text": "x"', "line 1 is not valid JSON"),
])  # fmt: skip
def test_files_that_are_no_predictions_are_one_sentence(content, message, tmp_path, capsys):
    write(tmp_path / "good.jsonl", lambda s: "yes")
    (tmp_path / "bad.jsonl").write_bytes(content)
    for files in (("bad.jsonl", "good.jsonl"), ("good.jsonl", "bad.jsonl"), ("good.jsonl", "."), ("good.jsonl", "absent.jsonl")):
        assert evaluate(tmp_path / "w", tmp_path / files[0], "--against", str(tmp_path / files[1])) == 1 + ("absent.jsonl" in files)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error or {".": "is a directory; a file was expected", "absent.jsonl": "cannot be read: "}[files[1]] in error


# --- published numbers ---


def test_the_papers_table():
    rows = {(row.name, row.dataset, row.protocol): row.values for row in published.ROWS}
    assert rows["from_llava", "vqa_rad", "paper"] == {"recall": 61.52, "closed_accuracy_substring": 84.19}
    assert rows["biomedclip", "slake", None] == {"recall": 87.11, "closed_accuracy_substring": 86.78}
    assert rows["llava", "pathvqa", None] == {"recall": 7.74, "closed_accuracy_substring": 63.20}
    assert len(rows) == len(published.ROWS) == 13 and rows["from_vicuna", "vqa_rad", "clean"]["recall"] == 32.5791
    assert {name for values in rows.values() for name in values} <= set(registry.names_of("paper"))


@pytest.mark.parametrize("change, reason", [
    ({}, None),
    ({"dataset": "slake", "n_open": 645, "n_closed": 416, "protocol": "clean"}, None),
    ({"dataset": "omnimed"}, "the paper has no numbers for omnimed"),
    ({"split": "held_out"}, "these questions are from held_out"),
    ({"dataset": "slake", "split": "validation"}, "these questions are from validation"),
    ({"n_open": 60}, "these are 60 open and 272 closed questions, and the paper's test split has 179 and 272"),
    ({"n_open": 180, "n_closed": 271}, "these are 180 open and 271 closed questions, and the paper's test split has 179 and 272"),
    ({"name": ""}, "the config key published does not name the model"),
    ({"protocol": "clean"}, "the published from_llava was trained on other rows of vqa_rad (protocol paper) than this protocol, clean"),
])  # fmt: skip
def test_published_numbers_stand_only_where_they_belong(change, reason):
    asked = dict(dataset="vqa_rad", split="test", protocol="paper", n_open=179, n_closed=272, name="from_llava") | change
    found = published.beside(**asked)
    if reason is None:
        assert found["model"] == "LLaVA-Med (From LLaVA), 15 epochs" and set(found["values"]) == set(published.METRICS)
    else:
        assert set(found) == {"reason"} and reason in found["reason"] and found["reason"].endswith(".")


def test_a_published_model_is_named_in_the_config(tmp_path, capsys):
    write(tmp_path / "p.jsonl", lambda s: "yes")
    assert evaluate(tmp_path / "w", tmp_path / "p.jsonl", "--config.published=llava_med") == 2
    assert "published is 'llava_med'; empty or one of llava, from_llava, from_vicuna, biomedclip was expected" in capsys.readouterr().err
    assert evaluate(tmp_path / "w", tmp_path / "p.jsonl", "--config.published=from_llava") == 0
    page = (tmp_path / "w" / "report.html").read_text()
    assert "No published numbers are shown: these are" in page and "84.2" not in page, "the sample is a cut of the set"


# --- TensorBoard ---


def events(path):
    """The events of a file: each a length, its checksum, the event, its checksum."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12: place + 12 + length])
        place += length + 16


def scalars(folder):
    (path,) = folder.glob("*.eval")
    return {value.tag: (event.step, value.simple_value) for event in events(path) for value in event.summary.value}


def test_tensorboard_receives_every_scalar_once(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", lambda s: s.answer)
    write(tmp_path / "b.jsonl", lambda s: "yes")
    trained = tmp_path / "w" / "tensorboard" / "events.out.tfevents.1.host"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"a training run's")
    for _ in range(2):
        assert evaluate(tmp_path / "w", tmp_path / "a.jsonl", "--against", str(tmp_path / "b.jsonl")) == 0
    found = scalars(tmp_path / "w" / "tensorboard")
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    for family in ("paper", "strict", "baselines"):
        for name, value in metrics[family].items():
            if isinstance(value, float):
                assert found[f"eval/vqa_rad_test/{family}/{name}"] == (0, pytest.approx(value, rel=1e-6, abs=1e-30))
    assert found["eval/vqa_rad_test/against/strict/open_f1/p"][1] < 0.05
    assert trained.read_bytes() == b"a training run's"


def test_the_step_is_the_checkpoints():
    for path, step in (("runs/a/checkpoints/400", 400), ("runs/a/checkpoints/7/", 7), ("x/checkpoint-1200", 1200), ("checkpoint-3", 3),
                       ("runs/a", 0), ("runs/400", 0), ("preset:small", 0), ("owner/name@checkpoint-5x", 0), ("", 0)):  # fmt: skip
        assert tensorboard.step_of(path) == step


def test_controls_judge_and_organ_are_scalars_too(tmp_path):
    table = {"closed_accuracy": 50.0, "closed_accuracy_low": None}
    metrics = {"dataset": "d", "split": "s", "strict": table, "paper": {"recall": 1.5}, "baselines": {"majority_closed_answer": "no"},
               "judged": {"open_accuracy": 25.0, "open_accuracy_low": 20.0, "open_accuracy_high": None, "n_open": 4},
               "organ": {"n": 3, "accuracy": 75.0, "exchanged": 30.0, "majority": 40.0, "shifts": [30.0]},
               "control": {"kind": "image", "seed": 3, "strict": table, "difference": {"closed_accuracy_p": 0.25},
                           "noise": {"kind": "noise", "seed": 3, "size": 336, "strict": table, "difference": {"closed_accuracy": 0.0}}}}
    tensorboard.write(tmp_path, metrics, 12)
    assert scalars(tmp_path / "tensorboard") == {
        "eval/d_s/strict/closed_accuracy": (12, 50.0), "eval/d_s/paper/recall": (12, 1.5),
        "eval/d_s/judged/open_accuracy": (12, 25.0), "eval/d_s/judged/open_accuracy_low": (12, 20.0),
        "eval/d_s/organ/accuracy": (12, 75.0), "eval/d_s/organ/exchanged": (12, 30.0), "eval/d_s/organ/majority": (12, 40.0),
        "eval/d_s/control_exchanged/strict/closed_accuracy": (12, 50.0),
        "eval/d_s/control_exchanged/difference/closed_accuracy_p": (12, 0.25),
        "eval/d_s/control_noise/strict/closed_accuracy": (12, 50.0), "eval/d_s/control_noise/difference/closed_accuracy": (12, 0.0),
    }  # fmt: skip
