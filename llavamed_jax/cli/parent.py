"""The parent of one of several processes, which does nothing but wait for it, and says in a sentence what ended it.

jax's runtime aborts a process from C++ when another one is lost, with a stack trace and no chance for Python. So each process of
several is the child of one that passes signals on, holds the runtime's last words back, and makes a sentence and an exit status
of them. It imports no jax, whose threads a fork would lose.
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

# What jax's coordination service writes, which ends in the words that it aborts with.
_RUNTIME = re.compile(rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service\w*|preemption_sync_manager|client)\.(cc|h):\d+\] ")
_ABORTING = b"Terminating process because the JAX distributed service detected fatal errors"


def stay_behind(place: Place) -> None:
    """Forks. Returns in the child; the parent waits for it and ends as it does."""
    if threading.active_count() > 1 or "jax" in sys.modules:
        return  # called from a program that has begun already, which a fork would not survive whole
    sys.stdout.flush()
    sys.stderr.flush()
    words, alive = None if os.isatty(2) else os.pipe(), os.pipe()  # on a terminal the child keeps its bar, and the runtime its noise
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
    os.read(alive, 1)  # returns when the parent's end is closed, however that came
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(child: int, words: tuple[int, int] | None, place: Place) -> int:
    """The exit status of the child, when it has ended."""
    def pass_on(number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    signals.pass_on(pass_on, others=(signal.SIGUSR1, signal.SIGUSR2))
    relay = None
    if words is not None:
        os.close(words[1])
        relay = Relay(words[0])
        relay.start()
    _, status = os.waitpid(child, 0)
    if relay is not None:
        relay.join(2.0)  # a worker process that is still there may hold the other end
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
        said = f"{name} was ended by {signal.Signals(-code).name}"
        said += ", which the system sends where memory runs out" if code == -signal.SIGKILL else ""
    os.write(2, f"error: {terminal.sentence(said)}\n".encode())
    return 1


class Relay(threading.Thread):
    """Passes on what a process writes to stderr, but for the runtime's words about other processes.

    Attributes:
      held: these, and what came after them; let go after `patience_s`, when the process goes on in spite of them.
    """

    def __init__(self, source: int, target: int = 2, patience_s: float = 10.0):
        super().__init__(daemon=True)
        self._source, self._target, self._patience = source, target, patience_s
        self._lock = threading.Lock()
        self.held = b""

    def run(self) -> None:
        line, decoder = b"", codecs.getincrementaldecoder("utf-8")("surrogateescape")
        while chunk := os.read(self._source, 2**16):
            chunk = decoder.decode(chunk).encode("utf-8", "surrogateescape")  # half a character waits for its other half
            *lines, line = (line + chunk).split(b"\n")
            for each in lines:
                self._pass(each + b"\n")
            if line and not _may_be_runtime(line):  # a line that is being written is seen as it comes
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
        """Writes what was held back."""
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
    """What the runtime aborted a process for, in a sentence.

    Args:
      words: the runtime's.
      name: of the process that was aborted.
    """
    again = "; what it had saved is kept, and all processes started again go on from there"
    if lost := re.search(r"unhealthy \(stopped sending heartbeats\):\s*([\d,\s]+)", words):
        numbers = ", ".join(re.findall(r"\d+", lost[1]))
        return f"process {numbers} has ended or cannot be reached, so {name} ends too{again}"
    if "RegisterTask" in words and "DEADLINE_EXCEEDED" in words:
        where = f" at {place.coordinator}" if place.coordinator else ""
        whole = f" of {place.count}" if place.count else ""
        return (f"{name}{whole} waited for the others{where}, and they did not all come; each has to be started, with "
                "the same --coordinator and a --process_id of its own")
    if "ALREADY_EXISTS" in words or "different incarnation" in words:
        return f"two processes were started with one --process_id{again}"
    if "UNAVAILABLE" in words:
        return f"process 0 has ended or cannot be reached, so {name} ends too{again}"
    return f"another process has ended or cannot be reached, so {name} ends too{again}"
