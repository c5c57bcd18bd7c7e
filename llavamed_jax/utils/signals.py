"""What SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a lost terminal) do to a command.

A handler raises no exception: one that comes up inside a callback of a library is swallowed there, and one that comes up inside
a compilation leaves its threads running, which crash when the process exits. The first signal sets a flag that the command's
loops read; in a phase that has nothing to save it ends the process. A second signal always ends the process. A thread waits for
signals, so that both hold while the main thread is inside a native call.

Imports nothing slow: a command listens before its slow imports.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llavamed_jax.utils import terminal

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_TWICE_S = 0.2  # `timeout` sends a signal to the process and to its group
_TWICE_IN_A_JOB_S = 1.0  # a launcher, a process's parent and a terminal that closes may each send the same one
_POLL_S = 0.1
_LAST_WORDS_S = 20.0


class Stopped(KeyboardInterrupt):
    """A signal, or another process of the job, asked the command to stop; raised by `check` where it may."""


@dataclass(frozen=True)
class Phase:
    """What signals do from now on.

    Attributes:
      sentence: printed to stderr where a signal ends the process, or a function that makes it; empty: nothing is printed.
      status: exit status then.
      grace: seconds after the first signal until the process is ended; 0: at once; None: the command ends in its own time.
      note: printed to stderr at the first signal.
      raises: whether `check` raises.
      last: called before the process is ended, for so many seconds at most.
    """

    sentence: str | Callable[[], str]
    status: int = 1
    grace: float | None = None
    note: str = ""
    raises: bool = False
    last: Callable[[], None] | None = None


def over(status: int) -> Phase:
    """The phase of a command whose exit status is settled: a first signal changes nothing, a second one does not wait."""
    return Phase("", status)


class _State:
    """Of this process, which has one set of signal handlers."""

    def __init__(self):
        self.lock = threading.RLock()
        self.is_command = self.is_job = self.is_typing = False
        self.begin(over(0))

    def begin(self, phase: Phase) -> None:
        self.phase, self.why, self.failure, self.asked_at, self.heard_at = phase, "", "", 0.0, 0.0
        self.undo: list[Callable[[], object]] = []
        self.is_listening, self.pipe = False, None


_state = _State()


@contextlib.contextmanager
def listening(phase: Phase, is_command: bool = False) -> Iterator[None]:
    """Hears signals within; inside another one it only begins a phase. Outside of the main thread nothing is heard.

    A signal that is ignored from the start stays ignored where it is SIGHUP (`nohup`).

    Args:
      is_command: the process is a command's and may be ended. Otherwise a second signal raises KeyboardInterrupt.
    """
    if _state.is_listening or threading.current_thread() is not threading.main_thread():
        enter(phase)
        yield
        return
    _state.begin(phase)
    _state.is_listening, _state.is_command = True, is_command
    earlier = {number: signal.getsignal(number) for number in NUMBERS}
    for number in _heard(earlier):
        signal.signal(number, _handle)
    try:
        yield
    finally:
        _stop_watching()
        for number in _heard(earlier):
            signal.signal(number, earlier[number])
        _state.begin(over(0))
        _state.is_command = _state.is_job = False


def _heard(earlier: dict) -> list[int]:
    is_kept = lambda number, handler: handler is None or handler is signal.SIG_IGN and number == getattr(signal, "SIGHUP", None)
    return [number for number, handler in earlier.items() if not is_kept(number, handler)]


def enter(phase: Phase) -> None:
    """Begins a phase. That a stop was asked for stays."""
    with _state.lock:
        _state.phase = phase


def watch(is_job: bool = False) -> None:
    """Starts the thread that waits for signals; to be called after the last fork. Does nothing where nobody listens.

    Args:
      is_job: the process is one of several, which may be sent a signal twice.
    """
    if not _state.is_listening or not _state.is_command or _state.pipe is not None:
        return
    _state.is_job = is_job
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    _state.pipe = ends
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ends,), name="signals", daemon=True).start()


def is_asked() -> bool:
    """Whether the command was asked to stop."""
    return bool(_state.why)


def failure() -> str:
    """The sentence of what asked the command to stop, where that was a failure and no signal."""
    return _state.failure


def check() -> None:
    """Raises `Stopped` where the command was asked to stop and its phase allows it."""
    if _state.why and _state.phase.raises:
        raise Stopped(_state.failure or f"stopped by {_state.why}")


def checked(items):
    """The items of an iterable, with a `check` before each."""
    for item in items:
        check()
        yield item


def forget() -> None:
    """Takes back that a stop was asked for."""
    with _state.lock:
        _state.why, _state.failure, _state.asked_at, _state.heard_at = "", "", 0.0, 0.0


def ask(reason: str, is_failure: bool = False) -> None:
    """Asks the command to stop as a first signal does, for a reason that is no signal."""
    with _state.lock:
        if not _state.why:
            _state.why, _state.failure, _state.asked_at = reason, reason if is_failure else "", time.monotonic()
        _wake()


def can_be_asked() -> bool:
    """Whether `ask` leads anywhere: a command listens, in a phase that reads the flag."""
    return _state.is_listening and _state.phase.grace != 0


@contextlib.contextmanager
def undone_by(act: Callable[[], object]) -> Iterator[None]:
    """What is begun within is taken back by `act` where a signal ends the process; else whoever began it sees to it."""
    _state.undo.append(act)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _state.undo.remove(act)


def block_here() -> None:
    """Blocks the signals in this thread and in all threads and processes that it starts: they end with the main one, not before."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def pass_on(act: Callable[[int], None], others: tuple[int, ...] = ()) -> None:
    """In the parent of a command's process: hands each signal, and `others`, to `act`."""
    for number in (*_heard({number: signal.getsignal(number) for number in NUMBERS}), *others):
        signal.signal(number, lambda number, _: act(number))


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt within, as often as it comes, and asks the command to stop besides: a library may swallow the
    exception, and then `check` raises. For a person who stops one answer and goes on; `forget` begins the next one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.is_typing = True
    earlier = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
        _read()
        _state.is_typing = False


