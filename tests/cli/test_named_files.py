"""Whatever a path names: a pipe that nobody writes to, a device without an end, a folder, a name that no file can have."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llavamed_jax.cli import common
from llavamed_jax.cli import convert as convert_cli
from llavamed_jax.cli import eval as cli
from llavamed_jax.cli import train as train_cli
from llavamed_jax.datasets import records, training
from llavamed_jax.datasets.sample import check_images
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.answering.resume import Partial
from llavamed_jax.evaluation.scoring import leakage
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.utils import files
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
KINDS = {"pipe": "a pipe", "zero": "a device", "random": "a device", "folder": "a directory", "socket": "cannot be read"}


@pytest.fixture
def strange(tmp_path):
    """Kind -> a path of that kind."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's name may only be short
        server.bind("socket.jsonl")
        os.chdir(before)
        found = {kind: tmp_path / f"{kind}.jsonl" for kind in KINDS}
        yield found | {"zero": Path("/dev/zero"), "random": Path("/dev/urandom")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file(strange, kind):
    for read in (files.open_file, files.read_bytes):
        with pytest.raises(UserError, match=KINDS[kind]) as error:
            read(strange[kind], "the file of names")
        assert str(error.value).startswith("the file of names ") and "\n" not in str(error.value)


def test_sizes_and_names(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert files.read_bytes(tmp_path / "a", most=100) == b"x" * 100
    with pytest.raises(UserError, match="at most 0.00 GB were expected"):
        files.read_bytes(tmp_path / "a", most=99)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"sparse has 1099.51 GB; at most 4.29 GB were expected"):
        files.read_bytes(tmp_path / "sparse")
    for name in ("a\0b", "a\ud800"):
        with pytest.raises((UserError, FileNotFoundError)):
            files.read_bytes(name)
    with pytest.raises(UserError, match=r"^'a\\x00b' is not a valid file name$"):
        files.open_file("a\0b")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        files.open_file("a" * 5000)
    with pytest.raises(FileNotFoundError):
        files.open_file(tmp_path / "none")


def complaint(main, words, capsys):
    """(status, the only sentence on stderr)."""
    status = main([str(word) for word in words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    return status, said[0]


EVAL = ["--config", ROOT / "configs/eval/vqa_rad.py", f"--config.data.root={SAMPLE}", "--workdir", "W"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["predictions", "against", "trained_on", "root", "prompt", "cache", "held_out", "config", "chat",
                                   "llava_med", "slake", "pathvqa", "choices", "captions"])
def test_every_file_that_an_evaluation_may_be_given(place, kind, strange, tmp_path, monkeypatch, capsys):
    """One sentence at once, where reading would wait for ever or take all memory."""
    monkeypatch.chdir(tmp_path)
    path = strange[kind]
    (tmp_path / "p.jsonl").write_text("{}\n")
    judge = ["--config.judge.model=m", "--config.judge.endpoint=http://127.0.0.1:1"]
    words = {
        "predictions": [*EVAL, "--predictions", path], "against": [*EVAL, "--predictions", "p.jsonl", "--against", path],
        "trained_on": [*EVAL, "--predictions", "p.jsonl", f"--config.data.trained_on={path}"],
        "root": instead(EVAL, ["--predictions", "p.jsonl", f"--config.data.root={path}"]),
        "prompt": [*EVAL, "--predictions", "p.jsonl", *judge, f"--config.judge.prompt={path}"],
        "cache": [*EVAL, "--predictions", "p.jsonl", *judge, f"--config.judge.cache={path}"],
        "held_out": [*EVAL, "--predictions", "p.jsonl", f"--config.data.held_out={path}"],
        "config": ["--config", path, "--predictions", "p.jsonl", "--workdir", "W"],
        "chat": ["--config", ROOT / "configs/eval/chat.py", "--predictions", "p.jsonl", "--workdir", "W", *judge,
                 f"--config.data.root={path}"],
    }
    of_set = [f"--config.data.root={path}", "--config", ROOT / f"configs/eval/{place}.py", "--predictions", "p.jsonl", "--workdir", "W"]
    status, said = complaint(cli.main, words.get(place, of_set), capsys)
    assert status in (1, 2) and str(path) in said
    if kind != "folder":
        assert KINDS[kind] in said or "does not exist" not in said and ("device" in said or "pipe" in said), said
    assert not (tmp_path / "W").exists() or place in ("predictions",)


@pytest.mark.parametrize("kind", ["pipe", "zero", "random", "socket"])
def test_training_data(kind, strange):
    with pytest.raises(UserError, match=f"^the data file .* {KINDS[kind]}"):
        training.read_training(str(strange[kind]))
    with pytest.raises(UserError, match=f"^the data file .* {KINDS[kind]}"):
        training.read_training([{"path": str(strange[kind]), "images": None, "weight": 1.0}])


@pytest.mark.parametrize("kind", ["pipe", "zero", "random", "socket"])
@pytest.mark.parametrize("place", ["config", "init"])
def test_every_file_that_a_command_line_of_training_may_be_given(place, kind, strange, tmp_path, capsys):
    config = strange[kind] if place == "config" else f"{ROOT / 'configs/demo.py'}:vqa"
    words = ["--config", config, "--workdir", tmp_path / "w"] + ([f"--config.{place}={strange[kind]}"] if place != "config" else [])
    status, said = complaint(train_cli.main, words, capsys)
    assert status in (1, 2) and str(strange[kind]) in said


def test_a_checkpoint_with_pipes_in_it(strange, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        os.mkfifo(tmp_path / "model" / name)
        status, said = complaint(convert_cli.main, ["inspect", tmp_path / "model"], capsys)
        assert status == 1
        if name == "config.json":
            os.unlink(tmp_path / "model" / name)
            (tmp_path / "model" / name).write_text(json.dumps({"model_type": "llava_mistral"}))


def test_a_pipe_is_not_waited_for(strange, tmp_path):
    """The whole command, with a limit of time that it would not keep to."""
    words = [sys.executable, "eval.py", *EVAL[:-1], tmp_path / "w", "--predictions", strange["pipe"]]
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{strange['pipe']} is a pipe; a file was expected" in done.stderr


@pytest.mark.parametrize("words", [
    [*EVAL, "--predictions", "a\0b"], [*EVAL, "--predictions", "p", "--against", "a\0b"], ["--config", "a\0b"], ["--\0", "x"],
    [*EVAL, "--predictions", "p", "--config.data.root=a\0b"], [*EVAL, "--predictions", "p", "--config.data.trained_on=a\0b"],
    [*EVAL, "--checkpoint", "a\0b"], [*EVAL, "--checkpoint", "x", "--tokenizer", "a\0b"], [*EVAL[:-1], "a\0b", "--predictions", "p"],
    [*EVAL, "--endpoint", "http://h", "--model", "a\0b"]])
def test_nul_on_a_command_line(words, capsys):
    status, said = complaint(cli.main, words, capsys)
    assert status == 2 and "NUL character" in said and "\\x00" in said


@pytest.mark.parametrize("error", [
    OSError(36, "File name too long", "a" * 5000), PermissionError(13, "Permission denied", "/root/x"), ValueError("embedded null byte"),
    ValueError("embedded null character in path")])
def test_what_the_system_says_is_one_sentence_whoever_asked_it(error, capsys):
    def fail(argv):
        raise error

    assert common.run(fail, []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 400 and "Traceback" not in said
    assert str(getattr(error, "strerror", None) or "NUL") in said
    with pytest.raises(ConnectionResetError):  # of no file: nobody expected it
        common.run(lambda argv: (_ for _ in ()).throw(ConnectionResetError(104, "reset")), [])


@pytest.mark.parametrize("value", ["'a\\0b'", "('x', 'a\\0b')"])
def test_nul_in_a_config_file(value, tmp_path):
    (tmp_path / "c.py").write_text("from ml_collections import ConfigDict\n"
                                   f"def get_config(arg=''):\n    return ConfigDict(dict(data=dict(root={value})))\n")
    with pytest.raises(UserError, match="the config key 'data.root' contains a NUL character"):
        common.load_config(str(tmp_path / "c.py"))


def test_training_images_that_are_pipes_are_compared_with_nothing(strange, tmp_path):
    image = str(SAMPLE / "images" / "synpic17738.jpg")
    shutil.copy(image, tmp_path / "same.jpg")
    found = leakage._Matches([image, str(strange["pipe"])], [str(tmp_path / "same.jpg"), *map(str, strange.values())])
    assert found.of(image) == [str(tmp_path / "same.jpg")] and found.of(str(strange["pipe"])) == [] and found.num_unreadable == 5
    with pytest.raises(UserError, match="the image .*pipe.jsonl is not a file"):
        check_images([strange["pipe"]])


def test_nul_in_data(tmp_path):
    row = {"id": 1, "image": "a\0b.png", "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    found = records.open_records(tmp_path / "d.json")
    from llavamed_jax.images.load import load_image
    with pytest.raises(UserError):
        load_image(found[0]["image"][0])


# --- answers that are kept ---

HEAD = json.dumps({"answers of": hashlib.sha256(b"{}").hexdigest()})
GOOD = [json.dumps({"question": i, "text": "yes", "finish_reason": "stop", "tokens_cut": 0}) for i in range(3)]
ANSWER = '{"question": 1, "text": "a", "finish_reason": "stop", "tokens_cut": 0}'
SHAPES = [
    "7", "null", "[]", "{}", '"x"', "true", "NaN", "[" * 200_000, '{"a":' * 100_000, "1" * 5000, "\ufffd", '{"answers of": "x"}', HEAD,
    *(ANSWER.replace('"question": 1', f'"question": {value}') for value in ('"1"', "true", "-1", "1.0", "[1]", "null")),
    *(ANSWER.replace('"a"', value) for value in ("7", '{"a": 1}', "null", "[]")), ANSWER.replace('"stop"', "null"),
    ANSWER.replace("0", '"0"'), ANSWER.replace(', "tokens_cut": 0', ""), ANSWER.replace("}", ', "more": 1}'), ANSWER[:15], ANSWER[:-1],
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_a_line_of_another_shape_is_passed_over(shape, tmp_path, capsys):
    """Wherever it stands; and what is whole is kept, behind it too."""
    for name, place in (("a", 1), ("b", 2), ("c", 4)):
        lines = [HEAD, *GOOD]
        lines.insert(place, shape)
        (tmp_path / f"{name}.partial").write_text("\n".join(lines) + "\n")
        found = Partial(tmp_path / name, {})
        assert found.answers == {i: Answer("yes", "stop") for i in range(3)}
        assert "3 answers of an earlier start are reused" in (said := capsys.readouterr().err)
        assert f"warning: {found.path}: 1 of 4 lines are not complete answers and are skipped" in said
        found.add(3, Answer("no", "length", 2, has_question=False))
        assert found.path.read_text().splitlines()[1:4] == GOOD
        assert Partial(tmp_path / name, {}).answers[3] == Answer("no", "length", 2, has_question=False)
        found.remove()
    (tmp_path / "d.partial").write_text(shape + "\n" + "\n".join(GOOD) + "\n")
    if shape != HEAD:
        assert not Partial(tmp_path / "d", {}).answers and "all questions are asked again" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_kept_answers_that_are_no_file(kind, strange, tmp_path):
    (tmp_path / "p.partial").symlink_to(strange[kind])
    with pytest.raises(UserError, match=KINDS[kind]):
        Partial(tmp_path / "p", {})


def test_kept_answers_are_left_alone_until_there_is_one(tmp_path, capsys):
    partial = Partial(tmp_path / "p", {})
    assert not list(tmp_path.iterdir()) and len(partial) == 0
    other = "\n".join([HEAD, *GOOD]) + "\n"
    (tmp_path / "p.partial").write_text(other)
    anew = Partial(tmp_path / "p", {"another": "model"})
    assert "all questions are asked again" in capsys.readouterr().err and (tmp_path / "p.partial").read_text() == other
    anew.add(5, Answer("x", "stop"))
    assert Partial(tmp_path / "p", {"another": "model"}).answers == {5: Answer("x", "stop")}
    anew.remove()
    Partial(tmp_path / "p", {}).remove()
    assert not list(tmp_path.iterdir())


JUDGED = '{"key": "k", "text": "5 6", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2}'


@pytest.mark.parametrize("line", [
    "[" * 200_000, "1" * 5000, JUDGED.replace('"5 6"', '{"a": 1}'), JUDGED.replace("1", "1e999", 1), JUDGED.replace("2", '"2"'),
    JUDGED.replace("1", "Infinity", 1), JUDGED.replace('"k"', "[1]"), JUDGED.replace('"k"', "7"), JUDGED.replace("1", "true", 1)])
def test_a_judge_s_replies_of_another_shape(line, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text("\n".join([line, JUDGED.replace('"k"', '"good"'), ""]))
    cache = ReplyCache(tmp_path / "c.jsonl")
    assert "1 of 2 lines" in capsys.readouterr().err and "k" not in cache and cache.get("good").text == "5 6"
