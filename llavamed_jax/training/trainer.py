"""The training loop: every stage is a recipe that runs through `fit`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.tree import base, folder, store
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.parallel.mesh import local_rows
from llavamed_jax.pipeline.loader import Loader
from llavamed_jax.pipeline.workers import WorkerError
from llavamed_jax.training import alike, arithmetic, bucket_workdir, recipe, resume
from llavamed_jax.training import place as places
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.callbacks import NONE, Callbacks, Sampler, Snapshot
from llavamed_jax.training.inputs import describe, open_inputs
from llavamed_jax.training.log import MetricsWriter, SilentLog, troubles
from llavamed_jax.training.metrics_reader import MetricsReader, Update
from llavamed_jax.training.profiler import Profiler
from llavamed_jax.training.program import Program, within_memory
from llavamed_jax.training.progress import Progress, check_something_was_trained
from llavamed_jax.training.rows import Data
from llavamed_jax.training.saver import Saver
from llavamed_jax.training.state import TrainState
from llavamed_jax.training.step import make_eval_step, make_train_step, put_batch
from llavamed_jax.training.step_agreement import StepAgreement
from llavamed_jax.training.throughput import batch_counts
from llavamed_jax.training.validation import judge
from llavamed_jax.utils import signals
from llavamed_jax.utils.paths import is_bucket

_NOTHING_DONE = "stopped before the first update: run again to continue"
_OPENING = signals.Phase(_NOTHING_DONE, status=signals.EXIT_SAVED, grace=30, raises=True)
_LOOP = signals.Phase("error: ended at once by a second {name}; the saved steps are kept",
                      note="finishing the current update and saving; a second signal ends the run at once")


def fit(cfg: ConfigDict, workdir: str | Path, callbacks: Callbacks = NONE) -> bool:
    """Trains a recipe in a workdir, from its newest intact step, or from `init`.

    Args:
      cfg: the recipe (`recipe.SCHEMA`).
      workdir: a directory, `gs://BUCKET/KEY` or `s3://BUCKET/KEY`;
        gets `recipe.json`, `model/`, `base/`, `checkpoints/`, `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`.
      callbacks: evaluate the model during training.

    Returns:
      True if the run is finished (now or in an earlier call); False if it stopped early and saved everything, because
      of a signal or a stdout that cannot be written to (`signals.failure`).

    Raises:
      UsageError: an invalid recipe, or one that differs from the recipe that the workdir was started with; with several
        processes, a recipe or flag that differs between them.
      UserError: data, weights or a workdir that cannot be used; too many updates in a row that are not finite; with
        several processes, data, weights, code or packages that differ between them (raised in all, `agreement`).
    """
    agreement.check_same(lambda: alike.start(cfg, workdir, {"profile": callbacks.profile}))
    recipe.check(cfg)
    if is_bucket(workdir) and cfg.init.rstrip("/") == str(workdir).rstrip("/"):
        raise UsageError(f"the config key 'init' is {cfg.init!r}, which is the workdir; another workdir was expected")
    with (signals.listening(_OPENING), bucket_workdir.opened(workdir) as (workdir, bucket),
          places.locked(workdir, bucket) as place):
        distributed.when_stopped(lambda: signals.ask("another process"))
        record, step = distributed.from_first(lambda: resume.find(workdir, cfg))
        total_steps = cfg.total_steps or record.get("settled", {}).get("total_steps")
        if step is not None and total_steps is not None and step >= total_steps:
            _say_it_is_finished(place, step, total_steps)
            return True
        if not distributed.process_index():
            folder.clear(workdir)  # before anything is written: the disk may be full of it
        place.sign()
        cfg = workdirs.as_started(cfg, record["recipe"]) if step is not None else cfg
        try:
            with Run.open(cfg, place, total_steps, step, record) as run, \
                    store.StepWriter(workdir, place.note) as writer, within_memory(cfg, run.program):
                distributed.when_stopped(None)  # from here on all processes stop at the same update
                signals.enter(_LOOP)
                agreed = StepAgreement(lambda: signals.is_asked() or run.reason is not None,
                                       cfg.checkpoint.every_minutes, run.rows)
                return run.loop(agreed, writer, callbacks)
        except (UsageError, places.Lost, agreement.StartedOtherwise):
            raise
        except _FinishedError as finished:
            _say_it_is_finished(place, step, finished.args[0])
            return True
        except signals.Stopped:
            print(_NOTHING_DONE, file=sys.stderr, flush=True)
            return False
        except (UserError, OSError) as error:
            raise _with_what_is_saved(error, place) from error


class _FinishedError(Exception):
    """A run resumes from a step with all updates that its data ask for; the argument is their number."""


def _say_it_is_finished(place: places.Place, step: int, total_steps: int) -> None:
    if not distributed.process_index():
        base.check_base(place.workdir)
    beyond = "" if step == total_steps else f", although the recipe asks for {total_steps}"
    print(f"{place.name} is finished: it was trained for {count_of(step, 'update')}{beyond}", flush=True)


def _with_what_is_saved(error: UserError | OSError, place: places.Place) -> UserError:
    """Returns the error as UserError; process 0 adds the step that is saved."""
    workdir, what = place.workdir, str(error)
    if isinstance(error, OSError):
        what = f"{error.filename or workdir} cannot be read or written: {error.strerror or error}"
    if distributed.process_index():
        return UserError(what)
    try:
        place.check()  # if the workdir is gone, that is the reason
        return UserError(f"{what}; {place.what_is_saved()}")
    except places.Lost:
        raise
    except (UserError, OSError):  # what is saved cannot be read either
        return UserError(what)


@dataclass
class Run:
    """An opened run: everything that the loop works with. As a context manager it closes files and worker processes.

    Attributes:
      cfg: the recipe.
      place: the locked workdir.
      data: records and rows.
      program: model, optimizer, mesh and shardings.
      state: the state after `step` updates.
      step: updates done.
      total_steps: updates of the whole run.
      batches: the training batches.
      log: the run's log.
      record: which run this is and its base, for its steps; only in process 0, which writes them.
      progress: the run's counts.
      failure: the first error beside the updates, as of an evaluator: the run saves its state, and ends with it.
    """

    cfg: ConfigDict
    place: places.Place
    data: Data
    program: Program
    state: TrainState
    step: int
    total_steps: int
    batches: Loader
    log: MetricsWriter
    record: Mapping
    progress: Progress = field(default_factory=Progress)
    failure: UserError | OSError | None = None

    @classmethod
    def open(cls, cfg: ConfigDict, place: places.Place, total_steps: int | None, step: int | None,
             earlier: Mapping) -> Run:
        """Opens weights and data, settles what the recipe leaves open, and puts the state on the devices.

        A resumed run does not read `init`: frozen parameters, tokenizer and config are those of its own workdir.

        Args:
          cfg: the recipe.
          place: the locked workdir.
          total_steps: updates of the run; None if they follow from the data.
          step: the step that the run resumes from; None to begin.
          earlier: the record of this step; {} to begin.
        """
        workdir, is_first = place.workdir, not distributed.process_index()
        checkpoint, data, program, total_steps = open_inputs(cfg, workdir, total_steps, step, earlier)
        if step is not None and step >= total_steps:
            raise _FinishedError(total_steps)
        batches = data.training_batches(program.mesh)  # may raise, so it comes before anything is written
        meta = None if step is None else store.read_meta(workdir, step)
        if meta is not None:
            batches.restore(meta["data"])
            data.refuse_other_validation(earlier["validation"])
        record = resume.begin(workdir, cfg, checkpoint, program, data, total_steps, earlier) if is_first else {}
        place.belongs_to(record, step)
        source = f"{cfg.init if step is None else place.name}: {checkpoint.tower}"
        describe(source, cfg, data, program, total_steps)
        with within_memory(cfg, program):
            if meta is None:
                state, progress = program.initial_state(checkpoint), Progress()
            else:
                state, progress = resume.restore(workdir, step, checkpoint, program, meta)
                told = [*arithmetic.warnings(earlier["computed"], arithmetic.used(program)),
                        *workdirs.notes(cfg, earlier, step, total_steps)]
                print(f"resuming from step {step}", *told, sep="\n", flush=True)
        log = MetricsWriter(workdir, step or 0, total_steps, cfg.name, place.check) if is_first else SilentLog()
        return cls(cfg, place, data, program, state, step or 0, total_steps, batches, log, record, progress)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.batches.close()
        self.log.close()
        if kind is None and self.reason is not None:  # another error came first
            raise self.reason

    @property
    def reason(self) -> UserError | OSError | None:
        """The error with which the run ends after its state is saved; None if there is none."""
        return self.failure or self.log.failure

    @property
    def rows(self) -> list[int]:
        """The rows of an update that lie on this process's devices."""
        layout = self.data.plan.layout
        return local_rows(self.program.mesh, layout.rows + layout.padding_rows)

    def loop(self, agreed: StepAgreement, writer: store.StepWriter, callbacks: Callbacks) -> bool:
        """Trains until the last update, or until asked to stop.

        Args:
          agreed: the decisions that all processes share.
          writer: writes steps into the workdir.
          callbacks: evaluate the model during training.

        Returns:
          Whether the run is finished.

        Raises:
          UserError: the state could not be trained or saved; or it is saved, and something beside the updates failed: a
            loader worker, a log file, the validation or the sample answers.
        """
        try:
            self._train(agreed, writer, callbacks)
        except places.Lost:
            raise
        except (UserError, OSError) as error:
            if self.reason is None:
                raise
            self.log.say(f"warning: step {self.step} is not saved: {error}")
        if self.reason is not None:
            raise self.reason
        return self._end()

    def _train(self, agreed: StepAgreement, writer: store.StepWriter, callbacks: Callbacks) -> None:
        """Trains and saves, as `loop` says."""
        train_step, eval_step = self._compiled()
        reader = self._reader(agreed)
        saver = Saver(writer, self.place, self.cfg.checkpoint, self.progress, self.log.say, self.step)
        self.batches.on_wait = agreed.on_wait
        has_samples = callbacks.sampler is not None and self.cfg.samples_every > 0
        agreed.saved()
        with Profiler(callbacks.profile, self.place, self.log) as profiler:
            try:
                while self.step < self.total_steps and not agreed.is_stopping:
                    profiler.before(self.step + 1, reader.drain)
                    self._update(train_step, reader)
                    profiler.after(self.step, reader.drain)
                    if has_samples and self._is_due(self.cfg.samples_every):
                        with reader.paused(), self._aside():
                            self._show_answers(callbacks.sampler, agreed)
                    is_due = self._is_due(self.cfg.checkpoint.every_steps)
                    if is_due or agreed.is_save_due:
                        with reader.paused():
                            self._check_something_was_trained()
                            if is_due:
                                with self._aside():
                                    self._validate(eval_step, callbacks, agreed)
                            saver.save(self.state, self._meta())
                        agreed.saved()
            except signals.Stopped as stopped:  # the awaited batch is dropped
                self.log.say(str(stopped))
            except WorkerError as error:
                self._note(error)
        if self.step != saver.saved:
            reader.drain()
            saver.save(self.state, self._meta())
        saver.finish(self.state, self._meta())

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Lets the run save its state before an error inside the block, which changes no state, ends it."""
        try:
            yield
        except places.Lost:
            raise
        except (UserError, OSError) as error:
            self._note(error)

    def _note(self, error: UserError | OSError) -> None:
        """Notes an error as the run's failure. With several processes it is raised: the others may not have it."""
        if jax.process_count() > 1:
            raise error
        self.failure = self.failure or error

    def _compiled(self):
        """Returns the functions of an update and of a validation batch, which compile on their first call."""
        program, loss_fn = self.program, self.program.loss()
        train_step = make_train_step(loss_fn, program.optimizer, program.schedule, program.mesh, program.shardings,
                                     self.data.plan.layout.micro_batches, program.weighting, program.dropout_seed)
        return train_step, make_eval_step(loss_fn, program.mesh)

    def _reader(self, agreed: StepAgreement) -> MetricsReader:
        return MetricsReader(
            self.progress, self.log, self.place.workdir, config=self.program.model.cfg,
            trained=self.program.trained_sizes(),
            num_devices=self.program.mesh.size, log_every=self.cfg.log_every, total_steps=self.total_steps,
            nan_limit=self.cfg.nan_limit, name_samples=self.batches.ids, agreed=agreed)

    def _update(self, train_step, reader: MetricsReader) -> None:
        """Dispatches an update, once the one before the last is done."""
        position = self.batches.state()
        batch, missed, skipped = self._next_batch()
        # An implicit transfer between host and device would also block on the device.
        with jax.transfer_guard("disallow"):
            placed = put_batch(batch, self.program.mesh)
            reader.make_room()
            self.state, metrics = train_step(self.state, placed)
        self.step += 1
        window = self.program.model.cfg.decoder.sliding_window
        reader.add(Update(self.step, metrics, batch_counts(batch, window), missed, position, skipped=skipped))

    def _next_batch(self) -> tuple[Mapping, dict[str, int], list[Mapping]]:
        """Returns a batch, its counts of skipped, cut and unsupervised samples, and the skipped samples."""
        self._check_skipped()
        before = self._trouble_counts()
        batch = next(self.batches)
        after = self._trouble_counts()
        skipped = self.batches.skipped[before["samples_skipped"]:]
        self.log.skipped(self.step + 1, skipped)
        return batch, {name: after[name] - before[name] for name in after}, skipped

    def _trouble_counts(self) -> dict[str, int]:
        loader = self.batches
        return dict(samples_skipped=len(loader.skipped), images_skipped=loader.surplus,
                    samples_truncated=loader.truncated, samples_unsupervised=loader.unsupervised,
                    samples_read=loader.seen, unreadable=loader.unreadable, unreadable_anew=loader.unreadable_anew)

    def _show_answers(self, sampler: Sampler, agreed: StepAgreement) -> None:
        """Logs the sample answers; a signal ends them and not the step, whose checks are still to come."""
        try:
            self.log.samples(self.step, sampler(self._snapshot()))
        except signals.Stopped as stopped:  # in all processes
            agreed.agree_to_stop()
            self.log.say(str(stopped))

    def _validate(self, eval_step, callbacks: Callbacks, agreed: StepAgreement) -> None:
        """Logs the validation loss and the evaluators' numbers; warns of skipped validation samples.

        No run resumes at the last step, so the validation of this step does not end at a signal.
        """
        is_last = self.step >= self.total_steps
        found, is_complete = judge(self._snapshot(), self.state, eval_step, callbacks.evaluators, self.progress,
                                   (lambda: False) if is_last else agreed.agree_to_stop)
        if not is_complete:
            what = "the evaluation of answers" if found else "the validation"
            self.log.say(f"{what} of step {self.step} was stopped and is not recorded")
            if not found:
                return
        unread = agreed.listed(self.data.unread)
        if unread:
            skipped = count_of(len(unread), "validation sample is", "validation samples are")
            self.log.say(f"warning: {skipped} skipped; the first: {unread[0]['reason']}")
            found = {**found, "validation_samples_skipped": len(unread)}
        if found:
            self.log.write(self.step, found)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.step, self.state.params, self.program, self.data)

    def _meta(self) -> dict:
        """Returns the record of a step."""
        return {"step": self.step, "data": self.batches.state(), "progress": vars(self.progress), "run": self.record}

    def _is_due(self, every: int) -> bool:
        """Returns whether an action is due: every `every` updates, and after the last one."""
        return self.step == self.total_steps or every > 0 and self.step % every == 0

    def _check_skipped(self) -> None:
        """Raises UserError if the whole run, of all processes and before it was resumed, has skipped too many."""
        if not distributed.process_index():  # its counts are those of all processes
            counts, skipped = self.progress, self.batches.skipped
            self.batches.limit.refuse_counts(
                counts.unreadable, counts.unreadable_anew, counts.samples_read,
                skipped[-1]["reason"] if skipped else "see skipped.jsonl")

    def _check_something_was_trained(self) -> None:
        if self.step >= self.total_steps:
            self._check_skipped()
            check_something_was_trained(self.progress, self.total_steps, self.log.say)

    def _end(self) -> bool:
        """Logs how the run ended, and returns whether it is finished."""
        is_finished = self.step >= self.total_steps
        stopped = "stopped and saved" if self.step else "stopped before the first update,"
        end = "finished" if is_finished else stopped
        line = f"{end} at step {self.step} of {self.total_steps}: {self.place.name}"
        self.log.say(" · ".join([line, *troubles(vars(self.progress))]))
        return is_finished