def _interrupt(*_) -> None:
    _state.why = "SIGINT"
    raise KeyboardInterrupt


def _handle(number: int, _) -> None:
    if _state.pipe is None:
        _hear(number)
    else:
        _read()


def _watch(ends: tuple[int, int]) -> None:
    while _state.pipe == ends:
        select.select([ends[0]], [], [], _POLL_S if _state.why else None)
        _read()
        _end_late()
    with _state.lock:
        for end in ends:
            os.close(end)


def _wake() -> None:
    if _state.pipe is not None:
        with contextlib.suppress(OSError):
            os.write(_state.pipe[1], b"\0")


def _stop_watching() -> None:
    if _state.pipe is None:
        return
    signal.set_wakeup_fd(-1)
    with _state.lock:
        (_, writer), _state.pipe = _state.pipe, None
        os.write(writer, b"\0")


def _read() -> None:
    """Hears what has come; in the main thread, or in the one that waits for signals, whichever is first."""
    with _state.lock, contextlib.suppress(BlockingIOError):
        for number in os.read(_state.pipe[0], 64) if _state.pipe is not None else b"":
            if number and not (_state.is_typing and number == signal.SIGINT):
                _hear(number)
                _wake()  # the thread, which may have slept through it and counts the grace


def _hear(number: int) -> None:
    with _state.lock:
        name, now = signal.Signals(number).name, time.monotonic()
        if _state.phase.grace == 0:
            _end(name)
        if not _state.heard_at:
            _state.heard_at = now
            if not _state.why:
                _state.why, _state.asked_at = name, now
            _say(_state.phase.note and f"{name}: {_state.phase.note}")
        elif now >= _state.heard_at + (_TWICE_IN_A_JOB_S if _state.is_job or name == "SIGHUP" else _TWICE_S):
            _end(name)


def _end_late() -> None:
    with _state.lock:
        if _state.why and _state.phase.grace and time.monotonic() >= _state.asked_at + _state.phase.grace:
            _end(_state.why)


def _end(name: str) -> None:
    """Ends the process: takes back what was begun, says so, and leaves the interpreter and all native threads as they are."""
    if not _state.is_command:
        raise KeyboardInterrupt
    phase = _state.phase
    for act in reversed(_state.undo):
        with contextlib.suppress(Exception):
            act()
    sentence = phase.sentence
    if callable(sentence):
        try:
            sentence = sentence()
        except Exception:  # of a file that is being written, say
            sentence = f"stopped by {name}"
    _say(sentence.replace("{name}", name))
    if phase.last is not None:
        last = threading.Thread(target=phase.last, daemon=True)
        last.start()
        last.join(_LAST_WORDS_S)
    os._exit(phase.status)


def _say(text: str) -> None:
    """Not by `print`, in the middle of which a signal may have come. A terminal may be gone."""
    if text:
        with contextlib.suppress(OSError):
            os.write(2, f"{terminal.sentence(text)}\n".encode(errors="backslashreplace"))


def leave(status: int) -> None:
    """Ends a command that is done, without the interpreter's own end: native threads may be at work, and others may wait for a disk."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
