"""`.bin` files: the same tensors as in safetensors, mapped and not read, and no pickle that does anything else."""

import json
import os
import sys

import ml_dtypes
import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.errors import UserError
from tests.support import tiny
from tests.support.tiny import v1_tensors


def torch_module():
    return pytest.importorskip("torch", reason="torch's CPU build is not installed")


def save_bins(directory, config, tensors, index=True, shards=2):
    """As transformers 4.x saved: pytorch_model-0000i-of-0000N.bin with an index, or one pytorch_model.bin."""
    torch = torch_module()
    tiny.save(directory, config)

    def as_torch(array):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == ml_dtypes.bfloat16 else torch.from_numpy(array)
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[i::shards]
        torch.save({name: as_torch(tensors[name]) for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def same(one, other):
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert one.read(name).tobytes() == other.read(name).tobytes(), name


@pytest.fixture
def v1(tmp_path):
    return tiny.save_v1(tmp_path)


@pytest.mark.parametrize("shards, index", [(1, False), (3, True), (2, False)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_bin_files_hold_the_same(dtype, shards, index, tmp_path):
    tiny.save_clip(tmp_path / "tiny-tower")
    config, tensors = {**tiny.V1, "vocab_size": 73}, v1_tensors(dtype=dtype)
    directory = save_bins(tmp_path / "bin", config, tensors | tiny.buffers(tiny.LLAMA), index, shards)
    (directory / "training_args.bin").write_bytes(b"a pickle of other things, which nobody opens")
    found = open_checkpoint(directory)
    same(found, open_checkpoint(tiny.save(tmp_path / "st", config, tensors)))
    assert found.tensors["decoder/norm/scale"].dtype == dtype


def test_a_tower_in_a_bin_file(v1, tmp_path):
    """As openai/clip-vit-large-patch14-336 has it, with the buffer of positions that old versions saved."""
    torch = torch_module()
    tensors = tiny.drawn(tiny.clip_shapes(), 1)
    tiny.save(tmp_path / "other", {"model_type": "clip", "vision_config": tiny.CLIP})
    rest = {"vision_model.embeddings.position_ids": torch.arange(5)[None], "logit_scale": torch.ones(())}
    torch.save({name: torch.from_numpy(t) for name, t in tensors.items()} | rest, tmp_path / "other" / "pytorch_model.bin")
    same(open_checkpoint(v1, tmp_path / "other"), open_checkpoint(v1))


def test_safetensors_go_before_pickles(v1):
    (v1 / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(v1).layout == "llava"


def test_bin_files_are_mapped_and_not_read(tmp_path, monkeypatch):
    """Opening touches no tensor, and a tensor is read by itself: numpy looks at the mapped file."""
    torch = torch_module()
    tiny.save_clip(tmp_path / "tiny-tower")
    directory = save_bins(tmp_path / "bin", {**tiny.V1, "vocab_size": 73}, v1_tensors(), False, 1)
    given, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: given.append(k) or load(*a, **k))
    checkpoint = open_checkpoint(directory)
    assert given == [dict(map_location="cpu", weights_only=True, mmap=True)]
    table = checkpoint.read("decoder/embed_tokens/embedding")
    maps = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith("pytorch_model.bin")] if os.path.exists(
        "/proc/self/maps") else []
    address = table.__array_interface__["data"][0]
    assert not maps or any(int(low, 16) <= address < int(high, 16) for low, high in (entry[0].split("-") for entry in maps))


def test_without_torch_bin_files_name_the_extra(tmp_path, monkeypatch):
    tiny.save(tmp_path / "bin", {**tiny.V1, "mm_vision_tower": "openai/clip-vit-large-patch14"})
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model.bin needs torch, which is not installed: pip install 'llavamed-jax\[torch\]'"):
        open_checkpoint(tmp_path / "bin")


class Harm:
    """A pickle of this runs a command when it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def harmful(directory, _):
    torch = torch_module()
    torch.save({"model.norm.weight": Harm(directory / "harm")}, directory / "pytorch_model-00001-of-00002.bin")


def cut(directory, _):
    file = directory / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-200])


def test_stray_files_are_not_read(tmp_path):
    """As in transformers: the file of the standard name, then its index, then the same of pickles; others only without these."""
    import shutil

    from safetensors.numpy import save_file

    from llavamed_jax.checkpoints.torch.files import has_weights, read_weights, weight_files
    torch = torch_module()
    tensor = lambda value: {"x": np.full(2, value, np.float32)}
    everything = {"model.safetensors": 1, "model-00001-of-00001.safetensors": 2, "pytorch_model.bin": 3, "pytorch_model-00001-of-00001.bin": 4,
                  "model-00007-of-00007.safetensors": None, "consolidated.safetensors": 5, "other.bin.safetensors": 6}
    for name, value in everything.items():
        if name.endswith(".bin"):
            torch.save({"x": torch.full((2,), float(value))}, tmp_path / name)
        elif value:
            save_file(tensor(value), tmp_path / name)
    for whole, shard in (("model.safetensors", "model-00001-of-00001.safetensors"), ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin")):
        (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "consolidated.safetensors"}}))
    order = [("model.safetensors", 1, 0), ("model.safetensors.index.json", 2, 1), ("pytorch_model.bin", 3, 0),
             ("pytorch_model.bin.index.json", 4, 1), ("model-00001-of-00001.safetensors", 2, 0), ("consolidated.safetensors", 5, 1)]
    for name, value, has_index in order:
        assert read_weights(tmp_path)["x"].load().tolist() == [value, value], name
        assert name in [file.name for file in weight_files(tmp_path)] and len(weight_files(tmp_path)) == 1 + has_index
        (tmp_path / name).unlink()
    (tmp_path / "consolidated.safetensors.index.json").unlink()
    assert read_weights(tmp_path)["x"].load().tolist() == [6, 6], "a name that holds .bin and does not end with it"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert weight_files(tmp_path) == [] and not has_weights(tmp_path)


def lying(directory, index):
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in index["weight_map"].values() if shard != index["weight_map"]["model.norm.weight"])


def other_content(directory, _):
    torch = torch_module()
    torch.save({"step": 3}, directory / "pytorch_model-00001-of-00002.bin")


def sparse(directory, _):
    torch = torch_module()
    file = directory / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"model.norm.weight": torch.ones(48).to_sparse()}, file)


def numbered(directory, _):
    torch = torch_module()
    torch.save({1: torch.ones(2)}, directory / "pytorch_model-00001-of-00002.bin")


BAD_BINS = {
    "harmful": (harmful, r"00001-of-00002.bin was refused: its pickle calls \w+.system; only tensors were expected"),
    "cut": (cut, "00002-of-00002.bin is not a complete file of torch.save"),
    "empty": (lambda d, i: (d / "pytorch_model-00002-of-00002.bin").write_bytes(b""), "00002.bin is not a complete file of torch.save"),
    "missing shard": (lambda d, i: (d / "pytorch_model-00002-of-00002.bin").unlink(), "the shard .*-00002-of-00002.bin is missing"),
    "index that lies": (lying, "index.json names model.norm.weight in pytorch_model-0000.-of-00002.bin, which does not hold"),
    "index of nothing": (lambda d, i: i.pop("weight_map"), "index.json has no weight_map that names a file for each tensor"),
    "sparse": (sparse, "model.norm.weight in .* is a sparse tensor; a dense one was expected"),
    "numbers for names": (numbered, "holds something other than named tensors; a state dict was expected"),
    "other content": (other_content, "holds something other than named tensors; a state dict was expected"),
}


@pytest.mark.parametrize("case", BAD_BINS)
def test_bad_bin_files_are_one_sentence(case, tmp_path):
    damage, sentence = BAD_BINS[case]
    tiny.save_clip(tmp_path / "tiny-tower")
    directory = save_bins(tmp_path / "bin", {**tiny.V1, "vocab_size": 73}, v1_tensors())
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    damage(directory, index)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence) as error:
        open_checkpoint(directory)
    assert "\n" not in str(error.value) and not (directory / "harm").exists()


# Tensors that torch saves and whose values are not simply in the file; `x` is float32 [48] from 1 to 48.
ODD = {
    "a negative bit": (lambda torch, x: torch._neg_view(x), -1.0),
    "a negative bit of bfloat16": (lambda torch, x: torch._neg_view(x.bfloat16()), -1.0),
    "the imaginary part of a conjugate": (lambda torch, x: torch.complex(x, x).conj().imag, -1.0),
    "a parameter": (lambda torch, x: torch.nn.Parameter(x), 1.0),
    "every second of another": (lambda torch, x: torch.stack([x, 0 * x], 1)[:, 0], 1.0),
    "no values": (lambda torch, x: torch.empty(48, device="meta"), "is on the device meta, so its values are not in the file"),
    "quantised": (lambda torch, x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is of type torch.qint8, and quantised weights"),
    "complex": (lambda torch, x: torch.complex(x, x), "is of type torch.complex64; one of torch.float64, torch.float32"),
    "conjugated": (lambda torch, x: torch.complex(x, x).conj(), "is of type torch.complex64; one of"),
    "compressed rows": (lambda torch, x: x[None].to_sparse_csr(), "is a sparse tensor; a dense one was expected"),
    "nested": (lambda torch, x: torch.nested.nested_tensor([x[:8], x[8:]]), "is a nested tensor; a dense one was expected"),
    "bytes": (lambda torch, x: x.to(torch.int8), "is of type torch.int8; one of"),
    "eight bits": (lambda torch, x: x.to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn; one of"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_read_or_one_sentence(case, tmp_path):
    torch = torch_module()
    tiny.save_clip(tmp_path / "tiny-tower")
    config, tensors = {**tiny.V1, "vocab_size": 73}, v1_tensors(dtype=np.float32)
    directory = save_bins(tmp_path / "bin", config, tensors, index=False, shards=1)
    make, wanted = ODD[case]
    x = torch.arange(1.0, 49.0)
    state = torch.load(directory / "pytorch_model.bin")
    torch.save(state | {"model.norm.weight": make(torch, x)}, directory / "pytorch_model.bin")
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=f"model.norm.weight in .*pytorch_model.bin {wanted}") as error:
            open_checkpoint(directory)
        assert "\n" not in str(error.value)
    else:
        np.testing.assert_array_equal(open_checkpoint(directory).read("decoder/norm/scale").astype(np.float32), wanted * x.numpy())


def test_an_odd_buffer_is_nobodys_business(tmp_path):
    torch = torch_module()
    tiny.save_clip(tmp_path / "tiny-tower")
    directory = save_bins(tmp_path / "bin", {**tiny.V1, "vocab_size": 73}, v1_tensors(), index=False, shards=1)
    state = torch.load(directory / "pytorch_model.bin")
    torch.save(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.empty(6, device="meta")}, directory / "pytorch_model.bin")
    assert "decoder/norm/scale" in open_checkpoint(directory).tensors


def test_damaged_bytes_are_one_sentence(tmp_path):
    """Whatever torch raises of them."""
    tiny.save_clip(tmp_path / "tiny-tower")
    directory = save_bins(tmp_path / "bin", {**tiny.V1, "vocab_size": 73}, v1_tensors(), index=False, shards=1)
    file, rng = directory / "pytorch_model.bin", np.random.default_rng(0)
    whole, refused = file.read_bytes(), 0
    start, end = whole.index(b"model.embed_tokens"), whole.index(b"model.embed_tokens") + 6000  # of the pickle
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(start, end, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(directory)
            for name in checkpoint.tensors:
                checkpoint.read(name)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
