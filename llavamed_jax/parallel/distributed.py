"""Several processes of one run: they find each other, exchange small messages, and stop and fail together.

XLA exchanges the data of devices; that is not done here. Messages go through the key-value store of jax's coordination
service, which process 0 runs: it needs no device, works on every platform, and tolerates processes that arrive hours
apart. A run of one process may call every function here; none of them waits then.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llavamed_jax.errors import UserError
from llavamed_jax.utils import private, signals, terminal

# Timeout of a process's heartbeat in seconds; the runtime then ends all others.
HEARTBEAT_S = 40
_CHUNK = 2**20 - 64  # bytes of a message, with room for a header: gRPC refuses large messages
_POLL_S = 1.0
_FAREWELL_S = 5.0  # a failed process waits so long for the others to read the reason
_LAST_ACT_S = 20.0  # a process that ends because another one has failed may still do something for so long


class Group:
    """The processes of a run, as one of them sees them.

    Args:
      client: jax's client of the coordination service; its methods raise RuntimeError.
      index: of this process.
      count: of all processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self.index, self.count = client, index, count
        self._called = 0  # calls of gather and broadcast so far; all processes make them in one order
        self._given: list[str] = []  # on process 0: broadcasts that others may not have read yet
        self._when_stopped: Callable[[], None] | None = None
        self._when_failed: Callable[[], None] | None = None
        self.ends_alike = False  # whether all processes have the same failure
        self._is_left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="other-processes", daemon=True)

    def gather(self, value: bytes) -> list[bytes]:
        """Collects a value of each process on process 0.

        Args:
          value: this process's value.

        Returns:
          On process 0 all values, in order; on the others an empty list, without waiting.
        """
        self._called += 1
        call = f"handed/{self._called}"
        if self.index:
            self._put(f"{call}/{self.index}", value)
            return []
        found = [value, *(self._take(f"{call}/{k}") for k in range(1, self.count))]
        self._client.key_value_delete(f"{call}/")
        for earlier in self._given:  # all processes have made this call, so they have read the earlier broadcasts
            self._client.key_value_delete(f"{earlier}/")
        self._given.clear()
        return found

    def broadcast(self, value: bytes | None) -> bytes:
        """Returns process 0's value on every process; the others pass None and wait."""
        self._called += 1
        call = f"handed/{self._called}"
        if self.index:
            return self._take(call)
        self._put(call, value)
        self._given.append(call)
        return value

    def tell(self, what: str, **details: Any) -> None:
        """Tells the others of a `stop` or a `failure`; only the first call of all processes counts."""
        # Another process was first, or process 0 is gone, which the runtime reports.
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"told/{what}", json.dumps({"process": self.index, **details}))

    def farewell(self) -> None:
        """Gives the others time to read a failure before this process exits: the store ends with process 0."""
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"heard/{self.index}", "")
            until = time.monotonic() + _FAREWELL_S
            while (not self.index and len(self._client.key_value_dir_get("heard/")) < self.count
                   and time.monotonic() < until):
                time.sleep(0.1)

    def watch(self) -> None:
        """Starts the thread that watches the other processes."""
        self._watcher.start()

    def leave(self) -> None:
        """Ends the watching thread; the store can only be left afterwards."""
        self._is_left.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def when_stopped(self, act: Callable[[], None] | None) -> None:
        """Sets the function that is called, once and in another thread, when another process says that it stops."""
        self._when_stopped = act

    def when_failed(self, act: Callable[[], None] | None) -> None:
        """Sets the function that is called, in another thread, before this process ends for another one's failure."""
        self._when_failed = act

    def _watch(self) -> None:
        """Watches for failures and stops of other processes; exits this process if another one has failed."""
        while not self._is_left.wait(_POLL_S):
            try:
                told = {key.rsplit("/", 1)[-1]: json.loads(value)
                        for key, value in self._client.key_value_dir_get("told/")}
            except RuntimeError:
                return  # process 0 is gone, and the runtime ends this one
            failure, stop = told.get("failure"), told.get("stop")
            if failure is not None and failure["process"] != self.index:
                said = terminal.sentence(f"error: process {failure['process']} failed: {failure['sentence']}")
                print(said, file=terminal.Screen(sys.__stderr__), flush=True)
                self.farewell()
                if self._when_failed is not None:
                    last = threading.Thread(target=self._when_failed, name="last-act", daemon=True)
                    last.start()
                    last.join(_LAST_ACT_S)
                os._exit(failure["status"])
            if stop is not None and stop["process"] != self.index and self._when_stopped is not None:
                act, self._when_stopped = self._when_stopped, None
                act()

    def _put(self, key: str, value: bytes) -> None:
        """Writes a value in chunks; the first chunk is written last and has the number of the others."""
        first, *others = [value[at:at + _CHUNK] for at in range(0, len(value), _CHUNK)] or [b""]
        for number, chunk in enumerate(others):
            self._client.key_value_set_bytes(f"{key}/{number}", chunk)
        self._client.key_value_set_bytes(f"{key}/first", b"%d\n" % len(others) + first)

    def _take(self, key: str) -> bytes:
        """Waits for a value that another process writes."""
        others, _, value = self._wait(f"{key}/first").partition(b"\n")
        return value + b"".join(self._wait(f"{key}/{number}") for number in range(int(others)))

    def _wait(self, key: str) -> bytes:
        while True:  # in short waits, so that a signal can end the command
            signals.check()
            try:
                return self._client.blocking_key_value_get_bytes(key, int(1000 * _POLL_S))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_group: Group | None = None


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None,
               local_devices: Sequence[int] | None = None, method: str | None = None) -> None:
    """Joins the other processes. Call it once, before any computation.

    Args:
      coordinator: HOST:PORT of process 0; None on SLURM, Open MPI, Kubernetes and Cloud TPU, where jax finds it.
      count: the number of processes; None as for `coordinator`.
      index: the number of this process; None as for `coordinator`.
      local_devices: this process's GPUs among those of its host; empty for all.
      method: the name of jax's detection of clusters, for values that are None; None lets jax choose.

    Raises:
      UserError: jax finds no other processes. If it finds but cannot reach them, the C++ runtime aborts the process.
    """
    global _group
    import jax  # not at the top: a single process can call the rest without jax

    jax.config.update("jax_enable_preemption_service", False)  # it would replace the program's handler of SIGTERM
    try:
        jax.distributed.initialize(coordinator, count, index, local_device_ids=local_devices,
                                   heartbeat_timeout_seconds=HEARTBEAT_S,
                                   cluster_detection_method="deactivate" if coordinator else method)
    except Exception as error:  # from jax, a cluster's library or a socket
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the other processes of this run were not found: {reason}; give --coordinator, "
                        "--num_processes and --process_id, or --num_processes 1 to run alone") from error
    _group = Group(*private.coordination_client())
    _group.watch()


