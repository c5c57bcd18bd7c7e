"""Work by number in grain's worker processes, which end when the program does, however it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import parent_process

import grain
from absl import flags

from llavamed_jax import terminal

_GRACE_S = 30  # a worker's, after a SIGTERM


def in_order(make: Callable[[int], dict], count: int, workers: int) -> grain.DatasetIterator:
    """An iterator over make(0), …, make(count - 1), made ahead; close it to end the processes.

    Args:
      make: is pickled to the workers.
      workers: processes; 0 makes them in a thread of this one.
    """
    # One thread each: tokenising holds the interpreter's lock, and a second batch in the making costs its memory.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else 2)
    dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl for its options, and our command lines are argparse's
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                                      worker_init_fn=_tie_to_parent)
    return iter(dataset)


def _tie_to_parent(worker: int, num_workers: int) -> None:
    """Run first in each worker process: what it prints is cleaned, and it ends when its parent does, not before, and not after.

    A Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent still wants batches until it has saved.
    When the parent is gone, however it went, grain's own worker would wait for ever. Shared memory that was on its way is
    then removed by Python's resource tracker, a process of its own that ends after the last of them.
    """
    def later(*_):
        timer = threading.Timer(_GRACE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def watch(parent):
        parent.join()
        os._exit(1)

    terminal.install()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, later)
    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
