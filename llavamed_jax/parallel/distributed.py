"""Several processes of one run: they find each other, hand each other small things, and stop and fail together.

What the devices exchange is XLA's business and not here. What is handed over here goes through the key-value store of jax's
coordination service, which process 0 runs: it needs no device, works on every platform, and does not mind that one process
comes hours after another. A run of one process may call everything here; nothing waits then.
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

# A process that is silent for so long is given up, and the runtime ends all others.
HEARTBEAT_S = 40
_CHUNK = 2**20 - 64  # bytes of a message, with room for a few more: gRPC refuses large ones
_POLL_S = 1.0
_FAREWELL_S = 5.0  # that a process which fails waits until the others have heard why


class Group:
    """The processes of a run, as one of them sees them.

    Args:
      client: jax's client of the coordination service; its methods raise RuntimeError.
      index, count: of this process, and of all.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self.index, self.count = client, index, count
        self._called = 0  # handovers so far, which all processes make in one order
        self._given: list[str] = []  # of process 0: what it gave that others may not have taken
        self._when_stopped: Callable[[], None] | None = None
        self.ends_alike = False  # whether each process knows by itself why all end
        self._is_left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="other-processes", daemon=True)

    def gather(self, value: bytes) -> list[bytes]:
        """Process 0 gets everyone's, in order; the others get nothing and do not wait."""
        self._called += 1
        call = f"handed/{self._called}"
        if self.index:
            self._put(f"{call}/{self.index}", value)
            return []
        found = [value, *(self._take(f"{call}/{k}") for k in range(1, self.count))]
        self._client.key_value_delete(f"{call}/")
        for earlier in self._given:  # whoever has made this call has taken what was given before it
            self._client.key_value_delete(f"{earlier}/")
        self._given.clear()
        return found

    def broadcast(self, value: bytes | None) -> bytes:
        """Everyone gets what process 0 gives."""
        self._called += 1
        call = f"handed/{self._called}"
        if self.index:
            return self._take(call)
        self._put(call, value)
        self._given.append(call)
        return value

    def tell(self, what: str, **details: Any) -> None:
        """Lets the others know of a `stop` or a `failure`; the first word counts."""
        with contextlib.suppress(RuntimeError):  # it is there already, or process 0 is gone, of which the runtime tells them
            self._client.key_value_set(f"told/{what}", json.dumps({"process": self.index, **details}))

    def farewell(self) -> None:
        """Before a process that has failed ends: gives the others time to hear it from the store, which ends with process 0."""
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"heard/{self.index}", "")
            until = time.monotonic() + _FAREWELL_S
            while not self.index and len(self._client.key_value_dir_get("heard/")) < self.count and time.monotonic() < until:
                time.sleep(0.1)

    def watch(self) -> None:
        self._watcher.start()

    def leave(self) -> None:
        """Ends the watching, without which the store cannot be left."""
        self._is_left.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def when_stopped(self, act: Callable[[], None] | None) -> None:
        """What is done, in another thread and once, when another process tells that it stops."""
        self._when_stopped = act

    def _watch(self) -> None:
        """Ends this process when another one has failed: what it waits for will not come."""
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
                os._exit(failure["status"])
            if stop is not None and stop["process"] != self.index and self._when_stopped is not None:
                act, self._when_stopped = self._when_stopped, None
                act()

    def _put(self, key: str, value: bytes) -> None:
        """In chunks, the first of which, put last, says how many follow it."""
        first, *others = [value[at:at + _CHUNK] for at in range(0, len(value), _CHUNK)] or [b""]
        for number, chunk in enumerate(others):
            self._client.key_value_set_bytes(f"{key}/{number}", chunk)
        self._client.key_value_set_bytes(f"{key}/first", b"%d\n" % len(others) + first)

    def _take(self, key: str) -> bytes:
        """Waits for what another process puts."""
        others, _, value = self._wait(f"{key}/first").partition(b"\n")
        return value + b"".join(self._wait(f"{key}/{number}") for number in range(int(others)))

    def _wait(self, key: str) -> bytes:
        while True:  # in short waits, between which a signal may end the command
            signals.check()
            try:
                return self._client.blocking_key_value_get_bytes(key, int(1000 * _POLL_S))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_group: Group | None = None


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None,
               local_devices: Sequence[int] | None = None) -> None:
    """Joins the other processes; to be called once, before anything is computed.

    Args:
      coordinator, count, index: HOST:PORT of process 0, number of processes, number of this one; None where jax finds them
        by itself, on SLURM, Kubernetes and Cloud TPU.
      local_devices: of this host's GPUs, those of this process; empty: all.
    Raises:
      UserError: jax finds no others. A process that cannot reach them is aborted by the runtime, from C++.
    """
    global _group
    import jax  # not above: whoever runs alone needs no jax to call the rest

    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would take the place of the program's own
    try:
        jax.distributed.initialize(coordinator, count, index, local_device_ids=local_devices,
                                   heartbeat_timeout_seconds=HEARTBEAT_S,
                                   cluster_detection_method="deactivate" if coordinator else None)
    except Exception as error:  # of jax, of a cluster's own library, of a socket
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the other processes of this run were not found: {reason}; --coordinator, --num_processes and "
                        "--process_id name them, and --num_processes 1 runs alone") from error
    _group = Group(*private.coordination_client())
    _group.watch()


def leave() -> None:
    """Waits until all processes have come to their end, and parts from them."""
    global _group
    if _group is not None:
        import jax
        _group.leave()
        _group = None
        jax.distributed.shutdown()


def end_alike() -> None:
    """All processes have come to the same failure and end with its sentence: none tells the others of it (`fail`)."""
    if _group is not None:
        _group.ends_alike = True


def fail(status: int, sentence: str) -> None:
    """Tells the others why this process ends, and with which exit status they shall."""
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
    """What is done, in another thread and once, when another process was asked to stop."""
    if _group is not None:
        _group.when_stopped(act)


def process_index() -> int:
    return 0 if _group is None else _group.index


def process_count() -> int:
    return 1 if _group is None else _group.count


def gather(value: bytes) -> list[bytes]:
    """Process 0 gets everyone's, in order, as soon as all are there; the others get nothing and do not wait."""
    return [value] if _group is None else _group.gather(value)


@contextlib.contextmanager
def after_first() -> Iterator[None]:
    """What is done within is done by process 0 first, and by the others when it is through."""
    if _group is not None and _group.index:
        _group.broadcast(None)
    yield
    if _group is not None and not _group.index:
        _group.broadcast(b"")


def from_first(make: Callable[[], Any]) -> Any:
    """What process 0 makes, which is in JSON's types, for everyone; the others wait for it."""
    if _group is None:
        return make()
    if _group.index:
        return json.loads(_group.broadcast(None))
    value = make()
    _group.broadcast(json.dumps(value).encode())
    return value
