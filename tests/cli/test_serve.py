"""`serve.py`: its flags, its keys, what keeps it from starting, and a real process from curl to SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from llavamed_jax.cli import serve
from tests.support.training_runs import write_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words, sentence", [
    (["--port", "70000"], "--port is 70000; 0 to 65535 was expected"), (["--batch_size", "0"], "--batch_size is 0"),
    (["--timeout", "nan"], "--timeout is nan"), (["--max_body_bytes", "0"], "--max_body_bytes is 0; at least 1"),
    (["--key_share", "1.5"], "--key_share is 1.5; 0.001 to 1 was expected"), (["--max_new_tokens", "-1"], "--max_new_tokens is -1"),
    (["--api_key", " "], "--api_key is empty"), (["--api_keys", "nowhere"], "'nowhere', which does not exist"), (["--template", "x:y"], "--template"),
    (["--header_timeout", "inf"], "--header_timeout is inf"), (["--quantize", "int3"], "--quantize")])
def test_wrong_flags_exit_2(capsys, words, sentence):
    assert serve.main(["--checkpoint", "nowhere", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_keys_come_from_a_flag_and_from_a_file(tmp_path, capsys):
    file = tmp_path / "keys"
    parse = lambda *words: serve._keys(serve._parser().parse_args(["--checkpoint", "x", *words]))
    file.write_text("# of the ward\nward secret-1\n\nsecret-2\n", encoding="utf-8")
    assert parse("--api_keys", str(file), "--api_key", "secret-0") == {"api_key": "secret-0", "ward": "secret-1", "line 4": "secret-2"}
    for text, sentence in [("a b c\n", "line 1: KEY, or NAME KEY"), ("a x\na y\n", "line 2"), ("\n#\n", "holds no key")]:
        file.write_text(text, encoding="utf-8")
        assert serve.main(["--checkpoint", "x", "--api_keys", str(file)]) == 1
        error = capsys.readouterr().err
        assert sentence in error and "a b c" not in error


def test_what_keeps_it_from_starting_is_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--checkpoint", "x", "--port", str(port)]) == 1
    assert f"the server cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert serve.main(["--checkpoint", str(tmp_path / "nowhere"), "--port", "0", "--no_page"]) == 2
    out = capsys.readouterr()
    assert "nowhere" in out.err.splitlines()[-1] and out.out.startswith("serving nowhere at http://127.0.0.1:")


def test_a_process_loads_answers_and_ends_when_it_is_asked_to(tmp_path):
    start = write_start(tmp_path / "tiny")
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--checkpoint", str(start), "--port", "0", "--batch_size", "2"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)})
    url = process.stdout.readline().split(" at ")[1].split(": ")[0]
    for line in process.stderr:
        if '"event": "ready"' in line:
            break
    body = json.dumps({"messages": [{"role": "user", "content": "What?"}], "max_tokens": 3}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert '"all_answered": true' in process.stderr.read()
