"""The training loop, of which there is one: every stage is a recipe that runs through `fit`."""

from __future__ import annotations

import collections
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llavamed_jax.checkpoints import store
from llavamed_jax.checkpoints.load import flatten
from llavamed_jax.data.loader import Loader
from llavamed_jax.errors import UsageError, UserError, some
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.parallel.mesh import replicated
from llavamed_jax.training import metrics, recipe, setup
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.state import TABLE, TrainState
from llavamed_jax.training.step import make_eval_step, make_train_step, place

# (step, nested parameters with stacked layers) -> named numbers, written beside the validation loss.
Evaluator = Callable[[int, Mapping], Mapping[str, float]]

# Metrics are read this many updates late: the device always has work queued, and the host never runs far ahead.
RUN_AHEAD = 2


def fit(cfg: ConfigDict, workdir: str | Path, evaluators: Sequence[Evaluator] = ()) -> bool:
    """Trains a recipe in a directory, from the newest intact step that lies there, or from `init`.

    Args:
      cfg: the recipe (`recipe.KEYS`).
      workdir: gets `recipe.json`, `model/`, `base/`, `checkpoints/`, `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`.
      evaluators: are called whenever the validation loss is computed.
    Returns:
      True when the run is finished (which it may have been before); False when SIGTERM or SIGINT stopped it, after
      everything was saved.
    Raises:
      UsageError: a recipe that cannot be, or that differs from the one the directory was started with.
      UserError: data, weights or a directory that cannot be used.
    """
    recipe.check(cfg)
    workdir = Path(workdir)
    with workdirs.locked(workdir) as sign:
        saved = store.steps(workdir)
        # A directory without a step belongs to no recipe yet: one that failed before its first step may be corrected.
        settled = workdirs.read_recipe(workdir, cfg) if saved else {}
        step, damaged = store.newest_intact_step(workdir)
        if step is None and (len(saved) > 1 or any(store.is_sealed(workdir, number) for number in saved)):
            raise UserError(f"{workdir} has steps and none is intact, so there is nothing to go on from: {some(damaged, separator='; ')}; "
                            "delete its checkpoints/ to begin anew, or name another workdir")
        for sentence in damaged:
            print(f"{sentence}; it is passed over", flush=True)
        total_steps = cfg.total_steps or settled.get("total_steps")
        if step is not None and total_steps is not None and step >= total_steps:
            beyond = "" if step == total_steps else f", and has been trained to {step}"
            print(f"{workdir} is finished: {total_steps} updates were asked for{beyond}", flush=True)
            return True
        sign()
        try:
            with _Stop() as stop, Run.open(cfg, workdir, total_steps, step) as run, store.StepWriter(workdir) as writer:
                return run.loop(stop, writer, evaluators)
        except UsageError:
            raise
        except (UserError, OSError) as error:
            step, _ = store.newest_intact_step(workdir)
            saved = "no step had been saved" if step is None else f"step {step} is saved"
            what = f"{error.filename or workdir} could not be written: {error.strerror or error}" if isinstance(error, OSError) else error
            raise UserError(f"{what}; {saved}") from error


class _Stop:
    """Remembers SIGTERM and SIGINT, so that the update under way is finished and saved. A second one interrupts."""

    def __init__(self):
        self.is_asked = False
        self._earlier: dict = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    def __exit__(self, *_):
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """What a run has counted, which its checkpoints carry."""

    samples: int = 0
    tokens: int = 0  # supervised
    samples_skipped: int = 0  # whose image could not be read
    samples_truncated: int = 0  # longer than max_length
    samples_unsupervised: int = 0  # that teach nothing, because the original's label arithmetic did not add up
    updates_skipped: int = 0  # whose loss or gradient was not finite
    best: dict | None = None  # {"step", "validation_loss"}


