"""A run whose bucket fails for a while or for ever, and whose lock is renewed, lost, or too old; without a run where that is enough."""

import os
import shutil
import threading
import time

import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.parallel.distributed import Group
from llavamed_jax.training import bucket_workdir, trainer
from llavamed_jax.training.bucket_workdir import BucketWorkdir
from llavamed_jax.training.trainer import fit
from llavamed_jax.utils import bucket_lock, buckets, signals
from llavamed_jax.utils.bucket_lock import Taken
from llavamed_jax.utils.buckets import Bucket, Refused
from tests.support import stores
from tests.support.several import Store
from tests.support.training_runs import FakeStep
from tests.training.test_bucket_workdir import run, save

LONG_S = 60.0  # no test waits for so long, unless it fails


@pytest.fixture
def hurried(monkeypatch):
    """Locks are renewed and logs are copied many times a second; a lock is stale much later, whatever else the machine does."""
    for module, name, seconds in ((bucket_lock, "RENEWED_S", 0.05), (bucket_lock, "STALE_S", 20.0), (bucket_lock, "_POLL_S", 0.02), (bucket_workdir, "LOGS_S", 0.02)):
        monkeypatch.setattr(module, name, seconds)
    yield
    signals.forget()


def until(is_true):
    end = time.monotonic() + LONG_S
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def opened(url, machine=None):
    bucket = BucketWorkdir(url)
    bucket._lock._owner["machine"] = machine or bucket._lock._owner["machine"]
    return bucket, bucket.open()


def before_upload(monkeypatch, act, of="checkpoints/6/params"):
    """Calls `act` before files of such names are uploaded."""
    upload = Bucket.upload

    def acting(self, directory, names):
        if any(name.startswith(of) for name in names):
            act()
        upload(self, directory, names)
    monkeypatch.setattr(Bucket, "upload", acting)


def failing(*_, kind=UserError, **__):
    raise kind("x cannot be written: no answer")


@pytest.mark.parametrize("when", ["a save", "the end"])
def test_the_lock_is_renewed_while_a_step_is_copied(when, url, hurried, copies, monkeypatch):
    """However long that takes, also at the end of the run: a run on another machine sees it, and is refused."""
    has_begun, may_end = threading.Event(), threading.Event()
    before_upload(monkeypatch, lambda: (has_begun.set(), may_end.wait(LONG_S)))
    first, directory = opened(url)
    save(directory, 6)
    thread = threading.Thread(target=first.close if when == "the end" else lambda: first.push(6))
    thread.start()
    assert has_begun.wait(LONG_S)
    began = time.monotonic()
    with pytest.raises(UserError, match="is in use by another run"):
        opened(url, "another machine")
    assert time.monotonic() - began < bucket_lock.STALE_S and thread.is_alive()
    may_end.set()
    thread.join()
    assert (when == "the end" or first.close() == "") and stores.steps(url) == [6] and copies() == []
    assert b'"ended"' in stores.read(f"{url}/.lock/1")


@pytest.mark.parametrize("how", ["its thread notices", "it was paused"])
def test_a_run_that_lost_its_lock_writes_no_further_file(how, url, hurried, copies, monkeypatch):
    """Though it was in the middle of a step."""
    if how == "it was paused":
        monkeypatch.setattr(bucket_lock, "RENEWED_S", LONG_S)
    first, directory = opened(url)

    def take():
        Bucket(url).write(".lock/99", b'{"pid": 5, "host": "other"}')
        if how == "it was paused":
            first._lock._renewed -= bucket_lock.STALE_S
        else:
            until(lambda: first._lock.lost)

    before_upload(monkeypatch, take)
    save(directory, 6)
    with pytest.raises(Taken, match="was taken by another run .process 5 on other.*nothing more is saved there"):
        first.push(6)
    assert stores.listed(url) == {}
    kept = directory.with_suffix("")
    assert first.close() == f"{first._lock.lost}; step 6 is kept in {kept}, from which `--workdir {kept}` goes on" and copies() == [kept.name]
    assert stores.listed(url) == {} and stores.read(f"{url}/.lock/99") == b'{"pid": 5, "host": "other"}'


