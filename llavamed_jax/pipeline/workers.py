"""Work by number in grain's worker processes, which end when the program does. One that dies or gives nothing is named."""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import parent_process, resource_tracker
from typing import Any

import grain
from absl import flags

from llavamed_jax.errors import UserError, cut, warn
from llavamed_jax.utils import signals, terminal, worker_notes

WARN_S = 60.0  # without a result until the worker is named, and again after twice as long
GIVE_UP_S = 1800.0  # until the work is given up
HELD = 4  # results a worker, in its queue and in the threads that hand them on (grain 0.2.18), and one that is used
SHARED = "/dev/shm"
_POLL_S = 0.2
_DEAD_S = 3.0  # in which what a worker had finished before it died still comes
_CLOSE_S = 5.0  # for workers to end by themselves
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class WorkerError(UserError):
    """A worker died, or has given nothing for `GIVE_UP_S`."""


class InOrder(Iterator):
    """make(0), …, make(count - 1), made ahead in worker processes, or in a thread of this one. Close it to end them.

    Args:
      make: is pickled to the workers.
      workers: processes; 0 makes them in a thread.
    Attributes:
      on_wait: called with the seconds for which a result has been waited for. It may raise: `signals.Stopped`, or TimeoutError, of
        which a WorkerError that names the worker is made. The iterator is of no further use then.
    """

    def __init__(self, make: Callable[[int], dict], count: int, workers: int):
        self.on_wait: Callable[[float], object] = lambda waited: signals.check()
        self._shared = worker_notes.Shared(workers)
        self._taken = 0
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        dataset = _dataset(make, count, workers, self._shared.path)
        self._thread = threading.Thread(target=_run, args=(dataset, self._wanted, self._made), name="loader",
                                        daemon=True)
        self._thread.start()
        # Ends the workers with this object or, before modules are torn down (grain's destructors need them), with the program.
        self._end = weakref.finalize(self, _end, self._thread, self._wanted, self._shared)

    def __next__(self) -> Any:
        """The next result.

        Raises:
          WorkerError: a worker died or gives nothing. Stopped. What `make` raised.
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
                warn(f"{self._waited_for(waited)}; it is waited for {GIVE_UP_S - waited:.0f} s more")
                warn_after *= 2
        self._shared.look()
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):  # grain's sentence
            self._refuse_dead()
        if error is not None:
            raise error
        self._taken += 1
        return result

    def close(self) -> None:
        """Ends the workers: by themselves, or by SIGKILL where they are stuck or take long."""
        self._end()

    def _obey(self, waited: float) -> None:
        try:
            self.on_wait(waited)
            if waited > GIVE_UP_S:
                raise TimeoutError
        except TimeoutError:
            self._shared.is_stuck = True
            raise WorkerError(f"{self._waited_for(waited)}, and is given up") from None
        except BaseException:
            self._shared.is_stuck = True
            raise

    def _refuse_dead(self) -> None:
        for worker, pid, code in self._shared.ended():
            self._shared.is_stuck = True
            raise WorkerError(f"loader worker {worker} of {self._shared.count} (process {pid}) {_how(code)}")

    def _waited_for(self, seconds: float) -> str:
        """Who gives nothing, for how long, and what it reads. Workers take turns."""
        worker = self._taken % self._shared.count if self._shared.count else None
        pid, text = (None, worker_notes.here()) if worker is None else self._shared.note(worker)
        who = "the loader" if worker is None else f"loader worker {worker} of {self._shared.count}" + (f" (process {pid})" if pid else "")
        return f"{who} has given nothing for {seconds:.0f} s" + (f" and reads {cut(text, 300)}" if text else "")


def in_order(make: Callable[[int], dict], count: int, workers: int) -> InOrder:
    """An iterator over make(0), …, make(count - 1), made ahead; close it to end the processes (`InOrder`)."""
    return InOrder(make, count, workers)


def fitting(workers: int, size: int, folder: str = SHARED) -> int:
    """How many of some workers may start, so that what they hold at a time has room in shared memory.

    Args:
      size: bytes of a result.
    """
    free = free_bytes(folder)
    return workers if free is None else max(0, min(workers, (free // max(size, 1) - 1) // HELD))


def free_bytes(folder: str = SHARED) -> int | None:
    """Room in shared memory; None where that is no folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _dataset(make: Callable, count: int, workers: int, path: str) -> grain.IterDataset:
    # One thread each: tokenising holds the interpreter's lock, and a second batch in the making costs its memory.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else 2)
    dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl for its options, and our command lines are argparse's
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                                      worker_init_fn=functools.partial(_begin, path))
    return dataset


def _run(dataset: grain.IterDataset, wanted: queue.SimpleQueue, made: queue.SimpleQueue) -> None:
    """The thread in which grain works: a wait of its own cannot be interrupted.

    Signals are blocked in it, and so in the threads and processes that it starts: a Ctrl-C and a scheduler's SIGTERM reach the whole
    process group, and the command still wants batches until it has saved.
    """
    signals.block_here()
    _start_tracker()
    signals.block_here()  # starting the tracker has unblocked some
    iterator = None
    while wanted.get():
        try:
            iterator = iter(dataset) if iterator is None else iterator
            made.put((next(iterator), None))
        except BaseException as error:  # whoever waits gets it, StopIteration too
            made.put((None, error))
    if iterator is not None:
        iterator.close()


def _start_tracker() -> None:
    """Starts Python's resource tracker, which removes the shared memory of processes that were killed, and does so in silence."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def _end(thread: threading.Thread, wanted: queue.SimpleQueue, shared: worker_notes.Shared) -> None:
    wanted.put(False)
    if not shared.is_stuck:
        thread.join(_CLOSE_S)
    if thread.is_alive() and shared.count:  # without processes it waits for a disk, and is left to it
        shared.kill()
        thread.join(_CLOSE_S)
    if not thread.is_alive():
        shared.close()


def _begin(path: str, worker: int, num_workers: int) -> None:
    """Run first in each worker process: what it prints is cleaned, and it ends when its parent does.

    When the parent is gone, however it went, grain's own worker would wait for ever. Shared memory that was on its way is
    then removed by Python's resource tracker, a process of its own that ends after the last of them. A worker that is stopped (SIGSTOP)
    can look for nobody: on Linux the kernel ends it.
    """
    def watch(parent):
        parent.join()
        os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the thread that started it: the loader, which ends the last
    terminal.install()
    worker_notes.begin(path, worker)
    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _how(code: int) -> str:
    """How a worker ended, by its exit code, and what helps."""
    if code > 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    if code == -signal.SIGKILL:
        return f"was ended by {name}, which the system sends where memory runs out; fewer data.workers and a smaller batch_size take less"
    if code == -signal.SIGBUS:
        return (f"was ended by {name}, which the system sends where {SHARED} is full ({(free_bytes() or 0) / 1e6:.0f} "
                "MB are free now): fewer data.workers take less of it, and docker run --shm-size=8g gives more")
    return f"was ended by {name}"
