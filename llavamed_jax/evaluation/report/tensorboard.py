"""The scalars of an evaluation for TensorBoard, so that evaluations of a run's steps stand in one curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.evaluation.scoring import registry

_FAMILIES = ("strict", "paper", "captions", "overall", "type", "domain")  # the last three of a chat evaluation
_OTHERS = {"judged": ("open_accuracy", "open_accuracy_low", "open_accuracy_high"), "organ": ("accuracy", "exchanged", "majority")}
_SUFFIX = ".eval"  # a training run's events may lie in the same folder; ours alone are replaced (`results.write_results`)


def step_of(checkpoint: str) -> int:
    """The step that a checkpoint's path names (`RUN/checkpoints/STEP`, `checkpoint-STEP`); 0 where it names none."""
    match = re.search(r"(?:^|/)(?:checkpoints/|checkpoint-)(\d+)/?$", checkpoint)
    return int(match[1]) if match else 0


def write(folder: Path, metrics: Mapping, step: int) -> None:
    """Writes the metrics' numbers into `FOLDER/tensorboard`, as one file that ends in `.eval`."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=_SUFFIX) as writer:
        for name, value in scalars(metrics):
            writer.add_scalar(f"eval/{metrics['dataset']}_{metrics['split']}/{name}", value, step)


def scalars(metrics: Mapping) -> Iterator[tuple[str, float]]:
    """Name and value of each number: the families with their intervals, baselines, controls, judge, organ, comparison."""
    kept = [name for name in (*_FAMILIES, *registry.further()) if name in metrics]
    yield from _numbers({name: metrics[name] for name in (*kept, "baselines") if name in metrics})
    for title, names in _OTHERS.items():
        if metrics.get(title):
            yield from _numbers({title: {name: metrics[title][name] for name in names}})
    control = metrics.get("control")
    if control:
        for title, table in {"exchanged": control, "noise": control.get("noise", {})}.items():
            yield from _numbers({f"control_{title}": {name: table[name] for name in (*kept, "difference") if name in table}})
    if metrics.get("against"):
        yield from _numbers({"against": {family: metrics["against"][family] for family in kept}})


def _numbers(table: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, float(value)
