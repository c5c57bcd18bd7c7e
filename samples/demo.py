"""The whole way on the sample: train through the curriculum, evaluate on images no stage has seen, ask about one.

    python samples/demo.py [--out runs/demo] [--seed 0]

Each step is the command that a user would type, and is printed before it runs. Started again, a finished stage is not
trained again. Exits 1 if the answers do not follow the image: then something between the two is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "vqa_rad"
STAGES = {
    "warmup": "Warm-up: no pretrained tower or decoder can be fetched offline, so both are first trained on the sample itself.\n"
    "A real run starts from CLIP and Mistral instead and has no such stage.",
    "align": "Stage 1, concept alignment: the projector alone learns captions (derived from the data's own fields).",
    "instruct": "Stage 2, instruction tuning: projector and decoder learn conversations about an image.",
    "vqa": "Fine-tuning on VQA-RAD's questions: projector and decoder.",
}
LEAST_RIGHT = 9  # of the fifteen held-out images; their organ is guessed right for five
MOST_EXCHANGED = 45.0  # percent; a perfect reader of the images gets 4/14, one that ignores them a third


def command(*words: str | Path) -> None:
    """Runs one of the project's commands from its root, and ends with its exit status if it fails."""
    words = [str(word) for word in words]
    print(f"$ python {' '.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def train(out: Path, seed: int) -> Path:
    """The stages, each from the checkpoint of the one before; returns the last one's workdir."""
    before = None
    for stage, what in STAGES.items():
        print(f"\n== {what}", flush=True)
        init = [f"--config.init={before}"] if before else []
        command("train.py", "--config", f"configs/demo.py:{stage}", "--workdir", out / stage, f"--config.seed={seed}", *init)
        before = out / stage
    return before


def chat(checkpoint: Path) -> None:
    """One question about a held-out image, through the Python API."""
    import llavamed_jax as lm
    from llavamed_jax.evaluation.scoring.controls import ORGAN_QUESTION

    name = json.loads((SAMPLE / "held_out.json").read_text(encoding="utf-8"))["images"][0]
    image = {"type": "image", "image": str(SAMPLE / "images" / name)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": ORGAN_QUESTION}]}]
    print(f"\n== Chat about {name}, which no stage has seen\nuser:      {ORGAN_QUESTION}\nassistant: ", end="")
    for piece in lm.load(str(checkpoint)).stream(messages, max_new_tokens=32):
        print(piece, end="", flush=True)
    print()


def main() -> int:
    from llavamed_jax.utils.paths import local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local, default=Path("runs/demo"), help="where everything goes (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    out, start = flags.out.resolve(), time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"

    checkpoint = train(out, flags.seed)
    print("\n== Evaluation on the fifteen images that no stage has seen, and again with images exchanged", flush=True)
    evaluation = out / "eval"
    command("eval.py", "--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", checkpoint,
            "--workdir", evaluation, "--control", "image")
    organ = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))["organ"]
    chat(checkpoint)

    print(f"\n== The organ named for {organ['n']} held-out images")
    print(f"with the image          {organ['hits']} of {organ['n']} ({organ['accuracy']:.0f} %)")
    print(f"with images exchanged   {organ['exchanged']:.0f} % (mean over all {len(organ['shifts'])} cyclic shifts)")
    print(f"majority                {organ['majority']:.0f} %")
    print(f"\nTook {(time.monotonic() - start) / 60:.1f} minutes. For research only, never for clinical decisions.")
    print("TensorBoard itself: pip install tensorboard, then tensorboard --logdir and the folder below.")
    print(f"report       {evaluation / 'report.html'}")
    print(f"TensorBoard  {checkpoint / 'tensorboard'}")
    print(f"checkpoint   {checkpoint}")
    if organ["hits"] < LEAST_RIGHT or organ["exchanged"] > MOST_EXCHANGED:
        print(f"error: at least {LEAST_RIGHT} right with the image and at most {MOST_EXCHANGED:.0f} % with images exchanged "
              "were expected: the answers do not follow the image", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from llavamed_jax.utils import terminal

    with terminal.cleaned():
        status = main()
    sys.exit(status)
