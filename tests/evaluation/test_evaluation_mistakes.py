"""What people do to an evaluation by mistake: one sentence, the right exit status, and nothing of what there was is lost."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.results import locked
from llavamed_jax.evaluation.scoring.predictions import join, read_predictions
from tests.support.openai_server import OpenAiServer, yes_or_no
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
ARGV = ["--config", str(ROOT / "configs/eval/vqa_rad.py"), f"--config.data.root={SAMPLE}"]
TESTED = read_vqa_rad(SAMPLE, "test", "clean")


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"question_id": sample.question_id, "text": "yes"}) + "\n" for sample in TESTED))
    return path


@pytest.mark.parametrize(("more", "status", "sentence"), [
    (["--config.generation.temperature=none"], 2, "generation.temperature is none; a number was expected"),
    (["--config.generation.max_new_tokens=none"], 2, "generation.max_new_tokens is none"),
    (["--config.seed=none"], 2, "seed is none"),
    (["--config.judge.max_tokens=none", "--config.judge.model=x"], 2, "judge.max_tokens is none"),
    (["--config.judge.timeout=nan", "--config.judge.model=x"], 2, "timeout is nan; more than 0 seconds was expected"),
    (["--workdir", "a" * 300], 1, "cannot be written to: File name too long"),
    (["--config.data.trained_on=IMAGE"], 1, "data.trained_on has no usable training data: none of its "),
    (["--config.data.trained_on=PREDICTIONS"], 1, "has no conversations; a list of {from, value} was expected"),
    (["--config.data.root=SLAKE"], 1, "test.json does not exist; SLAKE has the splits train and validation (data.split)")])
def test_a_mistake_is_one_sentence(more, status, sentence, predictions, tmp_path, capsys):
    slake = tmp_path / "set"
    slake.mkdir()
    for name in ("train", "validate"):
        (slake / f"{name}.json").write_text("[]")
    image = next((SAMPLE / "images").iterdir())
    words = {"IMAGE": str(image), "PREDICTIONS": str(predictions), "SLAKE": str(slake)}
    for word, path in words.items():
        more, sentence = [each.replace(word, path) for each in more], sentence.replace(word, path)
    argv = instead([*ARGV, "--workdir", str(tmp_path / "w"), "--predictions", str(predictions)], more)
    if str(slake) in " ".join(more):
        argv[1] = str(ROOT / "configs/eval/slake.py")
    assert cli.main(argv) == status
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "w").exists()


@pytest.mark.parametrize("flag", [["--dry_run"], ["--against", "x"]])
def test_a_training_file_is_not_written_in_a_dry_run(flag, tmp_path, capsys):
    assert cli.main([*ARGV, "--write_llava", str(tmp_path / "x.json"), *flag]) == 2
    assert f"{flag[0]} cannot be used with --write_llava" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_predictions_may_begin_with_a_mark_of_byte_order(predictions):
    plain = read_predictions(predictions)
    predictions.write_bytes(b"\xef\xbb\xbf" + predictions.read_bytes())
    assert read_predictions(predictions) == plain and len(plain) == len(TESTED)
    predictions.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text .byte 0.; lines of JSON were expected"):
        read_predictions(predictions)


def test_a_long_id_is_cut_in_the_sentence():
    with pytest.raises(UserError, match=r"1 predicted but not asked \(a{80}…\)$"):
        join([], [{"question_id": "a" * 5000, "text": ""}])


def test_what_a_model_was_trained_on_counts_what_could_not_be_read(predictions, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": 1, "image": "gone.png", "conversations": turns}, {"id": 2}]
    (tmp_path / "train.json").write_text(json.dumps(records))
    argv = [*ARGV, "--workdir", str(tmp_path / "w"), "--predictions", str(predictions)]
    assert cli.main([*argv, f"--config.data.trained_on={tmp_path / 'train.json'}"]) == 0
    assert f"warning: 1 of 2 records and 1 of 1 images of {tmp_path / 'train.json'} cannot be read" in capsys.readouterr().out


def test_two_evaluations_do_not_share_a_workdir(predictions, tmp_path, capsys):
    """Their answers would lie in one file, under the key of the one that came last."""
    argv = [*ARGV, "--workdir", str(tmp_path / "w"), "--predictions", str(predictions)]
    (tmp_path / "w").mkdir()
    with locked(tmp_path / "w"):
        assert cli.main(argv) == 1
        assert capsys.readouterr().err == (
            f"error: the workdir {tmp_path / 'w'} is in use by another evaluation; wait until it ends, or name another workdir\n")
        assert not list((tmp_path / "w").iterdir())
    assert cli.main(argv) == 0


def test_a_second_evaluation_is_refused_while_one_asks_and_not_after_it_was_killed(tmp_path):
    workdir, first = tmp_path / "w", None
    with OpenAiServer(yes_or_no, delay=0.2) as server:
        argv = [*ARGV, "--endpoint", server.url, "--model", "tiny", "--concurrency", "2", "--workdir", str(workdir)]
        try:
            first = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *argv], cwd=ROOT, stderr=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL)
            until = time.monotonic() + 60
            while len(server.log) < 4 and time.monotonic() < until:
                time.sleep(0.02)
            assert cli.main([*argv, "--config.generation.max_new_tokens=3"]) == 1, "another configuration, the same workdir"
            before = (workdir / "predictions.jsonl.partial").read_bytes()
        finally:
            first.kill()
            first.wait()
        assert before.count(b"\n") >= 3 and (workdir / "predictions.jsonl.partial").read_bytes().startswith(before)
        server.stopping.set()  # no more delay
        assert cli.main(argv) == 0, "the kernel let go of the killed one's"
        assert {each.body["max_tokens"] for each in server.log} == {1024}
    assert len(read_predictions(workdir / "predictions.jsonl")) == len(TESTED)
    assert not list(workdir.glob("*.partial"))


def test_a_dry_run_says_what_controls_add(tmp_path, capsys):
    argv = [*ARGV, "--workdir", str(tmp_path / "w"), "--checkpoint", "preset:small", "--dry_run", "--control", "image"]
    assert cli.main(argv) == 0
    assert f"{len(TESTED)} questions, each three times: with its image, with another one, with noise" in capsys.readouterr().out
