"""Notes what each worker process reads, in memory shared with its parent, which can then say where one hangs."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import struct
import sys
import tempfile
from collections.abc import Iterator

_NOTE = struct.Struct("<qH500s")  # process id; length of the name; the name of the file that is being read
_reading, _note = "", None


def reading(what: str) -> None:
    """Notes what this process reads from now on."""
    global _reading
    _reading = what
    if _note is not None:
        text = what.encode(errors="backslashreplace")[:500]
        _NOTE.pack_into(_note, 0, os.getpid(), len(text), text)


def here() -> str:
    """Returns what this process reads."""
    return _reading


def begin(path: str, worker: int) -> None:
    """Connects a worker process to the memory at `Shared.path`, where its notes go from now on."""
    global _note
    # On a system that hides /proc this fails, and errors name a worker without what it reads.
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        _note = memoryview(mmap.mmap(file.fileno(), 0))[worker * _NOTE.size:(worker + 1) * _NOTE.size]
    reading("")


class Shared:
    """Memory that workers and their parent share, with each worker's process id and what it reads.

    Args:
      count: number of workers.

    Attributes:
      count: number of workers.
      path: the path by which workers open the memory.
      is_stuck: whether the workers do not end by themselves.
    """

    def __init__(self, count: int):
        self.count, self.is_stuck, self._processes = count, False, {}
        if sys.platform == "linux":  # an anonymous file, which disappears however this process ends
            descriptor = os.memfd_create("llavamed_workers")
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, self.path = tempfile.mkstemp()
        os.ftruncate(descriptor, max(1, count) * _NOTE.size)
        self._descriptor, self._memory = descriptor, mmap.mmap(descriptor, 0)

    def note(self, worker: int) -> tuple[int, str]:
        """Returns the process id of a worker, 0 before it begins, and what it reads."""
        pid, length, text = _NOTE.unpack_from(self._memory, worker * _NOTE.size)
        return pid, text[:length].decode(errors="replace")

    def look(self) -> None:
        """Keeps references to the workers' processes, since multiprocessing forgets those that have ended."""
        if len(self._processes) < self.count:
            wanted = {self.note(worker)[0] for worker in range(self.count)}
            self._processes.update({p.pid: p for p in multiprocessing.active_children() if p.pid in wanted})

    def ended(self) -> Iterator[tuple[int, int, int]]:
        """Yields (number, process id, exit code) of each worker that failed."""
        for worker in range(self.count):
            pid = self.note(worker)[0]
            if pid in self._processes and self._processes[pid].exitcode:
                yield worker, pid, self._processes[pid].exitcode

    def kill(self) -> None:
        """Kills the workers that are still running."""
        self.look()
        for process in self._processes.values():
            if process.exitcode is None:
                process.kill()

    def close(self) -> None:
        """Frees the memory."""
        self._memory.close()
        os.close(self._descriptor)
        if sys.platform != "linux":
            with contextlib.suppress(OSError):
                os.unlink(self.path)
