"""What each worker process is reading, noted in memory that it shares with its parent, which can then say where one hangs."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import struct
import sys
import tempfile
from collections.abc import Iterator

_NOTE = struct.Struct("<qH500s")  # process id, length of what it reads, what it reads
_reading, _note = "", None


def reading(what: str) -> None:
    """Notes what this process reads from now on."""
    global _reading
    _reading = what
    if _note is not None:
        text = what.encode(errors="backslashreplace")[:500]
        _NOTE.pack_into(_note, 0, os.getpid(), len(text), text)


def here() -> str:
    """What this process reads."""
    return _reading


def begin(path: str, worker: int) -> None:
    """In a worker process: its notes go to the memory of `Shared.path` from now on."""
    global _note
    with contextlib.suppress(OSError), open(path, "r+b") as file:  # a system that hides /proc: then a worker is named without
        _note = memoryview(mmap.mmap(file.fileno(), 0))[worker * _NOTE.size:(worker + 1) * _NOTE.size]
    reading("")


class Shared:
    """Memory that workers and their parent share: of each its process and what it reads.

    Attributes:
      count: workers; path: by which they open it.
      is_stuck: they do not end by themselves.
    """

    def __init__(self, count: int):
        self.count, self.is_stuck, self._processes = count, False, {}
        if sys.platform == "linux":  # nothing is left of it, however this process ends
            descriptor = os.memfd_create("llavamed_workers")
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, self.path = tempfile.mkstemp()
        os.ftruncate(descriptor, max(1, count) * _NOTE.size)
        self._descriptor, self._memory = descriptor, mmap.mmap(descriptor, 0)

    def note(self, worker: int) -> tuple[int, str]:
        """The process of a worker, 0 where it has not begun, and what it reads."""
        pid, length, text = _NOTE.unpack_from(self._memory, worker * _NOTE.size)
        return pid, text[:length].decode(errors="replace")

    def look(self) -> None:
        """Keeps the processes of workers: multiprocessing forgets one that has ended."""
        if len(self._processes) < self.count:
            wanted = {self.note(worker)[0] for worker in range(self.count)}
            self._processes.update({p.pid: p for p in multiprocessing.active_children() if p.pid in wanted})

    def ended(self) -> Iterator[tuple[int, int, int]]:
        """(number, process id, exit code) of each worker that failed."""
        for worker in range(self.count):
            pid = self.note(worker)[0]
            if pid in self._processes and self._processes[pid].exitcode:
                yield worker, pid, self._processes[pid].exitcode

    def kill(self) -> None:
        self.look()
        for process in self._processes.values():
            if process.exitcode is None:
                process.kill()

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)
        if sys.platform != "linux":
            with contextlib.suppress(OSError):
                os.unlink(self.path)
