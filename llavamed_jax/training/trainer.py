"""The training loop, of which there is one: every stage is a recipe that runs through `fit`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.tree import base, store
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.parallel.mesh import local_rows
from llavamed_jax.pipeline.loader import Loader
from llavamed_jax.pipeline.workers import WorkerError
from llavamed_jax.training import alike, arithmetic, recipe, resume, void_keys
from llavamed_jax.training import place as places
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.callbacks import NONE, Callbacks, Snapshot
from llavamed_jax.training.log import MetricsWriter, SilentLog, troubles
from llavamed_jax.training.metrics_reader import MetricsReader, Update
from llavamed_jax.training.profiler import Profiler
from llavamed_jax.training.program import Program, open_mesh, within_memory
from llavamed_jax.training.progress import Progress, check_something_was_trained
from llavamed_jax.training.rows import Data, row_multiple
from llavamed_jax.training.saver import Saver
from llavamed_jax.training.start import open_start, with_own_tokenizer
from llavamed_jax.training.state import TrainState
from llavamed_jax.training.step import make_eval_step, make_train_step, place
from llavamed_jax.training.step_agreement import StepAgreement
from llavamed_jax.training.throughput import batch_counts
from llavamed_jax.training.validation import judge
from llavamed_jax.utils import signals

_NOTHING_DONE = "stopped before an update was done: run again to go on"
_OPENING = signals.Phase(_NOTHING_DONE, status=75, grace=30, raises=True)
_LOOP = signals.Phase("error: ended at once by a second {name}; what had been saved is kept",
                      note="what is under way is finished and saved; a second one ends the run at once")


def fit(cfg: ConfigDict, workdir: str | Path, callbacks: Callbacks = NONE) -> bool:
    """Trains a recipe in a workdir, from the newest intact step that lies there, or from `init`.

    Args:
      cfg: the recipe (`recipe.SCHEMA`).
      workdir: gets `recipe.json`, `model/`, `base/`, `checkpoints/`, `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`.
      callbacks: evaluate the model while it is trained.

    Returns:
      True when the run is finished (which it may have been before); False when a signal stopped it, or a stdout that
      cannot be written to (`signals.failure`), after everything was saved.

    Raises:
      UsageError: an invalid recipe, or one that differs from the recipe that the workdir was started with.
      UserError: data, weights or a workdir that cannot be used; updates that are not finite, again and again. In
        all of several processes, one of which has other data, weights, code or packages (`agreement`); UsageError
        there: another recipe or flag.
    """
    workdir = Path(workdir)
    agreement.check_same(lambda: alike.start(cfg, workdir, {"profile": callbacks.profile}))
    recipe.check(cfg)
    with signals.listening(_OPENING), places.locked(workdir) as place:
        distributed.when_stopped(lambda: signals.ask("another process"))
        record, step = distributed.from_first(lambda: resume.find(workdir, cfg))
        total_steps = cfg.total_steps or record.get("settled", {}).get("total_steps")
        if step is not None and total_steps is not None and step >= total_steps:
            _say_it_is_finished(workdir, step, total_steps)
            return True
        place.sign()
        cfg = workdirs.as_started(cfg, record["recipe"]) if step is not None else cfg
        try:
            with Run.open(cfg, place, total_steps, step, record) as run, \
                    store.StepWriter(workdir, place.note) as writer, within_memory(cfg, run.program):
                distributed.when_stopped(None)  # from here on all stop at the same update
                signals.enter(_LOOP)
                agreed = StepAgreement(signals.is_asked, cfg.checkpoint.every_minutes, run.rows)
                return run.loop(agreed, writer, callbacks)
        except (UsageError, places.Lost, agreement.StartedOtherwise):
            raise
        except signals.Stopped:
            print(_NOTHING_DONE, file=sys.stderr, flush=True)
            return False
        except (UserError, OSError) as error:
            raise _with_what_is_saved(error, place) from error


def _say_it_is_finished(workdir: Path, step: int, total_steps: int) -> None:
    if not distributed.process_index():
        base.check_base(workdir)
    beyond = "" if step == total_steps else f", and has been trained to {step}"
    print(f"{workdir} is finished: {total_steps} updates were asked for{beyond}", flush=True)


def _with_what_is_saved(error: UserError | OSError, place: places.Place) -> UserError:
    """The error with the step that is saved, which the first process adds."""
    workdir, what = place.workdir, str(error)
    if isinstance(error, OSError):
        what = f"{error.filename or workdir} cannot be read or written: {error.strerror or error}"
    if distributed.process_index():
        return UserError(what)
    place.check()  # where the workdir is gone, that is the reason
    step, _ = store.newest_intact_step(workdir)
    return UserError(f"{what}; {'no step had been saved' if step is None else f'step {step} is saved'}")


@dataclass
class Run:
    """An opened run: everything that the loop works with. As a context it closes its files and worker processes."""

    cfg: ConfigDict
    place: places.Place
    data: Data
    program: Program
    state: TrainState
    step: int
    total_steps: int
    batches: Loader
    log: MetricsWriter
    record: Mapping  # which run this is and what it stands on, for its steps; in the first process, which writes them
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def open(cls, cfg: ConfigDict, place: places.Place, total_steps: int | None, step: int | None,
             earlier: Mapping) -> Run:
        """Opens weights and data, settles what the recipe leaves open, and puts the state on the devices.

        A run that resumes needs no `init`: what is not trained, tokenizer and config are those of its own workdir.

        Args:
          step: the one that the run resumes from; None to begin.
          earlier: what this step recorded; {} to begin.
        """
        workdir = place.workdir
        checkpoint = open_start(cfg) if step is None else base.open_base(workdir)
        start = cfg if step is None else with_own_tokenizer(cfg)
        agreement.check_same(lambda: alike.model(cfg, workdir, checkpoint, step))
        mesh = open_mesh(cfg, checkpoint.config)
        with distributed.after_first():  # who finds what the first has kept of large data
            data = Data.open(start, checkpoint, row_multiple(cfg, mesh), workdir, earlier.get("settled"))
        total_steps = total_steps or data.total_steps()
        agreement.check_same(lambda: alike.data(data, total_steps))
        program = Program.build(start, checkpoint, mesh, total_steps)
        batches = data.training_batches(mesh)  # with what it refuses, before anything is written
        if step is not None:
            meta = store.read_meta(workdir, step)
            batches.restore(meta["data"])
            data.refuse_other_validation(earlier["validation"])
        record = {}
        if not distributed.process_index():
            record = resume.begin(workdir, cfg, checkpoint, program, data, total_steps, earlier)
        place.belongs_to(record, step)
        source = f"{cfg.init if step is None else workdir}: {checkpoint.tower}"
        _describe(source, cfg, data, program, total_steps)
        with within_memory(cfg, program):
            if step is None:
                state, progress = program.initial_state(checkpoint), Progress()
            else:
                state, progress = resume.restore(workdir, step, checkpoint, program, meta)
                told = arithmetic.warnings(earlier["computed"], arithmetic.used(program))
                print(f"going on from step {step}", *told, sep="\n", flush=True)
        is_first = not distributed.process_index()
        log = MetricsWriter(workdir, step or 0, total_steps, cfg.name, place.check) if is_first else SilentLog()
        return cls(cfg, place, data, program, state, step or 0, total_steps, batches, log, record, progress)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.batches.close()
        self.log.close()

    @property
    def rows(self) -> list[int]:
        """Of an update's rows, those that lie on this process's devices."""
        layout = self.data.plan.layout
        return local_rows(self.program.mesh, layout.rows + layout.padding_rows)

    def loop(self, agreed: StepAgreement, writer: store.StepWriter, callbacks: Callbacks) -> bool:
        """Updates until the last one, or until it is asked to stop. Returns whether the run is finished."""
        train_step, eval_step = self._compiled()
        reader = self._reader(agreed)
        saver = Saver(writer, self.place, self.cfg.checkpoint, self.progress, self.log.say, self.step)
        self.batches.on_wait = agreed.on_wait
        has_samples = callbacks.sampler is not None and self.cfg.samples_every > 0
        agreed.saved()
        with Profiler(callbacks.profile, self.place.workdir, self.log) as profiler:
            try:
                while self.step < self.total_steps and not agreed.is_stopping:
                    profiler.before(self.step + 1, reader.drain)
                    self._update(train_step, reader)
                    profiler.after(self.step, reader.drain)
                    if has_samples and self._is_due(self.cfg.samples_every):
                        with reader.paused():
                            self.log.samples(self.step, callbacks.sampler(self._snapshot()))
                    is_due = self._is_due(self.cfg.checkpoint.every_steps)
                    if is_due or agreed.is_save_due:
                        with reader.paused():
                            self._check_something_was_trained()
                            if is_due:
                                self._validate(eval_step, callbacks, agreed)
                            saver.save(self.state, self._meta())
                        agreed.saved()
            except signals.Stopped as stopped:  # what was waited for is done without
                self.log.say(str(stopped))
            except WorkerError:
                if jax.process_count() == 1 and self.step != saver.saved:
                    reader.drain()
                    saver.save(self.state, self._meta())
                    saver.wait()
                raise
        if self.step != saver.saved:
            reader.drain()
            saver.save(self.state, self._meta())
        saver.finish(self.state, self._meta())
        return self._end()

    def _compiled(self):
        """The functions of an update and of a validation batch, which are compiled when they are first called."""
        program, loss_fn = self.program, self.program.loss()
        train_step = make_train_step(loss_fn, program.optimizer, program.schedule, program.mesh, program.shardings,
                                     self.cfg.micro_batches, program.weighting)
        return train_step, make_eval_step(loss_fn, program.mesh)

    def _reader(self, agreed: StepAgreement) -> MetricsReader:
        return MetricsReader(
            self.progress, self.log, self.place.workdir, config=self.program.model.cfg,
            trained={name: math.prod(x.shape) for name, x in self.state.trainable.items()},
            num_devices=self.program.mesh.size, log_every=self.cfg.log_every, total_steps=self.total_steps,
            nan_limit=self.cfg.nan_limit, name_samples=self.batches.ids, agreed=agreed)

    def _update(self, train_step, reader: MetricsReader) -> None:
        """Dispatches an update, when the one before the last is done."""
        position = self.batches.state()
        batch, missed, skipped = self._next_batch()
        # Whatever would move between host and device without being asked would also wait for the device.
        with jax.transfer_guard("disallow"):
            placed = place(batch, self.program.mesh)
            reader.make_room()
            self.state, metrics = train_step(self.state, placed)
        self.step += 1
        window = self.program.model.cfg.decoder.sliding_window
        reader.add(Update(self.step, metrics, batch_counts(batch, window), missed, position, skipped=skipped))

    def _next_batch(self) -> tuple[Mapping, dict[str, int], list[Mapping]]:
        """A batch, how many of its samples were skipped, were cut or teach nothing, and which were skipped."""
        before = self._trouble_counts()
        batch = next(self.batches)
        after = self._trouble_counts()
        skipped = self.batches.skipped[before["samples_skipped"]:]
        self.log.skipped(self.step + 1, skipped)
        return batch, {name: after[name] - before[name] for name in after}, skipped

    def _trouble_counts(self) -> dict[str, int]:
        loader = self.batches
        return dict(samples_skipped=len(loader.skipped), images_skipped=loader.surplus,
                    samples_truncated=loader.truncated, samples_unsupervised=loader.unsupervised)

    def _validate(self, eval_step, callbacks: Callbacks, agreed: StepAgreement) -> None:
        """Writes the validation loss and what the evaluators say; warns of validation samples that are skipped."""
        found = judge(self._snapshot(), self.state, eval_step, callbacks.evaluators, self.progress)
        unread = agreed.listed(self.data.unread)
        if unread:
            self.log.say(f"warning: {len(unread)} validation samples are skipped; the first: {unread[0]['reason']}")
            found = {**found, "validation_samples_skipped": len(unread)}
        if found:
            self.log.write(self.step, found)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.step, self.state.params, self.program, self.data)

    def _meta(self) -> dict:
        """What a step records."""
        return {"step": self.step, "data": self.batches.state(), "progress": vars(self.progress), "run": self.record}

    def _is_due(self, every: int) -> bool:
        """Every so many updates, and after the last one."""
        return self.step == self.total_steps or every > 0 and self.step % every == 0

    def _check_something_was_trained(self) -> None:
        if self.step >= self.total_steps:
            check_something_was_trained(self.progress, self.total_steps, self.log.say)

    def _end(self) -> bool:
        """Says how the run has ended, and returns whether it is finished."""
        is_finished = self.step >= self.total_steps
        stopped = "stopped and saved" if self.step else "stopped before the first update was done,"
        end = "finished" if is_finished else stopped
        line = f"{end} at step {self.step} of {self.total_steps}: {self.place.workdir}"
        self.log.say(" · ".join([line, *troubles(vars(self.progress))]))
        return is_finished


def _describe(source: str, cfg: ConfigDict, data: Data, program: Program, total_steps: int) -> None:
    """Prints what is trained, on what data and devices, and warns of keys that are not used."""
    print(f"{source}; {len(data.train)} samples, {total_steps} updates of {cfg.batch_size}, {program.describe()}",
          *data.describe(), *(f"warning: {line}" for line in [*void_keys.sentences(cfg), *program.void(cfg)]),
          sep="\n", flush=True)
