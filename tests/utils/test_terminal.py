"""What is printed is cleaned in one place, whoever prints it: no text from outside moves the cursor or hides."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from llavamed_jax import chat
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.cli import common, verify_release
from llavamed_jax.cli import convert as convert_cli
from llavamed_jax.cli import eval as eval_cli
from llavamed_jax.cli.parent import Relay
from llavamed_jax.cli.train import main as train_main
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering import ask
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.pipeline import workers
from llavamed_jax.training.log import MetricsWriter, Sample
from llavamed_jax.utils import terminal
from tests.checkpoints.test_convert import CFG as TINY
from tests.support.numbered import Printing
from tests.support.openai_server import OpenAiServer

ROOT = Path(__file__).resolve().parents[2]
# Clear the screen; a title that rings; one byte CSI; the text that follows runs backwards; back to the line's begin; up; erased.
HOSTILE = "a\x1b[2J\x1b]0;pwned\x07b\x9b31m\u202ec\rd\x1b[A\x08\x7f\u2066e\udcffg\u200b\x00"
SHOWN = r"a\x1b[2J\x1b]0;pwned\x07b\x9b31m\u202ec\rd\x1b[A\x08\x7f\u2066e\udcffg\u200b\x00"
FILE_NAME = "x\x1b[31m\r\u202ey"  # what a file may be called


def is_clean(text: str) -> bool:
    """Nothing but printable characters, and new lines and tabs."""
    return not set(text) & {*map(chr, (*range(9), *range(11, 32), *range(127, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a)))}


def test_what_is_cleaned_and_what_stays():
    assert terminal.clean(HOSTILE) == SHOWN and is_clean(SHOWN)
    for kept in ("two\nlines\tand a tab", "naïve 日本 \U0001f469\u200d\u2695\ufe0f می\u200cخواهم", r"C:\new\x1b", ""):
        assert terminal.clean(kept) == kept
    assert terminal.clean("dos\r\nlines\r\n") == "dos\nlines\n"
    assert terminal.sentence("a\nerror: b\tc") == r"a\nerror: b\tc"
    assert terminal.clean("\u2028\u2029\x85\x0b\x0c\ufeff\u061c") == r"\u2028\u2029\x85\x0b\x0c\ufeff\u061c"
    assert terminal.clean("a\U000e0041\U000e007fb\ufff9\ufffb\u206f") == r"a\U000e0041\U000e007fb\ufff9\ufffb\u206f", "tags, annotations"


class Terminal(io.StringIO):
    """A stream of somebody who watches."""

    def isatty(self):
        return True


def test_every_way_to_print_is_cleaned(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    log = logging.getLogger("tests.terminal")
    older = logging.StreamHandler()  # made before, as absl's is by an import
    monkeypatch.setattr(log, "handlers", [older])
    monkeypatch.setattr(log, "propagate", False)  # pytest's own record of it would go to another process, in UTF-8
    with terminal.cleaned():
        print("print", HOSTILE, file=sys.stderr)
        log.warning("log %s", HOSTILE)
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": f"late {HOSTILE}"}))
        sys.stderr.writelines([f"lines {HOSTILE}", "\n"])
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            sys.excepthook(*sys.exc_info())
    assert is_clean(stream.getvalue())
    assert [line.split(SHOWN)[0] for line in stream.getvalue().splitlines() if SHOWN in line] == [
        "print ", "log ", "late ", "lines ", "ValueError: "]
    print(HOSTILE, file=sys.stderr)
    log.warning("afterwards %s", HOSTILE)
    assert stream.getvalue().endswith(f"{HOSTILE}\nafterwards {HOSTILE}\n"), "who opened it has the streams back"


def test_a_bar_moves_and_what_it_says_does_not(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.cleaned():
        with tqdm(total=3, desc=f"bar\n{HOSTILE}", file=sys.stderr, mininterval=0, ncols=400) as outer:
            with tqdm(total=2, desc="inner", mininterval=0, ncols=400) as inner:
                inner.set_postfix_str(HOSTILE)
                outer.write(f"text \r{HOSTILE}")
                inner.update(2)
            outer.update(3)
        text = screen.getvalue()
        print("\r\x1b[A and nobody else")
    assert rf"bar\n{SHOWN}: 100%" in text and rf"text \r{SHOWN}" in text and rf", {SHOWN}]" in text
    assert "\r" in text and "\x1b[A" in text and is_clean(text.replace("\r", "").replace("\x1b[A", "")), "tqdm's two movements alone"
    assert screen.getvalue()[len(text):] == "\\r\\x1b[A and nobody else\n"


def test_an_encoding_without_the_character(monkeypatch):
    cases = [("ascii", "é日\x1b", r"\xe9\u65e5\x1b"), ("latin-1", "é日", r"é\u65e5"), ("utf-8", "é\udcff", r"é\udcff")]
    for encoding, text, wanted in cases:
        stream = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        with terminal.cleaned():
            print(text, end="", flush=True)
        assert raw.getvalue().decode(encoding) == wanted


def test_closed_streams_and_nesting(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with terminal.cleaned():
        assert sys.stdout is None
        inner = sys.stderr
        with terminal.cleaned():
            assert sys.stderr is inner
        assert sys.stderr is inner
    assert not isinstance(sys.stderr, terminal.Screen)


def test_errors_are_one_line(capsys):
    def fail(argv):
        raise UserError(f"the file {HOSTILE}\nerror: all is well")

    assert common.run(fail, []) == 1
    assert capsys.readouterr().err == f"error: the file {SHOWN}\\nerror: all is well\n"


def test_an_exception_that_nobody_caught_is_cleaned_too():
    code = (f"import warnings\nfrom llavamed_jax.cli.common import run\ndef fail(argv):\n    warnings.warn({HOSTILE[:20]!r})\n"
            f"    raise RuntimeError({HOSTILE[:20]!r})\nraise SystemExit(run(fail, []))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and is_clean(done.stderr)
    lines = done.stderr.splitlines()
    assert lines[-1] == f"RuntimeError: {terminal.clean(HOSTILE[:20])}" and f"UserWarning: {terminal.clean(HOSTILE[:20])}" in lines[0]


def test_what_a_parent_passes_on_is_cleaned():
    """Of one of several processes also what C++ writes; a character in two pieces stays whole."""
    (source, theirs), (ours, target) = os.pipe(), os.pipe()
    relay = Relay(source, target)
    relay.start()
    for piece in ("é".encode()[:1], "é".encode()[1:] + b" \x1b[31m\xff\n", "日本".encode()[:4], "日本".encode()[4:] + b"\n"):
        os.write(theirs, piece)
        relay.join(0.05)
    os.close(theirs)
    relay.join()
    os.close(target)
    assert os.read(ours, 9999).decode() == "é \\x1b[31m\\udcff\n日本\n"
    os.close(ours)
    os.close(source)


# --- each command ---


@pytest.fixture
def hostile_folder(tmp_path):
    folder = tmp_path / FILE_NAME
    folder.mkdir()
    return folder


@pytest.mark.parametrize("words", [
    (eval_cli.main, ["--config", "NAME"]), (eval_cli.main, ["--config", f"configs/eval/vqa_rad.py:{HOSTILE[:20]}", "--predictions", "p"]),
    (eval_cli.main, ["--config", "configs/eval/vqa_rad.py:demo", "--workdir", "NAME/w", "--predictions", "NAME/none.jsonl"]),
    (eval_cli.main, ["--config", "configs/eval/vqa_rad.py", "--workdir", "NAME/w", "--predictions", "p", "--config.data.root=NAME"]),
    (eval_cli.main, ["--config", "configs/eval/vqa_rad.py:demo", "--workdir", "NAME/w", "--endpoint", HOSTILE, "--model", "m"]),
    (train_main, ["--config", "configs/demo.py:vqa", "--workdir", "NAME/w", "--config.init=NAME"]),
    (train_main, ["--config", "configs/demo.py:vqa", "--workdir", "NAME/w", f"--config.{HOSTILE[:9]}=1"]),
    (convert_cli.main, ["inspect", "NAME"]), (convert_cli.main, ["import", "--checkpoint", "NAME", "--out", "NAME/out"]),
    (convert_cli.main, [HOSTILE]), (chat.main, ["--checkpoint", "NAME"]), (chat.main, ["--checkpoint", f"preset:{HOSTILE}"]),
    (verify_release.main, ["--model", "NAME", "--steps", "answers", "--out", "NAME/out.md"]), (verify_release.main, ["--steps", HOSTILE])])
def test_mistakes_of_every_command(words, hostile_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main, argv = words
    assert main([word.replace("NAME", str(hostile_folder)) for word in argv]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert is_clean(said) and said.splitlines()[-1].startswith("error: ")


def test_answers_and_server_s_words_of_an_evaluation(hostile_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def answer(body):
        choice = {"message": {"content": f"yes {HOSTILE[:20]}"}, "finish_reason": HOSTILE[:20]}
        return {"choices": [choice], "usage": {"prompt_tokens": HOSTILE}}

    argv = ["--config", "configs/eval/vqa_rad.py:demo", "--model", "tiny", "--workdir", str(hostile_folder / "w")]
    with OpenAiServer(answer, delay=0) as server:
        assert eval_cli.main([*argv, "--endpoint", server.url]) == 0
    said = "".join(capsys.readouterr())
    assert is_clean(said) and r"x\x1b[31m\r\u202ey" in said and "answers ended with finish_reason" in said
    kept = (hostile_folder / "w" / "predictions.jsonl").read_text()
    assert r"yes a\u001b[2J\u001b]0;pwned\u0007" in kept, "files have what was said"


def test_reasons_without_end_are_counted(capsys):
    ask._warn([Answer("x", f"reason {i % 20}") for i in range(100)])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 9 and said[-1] == "warning: 60 of 100 answers ended with 12 other values of finish_reason"


def test_what_a_loader_s_worker_prints(capfd):
    with contextlib.closing(workers.in_order(Printing(HOSTILE), 2, 1)) as found:
        assert [each["number"] for each in found] == [0, 1]
    said = capfd.readouterr().err
    assert said.count("printed " + SHOWN) == 2 and "warned " + SHOWN in said and "logged " + SHOWN in said
    assert not any(HOSTILE[:5] in line for line in said.splitlines())


@pytest.mark.parametrize("is_watched", [True, False])
def test_texts_of_training_data(is_watched, tmp_path, monkeypatch):
    """Ids, questions and answers that a run shows while it trains, with a bar and without; each in one line."""
    stream = Terminal() if is_watched else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    text = f"{HOSTILE}\nerror: all is well"
    with terminal.cleaned():
        writer = MetricsWriter(tmp_path, 0, 9, FILE_NAME)
        writer.samples(3, [Sample(text, [], text, text, text)])
        writer.advance(3, 1.0)
        writer.write(3, {"loss": 1.0, "samples": 3, "tokens": 4})
        writer.close()
    said = stream.getvalue()
    assert is_clean(said.replace("\r", "").replace("\x1b[A", "")) and said.count("[2J") >= 4
    assert not any(line.startswith("error") for line in said.replace("\r", "\n").splitlines())
    assert terminal.sentence(FILE_NAME) in said


def test_a_checkpoint_with_escapes_in_its_files(tmp_path, capsys):
    """Names and values of a config reach the terminal when it is shown, imported, compared, or refused."""
    model = tmp_path / FILE_NAME / "model"
    export(random_checkpoint(TINY, seed=1), model, "llava")
    config = json.loads((model / "config.json").read_text())
    for change in ({"mm_vision_tower": HOSTILE}, {"model_type": HOSTILE}, {"hidden_act": HOSTILE + "\nx"},
                   {HOSTILE: HOSTILE, "torch_dtype": HOSTILE, "template": HOSTILE}):
        (model / "config.json").write_text(json.dumps(config | change))
        for words in (["inspect", model], ["import", "--checkpoint", model, "--out", tmp_path / f"{len(change)}\x1b[31m"],
                      ["verify", model, model, "--tensors_only"], ["inspect", model, "--vision_tower", f"x{HOSTILE[:9]}"]):
            status = convert_cli.main([str(word) for word in words])
            said = "".join(capsys.readouterr())
            assert status in (0, 1, 2) and said and is_clean(said), words
            assert not any(line.startswith("x") for line in said.splitlines())


def test_streamed_answers_of_a_chat(monkeypatch, capsys):
    pieces = ["The ", "\x1b", "[31m", "lungs\r", "\n", "are\x07 clear\u202e"]
    model = SimpleNamespace(name=FILE_NAME, stream=lambda messages, **more: iter(pieces), processor=SimpleNamespace(
        prompt=lambda messages: "", encode=lambda text: [1]))
    lines = iter(["What?"])
    monkeypatch.setattr(chat.common, "load_assistant", lambda args: model)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    assert chat.main(["--checkpoint", "x"]) == 0
    said = capsys.readouterr().out
    assert is_clean(said) and said.endswith("The \\x1b[31mlungs\\r\nare\\x07 clear\\u202e\n") and terminal.clean(FILE_NAME) in said
