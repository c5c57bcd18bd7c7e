"""Answers of both vendors' protocols that emulators do not give: other refusals, lost answers, and the objects of folders."""

import asyncio
import json
import os
from types import SimpleNamespace

import pytest

from benchmarks import emulators
from llavamed_jax.checkpoints.tree import bucket_copy
from llavamed_jax.errors import UserError
from llavamed_jax.utils import bucket_lock, buckets
from llavamed_jax.utils.bucket_lock import BucketLock
from llavamed_jax.utils.buckets import Bucket
from tests.support import http_store, stores


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    with http_store.running() as store:
        yield store


@pytest.fixture(params=["gs", "s3"])
def url(request, monkeypatch):
    pytest.importorskip(stores.PACKAGES[request.param][0])
    if request.param == "gs":  # it waits for seconds before it sends a request again
        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100)))
    return f"{request.param}://{emulators.BUCKET}/run"


@pytest.mark.parametrize("condition", ["", http_store.NAMED])
def test_an_object_is_created_once(store, url, condition):
    """Whether or not the refusal names the precondition; so the lock works with all stores."""
    store.condition = condition
    bucket = Bucket(url)
    assert bucket.create("x", b"first") and not bucket.create("x", b"second") and bucket.read("x") == b"first"
    BucketLock(bucket).take()
    with pytest.raises(UserError, match="is in use by another run"):
        BucketLock(bucket).take()


@pytest.mark.parametrize("condition", ["", http_store.NAMED])
def test_an_object_whose_answer_was_lost_is_ones_own(store, url, condition):
    """The library sends the request again, and the store refuses it then."""
    store.condition = condition
    bucket = Bucket(url)
    store.faults = ["lost"]
    assert bucket.create("x", b"first") and bucket.read("x") == b"first" and store.writes == 1
    assert not bucket.create("x", b"second")


def test_two_requests_at_once_are_tried_again(store):
    """S3 answers 409 while another request for the object is under way."""
    pytest.importorskip("s3fs")
    bucket = Bucket(f"s3://{emulators.BUCKET}/run")
    store.faults = [409, 409]
    assert bucket.create("x", b"first") and not bucket.create("x", b"second")
    store.faults = [409] * 20
    with pytest.raises(UserError, match="/y cannot be written: .*refused"):
        bucket.create("y", b"x")


def test_the_objects_of_folders_are_left_alone(store, url, tmp_path, monkeypatch):
    """Consoles and gcsfuse make them; a listing, a copy and a deletion of what is there work without them."""
    monkeypatch.setenv(buckets.DIRECTORY, str(tmp_path))
    files = {"model/config.json": b"{}", "base/f": b"x", "recipe.json": b"{}"}
    for name in ("", "model/", "base/", "checkpoints/", "checkpoints/3/", "checkpoints/3/params/", "run/"):
        store.objects[f"run/{name}"] = b"", 1
    for name, content in files.items():
        store.objects[f"run/{name}"] = content, 2
    assert sorted(Bucket(url).entries()) == sorted(files) and list(Bucket(url).entries("base/")) == ["base/f"]
    copy = bucket_copy.local(url)
    assert {name: (copy / name).read_bytes() for name in files} == files
    Bucket(url).delete(["base/f"])
    assert "run/base/f" not in store.objects and Bucket(url).entries("base/") == {}


def test_large_objects_and_broken_reads(store, url, tmp_path, monkeypatch):
    """What is sent in parts arrives whole; what breaks on its way back is read again, or is an error, and never a part of a file."""
    if url.startswith("s3"):
        monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 2**21)
    content = os.urandom(6_000_000)
    (tmp_path / "large").write_bytes(content)
    bucket = Bucket(url)
    bucket.upload(tmp_path, ["large"])
    assert store.objects["run/large"][0] == content and store.parts == (3 if url.startswith("s3") else 1)
    assert bucket.entries()["large"].size == len(content)
    for faults in ([503], ["cut"], ["cut", 503]):
        store.faults_of_reads = list(faults)
        try:
            bucket.download(tmp_path / "back", ["large"])
        except UserError as error:
            assert "cut" in faults and "/large cannot be read: " in str(error) and not (tmp_path / "back" / "large").exists()
            bucket.download(tmp_path / "back", ["large"])
        assert store.faults_of_reads == [] and (tmp_path / "back" / "large").read_bytes() == content
        (tmp_path / "back" / "large").unlink()


def test_the_process_of_another_user_may_be_hidden(store, monkeypatch, capsys):
    """Only a process that does not exist has ended; one that cannot be seen is watched."""
    pytest.importorskip("s3fs")
    bucket, asked = Bucket(f"s3://{emulators.BUCKET}/run"), []

    def kill(kind):
        return lambda *_: (_ for _ in ()).throw(kind())

    def take(started=5):
        bucket.write(".lock/1", json.dumps({**bucket_lock._process(os.getpid()), "pid": 2**22 + 1, "started": started, "id": "x"}).encode())
        BucketLock(bucket).take()

    # What is called while a lock is watched renews it, as its run would.
    monkeypatch.setattr(bucket_lock.signals, "check", lambda: (asked.append(1), bucket.write(".lock/1", b'{"time": 1}')))
    monkeypatch.setattr(bucket_lock, "_POLL_S", 0.01)
    for kind, started in ((PermissionError, 5), (PermissionError, None)):
        monkeypatch.setattr(os, "kill", kill(kind))
        with pytest.raises(UserError, match="is in use by another run"):
            take(started)
    assert len(asked) == 2 and "was locked by a run of another user" in capsys.readouterr().out
    monkeypatch.setattr(os, "kill", kill(ProcessLookupError))
    take()
    assert len(asked) == 2
