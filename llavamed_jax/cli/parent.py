"""The parent of one of several processes, which waits for it and reports in one sentence what ended it.

jax's runtime aborts a process from C++ when another one is lost, with a stack trace and no chance for Python code. So
each of several processes is the child of one that passes signals on, captures the runtime's stderr, and converts it to
one sentence and an exit status. The parent does not import jax: jax's threads would not survive a fork.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import sys
import threading

from llavamed_jax.cli.clusters import Place
from llavamed_jax.utils import signals, terminal

# Lines of jax's coordination service; the last of them contains `_ABORTING`.
_RUNTIME = re.compile(
    rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service\w*|preemption_sync_manager|client)\.(cc|h):\d+\] ")
_ABORTING = b"Terminating process because the JAX distributed service detected fatal errors"


def stay_behind(place: Place) -> None:
    """Forks. Returns in the child; the parent waits for the child and exits with its status."""
    if threading.active_count() > 1 or "jax" in sys.modules:
        return  # called from a running program, whose threads would not survive a fork
    sys.stdout.flush()
    sys.stderr.flush()
    # On a terminal stderr is not captured: the child keeps its progress bar, and the runtime's lines are shown.
    words, alive = None if os.isatty(2) else os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(alive[0])
        os._exit(_wait(child, words, place))
    os.close(alive[1])
    threading.Thread(target=_end_with_parent, args=(alive[0],), daemon=True).start()
    if words is not None:
        os.dup2(words[1], 2)
        for end in words:
            os.close(end)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the parent's end is closed, for any reason
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(child: int, words: tuple[int, int] | None, place: Place) -> int:
    """Waits for the child to exit, and returns its exit status."""
    def pass_on(number):
        with contextlib.suppress(ProcessLookupError):  # the child has just exited
            os.kill(child, number)

    signals.pass_on(pass_on, others=(signal.SIGUSR1, signal.SIGUSR2))
    relay = None
    if words is not None:
        os.close(words[1])
        relay = Relay(words[0])
        relay.start()
    _, status = os.waitpid(child, 0)
    if relay is not None:
        relay.join(2.0)  # a worker process that is still running may hold the other end
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        if relay is not None:
            relay.let_go()
        return code
    name = "this process" if place.index is None else f"process {place.index}"
    held = b"" if relay is None else relay.held
    if code == -signal.SIGABRT and (relay is None or _ABORTING in held):
        said = explained(held.decode(errors="replace"), name, place)
    else:
        if relay is not None:
            relay.let_go()
        said = f"{name} was killed by {signal.Signals(-code).name}"
        said += ", which the system sends when memory runs out" if code == -signal.SIGKILL else ""
    os.write(2, f"error: {terminal.sentence(said)}\n".encode())
    return 1


class Relay(threading.Thread):
    """Passes on what a process writes to stderr, except the runtime's lines about other processes.

    Args:
      source: the file descriptor to read from.
      target: the file descriptor to write to.
      patience_s: seconds after which held lines are written, if the process continues in spite of them.

    Attributes:
      held: the runtime's lines, and everything after them.
    """

    def __init__(self, source: int, target: int = 2, patience_s: float = 10.0):
        super().__init__(daemon=True)
        self._source, self._target, self._patience = source, target, patience_s
        self._lock = threading.Lock()
        self.held = b""

    def run(self) -> None:
        """Reads until the source is closed."""
        line, decoder = b"", codecs.getincrementaldecoder("utf-8")("surrogateescape")
        while chunk := os.read(self._source, 2**16):
            chunk = decoder.decode(chunk).encode("utf-8", "surrogateescape")  # the decoder keeps incomplete characters
            *lines, line = (line + chunk).split(b"\n")
            for each in lines:
                self._pass(each + b"\n")
            if line and not _may_be_runtime(line):  # an incomplete line is shown at once
                self._pass(line)
                line = b""
        self._pass(line)

    def _pass(self, text: bytes) -> None:
        with self._lock:
            if not self.held and _RUNTIME.match(text):
                timer = threading.Timer(self._patience, self.let_go)
                timer.daemon = True
                timer.start()
            elif not self.held:
                _write(self._target, text)
                return
            self.held += text

    def let_go(self) -> None:
        """Writes the held lines."""
        with self._lock:
            _write(self._target, self.held)
            self.held = b""


def _may_be_runtime(line: bytes) -> bool:
    return line[:1] in b"WEF" and len(line) < 200


def _write(target: int, text: bytes) -> None:
    text = terminal.clean_bytes(text)
    while text:
        text = text[os.write(target, text):]


def explained(words: str, name: str, place: Place) -> str:
    """Explains in a sentence why the runtime aborted a process.

    Args:
      words: the runtime's lines.
      name: the aborted process.
      place: its place among the others.

    Returns:
      The sentence.
    """
    again = "; the saved state is kept, and starting all processes again resumes from it"
    if lost := re.search(r"unhealthy \(stopped sending heartbeats\):\s*([\d,\s]+)", words):
        numbers = ", ".join(re.findall(r"\d+", lost[1]))
        return f"process {numbers} has ended or cannot be reached, so {name} ends too{again}"
    if "RegisterTask" in words and "DEADLINE_EXCEEDED" in words:
        where = f" at {place.coordinator}" if place.coordinator else ""
        whole = f" of {place.count}" if place.count else ""
        return (f"timeout: {name}{whole} waited for the other processes{where}, and not all of them joined; start each "
                "with the same --coordinator and its own --process_id")
    if "ALREADY_EXISTS" in words or "different incarnation" in words:
        return f"two processes were started with the same --process_id{again}"
    if "UNAVAILABLE" in words:
        return f"process 0 has ended or cannot be reached, so {name} ends too{again}"
    return f"another process has ended or cannot be reached, so {name} ends too{again}"