@pytest.mark.parametrize("has_new_lines", [True, False])
@pytest.mark.parametrize("ending", ["none", "a sentence"])
def test_a_lock_that_is_lost_when_all_steps_are_copied(ending, has_new_lines, url, copies):
    """The run fails with a sentence, and the lines that came after the last copy stay here."""
    def act(directory, bucket):
        save(directory, 3)
        bucket.follow(3)
        bucket.settle()
        if has_new_lines:
            (directory / "metrics.jsonl").write_bytes(b"{}")
        bucket._lock.lost = "the lock was taken by another run"  # as its thread notices

    directory, error = run(url, ending, act)
    kept = directory.with_suffix("")
    said = [*["it failed"] * (ending != "none"), "the lock was taken by another run",
            *[f"the newest lines of metrics.jsonl are kept in {kept}"] * has_new_lines]
    assert str(error) == "; ".join(said) and copies() == [kept.name] * has_new_lines
    assert stores.steps(url) == [3] and "metrics.jsonl" not in stores.listed(url)


def test_a_late_renewal_is_checked_again(url, monkeypatch):
    """Another run takes the lock while this one writes into it, long after it had to."""
    bucket, write = Bucket(url), Bucket.write
    lock = bucket_lock.BucketLock(bucket)
    lock.take()
    monkeypatch.setattr(bucket_lock, "_POLL_S", 0.01)
    monkeypatch.setattr(Bucket, "write", lambda self, name, content: (write(self, name, content), write(self, ".lock/2", b"{}")))
    lock._renewed -= bucket_lock.STALE_S
    with pytest.raises(Taken, match="was taken by another run"):
        lock.confirm()


def test_a_step_that_was_refused_is_copied_later(url, hurried, copies, monkeypatch, capsys):
    """By the thread that copies logs; what had arrived is not sent again, and nobody else is blamed for it."""
    bucket, directory = opened(url)
    sent, put = [], stores.Files.put_file
    monkeypatch.setattr(stores.Files, "put_file", lambda self, file, path: (sent.append(path), put(self, file, path)))
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", failing)  # logs come after a step's files
        (directory / "metrics.jsonl").write_bytes(b"{}")
        save(directory, 3)
        bucket.follow(3)
        assert bucket.saved is None and not signals.is_asked()
    until(lambda: stores.steps(url) == [3])
    assert bucket.close() == "" and bucket.saved == 3 and copies() == []
    assert len(sent) == len({*sent}) == 4 and stores.read(f"{url}/metrics.jsonl") == b"{}"
    said = capsys.readouterr().err
    assert f"x cannot be written: no answer; step 3 is kept in {directory} and copied again later" in said and "another program" not in said


def test_a_step_that_waits_is_refused_for_good(url, hurried, copies, monkeypatch):
    """The thread that copies it again asks the run to stop, with the reason; the first failure was no reason to stop."""
    kinds, tries = [UserError], []
    before_upload(monkeypatch, lambda: (tries.append(1), failing(kind=kinds[0])))
    bucket, directory = opened(url)
    save(directory, 6)
    bucket.follow(6)
    until(lambda: len(tries) > 2)
    assert not signals.is_asked()
    kinds[0] = type("Denied", (Refused,), {"__str__": lambda _: "not permitted"})
    until(signals.is_asked)
    assert signals.failure() == "not permitted"
    with pytest.raises(Refused, match="not permitted"):
        bucket.settle()
    kept = directory.with_suffix("")
    assert bucket.close() == f"step 6 is kept in {kept}, from which `--workdir {kept}` goes on" and copies() == [kept.name]


