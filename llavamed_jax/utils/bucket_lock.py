"""Locks an address in a bucket for one run, by objects that are created on the precondition that they do not exist.

The lock is `.lock/N` with the highest N: one more for each run. A run takes the lock by creating `.lock/N+1`, which
exactly one of several runs can do. The object has its owner and a time, which the owner renews every `RENEWED_S`.

The lock of a run that was killed is stale, and the next run takes it:

- on the same machine at once, if the owner's process does not exist any more;
- on another machine once the object has not changed for `STALE_S`. The next run watches it for so long, so that no two
  clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
import uuid
from pathlib import Path

from llavamed_jax.errors import UserError
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
    """

    def __init__(self, bucket: Bucket):
        self._bucket, self._number = bucket, 0
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
            content = self._content()
            if self._bucket.create(f"{_FOLDER}{number + 1}", content):
                break
        self._number = number + 1
        if self._bucket.create(f"{_FOLDER}{self._number}", content + b"\n"):
            raise UserError(f"the store of {self._bucket.url} writes an object that exists although the request "
                            "forbids it (If-None-Match, ifGenerationMatch), so that two runs could not notice each "
                            "other; a store that obeys preconditions was expected")
        self.check()  # a slow process may have created a number that the runs after it had deleted
        self._bucket.delete(f"{_FOLDER}{each}" for each in self._numbers() if each < self._number)

    def check(self) -> None:
        """Raises Taken if this run does not have the lock any more."""
        number, record, _ = self._newest()
        if number != self._number or record.get("id") != self._owner["id"]:
            what = f"was taken by another run ({_described(record)})" if number else "was removed"
            raise Taken(f"the lock of {self._bucket.url} {what}; nothing more is saved there")

    def renew(self) -> None:
        """Writes the present time into the lock. Raises Taken as `check` does."""
        self.check()
        self._bucket.write(f"{_FOLDER}{self._number}", self._content())

    def release(self) -> None:
        """Gives the lock up if it was taken. Its object stays, so that the next run's has a higher number."""
        if self._number:
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
        if record.get("machine") and record["machine"] == self._owner["machine"]:
            return _process(record.get("pid")) != {key: record.get(key) for key in ("machine", "pid", "started")}
        print(f"{self._bucket.url} was locked by a run on another machine ({_described(record)}): the lock counts as "
              f"stale once it has not been renewed for {STALE_S:.0f} s", flush=True)
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _process(pid: object) -> dict[str, object]:
    """Returns what identifies a process: its machine since the last boot, its number, and when it was started.

    `machine` is "" where there is no /proc, and `started` is None for a process that does not exist.
    """
    found: dict[str, object] = {"machine": "", "pid": pid, "started": None}
    with contextlib.suppress(OSError):
        # Containers of one machine have one boot, and process numbers of their own.
        found["machine"] = (Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + " "
                            + os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError, IndexError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        if after_name[0] not in "ZX":
            found["started"] = int(after_name[19])
    return found
