"""How an export is written: files that any safetensors reads, a few tensors in memory, and nothing that looks whole when it is not."""

import json
import os
import random
import select
import signal
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch import write
from llavamed_jax.checkpoints.torch.write import write_safetensors
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli import convert_program
from llavamed_jax.cli.convert import main
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.utils import directories
from tests.support import forks

CFG = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14), DecoderConfig(70, 48, 96, 2, 4, 2, 12, 1e-5, 1e4, 512, architecture="mistral"))

# --- streams -------------------------------------------------------------------------------------------------------------------------


def test_a_file_is_what_the_library_would_write(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [((3, 5), np.float16), ((7,), np.float64), ((2, 3, 4), np.float32), ((0, 4), np.float32), ((), np.float32),
             ((5,), ml_dtypes.bfloat16)]
    arrays = {f"t{i}": np.asarray(rng.standard_normal(shape)).astype(dtype) for i, (shape, dtype) in enumerate(kinds)}
    write_safetensors(tmp_path, {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}, metadata={"format": "pt"})
    save_file(arrays, tmp_path / "library.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").rename(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", "np") as ours, safe_open(tmp_path / "library.safetensors", "np") as library:
        assert sorted(ours.keys()) == sorted(library.keys()) and ours.metadata() == library.metadata()
        for name, array in arrays.items():
            assert ours.get_tensor(name).dtype == array.dtype and ours.get_tensor(name).shape == array.shape
            assert ours.get_tensor(name).tobytes() == array.tobytes()
    raw = (tmp_path / "ours.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for entry in json.loads(raw[8:8 + length]).values():
        if "dtype" in entry:
            width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
            assert (8 + length + entry["data_offsets"][0]) % width == 0  # else a reader must copy


def test_a_view_is_written_as_it_reads(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path, {"t": Tensor((4, 3), array.dtype, lambda: array.T)})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["t"], array.T)


def test_few_tensors_are_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 4000)
    alive, most = set(), []

    def load():
        array = np.ones(300, np.float32)
        key = id(array)
        alive.add(key)
        weakref.finalize(array, alive.discard, key)
        most.append(len(alive))
        return array
    write_safetensors(tmp_path, {f"t{i}": Tensor((300,), np.dtype(np.float32), load) for i in range(50)})
    assert len(most) == 50 and max(most) <= 3  # written, read, and being read


# --- interruptions -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "original"
    export(random_checkpoint(CFG), path, "llava")
    return path


def begin(source, out, command):
    """A conversion that takes two seconds, in a process of its own, when it has begun."""
    reader, writer = os.pipe()

    def slowly(names):
        os.write(writer, b".")
        for name in names:
            time.sleep(0.02)
            yield name

    def run():
        convert_program.progress.over, write.SHARD_BYTES = slowly, 40_000
        words = ["import"] if command == "import" else ["export", "--layout", command]
        return main([*words, "--checkpoint", str(source), "--out", str(out)])
    begun = forks.Command(run)
    os.close(writer)
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b"."
    os.close(reader)
    return begun


@pytest.mark.parametrize("command", ["import", "transformers"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(command, source, tmp_path):
    rng, out = random.Random(command), tmp_path / "out"
    for _ in range(2 if command == "transformers" else 1):
        process = begin(source, out, command).process
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert not out.exists()
        (left,) = tmp_path.iterdir()  # hidden, and of a name that says what it is
        assert left.name.startswith(".out.") and left.name.endswith(".partial")
        for path in (left, left / "checkpoint"):
            with pytest.raises(UserError):
                open_checkpoint(path)
    checkpoint = open_checkpoint(source)
    if command == "import":
        with directories.new_directory(out) as directory:
            write_model(directory, checkpoint)
    else:
        export(checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # what was left is gone
    assert open_checkpoint(out).config.decoder == checkpoint.config.decoder


def test_an_interrupted_conversion_cleans_up(source, tmp_path):
    command = begin(source, tmp_path / "out", "transformers")
    time.sleep(0.1)
    os.kill(command.process.pid, signal.SIGINT)
    status, error = command.finish()
    assert (status, error.strip()) == (1, "error: interrupted before anything was written")
    assert not list(tmp_path.iterdir())


def test_a_conversion_under_way_is_left_alone(tmp_path):
    with directories.new_directory(tmp_path / "out") as first:
        (first / "file").write_text("in work")
        with directories.new_directory(tmp_path / "out") as second:
            assert first != second and (first / "file").exists()
        assert (tmp_path / "out").is_dir() and (first / "file").read_text() == "in work"
