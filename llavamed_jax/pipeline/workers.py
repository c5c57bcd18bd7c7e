"""Computes results by number, in order, in grain's worker processes, which end when the program does.

An error names the worker that died or does not respond.
"""

from __future__ import annotations

import functools
import os
import queue
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from llavamed_jax.errors import UserError, cut, warn
from llavamed_jax.utils import child_processes, signals, terminal, worker_notes

WARN_S = 60.0  # without a result until a warning names the worker; doubles with each warning
GIVE_UP_S = 1800.0  # timeout of a result
HELD = 4  # results of a worker in memory: in its queue, in grain 0.2.18's threads, and the one in use
SHARED = "/dev/shm"
_POLL_S = 0.2
_DEAD_S = 3.0  # the results that a worker finished before it died arrive within this time
_CLOSE_S = 5.0  # workers may take so long to exit by themselves


class WorkerError(UserError):
    """A worker died, or has not responded for `GIVE_UP_S`."""


class InOrder(Iterator):
    """An iterator over make(0), …, make(count - 1), made ahead in worker processes or in a thread. `close` ends them.

    Args:
      make: makes a result of its number; it is pickled to the workers.
      count: the number of results.
      workers: processes; 0 uses a thread.

    Attributes:
      on_wait: called with the seconds for which a result has been waited for. It may raise `signals.Stopped`, or
        TimeoutError, which is converted to a WorkerError that names the worker. The iterator cannot be used afterwards.
    """

    def __init__(self, make: Callable[[int], dict], count: int, workers: int):
        self.on_wait: Callable[[float], object] = lambda waited: signals.check()
        self._shared = worker_notes.Shared(workers)
        self._taken = 0
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        # SimpleQueue's `get` waits without end if a signal's handler outlasts the rest of its timeout.
        self._made: queue.Queue = queue.Queue()
        dataset = _dataset(make, count, workers, self._shared.path)
        self._thread = threading.Thread(target=_run, args=(dataset, self._wanted, self._made), name="loader",
                                        daemon=True)
        self._thread.start()
        # Ends the workers with this object or, at exit, before modules are torn down: grain's destructors need them.
        self._end = weakref.finalize(self, _end, self._thread, self._wanted, self._shared)

    def __next__(self) -> Any:
        """Returns the next result.

        Raises:
          WorkerError: a worker died or does not respond.
          Stopped: `on_wait` raised it.
          Exception: `make` raised it.
        """
        self._wanted.put(True)
        begun, warn_after = time.monotonic(), WARN_S
        while True:
            try:
                result, error = self._made.get(timeout=_POLL_S)
                break
            except queue.Empty:
                pass
            waited = time.monotonic() - begun
            self._shared.look()
            self._obey(waited)
            if waited > _DEAD_S:
                self._refuse_dead()
            if waited > warn_after:
                warn(f"{self._waited_for(waited)}; waiting up to {GIVE_UP_S - waited:.0f} s more")
                warn_after *= 2
        self._shared.look()
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):  # grain's sentence
            self._refuse_dead()
            # The process ended before it was seen here. Workers take turns, so grain waited for this one.
            if code := re.search(r"exit code (-?[1-9]\d*)", str(error)):
                self._shared.is_stuck = True
                raise WorkerError(self._dead(self._taken % self._shared.count, int(code[1]))) from None
        if error is not None:
            raise error
        self._taken += 1
        return result

    def close(self) -> None:
        """Ends the workers: they exit by themselves, or get SIGKILL if they are stuck or take long."""
        self._end()

    def _obey(self, waited: float) -> None:
        try:
            self.on_wait(waited)
            if waited > GIVE_UP_S:
                raise TimeoutError
        except TimeoutError:
            self._shared.is_stuck = True
            raise WorkerError(f"timeout: {self._waited_for(waited)}") from None
        except BaseException:
            self._shared.is_stuck = True
            raise

    def _refuse_dead(self) -> None:
        for worker, _, code in self._shared.ended():
            self._shared.is_stuck = True
            raise WorkerError(self._dead(worker, code))

    def _dead(self, worker: int, code: int) -> str:
        """Returns a sentence: which worker ended, and how."""
        pid = self._shared.note(worker)[0]
        process = f" (process {pid})" if pid else ""
        return f"loader worker {worker} of {self._shared.count}{process} {_how(code)}"

    def _waited_for(self, seconds: float) -> str:
        """Returns a sentence: which worker does not respond, for how long, and the file that it reads.

        Workers take turns.
        """
        worker = self._taken % self._shared.count if self._shared.count else None
        pid, text = (None, worker_notes.here()) if worker is None else self._shared.note(worker)
        who = ("the loader" if worker is None
               else f"loader worker {worker} of {self._shared.count}" + (f" (process {pid})" if pid else ""))
        reading = f", reading {cut(text, 300)}," if text else ""
        return f"{who}{reading} has returned nothing for {seconds:.0f} s"


