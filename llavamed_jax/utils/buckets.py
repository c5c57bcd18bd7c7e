"""Reads and writes the objects of a bucket of Google Cloud Storage (`gs://`) or of S3 (`s3://`), through fsspec.

Both stores are used in the same way: whole objects, listings, and one precondition, that an object does not exist yet.
gcsfs and s3fs (the extra `[cloud]`) find credentials and endpoints as their vendors' tools do.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UserError, cut
from llavamed_jax.utils import signals
from llavamed_jax.utils.files import write_whole
from llavamed_jax.utils.paths import split_bucket, user_cache

DIRECTORY = "LLAVAMED_BUCKET_CACHE"  # environment variable: the directory of local copies
_MODULES = {"gs": ("gcsfs", "gcsfs.core", "GCSFileSystem"), "s3": ("s3fs", "s3fs", "S3FileSystem")}
_LOGIN = {"gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
          "s3": "run `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"}
_THREADS = 8  # files that are read or written at a time
_CONFLICTS = 4  # tries to create an object that another request creates at the same time
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CONNECTION = ("Connect", "Timeout", "Connection", "ServerDisconnected", "ClientOSError", "ClientPayload", "Proxy")


class Refused(UserError):
    """Another try would fail too: credentials or permission are missing, or the local disk refuses."""


class Missing(Refused):
    """An object, or the bucket, does not exist."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing.

    Attributes:
      size: bytes.
      version: changes whenever the object is written again with other content.
    """

    size: int
    version: str


class Bucket:
    """The objects below an address, by their names relative to it.

    Every method raises UserError with one sentence, `Refused` if another try would fail too, and `Missing` for what
    does not exist.

    Args:
      url: `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.
      before_change: called before each object that is written or deleted; it may raise.
      is_brisk: whether requests are given up early, for small objects that are written again soon.

    Attributes:
      url: the address without a slash at its end.
    """

    def __init__(self, url: str, before_change: Callable[[], None] = lambda: None, is_brisk: bool = False):
        self._scheme, self._bucket, key = split_bucket(url)
        self.url, self._root = f"{self._scheme}://{self._bucket}/{key}", f"{self._bucket}/{key}"
        self._before_change = before_change
        package, module, name = _MODULES[self._scheme]
        for noisy in ("gcsfs", "s3fs", "fsspec", "botocore", "aiobotocore", "asyncio", "google"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)  # they log a traceback of what they raise anyway
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError:
            raise UserError(f"{package}, which reads and writes {self._scheme}:// addresses, is not installed: pip "
                            "install 'llavamed-jax[cloud]'") from None
        with self._saying("opened"):  # other processes write too, so no listing is remembered
            self._files = kind(skip_instance_cache=True, use_listings_cache=False, **_patience(self._scheme, is_brisk))
            if is_brisk:
                self._files.retries = 2  # which gcsfs does not read

    def entries(self, below: str = "") -> dict[str, Entry]:
        """Lists all objects below the address whose names begin with `below`, a folder with its slash, by name.

        The empty objects of folders (`base/`), which consoles and gcsfuse make, are left out.
        """
        with self._saying("read"):
            found = self._files.find(f"{self._root}/{below}".rstrip("/"), detail=True)
        return {path[len(self._root) + 1:]: Entry(int(info["size"]), str(info.get("generation") or info.get("ETag")))
                for path, info in found.items() if path.startswith(f"{self._root}/") and not path.endswith("/")
                and info.get("type") == "file"}

    def read(self, name: str) -> bytes:
        """Reads an object."""
        with self._saying("read", name):
            return self._files.cat_file(f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, over the one that is there."""
        self._before_change()
        with self._saying("written", name):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object if there is none of this name; returns whether it did.

        Exactly one of several processes that try it at once gets True. If the library sent a request again because the
        first answer was lost, the content shows that this process wrote the object.
        """
        self._before_change()
        with self._saying("written", name):
            for number in range(_CONFLICTS):
                try:
                    self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
                    return True
                except Exception as error:
                    if _answer(error)[1] == "ConditionalRequestConflict" and number < _CONFLICTS - 1:
                        time.sleep(0.5)  # another request for the same object is under way
                    elif isinstance(error, FileExistsError) or 412 in _answer(error):
                        break
                    else:
                        raise
            with contextlib.suppress(FileNotFoundError):
                return self._files.cat_file(f"{self._root}/{name}") == content
            return False

    def upload(self, directory: Path, names: Sequence[str]) -> None:
        """Writes local files as objects of the same names; a file that was deleted in the meantime is left out."""
        def put(name: str) -> None:
            self._before_change()
            with self._saying("written", name):
                try:
                    self._files.put_file(str(directory / name), f"{self._root}/{name}")
                except FileNotFoundError:
                    if (directory / name).exists():
                        raise

        _in_threads(put, names)

    def download(self, directory: Path, names: Sequence[str]) -> None:
        """Reads objects into local files of the same names; each file appears when it is complete."""
        def get(name: str) -> None:
            signals.check()
            if {"", ".", ".."} & set(name.split("/")):
                raise UserError(f"{self.url}/{name} is not a name that a file can have")
            file = directory / name
            with self._saying("read", name):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, lambda part: self._files.get_file(f"{self._root}/{name}", part.name))

        _in_threads(get, names)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are gone already are no error."""
        def remove(name: str) -> None:
            self._before_change()
            with self._saying("deleted", name), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

        _in_threads(remove, list(names))

    @contextlib.contextmanager
    def _saying(self, done: str, name: str = "") -> Iterator[None]:
        """Re-raises errors inside the block as one sentence about the address."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            what = "it" if name and done == "read" else f"the bucket {self._bucket}"
            raise Missing(f"{where} cannot be {done}: {what} does not exist") from error
        except Exception as error:  # of botocore, aiohttp, google.auth, requests, the system
            kind, reason = self._reason(error)
            raise kind(f"{where} cannot be {done}: {reason}") from error

    def _reason(self, error: Exception) -> tuple[type[UserError], str]:
        """Returns what to raise for a library's error, and the reason in words."""
        names = " ".join(kind.__name__ for kind in type(error).__mro__)
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, OSError) and (error.errno in _DISK or error.filename):  # the stores' own have no file
            file = Path(str(error.filename or local_copies()))
            hint = f" ({DIRECTORY} names another directory for local copies)" if is_local_copy(file) else ""
            return Refused, f"{error.strerror} at {file} on this machine{hint}"
        if "TransportError" in names:  # of google.auth, whose server cannot be reached
            return UserError, f"the store cannot be reached ({cut(text, 160)})"
        if "Credential" in names or "GoogleAuthError" in names or getattr(error, "code", None) in (401, "401"):
            kind = UserError if getattr(error, "retryable", False) else Refused  # a server of google.auth that is down
            return kind, f"no valid credentials were found ({cut(text, 120)}); {_LOGIN[self._scheme]}"
        if isinstance(error, PermissionError) or text.startswith("Forbidden"):
            return Refused, f"the credentials do not permit it ({cut(text, 120)})"
        if any(word in names for word in _CONNECTION):
            return UserError, f"the store cannot be reached ({cut(text, 160)})"
        return UserError, cut(f"{type(error).__name__}: {text}", 200)


def _answer(error: Exception) -> tuple[int, str]:
    """Returns status and code of the answer of S3 behind an error of s3fs; 412 also if only the code says so.

    s3fs knows a failed precondition only by an element that other stores than Amazon's leave out.
    """
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return 0, ""
    status, code = response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
    return 412 if code == "PreconditionFailed" else int(status or 0), str(code)


def _patience(scheme: str, is_brisk: bool) -> dict[str, Any]:
    """Returns the timeouts of a file system: s3fs waits 15 s for an answer by itself, gcsfs forever."""
    if scheme == "s3":
        return {"config_kwargs": {"retries": {"max_attempts": 1}}} if is_brisk else {}
    import aiohttp  # which gcsfs brings
    return {"requests_timeout": aiohttp.ClientTimeout(total=15) if is_brisk else aiohttp.ClientTimeout(
        total=None, sock_connect=30, sock_read=60)}


def _in_threads(act: Callable[[str], None], names: Sequence[str]) -> None:
    """Calls a function for each name, several at a time; after the first error it begins no other name."""
    has_failed = threading.Event()

    def act_unless_failed(name: str) -> None:
        if has_failed.is_set():
            return
        try:
            act(name)
        except BaseException:
            has_failed.set()  # before this thread takes the next name, which is sooner than `cancel_futures`
            raise

    with ThreadPoolExecutor(_THREADS) as threads:
        waiting = [threads.submit(act_unless_failed, name) for name in names]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def local_copies() -> Path:
    """Returns the directory of local copies: `$LLAVAMED_BUCKET_CACHE`, else `buckets` in the user's cache.

    Raises:
      UserError: the variable is not an absolute path, or the user has no home directory.
    """
    named = os.environ.get(DIRECTORY, "")
    try:
        path = Path(named) if named else user_cache() / "buckets"
    except OSError as error:
        raise UserError(f"{error}; {DIRECTORY} must name a directory for local copies of buckets") from None
    if not path.is_absolute():
        raise UserError(f"the directory of local copies of buckets is {named!r}; an absolute path was expected in "
                        f"{DIRECTORY}")
    return path


@contextlib.contextmanager
def on_local_disk(directory: Path) -> Iterator[None]:
    """Re-raises an OSError inside the block as Refused with one sentence.

    Args:
      directory: a directory of local copies, for an error that names no file.
    """
    try:
        yield
    except OSError as error:
        raise Refused(f"{error.filename or directory} cannot be read or written: {error.strerror or error} "
                      f"({DIRECTORY} names another directory for local copies)") from error


def is_local_copy(path: Path) -> bool:
    """Returns whether a path lies in the directory of local copies."""
    try:
        return path.resolve().is_relative_to(local_copies().resolve())
    except UserError:
        return False
