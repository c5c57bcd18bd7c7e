"""Models by name, from a hub on loopback: only what is needed is fetched, the licence is said, and no hub is one sentence.

The environment decides where the hub is when huggingface_hub is imported: one test starts processes, the others replace what it read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import file_download
from safetensors.numpy import save_file

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.torch import write
from llavamed_jax.cli.convert import main
from llavamed_jax.processor import Processor
from tests.support import local_hub, tiny
from tests.support.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5")


def save_adapter(directory, cfg, base):
    """An adapter as PEFT leaves it, of the queries of all layers."""
    D, N = cfg.decoder.hidden_size, cfg.decoder.num_heads * cfg.decoder.head_dim
    directory.mkdir()
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight".format
    save_file({q(i, letter): np.ones(shape, np.float32) for i in range(cfg.decoder.num_layers)
               for letter, shape in (("A", (2, D)), ("B", (N, 2)))}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base}))
    (directory / "optimizer.bin").write_bytes(b"not fetched")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`me/llava`, as transformers and others leave a repository; `me/v1`, which names its tower; `me/clip`, the tower."""
    root = tmp_path_factory.mktemp("hub")
    from llavamed_jax.checkpoints.random import random_checkpoint
    from tests.checkpoints.test_convert import CFG
    limit, write.SHARD_BYTES = write.SHARD_BYTES, 150_000
    try:
        export(random_checkpoint(CFG), root / "llava", "llava")
    finally:
        write.SHARD_BYTES = limit
    (root / "llava" / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    for other in ("pytorch_model.bin", "flax_model.msgpack", "consolidated.safetensors", "training.log"):
        (root / "llava" / other).write_bytes(b"not fetched")
    tensors = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA) | tiny.projector_shapes())
    tiny.save(root / "v1", {**tiny.V1, "mm_vision_tower": "me/clip"}, tensors)
    tiny.save_clip(root / "clip")
    (root / "clip" / "README.md").write_text("No header.\n")
    save_adapter(root / "lora", CFG, "me/llava")
    with LocalHub({f"me/{name}": root / name for name in ("llava", "v1", "clip", "lora")}) as hub:
        yield hub


@pytest.fixture
def of_hub(hub, tmp_path, monkeypatch):
    """Makes this process one that was started with the hub's address, and with a cache of its own."""
    def begin(url=hub.url, is_offline=False):
        del hub.requests[:]
        local_hub.ask(monkeypatch, url, tmp_path / "home", is_offline)
    return begin


@pytest.fixture
def convert(of_hub, capfd):
    """The command, as a process would run it."""
    def run(*argv, **environment):
        of_hub(**environment)
        capfd.readouterr()
        code = main([*map(str, argv)])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run