def test_each_reason_for_which_logs_are_not_copied_is_said_once(url, hurried, monkeypatch, capsys):
    """And again in a later outage. Refused logs alone are no reason to stop."""
    reasons, tried, write = ["no answer", "not permitted"] * 2 + [""] + ["not permitted", "no answer"] * 2, [], Bucket.write
    bucket, directory = opened(url)
    log = directory / "metrics.jsonl"

    def acting(self, name, content):
        reason = reasons[min(len(tried), len(reasons) - 1)] if name == log.name else ""
        tried.extend([1] * (name == log.name))
        if reason:
            raise (Refused if "permit" in reason else UserError)(reason)
        write(self, name, content)
        if name == log.name:
            log.write_bytes(content * 2)  # something to try again
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", acting)
        log.write_bytes(b"{}")
        until(lambda: len(tried) > len(reasons))
    assert bucket.close() == "" and not signals.is_asked() and stores.read(f"{url}/metrics.jsonl") == b"{}{}"
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(("no answer", "not permitted"))]
    assert [line.split(": ")[-1] for line in said] == ["no answer", "not permitted", "not permitted", "no answer"]


def test_a_log_that_grew_while_it_was_copied_is_no_change_by_another_program(url, monkeypatch, capsys):
    """Though the copy failed after it was written."""
    write = Bucket.write

    def act(directory, bucket):
        log = directory / "metrics.jsonl"
        log.write_bytes(b"{}")
        bucket._push_logs()
        log.write_bytes(b"{}{}")
        save(directory, 3)
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "write", lambda self, name, content: (log.write_bytes(content + b"{}"), write(self, name, content + b"{}"), failing()))
            bucket.follow(3)

    assert run(url, "none", act)[1] is None and stores.read(f"{url}/metrics.jsonl") == b"{}{}{}" and stores.steps(url) == [3]
    assert "another program" not in capsys.readouterr().err


def test_old_steps_that_cannot_be_deleted_are_deleted_later(url, monkeypatch, capsys):
    def act(directory, bucket):
        save(directory, 3)
        bucket.push(3)
        save(directory, 6)
        shutil.rmtree(directory / "checkpoints" / "3")
        with monkeypatch.context() as patch:
            patch.setattr(stores.Files, "rm_file", failing)
            bucket.follow(6)
        assert bucket.saved == 6 and stores.steps(url) == [3, 6] and not signals.is_asked()

    assert run(url, "none", act)[1] is None and stores.steps(url) == [6]
    assert "old steps are deleted later: x cannot be written: no answer" in capsys.readouterr().err


def test_logs_that_the_bucket_lacks_are_kept(url, copies, monkeypatch):
    def act(directory, bucket):
        save(directory, 3)
        bucket.push(3)
        (directory / "metrics.jsonl").write_bytes(b"{}")
        monkeypatch.setattr(Bucket, "write", failing)

    directory, error = run(url, "none", act)
    kept = directory.with_suffix("")
    assert f"x cannot be written: no answer; the newest lines of metrics.jsonl are kept in {kept}" in str(error)
    assert (kept / "metrics.jsonl").read_bytes() == b"{}" and copies() == [kept.name]


def test_what_an_older_start_left_goes_before_the_first_step_comes(url, copies, monkeypatch):
    """Else a run that was killed in between would have both kinds of base."""
    for name in ("recipe.json", "base.json", "model/config.json"):
        stores.write(f"{url}/{name}", b"{}")
    before_upload(monkeypatch, failing, of="base/")
    bucket, directory = opened(url)
    (directory / "base.json").unlink()
    (directory / "base").mkdir()
    (directory / "base" / "f").touch()
    save(directory, 3)
    bucket.follow(3)
    assert "base.json" not in stores.listed(url)
    monkeypatch.undo()
    assert bucket.close() == "" and "base/f" in stores.listed(url) and stores.steps(url) == [3]