def in_order(make: Callable[[int], dict], count: int, workers: int) -> InOrder:
    """Returns an iterator over make(0), …, make(count - 1), made ahead; its `close` ends the processes (`InOrder`)."""
    return InOrder(make, count, workers)


def fitting(workers: int, size: int, folder: str = SHARED) -> int:
    """Returns how many of `workers` processes may start so that their results fit into shared memory.

    Args:
      workers: the requested number of processes.
      size: bytes of a result.
      folder: the file system of shared memory.

    Returns:
      The number of processes.
    """
    free = free_bytes(folder)
    return workers if free is None else max(0, min(workers, (free // max(size, 1) - 1) // HELD))


def free_bytes(folder: str = SHARED) -> int | None:
    """Returns the free bytes of shared memory; None if there is no such folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _dataset(make: Callable, count: int, workers: int, path: str) -> grain.IterDataset:
    # One thread a worker: tokenising holds the interpreter's lock, and a second batch in progress costs memory.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else 2)
    dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl for its options, and our command lines are argparse's
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                                      worker_init_fn=functools.partial(_begin, path))
    return dataset


def _run(dataset: grain.IterDataset, wanted: queue.SimpleQueue, made: queue.Queue) -> None:
    """Runs grain in a thread, since its waits cannot be interrupted.

    Signals are blocked in the thread, and so in the threads and processes that it starts: Ctrl-C and a scheduler's
    SIGTERM reach the whole process group, and the command still needs batches until it has saved.
    """
    signals.block_here()
    child_processes.prepare()
    signals.block_here()  # starting the tracker has unblocked some
    iterator = None
    while wanted.get():
        try:
            iterator = iter(dataset) if iterator is None else iterator
            made.put((next(iterator), None))
        except BaseException as error:  # the waiting thread gets it, StopIteration too
            made.put((None, error))
    if iterator is not None:
        iterator.close()


def _end(thread: threading.Thread, wanted: queue.SimpleQueue, shared: worker_notes.Shared) -> None:
    wanted.put(False)
    if not shared.is_stuck:
        thread.join(_CLOSE_S)
    if thread.is_alive() and shared.count:  # without processes the thread waits for a disk and cannot be ended
        shared.kill()
        thread.join(_CLOSE_S)
    if not thread.is_alive():
        shared.close()


def _begin(path: str, worker: int, num_workers: int) -> None:
    """Initialises a worker process: its output is cleaned, and it exits when its parent does.

    Python's resource tracker, a separate process that exits after the last worker, then removes shared memory that was
    in transit. The thread that started the worker is the loader's, which ends last.
    """
    terminal.install()
    worker_notes.begin(path, worker)
    child_processes.end_with_parent()
    child_processes.register_shared_memory_first()


def _how(code: int) -> str:
    """Describes how a worker ended, by its exit code, with a remedy."""
    if code > 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    if code == -signal.SIGKILL:
        return (f"was killed by {name}, which the system sends when memory runs out; fewer data.workers or a smaller "
                "batch_size need less memory")
    if code == -signal.SIGBUS:
        return (f"was killed by {name}, which the system sends when {SHARED} is full ({(free_bytes() or 0) / 1e6:.0f} "
                "MB are free now); fewer data.workers need less of it, and docker run --shm-size=8g gives more")
    return f"was killed by {name}"