@dataclass
class Run:
    """An opened run: everything that the loop works with. As a context it closes its files and worker processes."""

    cfg: ConfigDict
    workdir: Path
    data: setup.Data
    program: setup.Program
    state: TrainState
    step: int
    total_steps: int
    batches: Loader
    log: metrics.MetricsWriter
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def open(cls, cfg: ConfigDict, workdir: Path, total_steps: int | None, step: int | None) -> "Run":
        """Reads weights and data, settles what the recipe leaves open, and puts the state on the devices."""
        mesh = setup.open_mesh(cfg)
        checkpoint = setup.open_start(cfg)
        data = setup.Data.open(cfg, checkpoint)
        total_steps = total_steps or data.total_steps()
        program = setup.Program.build(cfg, checkpoint, mesh, total_steps)
        batches = data.training_batches()  # with what it refuses, before anything is written
        if step is None:
            workdirs.discard_start(workdir, cfg)
        workdirs.write_recipe(workdir, cfg, dict(total_steps=total_steps, samples=len(data.train), row_length=cfg.max_length,
                                                 rows=cfg.batch_size))
        if not (workdir / "model").exists():
            store.write_model(workdir, checkpoint, without=program.trained_names())
        print(f"{cfg.init}: {checkpoint.tower}; {len(data.train)} samples, {total_steps} updates of {cfg.batch_size}, "
              f"{_size(program)}, mesh {dict(mesh.shape)}", flush=True)
        state, progress = program.initial_state(checkpoint), Progress()
        if step is not None:
            state, progress = _restore(workdir, step, state, program, batches)
            print(f"going on from step {step}", flush=True)
        log = metrics.MetricsWriter(workdir, step or 0, total_steps, cfg.name)
        return cls(cfg, workdir, data, program, state, step or 0, total_steps, batches, log, progress)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.batches.close()
        self.log.close()

    def loop(self, stop: _Stop, writer: store.StepWriter, evaluators: Sequence[Evaluator]) -> bool:
        """Updates until the last one, or until it is asked to stop. Returns whether the run is finished."""
        cfg, program = self.cfg, self.program
        loss_fn = program.loss()
        train_step = make_train_step(loss_fn, program.optimizer, program.schedule, program.mesh, program.shardings, cfg.micro_batches)
        validate = self._validator(make_eval_step(loss_fn, program.mesh), evaluators)
        reader = _LateReader(self)
        saved_step, saved_at = self.step, time.monotonic()
        while self.step < self.total_steps and not stop.is_asked:
            batch, troubles = self._next_batch()
            self.state, device_metrics = train_step(self.state, place(batch, program.mesh))
            self.step += 1
            reader.add(self.step, device_metrics, metrics.batch_counts(batch), troubles)
            is_due = _is_multiple(self.step, cfg.checkpoint.every_steps) or self.step == self.total_steps
            is_late = cfg.checkpoint.every_minutes and time.monotonic() - saved_at > 60 * cfg.checkpoint.every_minutes
            if is_due or is_late:
                reader.drain()
                if self.step == self.total_steps:
                    self._refuse_nothing()
                if is_due:
                    validate()
                self._save(writer)
                reader.restart_clock()
                saved_step, saved_at = self.step, time.monotonic()
        if self.step != saved_step:
            reader.drain()
            self._save(writer)
        writer.wait()
        self._prune(writer)
        is_finished = self.step >= self.total_steps
        self.log.say(" · ".join([f"{'finished' if is_finished else 'stopped and saved'} at step {self.step} of {self.total_steps}: "
                                 f"{self.workdir}", *metrics.troubles(vars(self.progress))]))
        return is_finished

    def _refuse_nothing(self) -> None:
        """A run that has learnt from nothing has not finished; its last step is not saved."""
        if not self.progress.tokens:
            raise UserError(f"not one of the {self.progress.samples} samples that were seen has a supervised token, so nothing was trained")
        if self.progress.updates_skipped >= self.total_steps:
            raise UserError(f"all {self.total_steps} updates were skipped because loss, gradient or update was not finite")

    def _next_batch(self) -> tuple[dict, dict[str, int]]:
        """A batch, and how many of its samples were skipped, cut or teach nothing, which is counted and never silent."""
        before = self._trouble_counts()
        batch = next(self.batches)
        after = self._trouble_counts()
        self.log.skipped(self.step + 1, self.batches.skipped[before["samples_skipped"]:])
        return batch, {name: after[name] - before[name] for name in after}

    def _trouble_counts(self) -> dict[str, int]:
        loader = self.batches
        return dict(samples_skipped=len(loader.skipped), samples_truncated=loader.truncated, samples_unsupervised=loader.unsupervised)

    def _validator(self, eval_step, evaluators: Sequence[Evaluator]) -> Callable[[], None]:
        """A function that writes the validation loss, weighted by tokens, and what the evaluators say, if there is either."""

        def validate():
            found = {}
            if self.data.validation is not None:
                total, count = jnp.float32(0), jnp.float32(0)
                for batch in self.data.validation_batches():
                    part = eval_step(self.state, place(batch, self.program.mesh))
                    total, count = total + part[0], count + part[1]
                if not count:
                    raise UserError(f"no sample of the validation data {self.cfg.data.validation} has a supervised token")
                found["validation_loss"] = float(total / count)
                best = self.progress.best["validation_loss"] if self.progress.best else math.inf
                if found["validation_loss"] < best:  # NaN never is
                    self.progress.best = {"step": self.step, **found}
            for evaluate in evaluators:
                found.update(evaluate(self.step, self.state.params))
            if found:
                self.log.write(self.step, found)

        return validate

    def _save(self, writer: store.StepWriter) -> None:
        meta = {"data": self.batches.state(), "progress": vars(self.progress), "seed": self.cfg.seed}
        writer.save(self.step, setup.to_disk(self.state.trainable), self.state.opt_state, meta)
        self._prune(writer)

    def _prune(self, writer: store.StepWriter) -> None:
        """Deletes old steps. One that is still being written does not count among those that are kept."""
        keep = self.cfg.checkpoint
        best = [self.progress.best["step"]] if keep.keep_best and self.progress.best else []
        writer.keep(keep.keep, also=best)


