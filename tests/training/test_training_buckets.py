"""A run whose workdir is in a bucket: what arrives there and when, from what it resumes, and what stays when something fails."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from llavamed_jax.adapters import open as adapted
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree import bucket_copy
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.training import bucket_workdir, trainer
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from llavamed_jax.utils import buckets
from llavamed_jax.utils.buckets import Bucket
from tests.support import stores
from tests.support.training_runs import FakeStep

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture(scope="module", params=["memory", "gs", "s3"])
def scheme(request, tmp_path_factory):
    with stores.running(request.param, tmp_path_factory.mktemp("cache")) as scheme:
        yield scheme


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


def at_update(monkeypatch, acts):
    """Calls a function when the update of its number is dispatched, counted from the start; saves are at 3, 6, … and at the last."""
    step = FakeStep()
    update = step.update

    def acting(state, batch):
        found = update(state, batch)
        acts.get(step.step, lambda: None)()
        return found
    step.update = acting
    monkeypatch.setattr(trainer, "make_train_step", step)


def logged(url):
    return [json.loads(line)["step"] for line in stores.read(f"{url}/metrics.jsonl").decode().splitlines()]


def test_an_address_is_resolved_once(finished, recipe, monkeypatch):
    """By what opens a run's start, and a model with an adapter."""
    asked, local = [], bucket_copy.local
    monkeypatch.setattr(bucket_copy, "local", lambda *words: asked.append(words) or local(*words))
    assert open_start(recipe(init=finished)).step == 8 and len(asked) == 1
    monkeypatch.setattr(adapted, "_adapter", Path)
    monkeypatch.setattr(adapted.plain_base, "is_plain", lambda base, adapter: False)
    monkeypatch.setattr(adapted.peft, "apply", lambda checkpoint, adapter: checkpoint)
    assert adapted.open_model(finished, adapter="x").step == 8 and len(asked) == 2


