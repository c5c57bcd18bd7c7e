"""The training loop, of which there is one: every stage is a recipe that runs through `fit`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.nested import flatten
from llavamed_jax.checkpoints.tree import base, store
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.errors import UsageError, UserError, some
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.parallel.mesh import local_rows, put, replicated
from llavamed_jax.pipeline.loader import Loader
from llavamed_jax.pipeline.workers import WorkerError
from llavamed_jax.training import alike, arithmetic, recipe, void_keys
from llavamed_jax.training import place as places
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.callbacks import NONE, Callbacks, Snapshot
from llavamed_jax.training.log import MetricsWriter, SilentLog, troubles
from llavamed_jax.training.metrics_reader import UNMOVED, ZERO_GRADIENT, MetricsReader, Progress, Update
from llavamed_jax.training.profiler import Profiler
from llavamed_jax.training.program import Program, from_disk, open_mesh, to_disk, within_memory
from llavamed_jax.training.rows import Data, row_multiple
from llavamed_jax.training.start import open_start, with_own_tokenizer
from llavamed_jax.training.state import TABLE, TrainState
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
    """Trains a recipe in a directory, from the newest intact step that lies there, or from `init`.

    Args:
      cfg: the recipe (`recipe.KEYS`).
      workdir: gets `recipe.json`, `model/`, `base/`, `checkpoints/`, `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`.
    Returns:
      True when the run is finished (which it may have been before); False when a signal stopped it, or a stdout that cannot be
      written to (`signals.failure`), after everything was saved.
    Raises:
      UsageError: a recipe that cannot be, or that differs from the one the directory was started with.
      UserError: data, weights or a directory that cannot be used; updates that are not finite, again and again. Of several processes
        in all, one of which has other data, weights, code or packages (`agreement`); UsageError: another recipe or flag.
    """
    workdir = Path(workdir)
    agreement.check_same(lambda: alike.start(cfg, workdir, {"profile": callbacks.profile}))
    recipe.check(cfg)
    with signals.listening(_OPENING), places.locked(workdir) as place:
        distributed.when_stopped(lambda: signals.ask("another process"))
        record, step = distributed.from_first(lambda: _found(workdir, cfg))
        total_steps = cfg.total_steps or record.get("settled", {}).get("total_steps")
        if step is not None and total_steps is not None and step >= total_steps:
            if not distributed.process_index():
                base.check_base(workdir)
            beyond = "" if step == total_steps else f", and has been trained to {step}"
            print(f"{workdir} is finished: {total_steps} updates were asked for{beyond}", flush=True)
            return True
        place.sign()
        cfg = workdirs.as_started(cfg, record["recipe"]) if step is not None else cfg
        try:
            with Run.open(cfg, place, total_steps, step, record) as run, store.StepWriter(workdir, place.note) as writer, \
                    within_memory(cfg, run.program):
                distributed.when_stopped(None)  # from here on all stop at the same update
                signals.enter(_LOOP)
                return run.loop(StepAgreement(signals.is_asked, cfg.checkpoint.every_minutes, run.rows), writer, callbacks)
        except (UsageError, places.Lost, agreement.StartedOtherwise):
            raise
        except signals.Stopped:
            print(_NOTHING_DONE, file=sys.stderr, flush=True)
            return False
        except (UserError, OSError) as error:
            is_file = isinstance(error, OSError)
            what = f"{error.filename or workdir} cannot be read or written: {error.strerror or error}" if is_file else error
            if distributed.process_index():  # the first one says it
                raise UserError(str(what)) from error
            place.check()  # where the directory is gone, that is the reason
            step, _ = store.newest_intact_step(workdir)
            saved = "no step had been saved" if step is None else f"step {step} is saved"
            raise UserError(f"{what}; {saved}") from error


def _found(workdir: Path, cfg: ConfigDict) -> tuple[dict, int | None]:
    """What the run in a directory had recorded with its newest step, and this step; {} and None to begin."""
    step = _newest_step(workdir)
    if step is None:  # a directory without a step belongs to no recipe yet: one that failed before its first step may be corrected
        workdirs.begin_anew(workdir, cfg)
        return {}, None
    meta = store.read_meta(workdir, step)
    if (saved_as := meta.get("step")) != step:
        what = "does not say which step it is, as those of earlier versions" if saved_as is None else f"was saved as step {saved_as}"
        raise UserError(f"{workdir}/checkpoints/{step} {what}; a step under its own number was expected")
    record = meta["run"]
    record["settled"] = workdirs.settled(workdir, cfg, step, record)
    base.check_fingerprints(workdir, record["model"])
    return record, step


def _newest_step(workdir: Path) -> int | None:
    """The step to go on from, None to begin; what is damaged is named, and what was once whole is never begun anew."""
    step, damaged = store.newest_intact_step(workdir)
    if step is None and (len(damaged) > 1 or store.has_sealed(workdir)):
        raise UserError(f"{workdir} has steps and none is intact, so there is nothing to go on from: {some(damaged, separator='; ')}; "
                        "delete its checkpoints/ to begin anew, or name another workdir")
    for sentence in damaged:
        print(f"{sentence}; {'the run begins anew' if step is None else 'it is passed over'}", flush=True)
    return step


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
    saved: int = 0  # the newest step that was given to the writer, or the one that the run goes on from
    is_unsaved: bool = False  # whether the last save came to nothing; a second one in a row ends the run

    @classmethod
    def open(cls, cfg: ConfigDict, place: places.Place, total_steps: int | None, step: int | None, earlier: Mapping) -> Run:
        """Reads weights and data, settles what the recipe leaves open, and puts the state on the devices.

        A run that goes on needs no `init`: what is not trained, tokenizer and config are those of its own directory.
        Args:
          earlier: what step `step` recorded; {} where there is none.
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
        record = {} if distributed.process_index() else _begin(workdir, cfg, checkpoint, program, data, total_steps, earlier)
        place.belongs_to(record, step)
        print(f"{cfg.init if step is None else workdir}: {checkpoint.tower}; {len(data.train)} samples, {total_steps} updates of "
              f"{cfg.batch_size}, {_size(program)}, mesh {dict(mesh.shape)}{_part(mesh)}", *data.describe(),
              *(f"warning: {line}" for line in [*void_keys.sentences(cfg), *program.void(cfg)]), sep="\n", flush=True)
        with within_memory(cfg, program):
            if step is None:
                state, progress = program.initial_state(checkpoint), Progress()
            else:
                state, progress = _restore(workdir, step, checkpoint, program, meta)
                told = arithmetic.warnings(earlier["computed"], arithmetic.used(program))
                print(f"going on from step {step}", *told, sep="\n", flush=True)
        log = SilentLog() if distributed.process_index() else MetricsWriter(workdir, step or 0, total_steps, cfg.name, place.check)
        return cls(cfg, place, data, program, state, step or 0, total_steps, batches, log, record, progress, saved=step or 0)

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

    def loop(self, together: StepAgreement, writer: store.StepWriter, callbacks: Callbacks) -> bool:
        """Updates until the last one, or until it is asked to stop. Returns whether the run is finished."""
        program = self.program
        loss_fn = program.loss()
        train_step = make_train_step(loss_fn, program.optimizer, program.schedule, program.mesh, program.shardings,
                                     self.cfg.micro_batches, program.weighting)
        eval_step = make_eval_step(loss_fn, program.mesh)
        reader = self._reader(together)
        self.batches.on_wait = together.on_wait
        together.saved()
        with Profiler(callbacks.profile, self.place.workdir, self.log) as profiler:
            try:
                while self.step < self.total_steps and not together.is_stopping:
                    profiler.before(self.step + 1, reader.drain)
                    self._update(train_step, reader)
                    profiler.after(self.step, reader.drain)
                    if callbacks.sampler is not None and self.cfg.samples_every and self._is_due(self.cfg.samples_every):
                        reader.drain()
                        self.log.samples(self.step, callbacks.sampler(self._snapshot()))
                        reader.restart_clock()
                    is_due = self._is_due(self.cfg.checkpoint.every_steps)
                    if is_due or together.is_save_due:
                        reader.drain()
                        self._check_something_was_trained()
                        if is_due and (found := self._judge(eval_step, callbacks, together)):
                            self.log.write(self.step, found)
                        self._save(writer)
                        reader.restart_clock()
                        together.saved()
            except signals.Stopped as stopped:  # what was waited for is done without
                self.log.say(str(stopped))
            except WorkerError:
                if jax.process_count() == 1 and self.step != self.saved:
                    reader.drain()
                    self._save(writer)
                    writer.wait()
                raise
        if self.step != self.saved:
            reader.drain()
            self._save(writer)
        if not self._is_saved(writer):  # the state is still here
            self._write(writer)
            if not self._is_saved(writer):
                raise UserError(f"step {self.step} was removed from {self.place.workdir} as often as it was saved")
        if held := self._prune(writer):
            self.log.say(f"somebody reads the steps {some(list(map(str, held)))}, so they are kept: delete them later")
        is_finished = self.step >= self.total_steps
        end = "finished" if is_finished else "stopped and saved" if self.step else "stopped before the first update was done,"
        self.log.say(" · ".join([f"{end} at step {self.step} of {self.total_steps}: {self.place.workdir}", *troubles(vars(self.progress))]))
        return is_finished

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

    def _judge(self, eval_step, callbacks: Callbacks, together: StepAgreement) -> dict[str, float]:
        """What validation data and evaluators say, and how many validation samples they had to do without."""
        found = judge(self._snapshot(), self.state, eval_step, callbacks.evaluators, self.progress)
        unread = together.listed(self.data.unread)
        if unread:
            self.log.say(f"warning: {len(unread)} validation samples are skipped; the first: {unread[0]['reason']}")
        return {**found, "validation_samples_skipped": len(unread)} if unread else found

    def _reader(self, together: StepAgreement) -> MetricsReader:
        return MetricsReader(
            self.progress, self.log, self.place.workdir, config=self.program.model.cfg,
            trained={name: math.prod(x.shape) for name, x in self.state.trainable.items()}, num_devices=self.program.mesh.size,
            log_every=self.cfg.log_every, total_steps=self.total_steps, nan_limit=self.cfg.nan_limit, name_samples=self.batches.ids,
            together=together)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.step, self.state.params, self.program, self.data)

    def _is_due(self, every: int) -> bool:
        """Every so many updates, and after the last one."""
        return self.step == self.total_steps or every > 0 and self.step % every == 0

    def _check_something_was_trained(self) -> None:
        """A run that has learnt from nothing has not finished; its last step is not saved."""
        if self.step < self.total_steps:
            return
        if not self.progress.tokens:
            raise UserError(f"not one of the {self.progress.samples} samples that were seen has a supervised token, so nothing was trained")
        if 2 * self.progress.updates_skipped >= self.total_steps:
            raise UserError(f"{self.progress.updates_skipped} of {self.total_steps} updates were skipped because loss, gradient or update "
                            "was not finite, so the run is not finished")
        if self.progress.zero_gradients and self.progress.zero_gradients + self.progress.updates_skipped >= self.total_steps:
            raise UserError(f"{self.progress.zero_gradients} of {self.total_steps} updates had a gradient of exactly 0, so nothing was "
                            f"trained{ZERO_GRADIENT}")
        if self.progress.updates_unmoved and not self.progress.updates_moved:
            raise UserError(f"not one of {self.progress.updates_unmoved} updates moved the parameters, so nothing was trained{UNMOVED}")
        if not self.progress.updates_unmoved and not self.progress.updates_moved:
            self.log.say("warning: the learning rate was 0 in every update, for all of them are warm-up (optimizer.warmup_ratio): nothing "
                         "was trained")

    def _next_batch(self) -> tuple[Mapping, dict[str, int], list[Mapping]]:
        """A batch, how many of its samples were skipped, cut or teach nothing, which is counted and never silent, and those skipped."""
        before = self._trouble_counts()
        batch = next(self.batches)
        after = self._trouble_counts()
        skipped = self.batches.skipped[before["samples_skipped"]:]
        self.log.skipped(self.step + 1, skipped)
        return batch, {name: after[name] - before[name] for name in after}, skipped

    def _trouble_counts(self) -> dict[str, int]:
        loader = self.batches
        return dict(samples_skipped=len(loader.skipped), images_skipped=loader.surplus, samples_truncated=loader.truncated,
                    samples_unsupervised=loader.unsupervised)

    def _save(self, writer: store.StepWriter) -> None:
        """Saves this step, once the one before is known to be saved and the workdir to be the run's own."""
        self._is_saved(writer)
        self._write(writer)

    def _write(self, writer: store.StepWriter) -> None:
        meta = {"step": self.step, "data": self.batches.state(), "progress": vars(self.progress), "run": self.record}
        writer.save(self.step, to_disk(self.state.trainable), self.state.opt_state, meta)
        self.saved = self.step
        self._prune(writer)

    def _is_saved(self, writer: store.StepWriter) -> bool:
        """Waits for the last save, and says whether it lies where it was saved; a warning tells that it does not.

        Raises:
          Lost: the workdir is no longer the run's own.
        """
        removed = ""
        try:
            writer.wait()
        except store.Unsaved as error:
            if jax.process_count() > 1 or self.is_unsaved:
                raise
            removed = str(error)
        self.is_unsaved = bool(removed)

        def look() -> str:
            self.place.check()
            if not self.saved or removed or writer.is_there(self.saved):
                return removed
            return f"{self.place.workdir}/checkpoints/{self.saved} was removed after it was saved, and is lost"

        if sentence := distributed.from_first(look):
            others = store.steps(self.place.workdir)
            self.log.say(f"warning: {sentence}; the steps that are left: {some(list(map(str, others))) or 'none'}")
        return not sentence

    def _prune(self, writer: store.StepWriter) -> list[int]:
        """Deletes old steps, and returns those that are held by readers. One that is still being written does not count among those
        that are kept."""
        keep = self.cfg.checkpoint
        best = [self.progress.best["step"]] if keep.keep_best and self.progress.best else []
        return writer.keep(keep.keep, also=best, newest=self.step)


