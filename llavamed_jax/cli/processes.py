"""One of several processes of a command line: the flags that say so, how it joins the others, and how it parts from them.

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
    """`--coordinator HOST:PORT --num_processes N --process_id I`, in one line of `--help`."""
    parser.add_argument("--coordinator", metavar="ADDR", help="HOST:PORT, and --num_processes N --process_id I")
    parser.add_argument("--num_processes", type=int, help=argparse.SUPPRESS)  # 1 runs alone wherever it is
    parser.add_argument("--process_id", type=int, help=argparse.SUPPRESS)


def asked(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that the flags or the cluster name; None for a run of one process.

    Raises:
      UsageError: flags that are not all there, or out of range.
    """
    given = {f"--{name}": getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    if given["--num_processes"] == 1 and not given["--process_id"]:
        return None
    absent = [flag for flag, value in given.items() if value is None]
    if len(absent) == len(given):
        return detected(environment)
    if absent:
        raise UsageError(f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing; --coordinator, "
                         "--num_processes and --process_id stand together")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", args.coordinator):
        raise UsageError(f"--coordinator is {args.coordinator!r}; HOST:PORT was expected")
    if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
        raise UsageError(f"--process_id is {args.process_id} of --num_processes {args.num_processes}; a number from 0 "
                         "up to below that was expected")
    return Place(args.coordinator, args.num_processes, args.process_id)


def join(place: Place | None) -> None:
    """Makes this process one of several; to be called before jax is imported. All but process 0 are silent from here on.

    The caller goes on in a child; the parent ends with it.
    """
    global _joined
    if place is None:
        signals.watch()
        return
    parent.stay_behind(place)
    signals.watch(is_job=True)
    from llavamed_jax.parallel import distributed
    distributed.initialize(place.coordinator, place.count, place.index, place.local_devices)
    _joined = True
    sys.stdout.flush()
    sys.stdout = terminal.Screen(streams.opened(os.dup(1), sys.stdout, closefd=True))
    nowhere = open(os.devnull, "w", encoding="utf-8")
    os.dup2(nowhere.fileno(), 1)  # where the CPU's collectives tell of each connection, in pieces
    if distributed.process_index():
        sys.stdout = sys.stderr = nowhere


def is_joined() -> bool:
    return _joined


def part(status: int, sentence: str | None) -> None:
    """The end of a process: the others hear of it. Of a failure they do so at once, and this process does not come back.

    Args:
      status: exit status; sentence: what went wrong, where it is a failure.
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
    os._exit(status)  # else jax would wait for the others to come to their end, too


def complain(sentence: str) -> None:
    """Prints an error, of a silent process too."""
    print(f"error: {terminal.sentence(sentence)}", file=_stderr(), flush=True)


def trace(error: Exception) -> None:
    """Prints the traceback of an error that nobody expected.

    That a connection is broken says that another process is gone: of that the runtime, or the other one, says more in a while, and
    ends this one.
    """
    from llavamed_jax.parallel import distributed
    if re.search("(?i)gloo|nccl|connection|socket|unavailable|aborted|cancelled", str(error)):
        time.sleep(distributed.HEARTBEAT_S + 10)
    traceback.print_exception(error, file=_stderr())


def _stderr() -> terminal.Screen:
    """Where errors go, those of a silent process too."""
    return terminal.Screen(sys.__stderr__) if _joined else sys.stderr
