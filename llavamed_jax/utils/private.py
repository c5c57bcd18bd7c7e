"""Lists every private name of jax, Orbax and Python's pickle that this package uses.

| name | tried with | in a version without it |
|---|---|---|
| `jax._src.distributed.global_state` | jax 0.10.2, jax 0.11.2 | several processes end with a sentence; one runs |
| `_cache_size` of jitted functions | jax 0.10.2, jax 0.11.2 | tests and benchmarks count no compilations |
| `orbax.checkpoint._src.asyncio_utils._run_sync_via_new_loop` | orbax-checkpoint 0.12.8 | tracebacks at failed saves |
| `pickle._Unpickler` | Python 3.11, Python 3.12 | PathVQA's pickles are refused; its parquet files are read |

`tests/utils/test_private_names.py` takes each name away, and finds private names elsewhere in the package.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections import defaultdict
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

from llavamed_jax.errors import UserError

_LEFT_S = 60.0  # seconds that the writes of a failed save may take to end


def coordination_client() -> tuple[Any, int, int]:
    """Returns the client of jax's coordination service, this process's number, and the number of processes.

    No public function of jax returns the client. Call this after `jax.distributed.initialize`.

    Raises:
      UserError: this version of jax stores the client elsewhere.
    """
    try:
        from jax._src import distributed
        state = distributed.global_state
        return state.client, state.process_id, state.num_processes
    except (ImportError, AttributeError):
        raise UserError(f"jax {version('jax')} has no jax._src.distributed.global_state, which several processes need; "
                        "jax 0.10 was expected, or --num_processes 1") from None


def compilations(jitted: Callable) -> int:
    """Returns the number of programs that jax has compiled for a jitted function."""
    return jitted._cache_size()


def let_orbax_finish_writes() -> None:
    """Makes Orbax wait for a failed save's other writes.

    Orbax closes its event loop at the first failure. TensorStore then prints a traceback for each write that is still
    running. No public option of Orbax changes this.
    """
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src import asyncio_utils
        if hasattr(asyncio_utils, "_run_sync_via_new_loop"):
            asyncio_utils._run_sync_via_new_loop = _run_to_the_end


def _run_to_the_end(coroutine: Coroutine) -> Any:
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coroutine)
    except Exception:
        if left := asyncio.all_tasks(loop):
            for task in loop.run_until_complete(asyncio.wait(left, timeout=_LEFT_S))[0]:
                task.cancelled() or task.exception()  # read, or asyncio logs it; the first error is raised below
        raise
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class _NoUnpickler:
    """Replaces `pickle._Unpickler` in a Python without it."""

    dispatch: defaultdict = defaultdict(lambda: None)

    def __init__(self, *args: Any, **options: Any):
        raise UserError("this Python has no pickle._Unpickler, which is needed to read pickles; Python 3.11 or 3.12 "
                        "was expected")


# Python's own unpickler, written in Python. Its public twin in C, `pickle.Unpickler`, cannot be restricted to
# instructions: it crashes with a segmentation fault if a nested tuple is a key, and allocates as much memory as a
# number in the file says.
PythonUnpickler = getattr(pickle, "_Unpickler", _NoUnpickler)
