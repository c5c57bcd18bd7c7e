"""Keeps a run's workdir in a bucket: the run works in a local copy, and this module copies both ways.

Whoever starts or resumes a run takes the lock in the bucket (`utils.bucket_lock`), makes a new local directory, and
copies there what the run needs: the model and the newest intact step. From then on the bucket follows the directory:
after each saved step come its files, then the logs, then the step's manifest, and then the deletion of old steps. A
step in the bucket counts once its manifest is there. Logs follow also between steps.

A store that does not answer does not end the run: its steps stay here, and each minute and with each later step they
are copied again. If another try would fail too (no permission, a full disk, another run's lock), the run is asked to
save its state here and to stop.

The local directory is deleted at the end, and that of a killed run by the next run on the machine. It is kept if it has
a step that the bucket lacks: `bucket_copy.RECORD` in it has what the bucket has.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from llavamed_jax.checkpoints.tree import bucket_copy, folder, store
from llavamed_jax.checkpoints.tree.bucket_copy import RECORD, STEPS
from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST
from llavamed_jax.errors import UserError, amount, count_of, warn
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.training import bucket_files
from llavamed_jax.training.bucket_files import is_log, is_manifest
from llavamed_jax.utils import bucket_lock, signals
from llavamed_jax.utils.buckets import DIRECTORY, Bucket, Entry, Refused, local_copies, on_local_disk
from llavamed_jax.utils.directories import delete_leftovers, make_partial
from llavamed_jax.utils.files import write_json
from llavamed_jax.utils.paths import is_bucket

LOGS_S = 60.0  # logs are copied so often
ABANDON_S = 10.0  # a process that is ended waits so long for the copy of a step
_PULLED = ("recipe.json", "base.json", "model", "base", "metrics.jsonl", "skipped.jsonl")  # beside steps


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[tuple[Path, BucketWorkdir | None]]:
    """Yields the local directory of a run, and in process 0 the bucket that follows it. All processes call it.

    Args:
      workdir: a directory, `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.

    Raises:
      UserError: another run has the address; the bucket or the local disk cannot be used.
    """
    if not is_bucket(workdir):
        yield Path(workdir), None
        return
    bucket = None if distributed.process_index() else BucketWorkdir(str(workdir))
    directory = Path(distributed.from_first(lambda: str(bucket.open())))
    try:
        agreement.check_same(lambda: {f"the local copy of {workdir}, {directory} ({DIRECTORY} names another directory, "
                                      "which all processes see)": "exists" if directory.is_dir() else "does not exist"})
        yield directory, bucket
    except UserError as error:
        told = f"{error}; {directory} is the local copy of {workdir}" if str(directory) in str(error) else str(error)
        said = "; ".join(filter(None, (told, _close(bucket))))
        if said == str(error):
            raise
        raise type(error)(said) from error
    except BaseException:
        if said := _close(bucket):
            warn(said)
        raise
    else:
        if said := _close(bucket):
            raise UserError(said)


def _close(bucket: BucketWorkdir | None) -> str:
    return "" if bucket is None else bucket.close()


class BucketWorkdir:
    """The workdir of a run in a bucket, and its local copy. Only process 0 has one.

    Args:
      url: the address of the workdir.

    Attributes:
      url: the address of the workdir.
      directory: the local copy, once the run is opened.
      saved: the newest step in the bucket; None without one.
    """

    def __init__(self, url: str):
        self._lock = bucket_lock.BucketLock(Bucket(url, is_brisk=True))
        self._bucket = Bucket(url, before_change=self._lock.confirm)
        self.url, self.saved = self._bucket.url, None
        self.directory, self._held = Path(), -1  # the descriptor keeps other runs from deleting the directory
        self._sent: dict[str, list] = {}  # as in RECORD, by name: version of the object, size and time of the file
        self._begun: dict[str, list] = {}  # what a copy that failed had begun: as `_sent`, with the version before
        self._steps: list[int] = []  # that this run has saved
        self._mutex, self._is_over = threading.Lock(), threading.Event()
        self._beat = threading.Thread(target=self._keep_up, name="bucket", daemon=True)
        self._is_pulled = False  # only then the local directory says what belongs in the bucket
        self._failure: UserError | None = None  # why the last copy of a step failed; None if it did not
        self._is_given_up = False  # whether the run has ended with this failure
        self._told: set[str] = set()  # why the beat could not copy, as it has warned since its last copy

    def open(self) -> Path:
        """Takes the lock, makes the local directory and copies the run into it."""
        runs = local_copies() / "runs"
        with on_local_disk(runs):
            runs.mkdir(parents=True, exist_ok=True)
            delete_leftovers(runs, delete=bucket_files.delete_leftover)
            self.directory, self._held = make_partial(runs, f"{self.url.rpartition('/')[2]}.")
        try:
            self._lock.take()
            self._lock.keep(_ask_to_stop)
            distributed.when_failed(self.abandon)
            with on_local_disk(self.directory):
                self._pull()
            self._beat.start()
        except BaseException:
            self.close()
            raise
        return self.directory

    def follow(self, step: int) -> None:
        """Copies a step that was saved just now. If that fails, the step stays here, and the run goes on for now."""
        try:
            self.push(step)
        except UserError as error:
            if isinstance(error, bucket_lock.Taken | Refused):
                _ask_to_stop(error)
            else:
                warn(f"{error}; step {step} is kept in {self.directory} and copied again later")

    def settle(self) -> None:
        """Copies at the end of a run what could not be copied before. Raises UserError as `push`."""
        if self._failure is not None or self._lock.lost is not None:
            try:
                self.push()
            except UserError:
                self._is_given_up = True
                raise

    def push(self, step: int | None = None) -> None:
        """Makes the bucket equal to the local directory.

        Args:
          step: the step that was saved just now; None for no new one.

        Raises:
          Taken: another run has the lock.
          Refused: the bucket refuses, or the local directory cannot be read.
          UserError: the bucket cannot be written now.
        """
        if step is not None:
            self._steps.append(step)
        with self._mutex:
            try:
                with on_local_disk(self.directory):
                    self._push()
                    if not self._is_over.is_set():
                        write_json(self.directory / RECORD, self._sent)
            except UserError as error:
                self._failure = error
                raise
            self._failure = None

    def _push(self) -> None:
        self._lock.check()
        found, remote = bucket_files.listed(self.directory), self._bucket.entries()
        if not any(map(is_manifest, found)):  # without a step nothing else counts, and the next run begins anew
            found = {name: mark for name, mark in found.items() if name == "recipe.json" or is_log(name)}
        self._count_begun(remote)
        new = [name for name, mark in found.items() if self._sent.get(name) != [_version(remote, name), *mark]]
        self._tell_of_changes(remote)
        for name in new:  # if this fails, what was written is no change by another program
            self._sent.pop(name, None)
        manifests = [name for name in new if is_manifest(name)]
        files = [name for name in new if not is_manifest(name)]
        if manifests and self.saved is None and not bucket_copy.sealed(remote):
            self._forget(name for name in self._sent if name in remote and not name.startswith(STEPS)
                         and not (self.directory / name).exists())  # an older start, before the first step counts
        # A step that is written again does not count until it is whole; files of an interrupted save go.
        self._bucket.delete([name for name in manifests if name in remote])
        steps = tuple(map(_folder, manifests))
        self._bucket.delete([name for name in remote if name.startswith(steps) and name not in found])
        self._begun = {name: [_version(remote, name), *found[name]] for name in files}
        self._bucket.upload(self.directory, [name for name in files if name == "recipe.json"])
        self._bucket.upload(self.directory, [name for name in files if name != "recipe.json" and not is_log(name)])
        self._upload_logs([name for name in files if is_log(name)])
        listed = self._bucket.entries()
        lacking = [name for name in files if not is_log(name) and (
            name not in listed or listed[name].size != found[name][0])]
        for name in lacking:
            if (self.directory / name).exists():
                raise UserError(f"{self.url}/{name} was removed while the run wrote it, so the step is not saved")
        # A step of which files were deleted here in the meantime, as old steps are, does not count.
        manifests = [name for name in manifests if not any(each.startswith(_folder(name)) for each in lacking)]
        self._lock.check()
        self._begun |= {name: [None, *found[name]] for name in manifests}
        self._bucket.upload(self.directory, manifests)
        listed |= self._bucket.entries(STEPS) if manifests else {}
        self._sent |= {name: [_version(listed, name), *found[name]] for name in (*files, *manifests)}
        self._begun = {}
        there = {bucket_files.step_of(name) for name, mark in found.items() if is_manifest(name) and name in listed
                 and self._sent.get(name, [])[1:] == [*mark]}
        self.saved = max(there & {*self._steps}, default=self.saved)
        try:
            self._delete(listed)
        except bucket_lock.Taken:
            raise
        except UserError as error:
            warn(f"old steps are deleted later: {error}")

    def _count_begun(self, remote: Mapping[str, Entry]) -> None:
        """Counts what arrived of a copy that failed; the next one does not send it again."""
        self._sent |= {name: [remote[name].version, *mark] for name, (before, *mark) in self._begun.items()
                       if name in remote and remote[name].version != before and remote[name].size == mark[0]}
        self._begun = {}

    def _upload_logs(self, names: list[str]) -> None:
        """Uploads logs as they are now, since the run appends to them in the meantime."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._bucket.write(name, (self.directory / name).read_bytes())

    def _tell_of_changes(self, remote: Mapping[str, Entry]) -> None:
        changed = [name for name, sent in self._sent.items() if sent[0] != _version(remote, name)]
        if changed:
            warn(f"{count_of(len(changed), 'object')} of {self.url} that this run had written or read, such as "
                 f"{changed[0]}, was changed or removed by another program; what the run still has is written again")
            self._sent = {name: sent for name, sent in self._sent.items() if name not in changed}

    def close(self) -> str:
        """Ends the run, for whatever reason: copies what is new, gives up the lock, and deletes the local directory.

        Returns:
          "" if all this was done; else a sentence that says what failed, and where a step is kept that the bucket
          lacks.
        """
        distributed.when_failed(None)
        self._is_over.set()
        if self._beat.is_alive():
            self._beat.join()
        said = []
        for act in (self._push_the_rest, self._lock.release, self._leave):
            try:
                with on_local_disk(self.directory):
                    said.append(act())
            except UserError as error:
                said.append(str(error))
        os.close(self._held)
        return "; ".join(filter(None, said))

    def abandon(self) -> None:
        """Copies the logs and gives up the lock, since another process of the job has failed and this one is ended.

        It is called beside the thread that trains, which copies nothing any more. If a step is being copied for longer
        than `ABANDON_S`, the lock becomes stale in place of being given up.
        """
        self._is_over.set()
        if self._mutex.acquire(timeout=ABANDON_S):  # for ever
            with contextlib.suppress(UserError, OSError):
                if self._is_pulled:
                    self._copy_logs()
            with contextlib.suppress(UserError):
                self._lock.release()

    def _push_the_rest(self) -> None:
        if self._is_pulled and not self._is_given_up:
            if self._lock.lost is not None:  # since `settle`, or in a run that ends before it
                raise bucket_lock.Taken(self._lock.lost)
            self.push()

    def _leave(self) -> str:
        if self._is_pulled:
            has_logs = self._failure is not None or self._lock.lost is not None
            return bucket_files.keep_or_delete(self.directory, self._sent, has_logs)
        shutil.rmtree(self.directory, ignore_errors=True)  # at most a part of what the bucket has
        return ""

    def saved_in_words(self) -> str:
        """Returns the newest step in the bucket, as the end of a sentence."""
        return "no step had been saved" if self.saved is None else f"step {self.saved} is saved in {self.url}"

    def _pull(self) -> None:
        """Copies the newest intact step, and the base and the logs with it; of older steps only the manifests.

        The local directory then looks to the run as if it had all steps, so that the run deletes old ones as usual.
        """
        remote = self._bucket.entries()
        steps = bucket_copy.sealed(remote)
        wanted = [name for name in remote if (
            steps or not name.startswith("base/")) and name.partition("/")[0] in _PULLED]
        copy = lambda names: bucket_copy.copy(self._bucket, remote, self.directory, names)
        copy(wanted)
        copy([name for name in remote if is_manifest(name) or name == STEPS + store.SEALED])
        self.saved = bucket_copy.copy_newest_step(self._bucket, remote, self.directory, steps)
        for name in remote:  # an interrupted save, or a base without a step, is there for the run to see
            if name.startswith((STEPS, "base/", "model/")) and name.count("/"):
                (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        found = bucket_files.listed(self.directory)
        self._sent = {name: [entry.version, *found.get(name, (0, 0))] for name, entry in remote.items()
                      if name in found or name.startswith(("base/", "model/"))}
        self._is_pulled = True
        size = sum(size for size, _ in found.values())
        done = f"copied {amount(size)} to" if steps else "the local copy is"
        print(f"{self.url}: {done} {self.directory}", flush=True)

    def _delete(self, remote: Mapping[str, Entry]) -> None:
        """Deletes from the bucket the steps that the run has deleted, their manifests first.

        A run deletes steps before its newest one. Whatever else is not here was deleted here by another program, and
        stays in the bucket.
        """
        ours = (name for name in bucket_files.listed(self.directory) if is_manifest(name) and name in self._sent)
        newest = max((int(name.split("/")[1]) for name in ours), default=-1)
        later = {step for step in bucket_copy.sealed(remote) if step >= newest}
        gone = [name for name in remote if name.startswith(STEPS) and (
            step := folder.number(name.split("/")[1])) is not None
                and step not in later and not (self.directory / STEPS / str(step)).is_dir()]
        self._bucket.delete(name for name in gone if is_manifest(name))
        self._forget(gone)

    def _forget(self, names: Iterable[str]) -> None:
        gone = list(names)
        self._bucket.delete(gone)
        for name in gone:
            self._sent.pop(name, None)

    def _keep_up(self) -> None:
        """Copies the logs, and steps that could not be copied, until the run ends; later tries follow a failure.

        If another try would fail too, it asks the run to stop, unless nothing but logs waits: the next step will tell.
        """
        while not self._is_over.wait(LOGS_S):
            try:
                if self._failure is None:
                    self._push_logs()
                else:
                    self.push()
                self._told.clear()
            except (UserError, OSError) as error:  # OSError: the local disk is full
                if isinstance(error, bucket_lock.Taken) or isinstance(error, Refused) and self._failure is not None:
                    _ask_to_stop(error)
                    return
                if str(error) not in self._told:
                    warn(str(error))
                self._told.add(str(error))

    def _push_logs(self) -> None:
        with self._mutex:
            self._copy_logs()

    def _copy_logs(self) -> None:
        found = {name: mark for name, mark in bucket_files.listed(self.directory).items() if is_log(name)}
        new = [name for name, mark in found.items() if self._sent.get(name, [])[1:] != [*mark]]
        for name in new:  # if this fails, what was written of it is no change by another program
            self._sent.pop(name, None)
        self._upload_logs(new)
        listed = self._bucket.entries()
        self._sent |= {name: [_version(listed, name), *found[name]] for name in new}


def _ask_to_stop(error: UserError) -> None:
    signals.ask(str(error), is_failure=True)


def _version(remote: Mapping[str, Entry], name: str) -> str | None:
    return remote[name].version if name in remote else None


def _folder(manifest: str) -> str:
    """Returns the folder of a step's manifest, with its slash."""
    return manifest.removesuffix(MANIFEST)
