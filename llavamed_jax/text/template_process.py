"""Renders chat templates in a separate process, with limits on time, memory and output.

A template is foreign code: it may loop forever, request any amount of memory or compute 9**9**9, and some of that
cannot be interrupted from inside Python. The process starts with the first template, which takes about a second; a
prompt then takes a fraction of a millisecond. The process exits when its parent exits for any reason.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Pipe
from pathlib import Path

from llavamed_jax.errors import UserError, cut
from llavamed_jax.utils import streams

CPU_SECONDS = 3  # for one prompt; processor time, so that a busy machine refuses no template
_WALL_SECONDS = 120  # for waits without processor time, and for the start
_CHILD = Path(__file__).with_name("template_child.py")
_LONGEST = 300  # characters of a template's or a library's message in an error


def render(request: dict, name: str) -> str:
    """Renders one prompt.

    Args:
      request: the arguments of `template_child.render`.
      name: the template's name in errors.

    Returns:
      The prompt.

    Raises:
      UserError: the template cannot be rendered for any reason.
    """
    key = (request["source"], name)
    with _lock:
        if key in _hopeless:  # every further prompt would take as long again
            raise UserError(_hopeless[key])
        try:
            reply = _running().ask(request)
        except BaseException:  # for example a signal: the next reply would belong to this request
            _stop()
            raise
        if "died" in reply:
            _stop()
            sentence = f"{name} cannot be rendered: {reply['died']}"
            if _fails_always(request):
                _hopeless[key] = sentence
            raise UserError(sentence)
    if "text" in reply:
        return reply["text"]
    raise UserError(f"{name} {reply['verb']}: {_one_line(reply['error'])}")


def _fails_always(request: dict) -> bool:
    """Returns whether a template ends its process with a message of one letter too: no message is the cause then."""
    letter = {"role": "user", "text": "Q", "parts": [{"type": "text", "text": "Q"}]}
    try:
        is_dead = "died" in _running().ask({**request, "messages": [letter], "seconds": 1})
    except BaseException:
        _stop()
        raise
    if is_dead:
        _stop()
    return is_dead


def _one_line(text: str) -> str:
    """Makes one line of printable characters from a message, for the end of a sentence."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return cut(words, _LONGEST).rstrip(".")


class _Process:
    def __init__(self):
        streams.keep_open()  # one end of the pipe could be the child's stdin
        self._connection, theirs = Pipe()
        with theirs:
            # -P: the script's folder holds modules whose names are those of libraries.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(_CHILD), str(theirs.fileno()), str(CPU_SECONDS)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True)  # Ctrl-C at the terminal does not reach it
        started = self._receive()
        if "error" in started:
            raise UserError("transformers and jinja2, which render chat templates, cannot be imported: "
                            f"{_one_line(started['error'])}")
        if "died" in started:
            raise UserError(f"the process that renders chat templates did not start: {started['died']}")

    def ask(self, request: dict) -> dict:
        try:
            self._connection.send_bytes(json.dumps(request).encode())
        except OSError:
            return {"died": self._reason()}
        return self._receive()

    def _receive(self) -> dict:
        try:
            if self._connection.poll(_WALL_SECONDS):
                return json.loads(self._connection.recv_bytes())
            return {"died": f"it takes more than {_WALL_SECONDS} s"}
        except (EOFError, OSError):
            return {"died": self._reason()}

    def _reason(self) -> str:
        code = self._popen.wait()
        if code == -signal.SIGXCPU:
            return f"it takes more than {CPU_SECONDS} s of processor time"
        if code == -signal.SIGKILL:
            return "its process was killed, probably because the system ran out of memory"
        return f"its process ended with status {code}"

    def stop(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._connection.close()


_lock = threading.Lock()
# With the id of the process that started it: a fork does not use it.
_process: tuple[int, _Process] | None = None
_hopeless: dict[tuple[str, str], str] = {}  # templates that always end their process, with the error of each


def _running() -> _Process:
    global _process
    if _process is None or _process[0] != os.getpid():
        _process = os.getpid(), _Process()
    return _process[1]


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None and _process[0] == os.getpid():
        with contextlib.suppress(OSError):
            _process[1].stop()
    _process = None