@pytest.mark.slow  # what it asserts of one store, the tests beside it assert of parts of a run
def test_a_run_arrives_and_goes_on(recipe, scheme, copies, monkeypatch, capsys):
    """Stopped at step 4 and resumed: one history, old steps deleted, manifests last; and it is read."""
    url, order = stores.address(scheme), []
    upload, write = Bucket.upload, Bucket.write
    monkeypatch.setattr(Bucket, "upload", lambda self, directory, names: (order.extend(names), upload(self, directory, names))[1])
    monkeypatch.setattr(Bucket, "write", lambda self, name, content: (order.append(name), write(self, name, content))[1])
    at_update(monkeypatch, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is False
    for step in ("3", "4"):
        end = order.index(f"checkpoints/{step}/manifest.json")
        assert all(order.index(name) < end for name in ("recipe.json", "base/manifest.json", "model/config.json", "metrics.jsonl"))
        assert all(k < end for k, name in enumerate(order) if name.startswith(f"checkpoints/{step}/") and k != end)
    assert stores.steps(url) == [3, 4] and logged(url) == [1, 2, 3, 4] and copies() == []
    assert any(name.startswith("tensorboard/events") for name in stores.listed(url))
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    order.clear()
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is True
    out = capsys.readouterr().out
    assert "resuming from step 4" in out and f"finished at step 8 of 8: {url}" in out
    assert not [name for name in order if name.startswith(("base/", "model/"))]  # they are there
    assert stores.steps(url) == [6, 8] and logged(url) == [1, 2, 3, 4, 5, 6, 7, 8] and copies() == []
    assert not [name for name in stores.listed(url) if name.startswith(("checkpoints/3/", "checkpoints/4/"))]
    before = stores.listed(url)
    order.clear()
    assert fit(recipe(**{"checkpoint.keep": 2}), url) is True  # a finished run changes nothing
    assert f"{url} is finished: it was trained for 8 updates" in capsys.readouterr().out
    assert not [name for name in order if ".lock/" not in name] and stores.listed(url) == before
    assert open_checkpoint(url).step == 8 and open_checkpoint(f"{url}/checkpoints/6").step == 6


def test_a_reader_copies_no_optimizer_and_only_what_has_changed(a_run, monkeypatch):
    url = a_run
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


def test_an_adapters_run_takes_its_base_to_the_bucket(recipe, start, url, tmp_path):
    """Another machine does not have it: the run is read and goes on without it."""
    shutil.copytree(start, tmp_path / "start")
    of = lambda steps: recipe(**{"init": str(tmp_path / "start"), "total_steps": steps, "lora.rank": 2, "trainable": '["decoder/.*lora_[ab]"]'})
    assert fit(of(3), url)
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    assert "base.json" not in stores.listed(url) and open_checkpoint(url).step == 3
    assert fit(of(4), url) and stores.steps(url) == [3, 4]


def test_a_killed_first_save_and_leftovers(recipe, a_run, copies):
    """A run that was killed before its first step counted begins anew; its base goes, and so does its local copy."""
    url = a_run
    stores.remove(f"{url}/checkpoints")
    stores.write(f"{url}/base/left over", b"x")
    left = buckets.local_copies() / "runs" / "x.0123.partial"
    left.mkdir(parents=True)
    assert fit(recipe(total_steps=3, seed=5), url)
    assert stores.steps(url) == [3] and "base/left over" not in stores.listed(url) and copies() == []
    stores.remove(url)
    stores.write(f"{url}/model/config.json", b"{}")
    with pytest.raises(UserError, match=rf"has model/ but no recipe.json.* is the local copy of {url}"):
        fit(recipe(), url)
    assert stores.listed(url) == {"model/config.json": 2}


def test_the_bucket_fails_in_the_middle(recipe, url, copies, monkeypatch):
    """One sentence; step 3 is in the bucket, step 6 is kept here, from which a run goes on."""
    upload = Bucket.upload

    def refusing(self, directory, names):
        if any(name.startswith("checkpoints/6/") for name in names):
            raise UserError(f"{url}/x cannot be written: the store cannot be reached")
        upload(self, directory, names)

    monkeypatch.setattr(Bucket, "upload", refusing)
    with pytest.raises(UserError) as caught:
        fit(recipe(total_steps=6), url)
    (kept,) = copies()
    kept = buckets.local_copies() / "runs" / kept
    assert str(caught.value) == (f"{url}/x cannot be written: the store cannot be reached; step 3 is saved in {url}; step 6 is kept in {kept}, from "
                                 f"which `--workdir {kept}` goes on")
    monkeypatch.setattr(Bucket, "upload", upload)
    assert stores.steps(url) == [3] and fit(recipe(total_steps=7), kept) is True and open_checkpoint(kept).step == 7


def test_somebody_removes_the_run_and_then_takes_its_lock(recipe, a_run, copies, monkeypatch, capsys):
    """What was removed is written again, and said; a run whose lock was taken writes nothing more."""
    url = a_run

    def remove():
        for name in list(stores.listed(url)):
            stores.remove(f"{url}/{name}") if "/" not in name else None
        stores.remove(f"{url}/base")

    def take():
        while stores.steps(url)[-1] < 9:
            time.sleep(0.01)
        stores.write(f"{url}/.lock/99", b'{"pid": 5, "host": "other"}')

    at_update(monkeypatch, {1: remove, 4: take})
    with pytest.raises(UserError, match=r"the lock of .* was taken by another run \(process 5 on other.*nothing more is saved there; step 9 is saved in .*; step 12 is kept in") as caught:
        fit(recipe(total_steps=12), url)
    assert str(caught.value).count("\n") == 0 and len(copies()) == 1
    assert "was changed or removed by another program; what the run still has is written again" in capsys.readouterr().err
    assert stores.steps(url) == [3, 6, 8, 9] and open_checkpoint(url).step == 9 and logged(url)[:9] == [*range(1, 10)]


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
    at_update(monkeypatch, {1: lambda: monkeypatch.setattr(shutil, "disk_usage", full)})
    with pytest.raises(UserError, match=rf"needs .*; its disk has 0.1 kB free; step 8 is saved in {url}; /.* is the local copy of {url}$"):
        fit(recipe(total_steps=12), url)
    assert stores.steps(url) == [3, 6, 8] and copies() == []


def test_two_runs_want_one_address(recipe, url, monkeypatch):
    """The second one is refused, writes nothing and leaves nothing; a third one gets it afterwards."""
    seen = []

    def second():
        with pytest.raises(UserError, match=rf"the workdir {url} is in use by another run \(process {os.getpid()} on "):
            with bucket_workdir.opened(url):
                pass
        seen.append(sorted(os.listdir(buckets.local_copies() / "runs")))

    at_update(monkeypatch, {2: second})
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
