"""Writes the scalars of an evaluation for TensorBoard; evaluations of several steps of a run form one curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.evaluation.scoring import programs, registry

# The last three are the families of a chat evaluation.
_FAMILIES = ("strict", "paper", "captions", "overall", "type", "domain")
_OTHERS = {**dict.fromkeys(programs.PROGRAMS, tuple(name for name, _, _ in programs.NUMBERS)),
           "judged": ("open_accuracy", "open_accuracy_low", "open_accuracy_high"),
           "organ": ("accuracy", "exchanged", "majority")}
# A training run's events may lie in the same folder; only files with this suffix are replaced
# (`results.write_results`).
_SUFFIX = ".eval"


def step_of(checkpoint: str) -> int:
    """Returns the step in a checkpoint's path (`RUN/checkpoints/STEP`, `checkpoint-STEP`); 0 if there is none."""
    match = re.search(r"(?:^|/)(?:checkpoints/|checkpoint-)(\d+)/?$", checkpoint)
    return int(match[1]) if match else 0


def write(folder: Path, metrics: Mapping, step: int) -> None:
    """Writes the numbers of the metrics to `FOLDER/tensorboard`, into one file with the suffix `.eval`."""
    from llavamed_jax.utils.event_files import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=_SUFFIX) as writer:
        for name, value in scalars(metrics):
            writer.add_scalar(f"eval/{metrics['dataset']}_{metrics['split']}/{name}", value, step)


def scalars(metrics: Mapping) -> Iterator[tuple[str, float]]:
    """Yields name and value of each scalar: families, intervals, baselines, judge, organ, controls, `against`."""
    kept = [name for name in (*_FAMILIES, *registry.further()) if name in metrics]
    yield from _numbers({name: metrics[name] for name in (*kept, "baselines") if name in metrics})
    for title, names in _OTHERS.items():
        if metrics.get(title):
            yield from _numbers({title: {name: metrics[title][name] for name in names if name in metrics[title]}})
    control = metrics.get("control")
    if control:
        for title, table in {"exchanged": control, "noise": control.get("noise", {})}.items():
            yield from _numbers({f"control_{title}": {name: table[name] for name in (*kept, "difference")
                                                      if name in table}})
    if metrics.get("against"):
        yield from _numbers({"against": {family: metrics["against"][family] for family in kept}})


def _numbers(table: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, float(value)
