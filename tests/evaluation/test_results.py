"""The files of an evaluation: whole and of one evaluation, whatever was there before, whatever the disk says and whoever else begins."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli import eval_parts
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import questions, results
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.report import tensorboard
from llavamed_jax.utils.files import to_jsonl
from tests.evaluation.test_joined_predictions import predictions
from tests.support.answerers import StandIn
from tests.support.small_sample import small_sample

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
SAMPLES = read_vqa_rad(SAMPLE, "test")


class Says(StandIn):
    """A model that always says one thing; `seen` counts how often it was asked."""

    def __init__(self, text):
        self.text, self.seen, self.model = text, 0, None

    name = "says"

    def answers(self, questions, asked, generation, failed):
        for i in asked:
            self.seen += 1
            yield i, Answer(self.text, "stop")

    def describe(self):
        return {"template": self.text}

    def depends_on(self):
        return {"what it says": self.text}


def evaluate(monkeypatch, workdir, text="yes", *more):
    model = Says(text)
    monkeypatch.setattr(eval_parts, "local", lambda args: model)
    config = str(ROOT / "configs" / "eval" / "vqa_rad.py")
    status = cli.main(["--config", config, f"--config.data.root={small_sample()}", "--workdir", str(workdir), "--checkpoint",
                       str(SAMPLE), *more])
    return status, model


def score(workdir, file, *more):
    config = str(ROOT / "configs" / "eval" / "vqa_rad.py")
    return cli.main(["--config", config, f"--config.data.root={small_sample()}", "--workdir", str(workdir), "--predictions",
                     str(file), *more])


def contents(workdir):
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


# ---- together or not at all ----

METRICS = {"dataset": "vqa_rad", "split": "test"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an evaluation of a model that says yes."""
    workdir = tmp_path_factory.mktemp("finished") / "w"
    with pytest.MonkeyPatch.context() as patch:
        assert evaluate(patch, workdir)[0] == 0
    return workdir


