"""Lets child processes end with their parent, however that ends, and without warnings of Python's own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from multiprocessing import parent_process, resource_tracker

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def start_tracker() -> None:
    """Starts Python's resource tracker, which removes the shared memory of killed processes, without its warnings."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def end_with_parent() -> None:
    """Ends this process when its parent does; a child process calls it when it begins.

    Libraries' own workers would wait forever after their parent is gone. A stopped process (SIGSTOP) cannot check its
    parent: on Linux the kernel ends it.
    """
    def watch(parent):
        parent.join()
        os._exit(1)

    if sys.platform == "linux":
        # The kernel acts when the thread that started this process ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
