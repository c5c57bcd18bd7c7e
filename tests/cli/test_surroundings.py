"""Nothing is taken for granted of the machine: no variable, no home, no locale, no open stream, no umask, no folder to work in."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from llavamed_jax.checkpoints.hub import asking
from llavamed_jax.cli import common
from llavamed_jax.errors import UserError
from llavamed_jax.utils import streams
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.terminal import Screen
from tests.support import quick_renderer, xla
from tests.support.training_runs import SAMPLE, images, log_lines, write_start

ROOT = Path(__file__).resolve().parents[2]
# Python in the locale C takes UTF-8 nonetheless, unless it is told not to.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# The three standard streams closed, as some schedulers and services start a program.
WITHOUT = {"stdin": "0<&-", "stdout": "1>&-", "stderr": "2>&-", "all": "0<&- 1>&- 2>&-"}


def bare(*command, closed="", cwd=ROOT, **environment):
    """Runs Python with an emptied environment: as on a fresh machine, and with no home."""
    words = ["bash", "-c", f'exec "$@" {WITHOUT.get(closed, "")}', "bash", sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, env={"PATH": os.defpath, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
                          encoding="utf-8", timeout=300)


# ---- an emptied environment

@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}, ASCII], ids=["emptied", "unbuffered", "ascii"])
def test_lossless_jpeg_is_decoded_in_any_environment(monkeypatch, tmp_path, variables):
    """Its decoder runs in a process of its own, which inherits the environment and the folder that the user works in."""
    pytest.importorskip("pydicom", reason="pydicom, the extra [medical], is not installed")
    from pydicom.data import get_testdata_file

    from llavamed_jax.images.load import load_image
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for module in ("numpy", "json", "io", "pydicom"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    image = np.asarray(load_image(get_testdata_file("SC_rgb_jpeg_gdcm.dcm", download=False)))
    assert image.shape == (100, 100, 3) and abs(image.mean() - 127.7) < 0.05


def test_a_run_on_a_machine_that_has_nothing(tmp_path):
    """Emptied environment, no home, closed streams, a long TMPDIR, another folder, blanks and umlauts; with a worker process."""
    work = tmp_path / "größer, mit Leerzeichen"
    (long := work / ("x" * 120)).mkdir(parents=True)
    start = write_start(work / "start")
    keys = {"init": start, "data.train": SAMPLE / "vqa_train.json", "data.images": images(), "data.validation": "none",
            "data.samples": "none", "total_steps": 2, "data.workers": 1, "log_every": 1, "batch_size": 4, "max_length": 64,
            "trainable": "['projector/.*']"}
    done = bare(ROOT / "train.py", "--config", f"{ROOT}/configs/demo.py:vqa", "--workdir", "a run",
                *(f"--config.{key}={value}" for key, value in keys.items()),
                closed="all", cwd=work, TMPDIR=str(long), HOME="/nonexistent", LC_ALL="C", XLA_FLAGS=xla.flags())
    assert done.returncode == 0
    assert [line["step"] for line in log_lines(work / "a run")] == [1, 2]


CHAT = """
import sys
from types import SimpleNamespace
from llavamed_jax import chat

def stream(messages, **_):
    yield ascii(messages[-1]["content"][-1]["text"]) + " na\\u00efve \\u65e5\\u672c"

chat.common.load_assistant = lambda args: SimpleNamespace(
    name="fake", stream=stream, processor=SimpleNamespace(prompt=lambda messages: "", encode=lambda text: [1]))
