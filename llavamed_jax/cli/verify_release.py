"""`make verify-release`: fetches a released checkpoint, checks and runs it, and writes what came out."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli.common import Parser, command, load_config
from llavamed_jax.errors import UsageError
from llavamed_jax.utils import progress
from llavamed_jax.utils.files import write_text

RELEASE = "microsoft/llava-med-v1.5-mistral-7b"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `make verify-release` and returns its exit status."""
    return command(lambda: _program, argv)


def _program(argv: list[str]) -> None:
    parser = Parser(prog="make verify-release", description=__doc__)
    parser.add_argument("--model", default=RELEASE, metavar="PATH",
                        help=f"owner/name[@revision] or a directory; default: {RELEASE}")
    parser.add_argument("--steps", default="", metavar="A,B",
                        help="steps among fetch,tensors,tower,answers,vqa_rad; default: all")
    parser.add_argument("--vqa_rad", default="", metavar="DIR",
                        help="VQA-RAD in its official layout, for the step vqa_rad")
    parser.add_argument("--images", default="samples/vqa_rad/images", metavar="DIR",
                        help="directory of the images of the fixed questions")
    parser.add_argument("--stock_tower", metavar="PATH",
                        help="the CLIP tower to compare with; default: the one that the config names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16 on an accelerator, float32 on a CPU")
    parser.add_argument("--workdir", default="runs/verify-release", metavar="DIR",
                        help="directory for predictions, metrics and report of VQA-RAD")
    parser.add_argument("--out", default="docs/verification.md", metavar="FILE", help="the file with the results")
    parser.add_argument("--config", default="configs/eval/vqa_rad.py", metavar="FILE.py",
                        help="the eval recipe for VQA-RAD")
    args, overrides = parser.parse_with_overrides(argv)
    if args.vqa_rad and not Path(args.vqa_rad).exists():
        raise UsageError(f"--vqa_rad is {args.vqa_rad!r}, which does not exist; the folder of VQA-RAD was expected")
    cfg = load_config(args.config, [*([f"data.root={args.vqa_rad}"] if args.vqa_rad else []), *overrides])

    from llavamed_jax.verification import release as verification  # imports jax
    steps = [word for word in args.steps.split(",") if word]
    if not steps:
        steps = list(verification.STEPS)
        if not cfg.data.root:
            print("warning: the step vqa_rad is left out; it needs --vqa_rad DIR (VQA_RAD=DIR for make)",
                  file=sys.stderr)
            steps.remove("vqa_rad")
    unknown = [step for step in steps if step not in verification.STEPS]
    if unknown:
        raise UsageError(f"the step {unknown[0]!r} does not exist; one of {', '.join(verification.STEPS)} was expected")
    if "vqa_rad" in steps and not cfg.data.root:
        raise UsageError("the step vqa_rad needs --vqa_rad DIR (VQA_RAD=DIR for make), the data set in its official "
                         "layout")
    release = verification.Release(args.model, Path(args.images), Path(args.workdir), cfg, args.stock_tower, args.dtype,
                                   progress.bar)
    if "fetch" in steps:
        verification.check_disk(release)
    done: dict[str, list[str]] = {}
    for step in (name for name in verification.STEPS if name in steps):
        title, action = verification.STEPS[step]
        print(f"\n{title}", flush=True)
        done[step] = action(release)
        print("\n".join(done[step]), flush=True)
        # Written after every step, so that the results stay if a later step fails.
        _write(Path(args.out), verification.document(release, done, _facts()))
    print(f"\nwritten to {args.out}")


def _facts() -> dict[str, object]:
    from importlib.metadata import version

    import jax
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": ", ".join([f"Python {platform.python_version()}",
                                   *(f"{p} {version(p)}" for p in ("jax", "flax", "transformers"))])}


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


if __name__ == "__main__":
    sys.exit(main())