def leave() -> None:
    """Waits until all processes have finished, and disconnects."""
    global _group
    if _group is not None:
        import jax
        _group.leave()
        _group = None
        jax.distributed.shutdown()


def end_alike() -> None:
    """Records that all processes have the same failure and raise its sentence; `fail` then tells the others nothing."""
    if _group is not None:
        _group.ends_alike = True


def fail(status: int, sentence: str) -> None:
    """Tells the others why this process ends, and the exit status for all."""
    if _group is not None:
        if not _group.ends_alike:
            _group.tell("failure", status=status, sentence=sentence)
        _group.leave()
        _group.farewell()


def stop() -> None:
    """Tells the others that this process was asked to stop, so that they stop too."""
    if _group is not None:
        _group.tell("stop")


def when_stopped(act: Callable[[], None] | None) -> None:
    """Sets the function that is called, once and in another thread, when another process was asked to stop."""
    if _group is not None:
        _group.when_stopped(act)


def when_failed(act: Callable[[], None] | None) -> None:
    """Sets the function that is called, in another thread, before this process ends for another one's failure.

    It may take 20 seconds.
    """
    if _group is not None:
        _group.when_failed(act)


def process_index() -> int:
    """Returns the number of this process; 0 in a run of one."""
    return 0 if _group is None else _group.index


def process_count() -> int:
    """Returns the number of processes of the run."""
    return 1 if _group is None else _group.count


def gather(value: bytes) -> list[bytes]:
    """Returns all values, in order, on process 0, which waits for them; returns an empty list at once on the others."""
    return [value] if _group is None else _group.gather(value)


@contextlib.contextmanager
def after_first() -> Iterator[None]:
    """Runs the block on process 0 first; the others wait, then run it."""
    if _group is not None and _group.index:
        _group.broadcast(None)
    yield
    if _group is not None and not _group.index:
        _group.broadcast(b"")


def from_first(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0 and returns its result, of JSON's types, on every process; the others wait for it."""
    if _group is None:
        return make()
    if _group.index:
        return json.loads(_group.broadcast(None))
    value = make()
    _group.broadcast(json.dumps(value).encode())
    return value
