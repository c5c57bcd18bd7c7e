"""A run whose workdir is in a bucket: what arrives there and when, from what it resumes, and what stays when something fails."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from llavamed_jax.adapters import open as adapted
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree import bucket_copy, step_manifest
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.training import bucket_workdir, trainer
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from llavamed_jax.utils import buckets
from llavamed_jax.utils.buckets import Bucket
from tests.support import stores
from tests.support.training_runs import FakeStep

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    with stores.running("memory", tmp_path_factory.mktemp("cache")) as scheme:
        yield scheme


@pytest.fixture(scope="module", params=["memory", "gs", "s3"])
def scheme(request, tmp_path_factory):
    with stores.running(request.param, tmp_path_factory.mktemp("cache")) as scheme:
        yield scheme


@pytest.fixture
def url(memory):
    return stores.address(memory)


@pytest.fixture
def copies():
    """The local copies of runs that are left; the next test finds none."""
    yield lambda: sorted(os.listdir(buckets.local_copies() / "runs"))
    shutil.rmtree(buckets.local_copies() / "runs")


@pytest.fixture(scope="module")
def finished(recipe, memory, one_device):
    """The address of a finished run with the steps 3, 6 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", FakeStep())
        url = stores.address(memory)
        assert fit(recipe(), url)
    return url


@pytest.fixture
def a_run(finished, url):
    """The address of a copy of the finished run."""
    for name in stores.listed(finished):
        stores.write(f"{url}/{name}", stores.read(f"{finished}/{name}"))
    return url


def at_update(monkeypatch, number, act):
    """Calls `act` when an update is dispatched; saves are at 3 and 6, and at the last, 8."""
    step = FakeStep()
    update = step.update

    def acting(state, batch):
        found = update(state, batch)
        if step.step == number:
            act()
        return found
    step.update = acting
    monkeypatch.setattr(trainer, "make_train_step", step)


def steps(url):
    return sorted({int(name.split("/")[1]) for name in stores.listed(url) if name.startswith("checkpoints/") and name.endswith("/manifest.json")
                   and name.count("/") == 2})


def logged(url):
    return [json.loads(line)["step"] for line in stores.read(f"{url}/metrics.jsonl").decode().splitlines()]


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
    assert stores.read(f"{url}/metrics.jsonl") == b"{}{}" and steps(url) == [3]
    monkeypatch.undo()
    assert run(url, "none", lambda *_: None)[1] is None  # the lock is free


