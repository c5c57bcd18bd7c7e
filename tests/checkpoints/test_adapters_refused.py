"""Where a whole model is meant, an adapter is refused in one sentence, whichever way it was saved; so is one without its base."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import llavamed_jax as lm
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli import eval as eval_command
from llavamed_jax.cli.convert import main
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from tests.support import released, tiny

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 48), np.float32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.zeros((48, 2), np.float32)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}


def save(directory, *files):
    directory.mkdir()
    contents = {"adapter_config.json": json.dumps(CONFIG).encode(), "config.json": json.dumps(released.V15).encode(),
                "non_lora_trainables.bin": b"pickle", "adapter_model.bin": b"pickle",
                "adapter_model-00001-of-00002.safetensors": b"", "README.md": b"a lora"}
    for name in files:
        if name == "adapter_model.safetensors":
            save_file(LORA, directory / name)
        else:
            (directory / name).write_bytes(contents[name])
    return directory


SAVED = {
    "PEFT": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
    "PEFT, of before": ("adapter_config.json", "adapter_model.bin"),
    "PEFT, shards": ("adapter_config.json", "adapter_model-00001-of-00002.safetensors"),
    "LLaVA": ("adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"),
    "LLaVA, safetensors": ("adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"),
    "weights alone": ("adapter_model.safetensors",),
    "a config alone": ("adapter_config.json",),
    "what is no LoRA alone": ("non_lora_trainables.bin", "config.json"),
}
SENTENCE = "lora holds an adapter .*a whole model's weights were expected: `convert merge-lora` makes them of an adapter and its base"
BASELESS = "lora holds an adapter of liuhaotian/llava-v1.5-7b, which is neither a directory here nor beside it"


@pytest.mark.parametrize("case", SAVED)
def test_every_adapter_is_one_sentence(case, tmp_path):
    directory = save(tmp_path / "lora", *SAVED[case])
    is_whole = {"adapter_config.json"} < set(SAVED[case]) & {"adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"}
    for read in (open_checkpoint, read_config, lm.load, Processor.load if "config.json" in SAVED[case] else open_checkpoint):
        with pytest.raises(UserError, match=BASELESS if read is lm.load and is_whole else SENTENCE) as error:
            read(directory)
        assert "\n" not in str(error.value)


def test_every_command_says_it(tmp_path, capsys):
    lora, out = save(tmp_path / "lora", *SAVED["LLaVA, safetensors"]), str(tmp_path / "out")
    v15, clip = released.save_v15(tmp_path), tiny.save_clip(tmp_path / "clip")
    decoder = tiny.save(tmp_path / "decoder", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)))
    commands = [
        ["import", "--checkpoint", lora, "--out", out], ["export", "--checkpoint", lora, "--layout", "llava", "--out", out],
        ["inspect", lora], ["verify", v15, lora], ["verify", lora, v15], ["inspect", v15, "--vision_tower", lora],
        ["build", "--decoder", lora, "--vision", clip, "--projector", "linear", "--out", out],
        ["build", "--decoder", decoder, "--vision", lora, "--projector", "linear", "--out", out],
        ["make-delta", "--base", decoder, "--target", lora, "--out", out], ["make-delta", "--base", lora, "--target", v15, "--out", out],
        ["apply-delta", "--base", decoder, "--delta", lora, "--out", out], ["apply-delta", "--base", lora, "--delta", v15, "--out", out]]
    for command in commands:
        assert main(list(map(str, command))) == 1, command
        error = capsys.readouterr().err
        is_opened = command[0] in ("import", "export", "inspect", "verify") and "--vision_tower" not in command
        assert error.startswith(f"error: {lora} holds an adapter {'of liuhaotian' if is_opened else '(adapter_config.json)'}"), command
        assert error.count("\n") == 1, command
    argv = ["--config", "configs/eval/vqa_rad.py", "--config.data.root=samples/vqa_rad", "--checkpoint", str(lora), "--workdir", out]
    assert eval_command.main(argv) == 1
    assert "holds an adapter of liuhaotian" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_run_does_not_start_from_one(tmp_path):
    from llavamed_jax.training.trainer import fit
    from tests.support.training_runs import shrunk, write_data
    lora = save(tmp_path / "lora", *SAVED["LLaVA"])
    with pytest.raises(UserError, match=SENTENCE):
        fit(shrunk(lora, write_data(tmp_path), batch_size=8), tmp_path / "run")


def test_a_model_that_kept_the_adapters_config_loads_and_one_that_kept_its_weights_does_not(tmp_path):
    v15 = released.save_v15(tmp_path)
    lora = save(tmp_path / "lora", *SAVED["LLaVA, safetensors"])
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        shutil.copyfile(lora / name, v15 / name)
    assert open_checkpoint(v15).config.decoder.vocab_size == 70
    shutil.copyfile(lora / "adapter_model.safetensors", v15 / "adapter_model.safetensors")
    with pytest.raises(UserError, match="v15 holds an adapter"):  # which of the two is meant cannot be known
        open_checkpoint(v15)
