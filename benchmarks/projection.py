"""Hours of the curriculum at its floors: `python benchmarks/projection.py [--compile]`.

The floor of an update (docs/preflight.md) times the updates of each stage. Floors are read from OUT; with --compile those
that it lacks are compiled (minutes each on two cores; extra `[preflight]`). No hour was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_table import measure  # noqa: E402
from llavamed_jax.utils.paths import local  # noqa: E402

MACHINES = ("h100-8", "h200-8", "a100-40g-8", "v5p-16")
MODELS = {"v15,7b": "v1.5, 7B", "v1,13b": "v1.0, 13B"}
# Stage: recipe, samples, epochs. The VQA recipes differ in their data only, so they have one program.
STAGES = {
    "stage 1: 500,000 captions, 1 epoch": ("pretrain", 500_000, 1),
    "stage 2: 60,000 conversations, 3 epochs": ("finetune", 60_000, 3),
    "VQA-RAD: 1,797 questions, 3 epochs": ("vqa_rad", 1_797, 3),
    "SLAKE: 4,919 questions, 3 epochs": ("vqa_rad", 4_919, 3),
    "PathVQA: 19,654 questions, 3 epochs": ("vqa_rad", 19_654, 3),
}
REACHED = 0.7  # the share of the ceiling that well-tuned runs reach; a guess
PAPER = 15  # hours of stages 1 and 2 on eight A100 of 40 GB (LLaVA-Med's paper)


def case_of(recipe: str, model: str) -> str:
    """The name of the file of a recipe's floors."""
    return f"{recipe}_{model.replace(',', '_')}_auto"


def hours(row: dict | None, samples: int, epochs: int) -> float | None:
    """Hours of a stage at the floor of its update; None without a floor, or where the update does not fit."""
    if row is None or not row.get("floor") or not row["fits"]:
        return None
    return samples * epochs / row["samples_per_step"] * row["floor"]["milliseconds"] / 3.6e6


def table(rows: dict[str, dict[str, dict]], model: str) -> str:
    """Markdown: a line a stage, a cell a machine: hours at the floor, and the ceiling of the update.

    Args:
      rows: preflight's rows by the name of a case and of a machine.
      model: a key of `MODELS`.
    """
    lines = [f"| {MODELS[model]} | " + " | ".join(f"`{name}`" for name in MACHINES) + " |", "|---" * (len(MACHINES) + 1) + "|"]
    sums: dict[str, float | None] = dict.fromkeys(MACHINES, 0.0)
    for stage, (recipe, samples, epochs) in STAGES.items():
        cells = []
        for name in MACHINES:
            row = rows[case_of(recipe, model)].get(name)
            found = hours(row, samples, epochs)
            sums[name] = None if found is None or sums[name] is None else sums[name] + found
            cells.append("–" if found is None else f"{found:.2f} ({100 * row['floor']['mfu_ceiling']:.0f} %)")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    for words, share in (("sum, at the floors", 1), (f"sum, at {REACHED:.0%} of the ceilings (a guess)", REACHED)):
        cells = ["–" if found is None else f"{found / share:.1f}" for found in sums.values()]
        lines.append(f"| **{words}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=ROOT / "benchmarks/results/preflight", type=local, metavar="DIR")
    parser.add_argument("--compile", action="store_true", help="compiles the floors that OUT lacks")
    args = parser.parse_args()
    rows: dict[str, dict[str, dict]] = {}
    for model in MODELS:
        for recipe in dict.fromkeys(recipe for recipe, *_ in STAGES.values()):
            command, case = ["train.py", "--config", f"configs/{recipe}.py:{model}"], case_of(recipe, model)
            path = args.out / f"{case}.json"
            found = measure(command, list(MACHINES) if args.compile else [], path)
            rows[case] = {row["topology"]: row for row in found}
            if lacking := [name for name in MACHINES if name not in rows[case]]:
                print(f"{path.name} lacks {', '.join(lacking)}; --compile compiles them", file=sys.stderr)
    for model in MODELS:
        print(table(rows, model), end="\n\n")
    print(f"The paper: {PAPER} hours for stages 1 and 2, on eight A100 of 40 GB.")


if __name__ == "__main__":
    main()
