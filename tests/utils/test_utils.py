"""Files that are whole or absent, locks, hashes, lines of JSON and bars: each is written once in `utils/`."""

import errno
import fcntl
import hashlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llavamed_jax.errors import UserError, count_of
from llavamed_jax.utils import files, locks, progress
from llavamed_jax.utils.hashes import sha256

PACKAGE = Path(files.__file__).resolve().parent.parent
# What stands in the code -> the files where it does. Training draws its own bar; PubMed Central states md5.
ONCE = {
    "from tqdm import": {"utils/progress.py", "training/log.py"},
    ".flock(": {"utils/locks.py"},
    ".hexdigest()": {"utils/hashes.py", "utils/code.py", "datasets/records.py", "evaluation/scoring/leakage.py", "verification/release.py",
                     "curation/bucket.py", "curation/fetch.py"},
    "os.replace(": {"utils/files.py", "evaluation/results.py", "preflight/report.py", "curation/shard_writer.py"},  # all but the first rename what is whole already
}


@pytest.mark.parametrize("call", ONCE)
def test_what_is_written_once_is_called_in_no_other_file(call):
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if call in path.read_text(encoding="utf-8")}
    assert found == ONCE[call]


def test_sha256_of_bytes_and_text_is_hashlibs():
    for content in (b"", b"abc", "Größe", memoryview(b"abc")):
        data = content.encode() if isinstance(content, str) else content
        assert sha256(content) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("before")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        files.write_whole(path, write)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_several_may_write_one_file(tmp_path):
    texts = [f"{i}" * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: files.write_text(tmp_path / "x", text), texts * 4))
    assert (tmp_path / "x").read_text() in texts and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="none/x cannot be written: No such file or directory"):
        files.write_text(tmp_path / "none" / "x", "")


def test_a_lock_is_held_until_the_descriptor_is_closed(tmp_path, monkeypatch):
    first, second = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    assert locks.lock(first) is True and locks.lock(second) is False and locks.lock(second, is_shared=True) is False
    os.close(first)
    third = os.open(tmp_path, os.O_RDONLY)
    assert locks.lock(second, is_shared=True) is True and locks.lock(third, is_shared=True) is True and locks.lock(third) is False
    os.close(second)
    assert locks.lock(third) is True

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert locks.lock(third) is None, "a file system without locks"
    os.close(third)


# What Linux says: NFS without its daemon, other network file systems, Lustre without `flock`, NFS of a directory.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, *NO_LOCKS])
def test_a_lock_that_another_holds_is_told_from_none(tmp_path, monkeypatch, capsys, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert [locks.is_free(0, tmp_path) for _ in range(2)] == [code in NO_LOCKS] * 2
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == (code in NO_LOCKS), "said once"
    assert all(f"warning: {tmp_path} cannot be locked ({os.strerror(code)})" in line for line in warned)


def test_lines_of_json_have_their_numbers():
    text = '{"a": "x\u2028y"}\n\n  \n[1]\r\n'
    name = "line {}".format
    assert files.parse_jsonl(text, name) == [("line 1", {"a": "x\u2028y"}), ("line 4", [1])]
    with pytest.raises(UserError, match="^line 3 is no"):
        files.parse_jsonl('1\n2\n{"a"', name)
    with pytest.raises(UserError, match="^line 1 is nested too deeply"):
        files.parse_jsonl("[" * 200_000, name)
    assert files.recover_jsonl('1\n\n{"a"\n' + "[" * 200_000 + "\n2") == [1, None, None, 2]


def test_a_bar_is_for_a_terminal_alone(monkeypatch, capsys):
    assert list(progress.over("abc")) == list("abc")
    advance, close = progress.progress(20, 0, "asking")
    for _ in range(20):
        advance(1)
    close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("asking: 20 of 20, ")
    assert not progress.on_terminal()
    monkeypatch.setattr(sys, "stderr", None)
    assert not progress.on_terminal(), "a program without stderr, as a service may be started"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(total=3, is_long=False) as silent:
        silent.update()
    assert sys.stderr.getvalue() == ""
    advance, close = progress.progress(3, 1, "asking")
    advance(2)
    close()
    assert "asking: 100%" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


def test_a_pipe_sees_no_bar():
    code = "from llavamed_jax.utils import progress\nfor _ in progress.over(['a'] * 3): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""


@pytest.mark.parametrize("number, words, sentence", [
    (0, ("image",), "0 images"), (1, ("image",), "1 image"), (2, ("image",), "2 images"), (11, ("image",), "11 images"),
    (1, ("reply is", "replies are"), "1 reply is"), (0, ("reply is", "replies are"), "0 replies are")])
def test_a_count_has_the_noun_of_its_number(number, words, sentence):
    assert count_of(number, *words) == sentence
