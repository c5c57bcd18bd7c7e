"""The local directory of a run in a bucket, without a run: what is copied and when, and what stays whatever fails."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llavamed_jax.checkpoints.tree import bucket_copy, step_manifest, store
from llavamed_jax.errors import UserError
from llavamed_jax.training import bucket_workdir
from llavamed_jax.training.profiler import Profiler
from llavamed_jax.utils import buckets
from llavamed_jax.utils.buckets import Bucket
from tests.support import stores


def save(directory, step, content=b"x"):
    """Writes a step as a run does, but not what a run saves."""
    folder = directory / "checkpoints" / str(step)
    for part in ("params", "optimizer", "state"):
        (folder / part).mkdir(parents=True)
        (folder / part / "f").write_bytes(content)
    step_manifest.write(folder)


def refused(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


ENDINGS = {"none": None, "a sentence": UserError("it failed"), "a signal": KeyboardInterrupt(), "a fault": ZeroDivisionError("a fault")}


def run(url, ending, act):
    """A run that only calls `act(directory, bucket)`, and ends; returns its directory and what it raised."""
    try:
        with bucket_workdir.opened(url) as (directory, bucket):
            act(directory, bucket)
            if ENDINGS[ending]:
                raise ENDINGS[ending]
    except BaseException as error:
        return directory, error
    return directory, None


def test_a_step_counts_when_all_of_it_is_there(url, monkeypatch):
    """Its manifest comes last, and old steps are deleted after it."""
    order, upload, write, delete = [], Bucket.upload, Bucket.write, Bucket.delete

    def removing(self, names):
        names = list(names)
        order.extend(f"- {name}" for name in names)
        delete(self, names)

    def act(directory, bucket):
        for name in ("recipe.json", "base/f", "model/f", "metrics.jsonl"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(b"x")
        for step in (3, 4, 6):
            save(directory, step)
            if step == 6:
                shutil.rmtree(directory / "checkpoints" / "3")
                order.clear()
            bucket.push(step)
            end = order.index(f"checkpoints/{step}/manifest.json")
            assert [name for name in order[end + 1:] if step != 6] == [] and bucket.saved == step
            assert step != 3 or {"recipe.json", "base/f", "model/f", "metrics.jsonl", "checkpoints/3/params/f"} <= {*order[:end]}
        assert order[end + 1] == "- checkpoints/3/manifest.json" and {*order[end + 2:]} >= {"- checkpoints/3/params/f"}

    monkeypatch.setattr(Bucket, "upload", lambda self, directory, names: (order.extend(names), upload(self, directory, names))[1])
    monkeypatch.setattr(Bucket, "write", lambda self, name, content: (order.append(name), write(self, name, content))[1])
    monkeypatch.setattr(Bucket, "delete", removing)
    assert run(url, "none", act)[1] is None and stores.steps(url) == [4, 6]
    assert not [name for name in stores.listed(url) if name.startswith("checkpoints/3/")]


@pytest.fixture
def saved(url):
    """The address of a run with the steps 3, 6 and 8."""
    def act(directory, bucket):
        for name in ("recipe.json", "base/f", "model/config.json"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(b"x")
        for step in (3, 6, 8):
            save(directory, step)
            bucket.push(step)

    assert run(url, "none", act)[1] is None and stores.steps(url) == [3, 6, 8]
    return url


def test_interrupted_and_damaged_steps(saved):
    """A step without a manifest does not count, nor does one with a changed file; what is left of it goes when it is saved again."""
    stores.write(f"{saved}/checkpoints/8/params/left over", b"x")
    stores.write(f"{saved}/checkpoints/6/params/f", b"changed")
    Bucket(saved).delete(["checkpoints/8/manifest.json"])
    assert bucket_copy.local(saved).name == "3"

    def act(directory, bucket):
        step, told = store.newest_intact_step(directory)
        assert step == bucket.saved == 3 and len(told) == 2
        assert "checkpoints/8 has no manifest.json: the save was interrupted" in told[0]
        assert "checkpoints/6 is damaged: params/f has another sha256 than its manifest.json says" in told[1]
        for step in (6, 8):
            shutil.rmtree(directory / "checkpoints" / str(step))
            save(directory, step)
            bucket.push(step)

    assert run(saved, "none", act)[1] is None and stores.steps(saved) == [3, 6, 8] and bucket_copy.local(saved).name == "8"
    assert "checkpoints/8/params/left over" not in stores.listed(saved) and stores.read(f"{saved}/checkpoints/6/params/f") == b"x"


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_copies_what_is_new_and_releases_the_lock(ending, url, copies, monkeypatch):
    """Logs in folders of their own, as a profile lies, are copied too; no step is hashed to know that the bucket has it."""
    trace = "tensorboard/plugins/profile/2026/host.xplane.pb"

    def act(directory, bucket):
        save(directory, 3)
        bucket.push(3)
        (directory / trace).parent.mkdir(parents=True)
        (directory / trace).write_bytes(b"trace")
        (directory / "metrics.jsonl").write_bytes(b"{}")
        bucket._push_logs()
        assert stores.read(f"{url}/{trace}") == b"trace" and stores.read(f"{url}/metrics.jsonl") == b"{}"
        (directory / "metrics.jsonl").write_bytes(b"{}{}")
        monkeypatch.setattr(step_manifest, "sha256_of", refused)

    assert run(url, ending, act)[1] is ENDINGS[ending] and copies() == []
    assert stores.read(f"{url}/metrics.jsonl") == b"{}{}" and stores.steps(url) == [3]
    monkeypatch.undo()
    assert run(url, "none", lambda *_: None)[1] is None  # the lock is free


FAULTS = {"the bucket": (Bucket, "upload"), "listing": (os, "scandir"), "listing a part": (os, "listdir"), "logs": (bucket_workdir.BucketWorkdir, "_upload_logs"),
          "the record": (bucket_workdir, "write_json"), "a new name": (Path, "rename")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_step_that_the_bucket_lacks_is_never_deleted(ending, fault, url, memory, copies, monkeypatch, capsys):
    """Whatever fails, and however the run ends: the lock is free, and the step is in the bucket or stays here, after later runs too."""
    def act(directory, bucket):
        save(directory, 3)
        bucket.push(3)
        save(directory, 6)
        (directory / "metrics.jsonl").write_bytes(b"{}")
        for place in {FAULTS["the bucket"], FAULTS[fault]} if fault == "a new name" else {FAULTS[fault]}:
            monkeypatch.setattr(*place, refused)
        with pytest.raises(UserError, match=r"/disk/file cannot be read or written: No space left on device \(LLAVAMED_BUCKET_CACHE names"):
            bucket.push(6)

    directory, error = run(url, ending, act)
    monkeypatch.undo()
    said, kept = f"{error} {capsys.readouterr().err}", directory.with_suffix("")
    if fault == "the record":  # which is written when the bucket has the step
        assert error is ENDINGS[ending] and stores.steps(url) == [3, 6] and copies() == []
        return
    assert isinstance(error, type(ENDINGS[ending] or UserError())) and stores.steps(url) == [3]
    assert (f"step 6 is kept in {kept}, from which `--workdir {kept}` goes on" in said) == (fault in ("the bucket", "logs"))
    for address in (stores.address(memory), url):  # the lock is free
        assert run(address, "none", lambda *_: None)[1] is None
    assert copies() == [kept.name] and step_manifest.damage(kept / "checkpoints" / "6") is None


def test_leftovers_of_killed_runs(url, memory, copies, capsys):
    """One with a step that its bucket lacks is kept, and the next run on the machine, of any address, says so."""
    def act(directory, bucket):
        save(directory, 3)
        bucket.push(3)
        shutil.copytree(directory, directory.with_name("whole.killed.partial"))
        save(directory, 6)
        shutil.copytree(directory, directory.with_name("more.killed.partial"))
        for name, record in (("first", None), ("torn", b'{"checkpoints/6/mani')):  # before the first push; while the record was written
            shutil.copytree(directory, killed := directory.with_name(f"{name}.killed.partial"))
            (killed / bucket_copy.RECORD).unlink()
            if record:
                (killed / bucket_copy.RECORD).write_bytes(record)

    run(url, "none", act)
    run(stores.address(memory), "none", lambda *_: None)
    said = capsys.readouterr().err
    for name in ("first", "more", "torn"):
        kept = buckets.local_copies() / "runs" / f"{name}.killed"
        assert f"killed before its bucket had its newest step: step 6 is kept in {kept}, from which" in said
        assert step_manifest.damage(kept / "checkpoints" / "6") is None
    assert sorted(copies()) == ["first.killed", "more.killed", "torn.killed"]


@pytest.mark.parametrize("removed", [".", "checkpoints", "checkpoints/8", "base", "recipe.json"])
@pytest.mark.parametrize("ending", ["none", "a sentence"])
def test_what_another_program_deletes_here_stays_in_the_bucket(ending, removed, saved):
    before = stores.listed(saved)
    run(saved, ending, lambda directory, _: shutil.rmtree(directory / removed) if removed[-1] != "n" else (directory / removed).unlink())
    assert stores.listed(saved) == before


def test_an_older_step_that_is_deleted_here_is_deleted_in_the_bucket(saved):
    """As a run deletes it."""
    assert run(saved, "none", lambda directory, _: shutil.rmtree(directory / "checkpoints" / "6"))[1] is None
    assert stores.steps(saved) == [3, 8] and not [name for name in stores.listed(saved) if name.startswith("checkpoints/6/")]


def test_logs_that_were_copied_in_part_are_this_runs_own(saved, monkeypatch, capsys):
    """A log is in the bucket, and the listing after it fails: the next copy does not blame another program."""
    def act(directory, bucket):
        (directory / "metrics.jsonl").write_bytes(b"{}")
        bucket._push_logs()
        (directory / "metrics.jsonl").write_bytes(b"{}{}")
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(Bucket, "entries", refused)
            bucket._push_logs()
        assert stores.read(f"{saved}/metrics.jsonl") == b"{}{}"

    assert run(saved, "none", act)[1] is None and "another program" not in capsys.readouterr().err
    assert stores.read(f"{saved}/metrics.jsonl") == b"{}{}"


def test_a_trace_lies_in_the_bucket(tmp_path, monkeypatch):
    """Its line has the bucket's address: the local directory is deleted at the end."""
    said, began = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", began.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    place = SimpleNamespace(workdir=tmp_path, name="gs://bucket/run")
    with Profiler((1, 1), place, SimpleNamespace(say=said.append)) as profiler:
        profiler.before(1, lambda: None)
        profiler.after(1, lambda: None)
    assert began == [str(tmp_path / "tensorboard")]
    assert said == ["the trace of updates 1 to 1 is in gs://bucket/run/tensorboard/plugins/profile"]
