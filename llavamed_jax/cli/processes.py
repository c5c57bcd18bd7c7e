"""One of several processes of a command line: its flags, how it joins the others, and how it leaves them.

Nothing here imports jax before the process has been forked (`parent.py`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping

from llavamed_jax.cli import parent
from llavamed_jax.cli.clusters import Place, detected
from llavamed_jax.errors import UsageError
from llavamed_jax.utils import signals, streams, terminal

_joined = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator HOST:PORT --num_processes N --process_id I`, in one line of `--help`."""
    parser.add_argument("--coordinator", metavar="ADDR", help="HOST:PORT; with --num_processes N --process_id I")
    parser.add_argument("--num_processes", type=int, help=argparse.SUPPRESS)  # 1 runs alone on any cluster
    parser.add_argument("--process_id", type=int, help=argparse.SUPPRESS)


def asked(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place that the flags or the cluster give; None for a run of one process.

    Args:
      args: the parsed flags.
      environment: the environment variables.

    Returns:
      The place, or None.

    Raises:
      UsageError: a flag is missing or out of range.
    """
    given = {f"--{name}": getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    if given["--num_processes"] == 1 and not given["--process_id"]:
        return None
    absent = [flag for flag, value in given.items() if value is None]
    if len(absent) == len(given):
        return detected(environment)
    if absent:
        raise UsageError(f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing; --coordinator, "
                         "--num_processes and --process_id are given together")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", args.coordinator):
        raise UsageError(f"--coordinator is {args.coordinator!r}; HOST:PORT was expected")
    if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
        raise UsageError(f"--process_id is {args.process_id} and --num_processes is {args.num_processes}; a "
                         "--process_id of at least 0 and below --num_processes was expected")
    return Place(args.coordinator, args.num_processes, args.process_id)


def join(place: Place | None) -> None:
    """Joins the other processes. Call it before jax is imported. All processes except process 0 are silent afterwards.

    The caller continues in a child process; its parent exits with it.

    Args:
      place: the process's place; None for a run of one process.
    """
    global _joined
    if place is None:
        signals.watch()
        return
    parent.stay_behind(place)
    signals.watch(is_job=True)
    from llavamed_jax.parallel import distributed
    distributed.initialize(place.coordinator, place.count, place.index, place.local_devices, place.method)
    _joined = True
    sys.stdout.flush()
    sys.stdout = terminal.Screen(streams.opened(os.dup(1), sys.stdout, closefd=True))
    nowhere = open(os.devnull, "w", encoding="utf-8")
    os.dup2(nowhere.fileno(), 1)  # the CPU's collectives write about each connection to it, in pieces
    if distributed.process_index():
        sys.stdout = sys.stderr = nowhere


def is_joined() -> bool:
    """Returns whether this process has joined others and has not left them."""
    return _joined


def part(status: int, sentence: str | None) -> None:
    """Leaves the other processes. After a failure the others are told at once, and the call does not return.

    Args:
      status: the exit status.
      sentence: the error, if this is a failure; None otherwise.
    """
    global _joined
    if not _joined:
        return
    from llavamed_jax.parallel import distributed
    _joined = False
    if sentence is None:
        if status:
            distributed.stop()
        distributed.leave()
        return
    distributed.fail(status, sentence)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # otherwise jax would wait for the other processes to finish


def complain(sentence: str) -> None:
    """Prints an error, even from a silent process."""
    print(f"error: {terminal.sentence(sentence)}", file=_stderr(), flush=True)


def trace(error: Exception) -> None:
    """Prints the traceback of an unexpected error.

    A broken connection means that another process is gone: the runtime or that process reports the reason later and
    ends this one, so the traceback waits for that.
    """
    from llavamed_jax.parallel import distributed
    if re.search("(?i)gloo|nccl|connection|socket|unavailable|aborted|cancelled", str(error)):
        time.sleep(distributed.HEARTBEAT_S + 10)
    traceback.print_exception(error, file=_stderr())


def _stderr() -> terminal.Screen:
    """Returns the stream for errors, which a silent process has too."""
    return terminal.Screen(sys.__stderr__) if _joined else sys.stderr
