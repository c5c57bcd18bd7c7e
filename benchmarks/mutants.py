"""Breaks the package in forty places, one at a time, and checks that `make test` notices each.

    python benchmarks/mutants.py [--only PART OF A NAME] [--out results.json]

Each mutant replaces one text in one file of a copy of the package; the tests of the rooms that it names then run without
those marked `slow`, and one of them has to fail. A mutant whose text is no longer in its file is an error: write it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault to notice.

    Attributes:
      name: what is wrong, in words.
      file: the file, relative to the package.
      text: the text that is replaced; it occurs once.
      wrong: what replaces it.
      tests: the tests that should notice, relative to `tests/`.
    """

    name: str
    file: str
    text: str
    wrong: str
    tests: tuple[str, ...]


MUTANTS = [
    # models
    Mutant("RMSNorm leaves eps out", "models/layers.py", "jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)",
           "jnp.mean(x * x, axis=-1, keepdims=True))", ("parity/test_modules.py", "parity/test_parity.py")),
    Mutant("the scores are scaled by the wrong root", "models/attention/xla.py", "scores *= H**-0.5",
           "scores *= N**-0.5", ("parity/test_modules.py", "parity/test_parity.py")),
    Mutant("an image row takes the features of the image before", "models/llava.py",
           "index = jnp.cumsum(is_image, axis=1) - 1", "index = jnp.cumsum(is_image, axis=1)",
           ("parity/test_modules.py", "parity/test_parity.py")),
    Mutant("llama3's scaling forgets its middle band", "models/layers.py",
           "return np.where((lengths < f32(before / high)) | (lengths > f32(before / low)), slow, between)",
           "return slow", ("models/test_decoder_variants.py",)),
    Mutant("the lookup's gradient keeps one of several equal ids", "models/decoders/llama.py",
           ".at[ids].add(by_rows.astype(dtype), mode=\"drop\")", ".at[ids].set(by_rows.astype(dtype), mode=\"drop\")",
           ("training/test_training_step.py", "parity/test_training_torch.py")),
    # training
    Mutant("the last token of a sample predicts the next sample's first", "training/losses.py",
           "jnp.where((next_segments == segment_ids) & (segment_ids != 0), targets, IGNORE)",
           "jnp.where(segment_ids != 0, targets, IGNORE)", ("training/test_losses.py", "training/test_training_step.py")),
    Mutant("a row counts as one sample", "training/losses.py",
           "return jnp.sum(jnp.max(segment_ids, axis=1), dtype=jnp.float32)",
           "return jnp.sum(jnp.max(segment_ids, axis=1) > 0, dtype=jnp.float32)",
           ("training/test_losses.py", "training/test_training_step.py", "parity/test_training_torch.py")),
    Mutant("the gradient is not divided", "training/step.py", "g / jnp.maximum(divisor, 1.0)",
           "g / jnp.maximum(divisor, 1.0) ** 0",
           ("training/test_training_step.py", "parity/test_training_torch.py")),
    Mutant("an update that is not finite is applied to the moments", "training/step.py",
           "like_state(optimizer, opt_state, is_taken, is_finite)",
           "like_state(optimizer, opt_state, jax.tree.map(jnp.ones_like, is_taken), True)",
           ("training/test_training_step.py", "training/test_standing_still.py", "training/test_training_run.py")),
    Mutant("a number that overflows in the optimizer is written", "training/step.py", "is_finite & jnp.isfinite(x)",
           "is_finite", ("training/test_training_step.py",)),
    Mutant("Adam's correction is optax's", "training/optimizer.py", "u * factor.astype(u.dtype)", "u * 1",
           ("parity/test_training_torch.py", "training/test_training_step.py", "training/test_training_own.py")),
    Mutant("norms decay", "training/optimizer.py", "if not NOT_DECAYED.fullmatch(name) and name not in undecayed}",
           "if name not in undecayed}", ("training/test_training_step.py",)),
    Mutant("a resumed run forgets the updates that were skipped", "training/resume.py",
           "skipped=put(np.int32(progress.updates_skipped), everywhere)", "skipped=put(np.int32(0), everywhere)",
           ("training/test_training_resume.py", "training/test_training_run.py", "training/test_training_metrics.py")),
    Mutant("a workdir that was removed is made again", "training/place.py", "if not self.workdir.is_dir():",
           "if False:", ("training/test_training_place.py",)),
    # pipeline and data
    Mutant("the rows of an epoch are not shuffled anew", "pipeline/packing.py",
           "key = (self.stream.seed, epoch, 2**31,", "key = (self.stream.seed, 0, 2**31,",
           ("pipeline/test_packing.py", "pipeline/test_tokens_and_rows.py")),
    Mutant("an epoch's last rows are lost at its end", "pipeline/packing.py",
           "row += count\n        while row and", "row += count - 1\n        while row and", ("pipeline/test_packing.py", "pipeline/test_tokens_and_rows.py", "training/test_training_resume.py")),
    Mutant("a weight of a source is ignored", "datasets/training.py", "return tuple(round(weight * len(source))",
           "return tuple(len(source)", ("datasets", "pipeline", "training/test_training_data.py")),
    Mutant("a mixture may be empty", "datasets/training.py", "if not round(weight * len(part)):", "if False:",
           ("datasets", "training/test_training_data.py", "pipeline")),
    # text
    Mutant("the answer's first token is not supervised", "text/conversation.py",
           "yield slice(cursor, cursor + measure(parts[0] + before_answer) - 2 - shift)",
           "yield slice(cursor, cursor + measure(parts[0] + before_answer) - 1 - shift)", ("text", "parity")),
    Mutant("v0 supervises the question", "text/conversation.py", "yield slice(cursor + 2, cursor + length)",
           "yield slice(cursor + length, cursor + length)", ("text",)),
    Mutant("an image of P tokens becomes P + 1", "text/image_positions.py",
           "length = run if run % patches == 0 else run * patches",
           "length = run + 1 if run % patches == 0 else run * patches", ("text", "pipeline", "test_processor.py")),
    # images
    Mutant("padding is not centred", "images/load.py",
           "square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))", "square.paste(image, (0, 0))",
           ("images",)),
    Mutant("the crop is off by one", "images/load.py",
           "left, top = (image.width - size) // 2, (image.height - size) // 2",
           "left, top = (image.width - size + 1) // 2, (image.height - size) // 2",
           ("images", "checkpoints/test_preprocessor_file.py")),
    Mutant("a pipe is opened as an image", "images/load.py", "if stat.S_ISREG(os.fstat(file.fileno()).st_mode):",
           "if True:", ("images",)),
    # checkpoints
    Mutant("a flipped bit of the frozen weights is not noticed", "checkpoints/tree/base.py",
           "if _sha256(array) != sha256:", "if False:", ("checkpoints/test_store.py", "training/test_training_resume.py", "training/test_training_run.py")),
    Mutant("the newest step is taken without its manifest", "checkpoints/tree/store.py",
           "if (damage := _damage(directory, part)) is None:", "if (damage := None) is None:",
           ("checkpoints/test_store.py", "training/test_training_resume.py", "training/test_training_run.py")),
    Mutant("steps that are read are deleted", "checkpoints/tree/store.py",
           "kept = {*newest_ones, *also, self._step}", "kept = {*newest_ones, self._step}",
           ("checkpoints/test_store.py", "checkpoints/test_holding.py", "training/test_training_run.py")),
    Mutant("a delta of another base is taken", "checkpoints/assemble/delta.py",
           "if ours[name].shape[kept] != theirs[name].shape[kept] or ours[name].shape[0] > theirs[name].shape[0]:",
           "if False:", ("checkpoints/test_delta.py",)),
    Mutant("two files may hold one tensor", "checkpoints/torch/files.py", "twice = [name for name in found if name in tensors]",
           "twice = []", ("checkpoints/test_layouts.py", "checkpoints/test_bad_checkpoints.py")),
    # generation
    Mutant("top-p keeps one token too few", "generation/sampling.py",
           "(jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) <= tail)",
           "(jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) < tail + 0.02)", ("generation/test_sampling.py",)),
    Mutant("equal prompts draw equal tokens", "generation/sampling.py", "seen[prompt] += 1", "seen[prompt] += 0",
           ("generation/test_sampling.py", "generation/test_generation.py")),
    Mutant("ties at top-k are dropped", "generation/sampling.py", "(ranked >= worst_kept)",
           "(jnp.arange(V) >= V - top_k)", ("generation/test_sampling.py",)),
    # evaluation
    Mutant("an empty gold is answered by nothing", "evaluation/scoring/reader.py",
           "comparable(gold, other) != \"\" for one", "comparable(gold, other) for one",
           ("evaluation/test_reader.py", "evaluation/test_metrics.py")),
    Mutant("yes and no together are yes", "evaluation/scoring/polarity.py",
           "return None if _ANSWERS[other].search(rest) or", "return None if", ("evaluation/test_reader.py",)),
    Mutant("the images' contents are not in the key", "evaluation/answering/asked.py",
           "short_hash(hashes[files[image]], asked[image])", "short_hash(asked[image])",
           ("evaluation/test_asked.py", "evaluation/test_evaluation_settings.py")),
    Mutant("p is one-sided", "evaluation/scoring/statistics.py",
           "differences = np.abs(percent(totals[0] + change) - percent(totals[1] - change))",
           "differences = percent(totals[0] + change) - percent(totals[1] - change)",
           ("evaluation/test_statistics.py",)),
    Mutant("an interval of 90 %", "evaluation/scoring/statistics.py", "[2.5, 97.5]", "[5, 95]",
           ("evaluation/test_statistics.py",)),
    # openai_client, parallel, preflight, utils
    Mutant("a reply without text is an empty answer", "openai_client/replies.py",
           'raise PassingError("no text", f"its reply has no text (finish_reason {finish})", **billed)', 'text = ""',
           ("openai_client", "evaluation/test_endpoint.py")),
    Mutant("one mesh axis may divide two dimensions", "parallel/mesh.py", "if len(set(used)) != len(used):",
           "if False:", ("parallel",)),
    Mutant("a loop of a program counts once", "preflight/hlo.py",
           "times[called] += times[name] * rounds", "times[called] += times[name]", ("preflight",)),
    Mutant("a file is written under its own name", "utils/files.py",
           'temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")', "temporary = path",
           ("utils", "cli/test_named_files.py")),
]


