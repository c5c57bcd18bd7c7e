"""Makes the rows of a run: measures the recipe's records, packs them into rows, and shards the rows over the mesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.config import LlavaConfig
from llavamed_jax.datasets import training
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.models import llava
from llavamed_jax.parallel.mesh import batch_shards, local_rows, make_mesh
from llavamed_jax.pipeline import lengths, loader, packing, sizes
from llavamed_jax.pipeline.lengths import Lengths
from llavamed_jax.pipeline.trial import Trial
from llavamed_jax.processor import Processor
from llavamed_jax.training.state import partition
from llavamed_jax.training.update_rows import check_positions, update_of


@dataclass(frozen=True)
class Data:
    """Training and validation records, measured, and the rows that are made from them.

    Attributes:
      cfg: the recipe.
      processor: turns records into model inputs.
      train: the training records.
      plan: the rows of the training records.
      validation: the validation records; None for no validation.
      validation_plan: the rows of the validation records.
      samples: the lengths of `shown`.
      shown: the records of `data.samples`, which the model is asked about during training.
      unread: this process's validation samples with an image that could not be read.
    """

    cfg: ConfigDict
    processor: Processor
    train: training.TrainingData
    plan: packing.Plan
    validation: training.TrainingData | None
    validation_plan: packing.Plan | None
    samples: Lengths | None = None
    shown: training.TrainingData | None = None
    unread: list[dict] = field(default_factory=list)

    @classmethod
    def open(cls, cfg: ConfigDict, checkpoint: Checkpoint, mesh: Mesh | None = None, workdir: Path | None = None,
             settled: Mapping[str, Any] | None = None) -> Data:
        """Reads and measures the data, and settles the shape of its rows.

        Args:
          cfg: the recipe.
          checkpoint: the model, its tokenizer and its config.
          mesh: the devices that share the rows; None for one device.
          workdir: its directory `cache/` keeps measurements of large data; None to keep none.
          settled: `resolved` of an earlier part of the run, so that its rows stay the same.

        Raises:
          UsageError: an invalid batch size or row length.
          UserError: the data cannot be used.
        """
        cache = workdir / "cache" if workdir is not None else None
        processor = Processor.from_checkpoint(checkpoint, tokenizer=cfg.tokenizer, template=cfg.template)

        def measure(data, path) -> Lengths:
            rows = checkpoint.config.decoder.vocab_size
            found = lengths.measure(data, processor, cfg.max_length, cfg.data.workers, cache, rows)
            _check_skip_limit(cfg, path, packing.Stream.of(data, cfg.seed), found)
            return found

        def read(path, split) -> tuple[training.TrainingData, Lengths]:
            data = training.read_training(path, cfg.data.images, cfg.protocol or "clean", split, cache)
            return data, measure(data, path)

        check_positions(cfg, checkpoint.config)
        samples = shown = None
        if cfg.data.samples and cfg.samples_every:  # the sampler reads them again; errors are found now
            shown = training.read_training(cfg.data.samples, cfg.data.images)
            samples = measure(shown, cfg.data.samples)
        mesh = make_mesh(None, jax.local_devices()[:1]) if mesh is None else mesh
        rows = _Rows(cfg, checkpoint.config, mesh, settled or {})
        train, measured = read(cfg.data.train, "train")
        stream = packing.Stream.of(train, cfg.seed)
        plan = packing.Plan(stream, measured, rows.layout(stream, measured), cache)
        if not cfg.data.validation:
            return cls(cfg, processor, train, plan, None, None, samples, shown)
        validation, measured = read(cfg.data.validation, "validation")
        stream = packing.Stream.of(validation, cfg.seed, is_shuffled=False)
        layout = rows.layout_like(plan.layout, stream, measured)
        return cls(cfg, processor, train, plan, validation, packing.Plan(stream, measured, layout, cache), samples,
                   shown)

    def total_steps(self) -> int:
        """Returns the updates of the run: `total_steps`, or those that `epochs` over the rows make."""
        return self.cfg.total_steps if self.cfg.total_steps is not None else self.plan.num_updates(self.cfg.epochs)

    def with_micro_batches(self, number: int) -> Data:
        """Returns the same rows, computed in another number of parts that divides a device's rows."""
        if number == self.plan.layout.micro_batches:
            return self
        plan = packing.Plan(self.plan.stream, self.plan.lengths, replace(self.plan.layout, micro_batches=number),
                            self.plan.cache)
        judged = self.validation_plan
        if judged is not None:
            layout = replace(judged.layout, rows=max(1, (plan.layout.rows + plan.layout.padding_rows) // number))
            judged = packing.Plan(judged.stream, judged.lengths, layout, judged.cache)
        return replace(self, plan=plan, validation_plan=judged)

    def judged_by(self) -> str | None:
        """Returns a fingerprint of the validation records; None without validation."""
        return None if self.validation is None else self.validation.fingerprint()

    def refuse_other_validation(self, earlier: str | None) -> None:
        """Raises UserError if `judged_by` differs from the earlier run's: the validation losses would not compare."""
        if self.judged_by() != earlier:
            raise UserError(f"the text or the images of the samples of {self.cfg.data.validation} (data.validation) "
                            "have changed since the run was saved; the same data was expected")

    def resolved(self) -> dict[str, Any]:
        """Returns the settled values that `recipe.json` keeps, so that a resumed run has the same rows."""
        layout, found = self.plan.layout, self.plan.lengths
        return dict(samples=len(self.train), mean_length=round(found.mean, 1), row_length=layout.row_length,
                    image_slots=layout.image_slots, rows=layout.rows,
                    micro_batches=layout.micro_batches, samples_an_update=round(self.samples_an_update(), 1))

    def samples_an_update(self) -> float:
        """Returns the mean number of samples of an update."""
        layout, rows = self.plan.layout, self.plan.first(0)
        return layout.rows * len(rows.records) / len(rows)

    def describe(self) -> list[str]:
        """Returns lines about the data, warnings about unused records, and the shape of the rows."""
        found = self.plan.lengths
        sets = [*self.train.found, *(self.validation.found if self.validation is not None else ())]
        images = float(found.images.sum() / max(found.usable, 1))
        text = found.mean - images * self.processor.config.image_length
        lines = [*sets, f"{found.usable} samples with a mean of {found.mean:.1f} tokens and at most {found.longest}, "
                        f"images included (preflight, which reads no data, would plan with data.mean_text={text:.0f} "
                        f"and data.mean_images={images:.2g})"]
        lines += self._troubles("", found)
        if self.validation_plan is not None:
            lines += self._troubles("validation ", self.validation_plan.lengths)
        if self.samples is not None:
            lines += self._troubles("sample ", self.samples)
        lines += self._describe_packing() if self.plan.layout.is_packed else []
        return [*lines, *self._describe_batch()]

    def _troubles(self, which: str, found: Lengths) -> list[str]:
        """Returns warnings about records, images and tokens that are not used, of the data that `which` names."""
        lines = []
        if found.damaged:
            lines.append(f"{len(found.damaged)} {which}records cannot be used and are listed in skipped.jsonl; the "
                         f"first: {found.damaged[0]['reason']}" if not which else
                         f"{len(found.damaged)} {which}records cannot be used; the first: {found.damaged[0]['reason']}")
        if found.truncated:
            lines.append(f"{found.truncated} {which}samples are longer than {self.cfg.max_length} tokens and are cut")
        if found.unsupervised:
            lines.append(f"{found.unsupervised} {which}samples have no supervised token; the first: "
                         f"{found.first_unsupervised}")
        if found.surplus:
            lines.append(f"{found.surplus} {which}images are left out, because they have no marker or the cut removes "
                         f"them; the first: {found.first_lost}")
        return [f"warning: {line}" for line in lines]

    def _describe_packing(self) -> list[str]:
        layout, batch_size, here = self.plan.layout, self.cfg.batch_size, self.samples_an_update()
        about = "about " if self.plan.windows > 1 else ""
        expected = count_of(self.plan.expected_rows(0), "packed row")
        lines = [f"{about}{expected} per epoch, each of {layout.row_length} tokens and "
                 f"{count_of(layout.image_slots, 'image')}; {count_of(layout.rows, 'row')} per update, about "
                 f"{count_of(round(here), 'sample')} (batch_size is {batch_size})"
                 + (f", in {layout.micro_batches} micro-batches" if layout.micro_batches > 1 else "")]
        return lines

    def _describe_batch(self) -> list[str]:
        """Returns a warning if updates do not have `batch_size` samples."""
        here, batch_size = self.samples_an_update(), self.cfg.batch_size
        if abs(here - batch_size) <= (sizes.TOLERANCE * batch_size if self.plan.layout.is_packed else 0):
            return []
        if self.cfg.total_steps is None and here < batch_size and self.plan.expected_rows(0) <= self.plan.layout.rows:
            return [f"warning: an epoch has {count_of(len(self.plan.first(0).records), 'sample')}, fewer than "
                    f"{batch_size} (batch_size): each epoch is one update, of all of them"]
        return [f"warning: updates have about {here:.0f} samples and not {batch_size} (batch_size); the learning rate "
                "stays as it is"]

    def training_batches(self, mesh: Mesh | None = None) -> loader.Loader:
        """Returns the endless stream of training batches; on a mesh of several processes, this process's rows."""
        return self._batches(self.train, self.plan, self.cfg.data.workers, None, mesh)

    def validation_batches(self, mesh: Mesh | None = None,
                           on_wait: Callable[[float], object] | None = None) -> loader.Loader:
        """Returns the validation records once; the last batch is filled up with empty rows.

        Args:
          mesh: the mesh of which this process gets its rows; None for all rows.
          on_wait: the loader's callback while a batch is awaited.

        Returns:
          The loader; it appends skipped samples to `unread`.
        """
        self.unread.clear()
        found = self._batches(self.validation, self.validation_plan, 0, 1, mesh,
                              lambda entry: entry["image"] and self.unread.append(entry))
        found.on_wait = on_wait or found.on_wait
        return found

    def _batches(self, data, plan, num_workers, epochs, mesh, on_skip=None) -> loader.Loader:
        part = None if mesh is None else local_rows(mesh, plan.layout.rows + plan.layout.padding_rows)
        return loader.batches(data, self.processor, plan, self.cfg.max_length, num_workers=num_workers, epochs=epochs,
                              part=part,
                              on_skip=on_skip, skip_limit=self.cfg.data.skip_limit)


def _check_skip_limit(cfg: ConfigDict, path, stream: packing.Stream, found: Lengths) -> None:
    """Raises UserError if more than `data.skip_limit` of the samples, or of the images, cannot be used.

    Samples that lose an image count as unusable. Samples are those of an epoch: a source of weight 2 counts twice.
    """
    limit, weights, samples = cfg.data.skip_limit, stream.weights(), len(stream)
    count = lambda values: float((weights * values).sum())
    damaged, lossy = count(found.tokens == 0), count(found.is_lossy)
    if damaged > limit * samples:
        raise UserError(f"{damaged:.0f} of the {samples} samples of {path} cannot be used, more than the allowed "
                        f"{limit:.0%} (data.skip_limit); the first: {found.damaged[0]['reason']}")
    why = f"because they have no <image> marker or the cut at max_length removes them: more than the allowed " \
          f"{limit:.0%} (data.skip_limit); the first: {found.first_lost}"
    if damaged + lossy > limit * samples:
        rest = f" and {damaged:.0f} cannot be used" if damaged else ""
        raise UserError(f"{lossy:.0f} of the {samples} samples of {path} lose images{rest}, {why}")
    lost = count(found.lost) if found.lost is not None else 0
    named = count(found.images) + lost
    if lost > limit * named:
        raise UserError(f"{lost:.0f} of the {named:.0f} images of {path} are left out, {why}")


def _usable(stream: packing.Stream, found: Lengths) -> float:
    """Returns the samples of an epoch that can be used; a source of weight 2 counts twice."""
    return float((stream.weights() * (found.tokens > 0)).sum())


@dataclass(frozen=True)
class _Rows:
    """Settles the shape of rows from the data's lengths and the mesh."""

    cfg: ConfigDict
    config: LlavaConfig
    mesh: Mesh
    settled: Mapping[str, Any]

    def layout(self, stream: packing.Stream, found: Lengths) -> packing.Layout:
        """Returns the layout of training rows. A resumed run keeps its rows; another mesh only adds empty ones."""
        cfg, settled, shards = self.cfg, self.settled, batch_shards(self.mesh)
        if not found.usable:
            return packing.Layout(cfg.max_length, 0, shards, cfg.data.packing)  # empty; the plan raises
        if settled:
            parts = settled.get("micro_batches", cfg.micro_batches)
            most = -(-settled.get("rows", cfg.batch_size) // shards)
            if "micro_batches" not in settled and parts != sizes.AUTO and parts > most:
                raise UsageError(f"the config key 'micro_batches' is {parts}, but an update of this run has at most "
                                 f"{count_of(most, 'row')} on a device; at most {most} was expected")
            rows, length, slots = ((settled[key] for key in ("rows", "row_length", "image_slots")) if cfg.data.packing
                                   else (settled.get("rows", cfg.batch_size), cfg.max_length, found.max_images))
        elif cfg.data.packing:
            trial = self._trial(stream, found)
            update = update_of(self._at_most(stream, found), self.mesh, self.config, found.mean, found.longest,
                               trial.samples_a_row)
            rows, length, parts = update.rows, update.row_length, update.micro_batches
            slots = trial.image_slots(length)
        else:
            update = update_of(cfg, self.mesh, self.config)
            rows, length, parts, slots = update.rows, update.row_length, update.micro_batches, found.max_images
        if parts == sizes.AUTO:
            parts = sizes.parts_of(-(-rows // shards), length)
        made = packing.Layout(length, slots, rows, cfg.data.packing, micro_batches=parts)
        if not settled and cfg.total_steps is None and _usable(stream, found) < 2 * update.samples:
            made = replace(made, rows=min(rows, len(packing.Plan(stream, found, made).rows(0))))
        return self._padded(made, shards * parts)

    def _at_most(self, stream: packing.Stream, found: Lengths) -> ConfigDict:
        """Returns the recipe with a batch of at most an epoch's samples, if `epochs` says how long the run trains."""
        number = max(1, round(_usable(stream, found)))
        if self.cfg.total_steps is not None or number >= self.cfg.batch_size:
            return self.cfg
        cfg = self.cfg.copy_and_resolve_references()
        cfg.batch_size, cfg.batch_size_may_grow = number, True  # no mesh makes a batch that the data lacks
        return cfg

    def layout_like(self, layout: packing.Layout, stream: packing.Stream, found: Lengths) -> packing.Layout:
        """Returns the layout of validation rows: as many as a micro-batch, with room for their images and lengths.

        Args:
          layout: the layout of the training rows.
          stream: the order of the validation records.
          found: the lengths of the validation records.
        """
        row_length = layout.row_length if found.longest <= layout.row_length else -(-found.longest // 128) * 128
        is_tried = layout.is_packed and found.usable
        slots = self._trial(stream, found).image_slots(row_length) if is_tried else found.max_images
        rows = max(1, (layout.rows + layout.padding_rows) // layout.micro_batches)
        return replace(layout, image_slots=slots, row_length=row_length, rows=rows, padding_rows=0)

    def _padded(self, layout: packing.Layout, multiple: int) -> packing.Layout:
        layout = replace(layout, padding_rows=-layout.rows % multiple)
        rows, size = (layout.rows + layout.padding_rows) / jax.process_count(), self.config.vision.image_size
        needed = rows * loader.row_bytes(layout, size)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise UsageError(f"the config key 'batch_size' is {self.cfg.batch_size}: an update of {rows:.0f} rows of "
                             f"{layout.row_length} tokens and {layout.image_slots} images needs {needed / 1e9:,.0f} "
                             f"GB; at most this machine's memory of {memory / 1e9:,.0f} GB was expected")
        return layout

    def _trial(self, stream: packing.Stream, found: Lengths) -> Trial:
        return Trial(stream, found, self._image_cost(found.mean))

    def _image_cost(self, mean_length: float) -> float:
        """Returns the tower's work for an image, in tokens of the decoder.

        The backward pass of a trained part costs twice its forward pass. A frozen decoder costs half of that, since
        gradients pass through it to the projector; a frozen tower has no backward pass.
        """
        regexes = [entry for entry in self.cfg.trainable if isinstance(entry, str)]
        trained = partition(llava.abstract_params(self.config, scan=True), regexes)[0] if regexes else ()
        passes = lambda part, frozen: 3 if any(name.startswith(part) for name in trained) else frozen
        image = self.config.vision_flops_per_image() * passes("vision_tower/", 1)
        return image / (self.config.decoder.forward_flops_per_token(int(mean_length)) * passes("decoder/", 2))