def _begin(workdir: Path, cfg: ConfigDict, checkpoint: Checkpoint, program: Program, data: Data, total_steps: int,
           earlier: Mapping) -> dict:
    """Writes the recipe and, of a run that has no step, what no step will have; returns what its steps record of both."""
    if not earlier:
        workdirs.discard_start(workdir)
    record = workdirs.write_recipe(workdir, cfg, {"total_steps": total_steps, **data.resolved()}, earlier)
    if not earlier:
        write_model(workdir, checkpoint, without=program.trained_names(), progress=signals.checked)
    return {**record, "model": base.fingerprints(workdir), "validation": data.judged_by(), "computed": arithmetic.used(program)}


def _restore(workdir: Path, step: int, own: Checkpoint, program: Program, meta: Mapping) -> tuple[TrainState, Progress]:
    """The state of a saved step over the run's own base."""
    like = program.abstract_state()
    trained, opt_state, _ = store.restore_step(workdir, step, to_disk(like.trainable), like.opt_state)
    frozen = program.frozen(own)
    if distributed.process_index() == 0:
        for name in own.unused:  # no update needs them, but what is made of this run will
            own.read(name)
    progress = Progress(**{"updates_moved": 1, **meta["progress"]})  # earlier versions did not count them
    everywhere = replicated(program.mesh)
    return TrainState(
        step=put(np.int32(step), everywhere), skipped=put(np.int32(progress.updates_skipped), everywhere),
        trainable=from_disk(trained, program.shardings.trainable), frozen=frozen, opt_state=opt_state), progress


def _part(mesh: Mesh) -> str:
    """Of a mesh that leaves devices idle, how many it takes."""
    return f" on the first {mesh.size} of {jax.device_count()} devices" if mesh.size < jax.device_count() else ""


def _size(program: Program) -> str:
    """How much of the model is trained, in words; small numbers to the last parameter."""
    sizes = {name: math.prod(x.shape) for name, x in flatten(abstract_params(program.model.cfg, scan=True)).items()}
    trained = sum(sizes[name] for name in program.shardings.trainable)
    if program.rows:
        trained -= sizes[TABLE] - len(program.rows) * program.model.cfg.decoder.hidden_size
    trained, everything = (f"{n / 1e6:,.2f} M" if n >= 1e6 else f"{n:,}" for n in (trained, sum(sizes.values())))
    return f"{trained} of {everything} parameters trained"
