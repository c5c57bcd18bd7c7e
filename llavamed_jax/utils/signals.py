"""Handles SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a lost terminal) in a command.

No handler raises an exception: an exception inside a library's callback is swallowed there, and one inside a
compilation leaves its threads running, which crash when the process exits. The first signal sets a flag that the
command's loops read; in a phase with nothing to save it ends the process. A second signal always ends the process. A
thread waits for signals, so that both work while the main thread is inside a native call.

This module imports nothing slow: a command listens before its slow imports.
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
from dataclasses import dataclass, replace

from llavamed_jax.utils import terminal

EXIT_SAVED = 75  # stopped by a signal with everything saved: run again to resume (EX_TEMPFAIL of sysexits.h)
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_TWICE_S = 0.2  # `timeout` sends a signal to the process and to its group
_TWICE_IN_A_JOB_S = 1.0  # a launcher, a process's parent and a closing terminal may each send the same signal
_POLL_S = 0.1
_LAST_WORDS_S = 20.0


class Stopped(KeyboardInterrupt):
    """A signal, or another process of the job, asked the command to stop; raised by `check`."""


@dataclass(frozen=True)
class Phase:
    """The effect of signals from now on.

    Attributes:
      sentence: printed to stderr if a signal ends the process, or a function that returns it; empty to print nothing.
      status: the exit status in that case.
      grace: seconds from the first signal until the process is ended; 0 ends it at once; None never ends it.
      note: printed to stderr at the first signal.
      raises: whether `check` raises.
      last: called before the process is ended; it may take 20 seconds at most.
    """

    sentence: str | Callable[[], str]
    status: int = 1
    grace: float | None = None
    note: str = ""
    raises: bool = False
    last: Callable[[], None] | None = None


def over(status: int) -> Phase:
    """Returns the phase of a command with a settled exit status: a first signal has no effect, a second one ends it."""
    return Phase("", status)


class _State:
    """The state of this process, which has one set of signal handlers."""

    def __init__(self):
        self.lock = threading.RLock()
        self.is_command = self.is_job = self.is_typing = False
        self.begin(over(0))

    def begin(self, phase: Phase) -> None:
        """Resets the state and begins a phase."""
        self.phase, self.why, self.failure, self.asked_at, self.heard_at = phase, "", "", 0.0, 0.0
        self.undo: list[Callable[[], object]] = []
        self.is_listening, self.pipe = False, None


_state = _State()


@contextlib.contextmanager
def listening(phase: Phase, is_command: bool = False) -> Iterator[None]:
    """Handles signals inside the block; inside another such block, and outside the main thread, it only begins a phase.

    SIGHUP stays ignored if it was ignored from the start (`nohup`).

    Args:
      phase: the phase that begins.
      is_command: the process belongs to a command and may be ended. Otherwise a second signal raises KeyboardInterrupt.
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
    is_kept = lambda number, handler: handler is None or handler is signal.SIG_IGN and number == getattr(
        signal, "SIGHUP", None)
    return [number for number, handler in earlier.items() if not is_kept(number, handler)]


def enter(phase: Phase) -> None:
    """Begins a phase. An earlier request to stop stays in force."""
    with _state.lock:
        _state.phase = phase


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Lets `check` raise inside the block, whatever the phase says."""
    phase = _state.phase
    enter(replace(phase, raises=True))
    try:
        yield
    finally:
        enter(phase)


def watch(is_job: bool = False) -> None:
    """Starts the thread that waits for signals, after the last fork. Does nothing outside of a command's `listening`.

    Args:
      is_job: the process is one of several, which may receive a signal twice.
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
    """Returns whether the command was asked to stop."""
    return bool(_state.why)


def failure() -> str:
    """Returns the sentence of the failure that asked the command to stop; "" after a signal, or without a request."""
    return _state.failure


def check() -> None:
    """Raises `Stopped` if the command was asked to stop and its phase allows it."""
    if _state.why and _state.phase.raises:
        raise Stopped(_state.failure or f"stopped by {_state.why}")


def checked(items):
    """Yields the items of an iterable, with a `check` before each."""
    for item in items:
        check()
        yield item


def forget() -> None:
    """Cancels a request to stop."""
    with _state.lock:
        _state.why, _state.failure, _state.asked_at, _state.heard_at = "", "", 0.0, 0.0


def ask(reason: str, is_failure: bool = False) -> None:
    """Asks the command to stop as a first signal does, for another reason than a signal.

    Args:
      reason: the reason in words.
      is_failure: whether the reason is a failure (`failure`).
    """
    with _state.lock:
        if not _state.why:
            _state.why, _state.failure, _state.asked_at = reason, reason if is_failure else "", time.monotonic()
        _wake()


def can_be_asked() -> bool:
    """Returns whether `ask` has an effect: a command listens, in a phase that reads the flag."""
    return _state.is_listening and _state.phase.grace != 0


@contextlib.contextmanager
def undone_by(act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` if a signal ends the process inside the block; otherwise the block cleans up by itself."""
    _state.undo.append(act)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _state.undo.remove(act)


def block_here() -> None:
    """Blocks the signals in this thread and in its later threads and processes, which end with the main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def pass_on(act: Callable[[int], None], others: tuple[int, ...] = ()) -> None:
    """Passes each signal, and `others`, to `act`; for the parent of a command's process."""
    for number in (*_heard({number: signal.getsignal(number) for number in NUMBERS}), *others):
        signal.signal(number, lambda number, _: act(number))


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Makes SIGINT raise KeyboardInterrupt inside the block, each time it comes, and ask the command to stop.

    If a library swallows the exception, `check` raises. This serves a user who stops one answer and continues; `forget`
    begins the next answer.
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
    """Handles the signals that came; runs in the main thread or in the thread that waits for signals."""
    with _state.lock, contextlib.suppress(BlockingIOError):
        for number in os.read(_state.pipe[0], 64) if _state.pipe is not None else b"":
            if number and not (_state.is_typing and number == signal.SIGINT):
                _hear(number)
                _wake()  # the waiting thread, which may not have seen the signal and measures the grace


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
    """Ends the process: runs the undo functions, prints the sentence, and exits without the interpreter's shutdown."""
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
        except Exception:  # for example about a file that is being written
            sentence = f"stopped by {name}"
    _say(sentence.replace("{name}", name))
    if phase.last is not None:
        last = threading.Thread(target=phase.last, daemon=True)
        last.start()
        last.join(_LAST_WORDS_S)
    os._exit(phase.status)


def _say(text: str) -> None:
    """Writes to stderr without `print`, which the signal may have interrupted; ignores a lost terminal."""
    if text:
        with contextlib.suppress(OSError):
            os.write(2, f"{terminal.sentence(text)}\n".encode(errors="backslashreplace"))


def leave(status: int) -> None:
    """Ends a finished command without the interpreter's shutdown: native threads may run, or wait for a disk."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