FAULTS = {"the bucket": (Bucket, "upload"), "listing": (bucket_workdir, "_files"), "logs": (bucket_workdir.BucketWorkdir, "_upload_logs"),
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
        assert error is ENDINGS[ending] and steps(url) == [3, 6] and copies() == []
        return
    assert isinstance(error, type(ENDINGS[ending] or UserError())) and steps(url) == [3]
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

    run(url, "none", act)
    run(stores.address(memory), "none", lambda *_: None)
    kept = buckets.local_copies() / "runs" / "more.killed"
    assert f"killed before its bucket had its newest step: step 6 is kept in {kept}, from which" in capsys.readouterr().err
    assert copies() == ["more.killed"] and step_manifest.damage(kept / "checkpoints" / "6") is None


@pytest.mark.parametrize("removed", [".", "checkpoints", "checkpoints/8", "base", "recipe.json"])
def test_what_another_program_deletes_here_stays_in_the_bucket(removed, a_run):
    before = stores.listed(a_run)
    run(a_run, "a sentence", lambda directory, _: shutil.rmtree(directory / removed) if removed[-1] != "n" else (directory / removed).unlink())
    assert stores.listed(a_run) == before


def test_an_address_is_resolved_once(finished, recipe, monkeypatch):
    """By what opens a run's start, and a model with an adapter."""
    asked, local = [], bucket_copy.local
    monkeypatch.setattr(bucket_copy, "local", lambda *words: asked.append(words) or local(*words))
    assert open_start(recipe(init=finished)).step == 8 and len(asked) == 1
    monkeypatch.setattr(adapted, "_adapter", lambda path: path)
    monkeypatch.setattr(adapted.plain_base, "is_plain", lambda base, adapter: False)
    monkeypatch.setattr(adapted.peft, "apply", lambda checkpoint, adapter: checkpoint)
    assert adapted.open_model(finished, adapter="x").step == 8 and len(asked) == 2


def test_a_run_arrives_and_is_read_and_goes_on(recipe, scheme, copies, monkeypatch, capsys):
    """Stopped at step 4 and resumed: one history, old steps deleted, manifests last; a reader copies no optimizer."""
    url, order = stores.address(scheme), []
    upload, write = Bucket.upload, Bucket.write
    monkeypatch.setattr(Bucket, "upload", lambda self, directory, names: (order.extend(names), upload(self, directory, names))[1])
    monkeypatch.setattr(Bucket, "write", lambda self, name, content: (order.append(name), write(self, name, content))[1])
    at_update(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is False
    for step in ("3", "4"):
        end = order.index(f"checkpoints/{step}/manifest.json")
        assert all(order.index(name) < end for name in ("recipe.json", "base/manifest.json", "model/config.json", "metrics.jsonl"))
        assert all(k < end for k, name in enumerate(order) if name.startswith(f"checkpoints/{step}/") and k != end)
    assert steps(url) == [3, 4] and logged(url) == [1, 2, 3, 4] and copies() == []
    assert any(name.startswith("tensorboard/events") for name in stores.listed(url))
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    order.clear()
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is True
    out = capsys.readouterr().out
    assert "resuming from step 4" in out and f"finished at step 8 of 8: {url}" in out
    assert not [name for name in order if name.startswith(("base/", "model/"))]  # they are there
    assert steps(url) == [6, 8] and logged(url) == [1, 2, 3, 4, 5, 6, 7, 8] and copies() == []
    assert not [name for name in stores.listed(url) if name.startswith(("checkpoints/3/", "checkpoints/4/"))]
    before = stores.listed(url)
    order.clear()
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is True  # a finished run changes nothing
    assert f"{url} is finished: it was trained for 8 updates" in capsys.readouterr().out
    assert not [name for name in order if ".lock/" not in name] and stores.listed(url) == before

    checkpoint = open_checkpoint(url)
    assert checkpoint.step == 8 and open_checkpoint(f"{url}/checkpoints/6").step == 6
    assert len({name: checkpoint.read(name) for name in checkpoint.tensors}) > 10
    copy = checkpoint.directory
    assert not [path for path in copy.rglob("*") if "optimizer" in path.parts] and buckets.is_local_copy(copy)
    downloaded = []
    download = Bucket.download
    monkeypatch.setattr(Bucket, "download", lambda self, directory, names: (downloaded.extend(names), download(self, directory, names))[1])
    open_checkpoint(url)
    assert downloaded == []  # nothing has changed
    file = copy / "base" / "manifest.json"
    file.write_text("damaged")
    assert open_checkpoint(url).step == 8 and downloaded == ["base/manifest.json"]
    stores.remove(f"{url}/checkpoints/8")
    assert open_checkpoint(url).step == 6  # though the copy of step 8, which `checkpoint` may still read, is here
    for path, sentence in ((f"{url}/checkpoints/8", "has no manifest.json: there is no such step, or its save was interrupted"),
                           (f"{url}/nothing", "has no model/config.json; a run's workdir")):
        with pytest.raises(UsageError, match=sentence):
            open_checkpoint(path)


def test_a_run_that_starts_from_a_bucket(recipe, finished, tmp_path):
    """`init` is a bucket's run; an adapter's run takes its base with it, since a copy is not a place that stays."""
    url = finished
    assert fit(recipe(**{"init": url, "total_steps": 3, "lora.rank": 2, "trainable": '["decoder/.*lora_[ab]"]'}), tmp_path / "adapter")
    shutil.rmtree(buckets.local_copies() / "read")
    adapted = open_checkpoint(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "base.json").exists() and adapted.step == 3
    with pytest.raises(UsageError, match="'init' is .* which is the workdir; another workdir was expected"):
        fit(recipe(init=url), url)


def test_interrupted_and_damaged_steps(recipe, a_run, capsys):
    """A step without a manifest does not count, nor does one with a changed file; what is left of it goes when it is saved again."""
    url = a_run
    assert steps(url) == [3, 6, 8]
    stores.write(f"{url}/checkpoints/8/params/left over", b"x")
    stores.write(f"{url}/checkpoints/6/params/_METADATA", b"changed")
    Bucket(url).delete(["checkpoints/8/manifest.json"])
    assert open_checkpoint(url).step == 3
    assert fit(recipe(), url)
    out = capsys.readouterr().out
    assert "checkpoints/8 has no manifest.json: the save was interrupted; this step is skipped" in out
    assert "checkpoints/6 is damaged: params/_METADATA has another sha256 than its manifest.json says; this step is skipped" in out
    assert "resuming from step 3" in out and steps(url) == [3, 6, 8] and logged(url) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "checkpoints/8/params/left over" not in stores.listed(url)
    assert open_checkpoint(url).step == 8


def test_a_killed_first_save_and_leftovers(recipe, a_run, copies):
    """A run that was killed before its first step counted begins anew; its base goes, and so does its local copy."""
    url = a_run
    stores.remove(f"{url}/checkpoints")
    stores.write(f"{url}/base/left over", b"x")
    left = buckets.local_copies() / "runs" / "x.0123.partial"
    left.mkdir()
    assert fit(recipe(total_steps=3, seed=5), url)
    assert steps(url) == [3] and "base/left over" not in stores.listed(url) and copies() == []
    stores.remove(url)
    stores.write(f"{url}/model/config.json", b"{}")
    with pytest.raises(UserError, match=rf"has model/ but no recipe.json.* is the local copy of {url}"):
        fit(recipe(), url)
    assert stores.listed(url) == {"model/config.json": 2}


def test_the_bucket_fails_in_the_middle(recipe, url, copies, monkeypatch):
    """One sentence; step 3 is in the bucket, step 6 is kept here, and both are resumed from."""
    upload = Bucket.upload

    def refusing(self, directory, names):
        if any(name.startswith("checkpoints/6/") for name in names):
            raise UserError(f"{url}/x cannot be written: the store cannot be reached")
        upload(self, directory, names)

    monkeypatch.setattr(Bucket, "upload", refusing)
    with pytest.raises(UserError) as caught:
        fit(recipe(), url)
    (kept,) = copies()
    kept = buckets.local_copies() / "runs" / kept
    assert str(caught.value) == (f"{url}/x cannot be written: the store cannot be reached; step 3 is saved in {url}; step 6 is kept in {kept}, from "
                                 f"which `--workdir {kept}` goes on")
    monkeypatch.setattr(Bucket, "upload", upload)
    assert steps(url) == [3] and fit(recipe(), kept) is True and open_checkpoint(kept).step == 8
    shutil.rmtree(kept)
    assert fit(recipe(), url) is True and steps(url) == [3, 6, 8] and logged(url) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_somebody_removes_the_run_or_takes_its_lock(recipe, url, copies, monkeypatch, capsys):
    """What was removed is written again, and said; a run whose lock was taken writes nothing more."""
    def remove():
        for name in list(stores.listed(url)):
            stores.remove(f"{url}/{name}") if "/" not in name else None
        stores.remove(f"{url}/base")

    at_update(monkeypatch, 7, remove)
    assert fit(recipe(), url)
    assert "was changed or removed by another program; what the run still has is written again" in capsys.readouterr().err
    assert steps(url) == [3, 6, 8] and open_checkpoint(url).step == 8 and logged(url)[-1] == 8
    at_update(monkeypatch, 1, lambda: stores.write(f"{url}/.lock/99", b'{"pid": 5, "host": "other"}'))
    with pytest.raises(UserError, match=r"the lock of .* was taken by another run \(process 5 on other.*nothing more is saved there; step 8 is saved in .*; step 9 is kept in") as caught:
        fit(recipe(total_steps=12), url)
    assert steps(url) == [3, 6, 8] and logged(url)[-1] == 8 and str(caught.value).count("\n") == 0
    for name in copies():
        shutil.rmtree(buckets.local_copies() / "runs" / name)


def test_the_local_disk_is_full(recipe, a_run, copies, monkeypatch):
    """While the run is copied, and while a step is saved: one sentence, and what is in the bucket stays."""
    url, before, real = a_run, stores.listed(a_run), shutil.disk_usage
    full = lambda path: real(path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        with pytest.raises(UserError, match=rf"^{url} needs .* in /.*; its disk has 0.1 kB free \(LLAVAMED_BUCKET_CACHE names another directory"):
            fit(recipe(total_steps=12), url)
        shutil.rmtree(buckets.local_copies() / "read", ignore_errors=True)
        with pytest.raises(UserError, match=rf"^{url} needs .*; its disk has 0.1 kB free"):
            open_checkpoint(url)
    assert stores.listed(url) == before
    at_update(monkeypatch, 1, lambda: monkeypatch.setattr(shutil, "disk_usage", full))
    with pytest.raises(UserError, match=rf"needs .*; its disk has 0.1 kB free; step 8 is saved in {url}; /.* is the local copy of {url}$"):
        fit(recipe(total_steps=12), url)
    assert steps(url) == [3, 6, 8] and copies() == []


def test_two_runs_want_one_address(recipe, url, monkeypatch):
    """The second one is refused, writes nothing and leaves nothing; a third one gets it afterwards."""
    seen = []

    def second():
        with pytest.raises(UserError, match=rf"the workdir {url} is in use by another run \(process {os.getpid()} on "):
            with bucket_workdir.opened(url):
                pass
        seen.append(sorted(os.listdir(buckets.local_copies() / "runs")))

    at_update(monkeypatch, 2, second)
    assert fit(recipe(total_steps=3), url)
    assert len(seen) == 1 and len(seen[0]) == 1  # the first run's own
    with bucket_workdir.opened(url) as (directory, _):  # now it is free
        assert (directory / "checkpoints" / "3").is_dir()


def test_an_empty_copy_is_no_reason_to_delete(a_run, recipe, monkeypatch):
    """A run that ends while it copies, such as on a broken connection, leaves the bucket as it is."""
    url = a_run
    before = stores.listed(url)
    monkeypatch.setattr(bucket_copy, "copy_newest_step", lambda *_, **__: (_ for _ in ()).throw(UserError("the connection broke")))
    with pytest.raises(UserError, match="^the connection broke$"):
        fit(recipe(), url)
    assert stores.listed(url) == before
