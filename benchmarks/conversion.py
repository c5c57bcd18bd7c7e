"""Converting a checkpoint of full size, both ways: `python benchmarks/conversion.py --directory DIR [--out DIR] [--preset NAME]`.

A random checkpoint of the true shapes in bfloat16 and the original's layout is written into a new directory inside DIR, imported
and exported by the command line, and removed again. A row each has the time, that of `cp -r` of the same bytes on the same disk
right before, and the highest anonymous memory of the process (RssAnon: mapped pages do not count). Processor seconds stand
beside the times, because on a machine that others use these alone are the program's own. At the end every tensor of each export is
compared with the original's by its SHA-256. About three times the checkpoint is on the disk at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np

from benchmarks.measure import ROOT, append_row, circumstances
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import read_file
from llavamed_jax.checkpoints.torch.write import total_bytes, write_safetensors
from llavamed_jax.config import PRESETS, LlavaConfig, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import write_json
from llavamed_jax.utils.paths import local

BLOCK = 32 * 2**20 + 3  # values that are drawn; odd, so that no row of a matrix falls on itself
SAMPLE_SECONDS = 0.01
ROOM = 3.2  # the original, the tree, and either an export or the copy, over the size of one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=local, required=True, help="where the files are written and removed again")
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results", help="directory of conversion.jsonl, to which rows are appended")
    parser.add_argument("--preset", choices=PRESETS, default="v15-7b")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="conversion.", dir=args.directory) as directory:
            measure(args.preset, Path(directory), args.out / "conversion.jsonl")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(name: str, directory: Path, rows: Path) -> None:
    """Writes the checkpoint, converts it both ways, compares, and appends a row for each conversion."""
    cfg = preset(name)
    original, tree = directory / "original", directory / "tree"
    size = write_random(cfg, original)
    wanted = dict(hashes(original, cfg, "llava"))
    common = dict(checkpoint=f"preset:{name}, random, bfloat16", tensors=len(wanted), parameters=size // 2, bytes=size)
    imported = convert(original, tree, "import")
    append_row(rows, {"case": "import", **common, **imported, **circumstances()})
    for layout in [layout for layout in ("transformers", "llava") if layout == "llava" or cfg.projector_type == "mlp2x_gelu"]:
        exported = convert(tree, directory / layout, "export", "--layout", layout)
        found = dict(hashes(directory / layout, cfg, layout))
        differing = [tensor for tensor, digest in wanted.items() if found.pop(tensor, None) != digest]
        differing += found  # what the original has not
        if differing:
            raise UserError(f"{len(differing)} tensors of the {layout} export are not the original's: {differing[:3]}")
        append_row(rows, {"case": f"export {layout}", **common, **exported, "equal_tensors": len(wanted), **circumstances()})
        shutil.rmtree(directory / layout)


def write_random(cfg: LlavaConfig, out: Path) -> int:
    """A checkpoint in the original's layout: every tensor another stretch of one block of random values, those of
    norms around 1. Returns its bytes."""
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32).astype(ml_dtypes.bfloat16)
    block *= ml_dtypes.bfloat16(0.02)

    def tensor(name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        def load():
            count = int(np.prod(shape))
            turned = np.roll(block, -7919 * index) if count > BLOCK else block[7919 * index % (BLOCK // 2):]
            array = np.resize(turned[:count], shape)
            return array + ml_dtypes.bfloat16(1) if name.endswith("/scale") else array
        return Tensor(shape, block.dtype, load)

    specs = names.specs(cfg)
    tensors = {spelled[0]: tensor(name, i, names.torch_shape(name, specs[name].shape))
               for i, (name, spelled) in enumerate(names.torch_names(cfg, "llava").items())}
    size, free = total_bytes(tensors), shutil.disk_usage(out.parent).free
    if free < ROOM * size:
        raise UserError(f"{out.parent} has {free / 1e9:.1f} GB free; the files need {ROOM * size / 1e9:.1f} GB")
    out.mkdir()
    write_safetensors(out, tensors, metadata={"format": "pt"})
    write_json(out / "config.json", {**llava_to_hf(cfg, "llava"), "torch_dtype": "bfloat16"})
    return size


def convert(source: Path, out: Path, *command: str) -> dict:
    """Copies `source`, then converts it into `out`; seconds of both, and what the conversion held in memory."""
    copy, load = out.with_name("copy"), os.getloadavg()[0]  # what else ran on these processors
    forget(source)
    copied, copy_processor = seconds(lambda: subprocess.run(["cp", "-r", source, copy], check=True))
    shutil.rmtree(copy)
    forget(source)
    peak = 0

    def run():
        nonlocal peak
        with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would fill up
            process = subprocess.Popen([sys.executable, "-m", "convert", *command, "--checkpoint", source, "--out", out], cwd=ROOT,
                                       stdout=said, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(SAMPLE_SECONDS)
            if process.returncode:
                said.seek(0)
                raise UserError(f"convert {' '.join(command)} failed: {said.read().decode(errors='replace').strip()}")
    taken, processor = seconds(run)
    return dict(seconds=round(taken, 2), copy_seconds=round(copied, 2), ratio=round(taken / copied, 3),
                processor_seconds=round(processor, 2), copy_processor_seconds=round(copy_processor, 2), peak_rss_anon_bytes=peak,
                processors=os.cpu_count(), load_average=round(load, 1))


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """How long an action takes until its bytes are on the disk, and the processor seconds of the programs that it ran."""
    os.sync()
    start, before = time.perf_counter(), os.times()
    action()
    os.sync()
    after = os.times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, children


def forget(directory: Path) -> None:
    """Asks the kernel to drop the files' pages, so that each reader begins at the disk."""
    os.sync()
    for file in directory.rglob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def hashes(directory: Path, cfg: LlavaConfig, layout: str) -> Iterator[tuple[str, str]]:
    """Canonical name and SHA-256 of each tensor of an export, without the rows that the layout adds to the vocabulary."""
    canonical = {spelled[0]: name for name, spelled in names.torch_names(cfg, layout).items()}
    specs = names.specs(cfg)
    for file in sorted(directory.rglob("*.safetensors")):
        for key, tensor in read_file(file).items():
            name = canonical.get(key) or canonical["model.vision_tower.vision_tower." + key]  # of a tower in its own directory
            array = tensor.load()[:names.torch_shape(name, specs[name].shape)[0]]
            yield name, hashlib.sha256(f"{array.dtype.name} {array.shape}".encode() + array.tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
