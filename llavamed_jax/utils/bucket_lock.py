"""Locks an address in a bucket for one run, by objects that are created on the precondition that they do not exist.

The lock is `.lock/N` with the highest N: one more for each run. A run takes the lock by creating `.lock/N+1`, which
exactly one of several runs can do. The object has its owner and a time, which the owner renews every `RENEWED_S` in a
thread that waits for nothing else.

The lock of a run that was killed is stale, and the next run takes it:

- on the same machine at once, if the owner's process does not exist any more;
- on another machine once the object has not changed for `STALE_S`. The next run watches it for so long, so that no two
  clocks are compared.

A run that could not renew its lock for half of this time, because it was paused or the store did not answer, asks the
store whether it still has the lock before each object that it writes or deletes (`BucketLock.confirm`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from llavamed_jax.errors import UserError, warn
from llavamed_jax.utils import signals
from llavamed_jax.utils.buckets import Bucket, Missing

RENEWED_S = 30.0
STALE_S = 180.0
_POLL_S = 2.0
_FOLDER = ".lock/"


class Taken(UserError):
    """Another run has taken the lock of this run, or the lock was removed."""


class BucketLock:
    """The lock of one run.

    Args:
      bucket: the address that is locked.

    Attributes:
      lost: a sentence that says how the run lost its lock; None as far as the run knows.
    """

    def __init__(self, bucket: Bucket):
        self._bucket, self._number, self.lost = bucket, 0, None
        self._renewed = 0.0  # `_clock` before the newest renewal began
        self._failed: tuple[float, UserError] | None = None  # `_clock` after the newest renewal that failed, and why
        self._renewing, self._has_ended = threading.Lock(), threading.Event()
        self._keeper: threading.Thread | None = None
        self._owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "since": _now(), **_process(os.getpid())}

    def take(self) -> None:
        """Takes the lock.

        Raises:
          UserError: another run has it; or the store ignores preconditions, so that it can have no locks.
        """
        while True:
            number, record, version = self._newest()
            if number and not self._is_over(number, record, version):
                raise UserError(f"the workdir {self._bucket.url} is in use by another run ({_described(record)})")
            content, self._renewed = self._content(), _clock()
            if self._bucket.create(f"{_FOLDER}{number + 1}", content):
                break
        self._number = number + 1
        if self._bucket.create(f"{_FOLDER}{self._number}", content + b"\n"):
            raise UserError(f"the store of {self._bucket.url} writes an object that exists although the request "
                            "forbids it (If-None-Match, ifGenerationMatch), so that two runs could not notice each "
                            "other; a store that obeys preconditions was expected")
        self.check()  # a slow process may have created a number that the runs after it had deleted
        self._bucket.delete(f"{_FOLDER}{each}" for each in self._numbers() if each < self._number)

    def keep(self, when_lost: Callable[[Taken], None]) -> None:
        """Renews the lock from now on, in a thread of its own, until `release`.

        Args:
          when_lost: called once in that thread if another run has taken the lock.
        """
        self._keeper = threading.Thread(target=self._keep, args=(when_lost,), name="lock", daemon=True)
        self._keeper.start()

    def _keep(self, when_lost: Callable[[Taken], None]) -> None:
        has_failed = False
        while not self._has_ended.wait(RENEWED_S / 5 if has_failed else RENEWED_S):
            try:
                self.renew()
                has_failed = False
            except Taken as error:
                when_lost(error)
                return
            except UserError as error:
                if not has_failed:
                    warn(f"the lock was not renewed, which is tried again: {error}")
                has_failed = True

    def check(self) -> None:
        """Asks the store, and raises Taken if this run does not have the lock any more."""
        if self.lost is None:
            number, record, _ = self._newest()
            if number == self._number and record.get("id") == self._owner["id"]:
                return
            what = f"was taken by another run ({_described(record)})" if number else "was removed"
            self.lost = f"the lock of {self._bucket.url} {what}; nothing more is saved there"
        raise Taken(self.lost)

    def confirm(self) -> None:
        """Raises Taken if this run does not have the lock; asks the store only if the last renewal is long ago.

        Of several threads that call it at once, one asks; if the store does not answer, all raise its error.
        """
        if self.lost is not None:
            raise Taken(self.lost)
        if self._is_old():
            since = _clock()
            with self._renewing:
                if self._is_old():
                    if self._failed is not None and self._failed[0] >= since:  # while this thread waited
                        raise type(self._failed[1])(str(self._failed[1])) from self._failed[1]
                    self._renew()

    def renew(self) -> None:
        """Writes the present time into the lock. Raises Taken as `check` does."""
        with self._renewing:
            self._renew()

    def _renew(self) -> None:
        try:
            self._write()
        except UserError as error:
            self._failed = _clock(), error
            raise

    def _write(self) -> None:
        began = _clock()
        self.check()
        self._bucket.write(f"{_FOLDER}{self._number}", self._content())
        if _clock() - self._renewed > STALE_S - RENEWED_S:  # another run may have been about to take it
            time.sleep(2 * _POLL_S)
            self.check()
        self._renewed = began

    def _is_old(self) -> bool:
        return _clock() - self._renewed > STALE_S / 2

    def release(self) -> None:
        """Gives the lock up if it was taken. Its object stays, so that the next run's has a higher number."""
        self._has_ended.set()
        if self._keeper is not None:
            self._keeper.join()  # a renewal that came after the last word would undo it
        if self._number and self.lost is None:
            self._bucket.write(f"{_FOLDER}{self._number}", self._content(ended=_now()))

    def _content(self, **more: str) -> bytes:
        return json.dumps({**self._owner, "time": _now(), **more}, indent=1).encode() + b"\n"

    def _numbers(self) -> dict[int, str]:
        """Returns the version of each lock, by its number."""
        names = {name.removeprefix(_FOLDER): entry.version for name, entry in self._bucket.entries(_FOLDER).items()}
        return {int(name): version for name, version in names.items() if name.isdigit()}

    def _newest(self) -> tuple[int, dict, str]:
        """Returns number, record and version of the newest lock; (0, {}, "") without one."""
        while True:
            numbers = self._numbers()
            if not numbers:
                return 0, {}, ""
            number = max(numbers)
            with contextlib.suppress(Missing):  # deleted since it was listed: a newer one exists
                content = self._bucket.read(f"{_FOLDER}{number}")
                try:
                    record = json.loads(content)
                except ValueError:
                    record = {}
                return number, record if isinstance(record, dict) else {}, numbers[number]

    def _is_over(self, number: int, record: dict, version: str) -> bool:
        """Returns whether the run of a lock has ended, or was killed; waits for `STALE_S` if only waiting can tell."""
        if "ended" in record:
            return True
        is_here = bool(record.get("machine")) and record["machine"] == self._owner["machine"]
        is_gone = _is_gone(record.get("pid"), record.get("started")) if is_here else None
        if is_gone is not None:
            return is_gone
        where = "of another user" if is_here else "on another machine"
        print(f"{self._bucket.url} was locked by a run {where} ({_described(record)}): the lock counts as stale once "
              f"it has not been renewed for {STALE_S:.0f} s", flush=True)
        until = time.monotonic() + STALE_S
        while time.monotonic() < until:
            signals.check()
            time.sleep(min(_POLL_S, STALE_S))
            now, found, its_version = self._newest()
            if now != number or "ended" in found:
                return True  # the next try sees whether somebody else has it now
            if its_version != version:
                return False
        return True