sys.exit(chat.main(["--checkpoint", "x"]))
"""


def test_a_chat_without_stdin_ends():
    done = bare("-c", CHAT, closed="stdin")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fake, research use only")


@pytest.mark.parametrize("variables, shown", [
    ({"LC_ALL": "C.UTF-8"}, "naïve 日本"), ({}, "naïve 日本"), (ASCII, "na?ve ??"), ({"PYTHONIOENCODING": "utf-8:strict"}, "naïve 日本")])
def test_a_chat_hears_utf8_in_every_locale(variables, shown):
    if variables is ASCII and not str(ROOT).isascii():
        pytest.skip("numpy itself cannot be imported from a path that the locale cannot spell")
    typed = "Größe?\n".encode() + b"\xff?\n"
    done = subprocess.run([sys.executable, "-c", CHAT], cwd=ROOT, env={"PATH": os.defpath, **variables}, input=typed, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[1:] == [rf"'Gr\xf6\xdfe?' {shown}", f"'??' {shown}"]


def test_chat_templates_are_rendered_without_streams(tmp_path):
    """With all three closed by transformers; with stdin closed by a stand-in, since the pipe is what may be lost."""
    code = ("from llavamed_jax.text import template_process as t; text = t.render(dict(source='{{ messages[0].content }}', tokens={}, "
            "marker='<image>', messages=[dict(role='user', text='hello', parts=[])]), 'it'); raise SystemExit(text != 'hello')")
    assert bare("-c", code, closed="all").returncode == 0
    code = code.replace("{{ messages[0].content }}", "hello")
    assert bare("-c", code, closed="stdin", PYTHONPATH=str(quick_renderer.write(tmp_path))).returncode == 0


def test_streams_that_are_open_stay_as_they_are():
    before = sys.stdin, sys.stdout, sys.stderr, *map(os.fstat, range(3))
    streams.keep_open()
    assert (sys.stdin, sys.stdout, sys.stderr, *map(os.fstat, range(3))) == before


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is the locale C's
def test_a_screen_without_a_character_writes_it_out(errors):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors, write_through=True)
    print("ä · \u2026", file=Screen(stream))
    assert stream.buffer.getvalue() == rb"\xe4 \xb7 \u2026" + b"\n"


# ---- directories: whose, where, and whether there are any

@pytest.mark.parametrize("mask, wanted", [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700), (0o027, 0o750)])
def test_new_directories_follow_the_umask(tmp_path, mask, wanted):
    earlier = os.umask(mask)
    try:
        with new_directory(tmp_path / "out") as out:
            (out / "file").touch()
    finally:
        os.umask(earlier)
    assert (tmp_path / "out").stat().st_mode & 0o777 == wanted
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == wanted & 0o666


def test_no_temporary_directory_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda *_: (_ for _ in ()).throw(
        FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def program(_):
        tempfile.mkdtemp()

    assert common.run(program, []) == 1
    assert capsys.readouterr().err == ("error: a temporary directory is needed (No usable temporary directory found in ['/tmp', "
                                       "'/var/tmp']); set TMPDIR to a writable directory\n")


@pytest.mark.parametrize("home", ["/dev/null/home", "/proc/home"])
def test_a_cache_that_cannot_be_written_is_named(home):
    with pytest.raises(UserError) as caught, asking("me/model"):
        os.makedirs(f"{home}/hub")
    assert "me/model is not a directory here, and the hub model of this name cannot be cached in " in str(caught.value)
    assert f" ({home}" in str(caught.value) and str(caught.value).endswith("set HF_HOME to another directory")


# A container may run as a user that its /etc/passwd does not know.
UNKNOWN = """
import pwd

def getpwuid(uid):
    raise KeyError(uid)

pwd.getpwuid = getpwuid
"""


def test_without_a_home_evaluations_go_on_and_nothing_is_cached_in_a_folder_called_tilde(tmp_path):
    """nltk fails on import where it finds none."""
    code = (UNKNOWN + "from llavamed_jax.evaluation import metrics; from llavamed_jax.evaluation.scoring import captions; "
            "print(metrics.bleu('a b', 'a b')[1], captions.ORDERS)\n"
            "from llavamed_jax.cli.convert import main; raise SystemExit(main(['inspect', 'me/model']))")
    done = bare("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "1.0 4\n") and done.stderr.count("\n") == 1, done.stderr
    assert "this user has no home directory; set HF_HOME to a directory" in done.stderr
    assert not list(tmp_path.iterdir())


# ---- .ci/run

def test_ci_empties_its_environment(tmp_path):
    """What it hands to make, and that its home is gone afterwards."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "Makefile").write_text('lint test:\n\t@echo $@ && env && ls -A "$$HOME" && "$(PYTHON)" -c "print(12)"\n')
    (tmp_path / "user" / ".config" / "pip").mkdir(parents=True)
    (conf := tmp_path / "user" / ".config" / "pip" / "pip.conf").touch()
    kept = {"ACCEL": "cpu", "CI": "1", "LANG": "C.UTF-8", "PIP_INDEX_URL": "http://a b", "https_proxy": "http://p", "NO_PROXY": "h",
            "SSL_CERT_FILE": "/f"}
    mine = {"PYTHONUNBUFFERED": "1", "LC_ALL": "C", "PYTHONPATH": "/p", "XLA_FLAGS": "x", "TMPDIR": str(tmp_path), "SECRET": "s"}
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], cwd=tmp_path, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "user"), "PYTHON": sys.executable, **kept, **mine})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "=" not in line] == ["lint", "12", "test", "12"], "the home is empty"
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    python = Path(found.pop("PYTHON"))
    assert os.path.samefile(python, sys.executable) and not python.is_symlink() and found.pop("PATH").startswith(f"{python.parent}:")
    assert not Path(found.pop("HOME")).exists()
    of_the_shell = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PWD", "SHLVL", "OLDPWD", "_", "MAKE_TERMOUT", "MAKE_TERMERR")
    assert {name: value for name, value in found.items() if name not in of_the_shell} == {**kept, "PIP_CONFIG_FILE": str(conf)}


def test_ci_says_which_python_it_wants(tmp_path):
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], cwd=tmp_path, capture_output=True, encoding="utf-8",
                          env={"PATH": os.environ["PATH"], "PYTHON": "/no where/python"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: /no where/python is not a Python 3.11 or 3.12 that runs; name one with PYTHON=/path/to/python3.11\n")