@pytest.mark.parametrize("victim", ["predictions.jsonl", "report.html", "metrics.json", "events"])
def test_a_disk_that_is_full_leaves_the_results_as_they_were(victim, finished, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(finished, tmp_path / "w")
    before = contents(workdir)

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(victim):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(results.os, "fsync", full)
        if victim == "events":
            patched.setattr(tensorboard, "write", lambda *_: full(os.open("/dev/null", os.O_RDONLY)) or (_ for _ in ()).throw(
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        assert evaluate(monkeypatch, workdir, "no")[0] == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the results in {workdir} cannot be written: No space left on device; the earlier results are unchanged" in error
    assert f"{len(SAMPLES)} answers are kept in {workdir}" in error
    kept = contents(workdir)
    assert kept.pop("predictions.jsonl.partial") and kept == before
    if victim != "metrics.json":  # what lies there is the same for each
        return
    status, model = evaluate(monkeypatch, workdir, "no")
    assert status == 0 and model.seen == 0, "nothing is asked twice"
    assert {line["text"] for line in map(json.loads, open(workdir / "predictions.jsonl"))} == {"no"}
    after = contents(workdir)
    assert after.keys() - {name for name in after if "events" in name} == before.keys() - {name for name in before if "events" in name}
    assert all(b"no" in after[name] and after[name] != before[name] for name in ("metrics.json", "report.html",
                                                                                 "predictions.jsonl"))


@pytest.mark.parametrize("taken, words", [("metrics.json/", "metrics.json is a directory and no file"), ("tensorboard", "tensorboard is not a directory"),
                                          ("report.html/", "report.html is a directory and no file")])
def test_a_name_that_is_taken_changes_nothing(taken, words, tmp_path):
    (tmp_path / taken).mkdir() if taken.endswith("/") else (tmp_path / taken).write_text("x")
    (tmp_path / "a.jsonl").write_text("earlier")
    with pytest.raises(results.UserError) as error:
        results.write_results(tmp_path, {"a.jsonl": "new", "report.html": "new"}, METRICS, {})
    assert str(error.value) == f"the results in {tmp_path} cannot be written: {tmp_path}/{words}; the earlier results are unchanged"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.jsonl", taken.strip("/")]) and (tmp_path / "a.jsonl").read_text() == "earlier"


def test_an_error_among_the_renames_says_what_is_new(tmp_path, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if target.name == "metrics.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)
    monkeypatch.setattr(results.os, "replace", fail)
    (tmp_path / "judged.jsonl").mkdir()  # a directory is no earlier result
    with pytest.raises(results.UserError, match="Input/output error; a.jsonl, tensorboard/.* are new already$"):
        results.write_results(tmp_path, {"a.jsonl": "new"}, METRICS, {})
    monkeypatch.undo()
    results.write_results(tmp_path, {"a.jsonl": "new"}, METRICS, {})
    assert (tmp_path / "judged.jsonl").is_dir() and (tmp_path / "metrics.json").is_file()


def test_what_a_killed_process_left_is_removed_and_a_runs_events_stay(tmp_path, monkeypatch):
    (tmp_path / ".results.abc").mkdir()
    (tmp_path / ".results.abc" / "metrics.json").write_text("half")
    (tmp_path / "tensorboard").mkdir()
    run = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    run.write_bytes(b"of a training run")
    for text in ("yes", "no"):
        assert evaluate(monkeypatch, tmp_path, text)[0] == 0
    assert sorted(path.suffix for path in (tmp_path / "tensorboard").iterdir()) == [".eval",
                                                                                    ".host"] and run.read_bytes() == b"of a training run"
    assert not list(tmp_path.glob(".results*"))


def test_results_of_another_evaluation_do_not_stay_beside_the_new_ones(tmp_path, monkeypatch, capsys):
    assert evaluate(monkeypatch, tmp_path, "yes", "--control", "image")[0] == 0
    (tmp_path / "judge_cache.jsonl").write_text("paid for")
    assert evaluate(monkeypatch, tmp_path, "yes")[0] == 0
    assert (tmp_path / "predictions_control_noise.jsonl").exists(), "of the same model, questions and settings"
    capsys.readouterr()
    assert evaluate(monkeypatch, tmp_path, "no")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge_cache.jsonl", "metrics.json",
                                                                "predictions.jsonl", "report.html", "tensorboard"]
    assert f"{tmp_path / 'predictions_control_noise.jsonl'}: removed, because it belongs to another evaluation" in capsys.readouterr().err


def test_scores_of_a_file_are_not_laid_beside_the_answers_of_another_model(finished, tmp_path, capsys):
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    same.write_text(to_jsonl(predictions(SAMPLES)))
    other.write_text(to_jsonl([each | {"text": "no"} for each in predictions(SAMPLES)]))
    workdir = shutil.copytree(finished, tmp_path / "w")
    before = contents(workdir)
    capsys.readouterr()
    assert score(workdir, other) == 2
    assert "w holds predictions.jsonl of another evaluation" in capsys.readouterr().err
    assert contents(workdir) == before
    assert score(workdir, workdir / "predictions.jsonl") == 0, "scored again in its place"
    assert score(workdir, same) == 0, "the same answers"
    assert score(tmp_path / "u", same) == 0 == score(tmp_path / "u", other), "no answers there"


def test_scores_of_a_file_are_not_laid_beside_a_stopped_evaluation(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(to_jsonl(predictions(SAMPLES)))
    (tmp_path / "w").mkdir()
    line = {"question": 0, "text": "x", "finish_reason": "stop", "tokens_cut": 0}
    (tmp_path / "w" / "predictions.jsonl.partial").write_text('{"answers of": "x"}\n' + json.dumps(line) + "\n")
    assert score(tmp_path / "w", tmp_path / "p.jsonl") == 2
    assert "w holds answers of a stopped evaluation" in capsys.readouterr().err


def test_the_record_of_a_file_is_the_file(tmp_path):
    (tmp_path / "p.jsonl").write_text(to_jsonl(predictions(SAMPLES)))
    assert score(tmp_path / "w", tmp_path / "p.jsonl") == 0
    said = json.loads((tmp_path / "w" / "metrics.json").read_text())["asked"]
    assert said["predictions"] == str(tmp_path / "p.jsonl") and said["template"] is None and said["generation"] is None


# ---- two at once ----


def test_a_directory_that_another_holds_is_not_removed(tmp_path):
    work = tmp_path / "w"
    work.mkdir()
    with results.locked(work):
        with pytest.raises(UserError, match="in use by another evaluation"):
            with results.locked(work):
                pass
        results.remove_empty(work)
        assert work.is_dir(), "the winner's, still empty"
    (work / "file").write_text("")
    results.remove_empty(work)
    assert work.is_dir()
    (work / "file").unlink()
    results.remove_empty(work)
    assert not work.exists()
    results.remove_empty(work)


def test_a_directory_that_was_removed_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    work, real = tmp_path / "w", results._open
    opened = []

    def gone(path):
        descriptor = real(path)
        if not opened:
            os.rmdir(path)  # as another evaluation that came to nothing does
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(results, "_open", gone)
    with results.locked(work):
        assert len(opened) == 2 and work.is_dir()


def test_many_at_once_on_a_new_directory(tmp_path):
    """Of many that begin and end at random one holds it at a time, and none finds its directory gone."""
    work, inside, most, failed = tmp_path / "w", [], [], []

    def begin(n):
        for _ in range(30):
            with contextlib.suppress(FileExistsError):  # of `exist_ok` too, where another thread removes it at this moment
                work.mkdir(exist_ok=True)
            try:
                with results.locked(work):
                    inside.append(n)
                    most.append(len(inside))
                    (work / "file").write_text("")
                    time.sleep(0.0005 * (n % 3))
                    (work / "file").unlink()
                    inside.remove(n)
            except UserError as error:
                if "in use" not in str(error):
                    failed.append(error)
            except OSError as error:
                failed.append(error)
            finally:
                results.remove_empty(work)

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed and max(most) == 1 and not work.exists()


def test_a_directory_that_is_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """`mkdir(exist_ok=True)` finds a directory, looks whether it is one, and it is gone: then it says "File exists"."""
    work, made, left = tmp_path / "w", Path.mkdir, iter([FileExistsError(17, "File exists"), FileNotFoundError(2, "No such file")])

    def mkdir(path, **options):
        if error := next(left, None):
            raise error
        made(path, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with results.locked(work):
        assert work.is_dir()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(FileExistsError(17, "File exists")))
    with pytest.raises(UserError, match="cannot be opened: File exists"), results.locked(tmp_path / "v"):
        pass


def test_two_evaluations_of_one_new_workdir(tmp_path):
    """One is answered, the other refused, and what the first wrote is there."""
    config = f"{ROOT / 'configs' / 'eval' / 'vqa_rad.py'}:demo"
    argv = [sys.executable, "-m", "tests.support.fake_eval", "0.05", "--", "--config", config, "--checkpoint", str(SAMPLE),
            "--workdir", str(tmp_path / "w")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    loser = next(err for process, (_, err) in zip(both, said, strict=True) if process.returncode)
    assert "w is in use by another evaluation; wait until it ends, or name another workdir" in loser
    assert (tmp_path / "w" / "metrics.json").exists() and not list((tmp_path / "w").glob("*.partial"))


# ---- found before anything is asked ----


def own_set(root, count=1, same_id=False, **fields):
    root.mkdir()
    rows = []
    for n in range(2):
        Image.new("RGB", (8, 8), (9 * n, 0, 0)).save(root / f"{n}.png")
        rows.append({"id": 7 if same_id else n, "image": f"{n % count}.png", "answer_type": "CLOSED", **fields,
                     "conversations": [
            {"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]})
    (root / "test.json").write_text(json.dumps(rows))
    return root


@pytest.mark.parametrize("make, more, sentence", [
    (dict(count=1), ["--control", "image"], "the questions have 1 image; at least 2 were expected"),
    (dict(count=2), ["--config.organ_question=true"],
     "the organ question needs at least two images of HEAD, CHEST, ABD; 2 images of None were given"),
    (dict(count=1, organ="HEAD"), ["--config.organ_question=true"],
     "the organ question needs at least two images of HEAD, CHEST, ABD; 1 images"),
    (dict(same_id=True), [], "1 ids that more than one question has (7)"),
])  # fmt: skip
@pytest.mark.parametrize("is_dry", [False, True])
def test_what_cannot_be_is_found_before_a_model_is_loaded(make, more, sentence, is_dry, tmp_path, monkeypatch, capsys):
    root = own_set(tmp_path / "set", **make)
    monkeypatch.setattr(eval_parts, "local", None)
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), f"--config.data.root={root}", "--checkpoint",
            "preset:small", *more]
    assert cli.main([*argv, "--workdir", str(tmp_path / "w"), *(["--dry_run"] if is_dry else [])]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("error: ") == 1 and not (tmp_path / "w").exists()


def test_one_question_on_one_image_is_said_as_one(tmp_path, capsys):
    root = own_set(tmp_path / "set")
    (root / "test.json").write_text(json.dumps(json.loads((root / "test.json").read_text())[:1]))
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), f"--config.data.root={root}", "--checkpoint",
            "preset:small", "--workdir", str(tmp_path / "w"), "--dry_run"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "llava_med test: 1 question on 1 image, 0 open, 1 closed\n" in out and "\n1 question; nothing is judged\n" in out


def test_no_room_for_noise_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    from llavamed_jax.evaluation.scoring import controls

    root = own_set(tmp_path / "set", count=2)
    monkeypatch.setattr(eval_parts, "local", None)
    monkeypatch.setattr(controls.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), f"--config.data.root={root}", "--checkpoint",
            "preset:small", "--control", "image"]
    assert cli.main([*argv, "--workdir", str(tmp_path / "w")]) == 1
    assert "2 pictures of noise need 1 MB; the disk of" in capsys.readouterr().err


# ---- one image, several names ----


def test_an_image_is_one_by_whatever_path(tmp_path, capsys):
    root = own_set(tmp_path / "set", count=2)
    (root / "x").mkdir()
    (root / "link.png").symlink_to("0.png")
    (root / "y").symlink_to(root)
    rows = json.loads((root / "test.json").read_text())
    names = ["0.png", "x/../0.png", "./0.png", "link.png", "y/0.png", str(root / "0.png"), "0.png#frame=1", "1.png"]
    (root / "test.json").write_text(json.dumps([{**rows[0], "id": n, "image": name} for n, name in enumerate(names)]))
    (root / "train.json").write_text(json.dumps([{**rows[0], "image": "x/../1.png"}]))
    samples, training = questions.load_samples("llava_med", str(root), "test", "clean")
    assert [sample.image.name for sample in samples] == ["0.png"] * 6 + ["0.png#frame=1", "1.png"]
    assert training[0].image == samples[-1].image, "in the training rows too, so that overlap is found"
    assert "8 questions on 3 images" in describe(samples, "llava_med", "test")
    (tmp_path / "p.jsonl").write_text(to_jsonl(predictions(samples)))
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), f"--config.data.root={root}", "--workdir",
            str(tmp_path / "w")]
    assert cli.main([*argv, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    assert metrics["n_images"] == 3 == metrics["leakage"]["images"] and metrics["leakage"]["images_in_training"] == 1
    assert "8 questions on 3 images" in capsys.readouterr().out