def _described(record: dict) -> str:
    return (f"process {record.get('pid', '?')} on {record.get('host', 'an unknown machine')}, since "
            f"{record.get('since', '?')}, renewed {record.get('time', '?')}")


def _clock() -> float:
    """Returns seconds that pass also while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _process(pid: object) -> dict[str, object]:
    """Returns what identifies a process: its machine since the last boot, its number, and when it was started.

    `machine` is "" where there is no /proc, and `started` is None for a process that has ended or cannot be seen.
    """
    found: dict[str, object] = {"machine": "", "pid": pid, "started": None}
    with contextlib.suppress(OSError):
        # Containers of one machine have one boot, and process numbers of their own.
        found["machine"] = (Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + " "
                            + os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError, IndexError):
        state, started = _stat(pid)
        if state not in "ZX":
            found["started"] = started
    return found


def _stat(pid: object) -> tuple[str, int]:
    """Returns a process's state, Z and X after its end, and when it was started."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return after_name[0], int(after_name[19])


def _is_gone(pid: object, started: object) -> bool | None:
    """Returns whether a process of this machine has ended; None if that cannot be seen.

    /proc may hide the processes of other users (`hidepid`).

    Args:
      pid: its number.
      started: when it was started, as `_stat` says; None if it could not see itself.
    """
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        state, its_start = _stat(pid)
        return state in "ZX" or its_start != started if started is not None else None
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return None
