"""Lets child processes end with their parent, however that ends, and without warnings of Python's own."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing import parent_process, resource_tracker, shared_memory

SEGMENT = "llavamed_"  # begins the names of shared memory; the number of the worker's parent process follows
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def prepare() -> None:
    """Prepares the start of child processes by `multiprocessing`, in the thread that will start them.

    Python's resource tracker, which removes the shared memory of killed processes, starts now, without its warnings. On
    Linux with util-linux, children then start through `setpriv --pdeathsig KILL`: a child that is stopped (SIGSTOP)
    before it runs any code of ours could not ask for that signal itself, and would outlive its parent.
    """
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()  # before the launcher is set, for it must outlive its parent
    finally:
        sys.warnoptions.pop()
    if (launcher := _launcher()) is not None:
        multiprocessing.set_executable(launcher)


@functools.cache
def _launcher() -> str | None:
    """Returns the path of a program that takes the interpreter's arguments; None if there cannot be one here."""
    setpriv = shutil.which("setpriv")
    if sys.platform != "linux" or setpriv is None:
        return None
    text = f'#!/bin/sh\nexec {shlex.quote(setpriv)} --pdeathsig KILL {shlex.quote(sys.executable)} "$@"\n'
    try:
        # An anonymous file, which disappears however this process ends. A file that is open for writing cannot be run.
        written = os.memfd_create("llavamed_launcher")
        try:
            os.write(written, text.encode())
            os.fchmod(written, 0o500)
            path = f"/proc/{os.getpid()}/fd/{os.open(f'/proc/self/fd/{written}', os.O_RDONLY)}"
        finally:
            os.close(written)
        works = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        return path if works else None  # busybox's setpriv does not know the option
    except OSError:  # a system that hides /proc, or forbids anonymous programs
        return None


def end_with_parent() -> None:
    """Ends this process when its parent does; a child process calls it when it begins.

    Libraries' own workers would wait forever after their parent is gone. A stopped process (SIGSTOP) cannot check its
    parent: on Linux the kernel ends it, also where `prepare` found no launcher.
    """
    def watch(parent):
        parent.join()
        os._exit(1)

    if sys.platform == "linux":
        # The kernel acts when the thread that started this process ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


class _RegisteredMemory(shared_memory.SharedMemory):
    """Shared memory that is registered with Python's resource tracker before it exists.

    Python registers it afterwards, and a process that is killed in between leaves it behind. To the tracker, a name
    that was never used is no error.
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, **kwargs):
        if create and name is None:
            # Nothing else has this name, or the tracker would remove it. macOS permits 30 characters.
            name = f"{SEGMENT}{os.getppid()}_{secrets.token_hex(6)}"
            resource_tracker.register(f"/{name}", "shared_memory")
        super().__init__(name, create, size, **kwargs)


def register_shared_memory_first() -> None:
    """Lets libraries in this process create only shared memory that is removed however the process ends."""
    shared_memory.SharedMemory = _RegisteredMemory