def notices(mutant: Mutant, copy: Path) -> tuple[str, float]:
    """Returns the test that fails with the mutant, "" if none does, and the seconds that it took."""
    file = copy / "llavamed_jax" / mutant.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(mutant.text) != 1:
        raise SystemExit(f"error: {mutant.file} has the text {mutant.text!r} {whole.count(mutant.text)} times; once was "
                         f"expected ({mutant.name})")
    start = time.monotonic()
    try:
        file.write_text(whole.replace(mutant.text, mutant.wrong), encoding="utf-8")
        for tests in mutant.tests:
            run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider",
                                  f"tests/{tests}"], cwd=copy, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
                                 env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"})
            failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if run.returncode == 1 and failed:
                return failed[0].split(" - ")[0], time.monotonic() - start
            if run.returncode not in (0, 5):
                return f"pytest ended with {run.returncode}: {run.stdout[-200:]}", time.monotonic() - start
    finally:
        file.write_text(whole, encoding="utf-8")
    return "", time.monotonic() - start


def main() -> int:
    """Runs the mutants; returns 1 if one of them was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the mutants whose name or file has this text")
    parser.add_argument("--part", default="0/1", help="run the mutants K, K+N, K+2N, … of the table, for K/N")
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    first, step = map(int, args.part.split("/"))
    chosen = [mutant for mutant in MUTANTS if args.only in f"{mutant.name} {mutant.file}"][first::step]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache"))
        for mutant in chosen:
            test, seconds = notices(mutant, copy)
            results[mutant.name] = {"file": mutant.file, "noticed_by": test, "seconds": round(seconds, 1)}
            if args.out:
                Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{'noticed' if test else 'SURVIVED':9} {seconds:6.1f} s  {mutant.file}: {mutant.name}: {test}", flush=True)
    survived = [name for name, result in results.items() if not result["noticed_by"]]
    print(f"{len(results) - len(survived)} of {len(results)} mutants were noticed", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