def fetched(hub):
    return {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET ") and "/resolve/" in request}


def test_a_name_is_fetched_once_and_found_without_a_network(hub, convert, tmp_path):
    def in_a_process(*argv):
        del hub.requests[:]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run([sys.executable, "-m", "convert", *argv], cwd=ROOT, env=env, capture_output=True, text=True)

    done = in_a_process("inspect", "me/llava@v1")
    assert done.returncode == 0, done.stderr
    assert "llava layout, vision tower: the tensors in the checkpoint" in done.stdout
    assert "licence apache-2.0" in done.stderr and done.stderr.count("licence") == 1
    weights = {name for name in fetched(hub) if name.endswith(WEIGHTS)}
    shards = {name for name in weights if name.startswith("model-0000")}
    assert weights == shards and len(shards) > 1  # neither the pickle nor other formats beside them
    assert "training.log" not in fetched(hub)

    again = convert("inspect", "me/llava@v1")
    assert (again.returncode, again.stdout) == (0, done.stdout) and not fetched(hub)
    offline = convert("inspect", "me/llava@v1", is_offline=True)
    assert (offline.returncode, offline.stdout) == (0, done.stdout) and not hub.requests
    assert "licence apache-2.0" in offline.stderr


def test_a_tower_that_the_config_names_is_fetched(hub, convert, tmp_path):
    done = convert("inspect", "me/v1")
    assert done.returncode == 0, done.stderr
    assert "which mm_vision_tower names" in done.stdout and "3 layers, width 32" in done.stdout
    assert "licence not stated by its model card" in done.stderr
    asked = convert("inspect", "me/v1", "--vision_tower", "me/clip@main")
    assert asked.returncode == 0 and "as asked for" in asked.stdout


def test_an_adapter_is_fetched_with_its_base(hub, convert, tmp_path):
    done = convert("inspect", "me/lora")
    assert done.returncode == 0, done.stderr
    assert "adapter       2 kernels, rank 2, alpha 4" in done.stdout
    assert "adapter_model.safetensors" in fetched(hub) and "optimizer.bin" not in fetched(hub)
    merged = convert("merge-lora", "--base", "me/llava", "--adapter", "me/lora", "--out", tmp_path / "out", is_offline=True)
    assert merged.returncode == 0 and not hub.requests, merged.stderr


def test_a_processor_needs_no_weights(hub, of_hub):
    of_hub()
    assert Processor.load("me/llava").template_name == "v1.5:mistral_instruct"
    assert "config.json" in fetched(hub) and not {name for name in fetched(hub) if name.endswith(WEIGHTS)}


@pytest.mark.parametrize(("name", "environment", "sentence"), [
    ("me/nothing", {}, "me/nothing is not a directory here, and the hub model of this name does not exist on http://127.0.0.1"),
    ("me/llava@v9", {}, "me/llava@v9 is not a directory here, and the hub model of this name has no revision 'v9' on"),
    ("me/llava", {"is_offline": True}, "is not in the cache of hub models (HF_HUB_OFFLINE is set)"),
    ("me/llava", {"url": "http://127.0.0.1:9"}, "is not in the cache of hub models (http://127.0.0.1:9 cannot be reached)"),
])
def test_what_a_hub_does_not_give_is_one_sentence(name, environment, sentence, convert):
    done = convert("inspect", name, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_a_tower_that_no_hub_gives_is_asked_for(convert, tmp_path):
    tensors = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA) | tiny.projector_shapes())
    tiny.save(tmp_path / "v1", {**tiny.V1, "mm_vision_tower": "me/nothing"}, tensors)
    done = convert("inspect", tmp_path / "v1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "names the vision tower 'me/nothing', which lies neither inside nor beside it (me/nothing is not a directory" in done.stderr
    assert "vision_tower=PATH (--vision_tower PATH) was expected" in done.stderr


def test_a_repository_without_weights(hub, convert, tmp_path):
    tiny.save(tmp_path / "empty", {**tiny.V1, "mm_vision_tower": "openai/clip-vit-large-patch14"})
    save_file(tiny.drawn({"x": (2, 2)}), tmp_path / "empty" / "pytorch_model.bin.gz")  # no name that weights have
    with LocalHub({"me/empty": tmp_path / "empty"}) as other:
        done = convert("inspect", "me/empty", url=other.url)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(
        "holds no weights; .safetensors or pytorch_model*.bin files were expected")
    assert "No files matched" not in done.stderr


def test_a_fetch_that_breaks_off_is_one_sentence_and_goes_on_from_there(hub, convert, tmp_path, monkeypatch):
    """The client tries a few times itself before it gives up."""
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))  # a second between two tries
    with LocalHub({"me/clip": tmp_path / "clip", "me/v1": tmp_path / "v1"}, break_off=1000) as other:
        tensors = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA) | tiny.projector_shapes())
        tiny.save(tmp_path / "v1", {**tiny.V1, "mm_vision_tower": "me/clip"}, tensors)
        tiny.save_clip(tmp_path / "clip")
        done = convert("import", "--checkpoint", "me/v1", "--out", tmp_path / "out", url=other.url)
        error = done.stderr.splitlines()[-1]
        assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "out").exists()
        assert error.startswith(f"error: me/v1 is not a directory here, and the hub model of this name could not be fetched from {other.url} ("), done.stderr
        assert "Traceback" not in done.stderr
        other.break_off = None
        again = convert("import", "--checkpoint", "me/v1", "--out", tmp_path / "out", url=other.url)
    assert again.returncode == 0 and (tmp_path / "out" / "model").is_dir(), again.stderr