class _LateReader:
    """Takes the metrics of updates and writes them `RUN_AHEAD` updates later, when reading them waits for nothing.

    Throughput is taken from when updates were dispatched, which the queue keeps in step with the device. The clock starts
    after the first update, which compiles, and again after saving and validation.
    """

    def __init__(self, run: Run):
        self._run = run
        self._queue: collections.deque = collections.deque()
        self._peak = metrics.peak_flops(jax.devices()[0].device_kind)
        self._trained = {name: math.prod(x.shape) for name, x in run.state.trainable.items()}
        self._is_first = True
        self.restart_clock()

    def restart_clock(self, at: float | None = None) -> None:
        self._since, self._tokens, self._flops = at or time.monotonic(), 0, 0.0

    def add(self, step: int, device_metrics: Mapping[str, jax.Array], counts: Mapping[str, int],
            troubles: Mapping[str, int]) -> None:
        self._queue.append((step, device_metrics, counts, troubles, time.monotonic()))
        if len(self._queue) > RUN_AHEAD:
            self._read()

    def drain(self) -> None:
        """Waits for all updates, so that a checkpoint carries what they counted."""
        while self._queue:
            self._read()

    def _read(self) -> None:
        step, device_metrics, counts, troubles, dispatched = self._queue.popleft()
        values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        run, progress = self._run, self._run.progress
        progress.samples += counts["samples"]
        progress.tokens += int(values["tokens"])
        for name, count in troubles.items():
            setattr(progress, name, getattr(progress, name) + count)
        progress.updates_skipped += int(values["skipped"])
        self._tokens += counts["tokens"]
        self._flops += metrics.training_flops(run.program.model.cfg, self._trained, counts["tokens"], counts["samples"], counts["images"])
        run.log.advance(step, values["loss"])
        is_logged = _is_multiple(step, run.cfg.log_every) or step == run.total_steps
        if is_logged:
            run.log.write(step, self._line(values, counts, max(dispatched - self._since, 1e-9)))
        if is_logged or self._is_first:
            self.restart_clock(dispatched)
        self._is_first = False

    def _line(self, values: Mapping[str, float], counts: Mapping[str, int], seconds: float) -> dict:
        progress, peak = self._run.progress, self._peak and self._peak * self._run.program.mesh.size
        return dict(
            loss=values["loss"], learning_rate=values["learning_rate"], grad_norm=values["grad_norm"], samples=progress.samples,
            tokens=progress.tokens, tokens_per_second=self._tokens / seconds,
            padding_fraction=1 - counts["tokens"] / counts["positions"],
            image_padding_fraction=1 - counts["images"] / counts["image_slots"] if counts["image_slots"] else 0.0,
            mfu=self._flops / seconds / peak if peak else None,
            **{name: count for name, count in vars(progress).items() if name.endswith(("skipped", "truncated", "unsupervised"))})


def _restore(workdir: Path, step: int, state: TrainState, program: setup.Program, batches) -> tuple[TrainState, Progress]:
    """The state of a saved step; `batches` goes on where it stood."""
    like = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    trained_like = setup.to_disk({n: like(x, program.shardings.trainable[n]) for n, x in state.trainable.items()})
    optimizer_like = jax.tree.map(like, state.opt_state, program.shardings.opt_state)
    trained, opt_state, meta = store.restore_step(workdir, step, trained_like, optimizer_like)
    batches.restore(meta["data"])
    progress = Progress(**meta["progress"])
    everywhere = replicated(program.mesh)
    return state.replace(
        step=jax.device_put(jnp.int32(step), everywhere), skipped=jax.device_put(jnp.int32(progress.updates_skipped), everywhere),
        trainable=setup.from_disk(trained, program.shardings.trainable), opt_state=opt_state), progress


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _size(program: setup.Program) -> str:
    """How much of the model is trained, in words."""
    sizes = {name: math.prod(x.shape) for name, x in flatten(abstract_params(program.model.cfg, scan=True)).items()}
    trained = sum(sizes[name] for name in program.shardings.trainable)
    if program.rows:
        trained -= sizes[TABLE] - len(program.rows) * program.model.cfg.decoder.hidden_size
    return f"{trained / 1e6:,.2f} M of {sum(sizes.values()) / 1e6:,.2f} M parameters trained"