def test_a_run_without_a_step_leaves_recipe_and_logs(url, copies):
    def act(directory, _):
        for name in ("recipe.json", "metrics.jsonl", "base/f", "model/config.json", "cache/lengths.npz"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(b"x")

    def then(directory, bucket):
        act(directory, bucket)
        save(directory, 3)

    assert run(url, "none", act)[1] is None and sorted(stores.listed(url)) == ["metrics.jsonl", "recipe.json"]
    assert run(url, "none", then)[1] is None and {"base/f", "model/config.json"} < {*stores.listed(url)} and copies() == []
    assert "cache/lengths.npz" not in stores.listed(url)


def test_logs_follow_between_steps_but_not_before_they_are_here(url, hurried, copies, monkeypatch, capsys):
    run(url, "none", lambda directory, _: ((directory / "metrics.jsonl").write_bytes(b"{}"), save(directory, 3)))
    download = Bucket.download

    def slow(self, *words):
        download(self, *words)
        time.sleep(0.08)  # the thread would have warned
    monkeypatch.setattr(Bucket, "download", slow)

    def act(directory, bucket):
        (directory / "metrics.jsonl").write_bytes(b"{}{}")
        until(lambda: stores.read(f"{url}/metrics.jsonl") == b"{}{}")

    assert run(url, "none", lambda *_: None)[1] is None and capsys.readouterr().err == ""
    assert run(url, "none", act)[1] is None and capsys.readouterr().err == ""


@pytest.mark.parametrize("is_copying", [False, True])
def test_a_job_that_another_process_ends(is_copying, url, copies, monkeypatch):
    """The last lines arrive and the lock is free, unless a step is being copied: the thread that trains writes nothing after that."""
    group = Group(Store(), 0, 2)
    monkeypatch.setattr(distributed, "_group", group)
    monkeypatch.setattr(distributed, "process_count", lambda: 1)
    monkeypatch.setattr(bucket_workdir, "ABANDON_S", 0.05)
    bucket, directory = opened(url)
    (directory / "metrics.jsonl").write_bytes(b"{}")
    if is_copying:
        bucket._mutex.acquire()
    group._when_failed()
    assert (b'"ended"' in stores.read(f"{url}/.lock/1")) != is_copying
    assert list(stores.listed(url)) == ([] if is_copying else ["metrics.jsonl"])
    assert bucket._mutex.locked()  # a step that is saved now waits until the process has ended
    bucket._mutex.release()
    assert bucket.close() == "" and group._when_failed is None and copies() == []


def test_a_server_of_credentials_that_cannot_be_reached(url, monkeypatch):
    """It is not the user's credentials that are wrong."""
    kind = type("TransportError", (type("GoogleAuthError", (Exception,), {}),), {})
    monkeypatch.setattr(stores.Files, "cat_file", lambda *_: (_ for _ in ()).throw(kind()))
    with pytest.raises(UserError, match=r"/x cannot be read: the store cannot be reached .TransportError.$") as caught:
        Bucket(url).read("x")
    assert not isinstance(caught.value, Refused)


@pytest.mark.usefixtures("one_device", "without_compiling")
class TestRuns:
    """Saves are at 3, 6 and 9."""

    def test_that_meet_an_outage(self, recipe, url, copies, monkeypatch, capsys):
        """They go on, and all steps arrive."""
        has_failed = []
        before_upload(monkeypatch, lambda: has_failed or (has_failed.append(1), failing()), of="checkpoints/3/")
        assert fit(recipe(total_steps=9), url)
        assert stores.steps(url) == [3, 6, 9] and copies() == [] and "another program" not in (said := capsys.readouterr().err)
        assert "x cannot be written: no answer; step 3 is kept in" in said

    def test_that_are_refused_save_their_state_here(self, recipe, url, copies, monkeypatch):
        """The state at the stop, and not that of the save that was refused."""
        before_upload(monkeypatch, lambda: failing(kind=Refused), of="checkpoints/")
        step = FakeStep()
        update = step.update

        def acting(state, batch):
            found = update(state, batch)
            until(lambda: step.step != 5 or signals.is_asked())
            return found
        step.update = acting
        monkeypatch.setattr(trainer, "make_train_step", step)
        with pytest.raises(UserError) as caught:
            fit(recipe(total_steps=9), url)
        (name,) = copies()
        kept = buckets.local_copies() / "runs" / name
        assert str(caught.value) == f"x cannot be written: no answer; no step had been saved; step 5 is kept in {kept}, from which `--workdir {kept}` goes on"
        assert sorted(os.listdir(kept / "checkpoints")) == [".sealed", "3", "5"]
