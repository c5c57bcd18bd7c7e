"""The scalars of an evaluation for TensorBoard, so that evaluations of a run's steps stand in one curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_SUFFIX = ".eval"  # a training run's events may lie in the same folder; ours alone are replaced


def step_of(checkpoint: str) -> int:
    """The step that a checkpoint's path names (`RUN/checkpoints/STEP`, `checkpoint-STEP`); 0 where it names none."""
    match = re.search(r"(?:^|/)(?:checkpoints/|checkpoint-)(\d+)/?$", checkpoint)
    return int(match[1]) if match else 0


def write(workdir: Path, metrics: Mapping, step: int) -> None:
    """Writes the metrics' numbers into `WORKDIR/tensorboard`, in the place of those that an earlier start wrote."""
    from tensorboardX import SummaryWriter

    folder = workdir / "tensorboard"
    for earlier in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        for name, value in scalars(metrics):
            writer.add_scalar(f"eval/{metrics['dataset']}_{metrics['split']}/{name}", value, step)


def scalars(metrics: Mapping) -> Iterator[tuple[str, float]]:
    """Name and value of each number: the families with their intervals, baselines, controls, and what was compared."""
    families = [family for family in ("strict", "paper", "captions") if family in metrics]
    yield from _numbers({family: metrics[family] for family in families} | {"baselines": metrics["baselines"]})
    control = metrics.get("control")
    if control:
        for name, table in {"exchanged": control, "noise": control.get("noise", {})}.items():
            kept = (*families, "difference")
            yield from _numbers({f"control_{name}": {key: table[key] for key in kept if key in table}})
    if metrics.get("against"):
        yield from _numbers({"against": {family: metrics["against"][family] for family in families}})


def _numbers(table: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, float(value)
