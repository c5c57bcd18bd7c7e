"""What vLLM refuses in an adapter, and that an export says it."""

import pytest

from llavamed_jax.adapters import vllm
from llavamed_jax.adapters.lora import attach
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.convert import main
from llavamed_jax.config.adapter import AdapterConfig, AdapterRule
from tests.training.test_training_step import CFG


@pytest.mark.parametrize("settings, said", [
    ({"r": 16, "modules_to_save": None}, None), ({"r": 16, "modules_to_save": [], "rank_pattern": {}}, None),
    ({"r": 4, "modules_to_save": ["projector"]}, "because projector was trained whole"),
    ({"r": 17, "modules_to_save": None}, "--max-lora-rank 32 for"), ({"r": 4, "rank_pattern": {"a": 32, "b": 8}}, "--max-lora-rank 32 for"),
    ({"r": 300}, "--max-lora-rank 320 for"), ({"r": 513}, "its rank is 513, and at most 512")])
def test_what_vllm_refuses(settings, said):
    found = vllm.refuses(settings)
    assert found is None if said is None else said in found


@pytest.mark.parametrize("rank, layout, said", [(4, "transformers", None), (20, "transformers", "vLLM needs --max-lora-rank 32"), (20, "llava", None)])
def test_an_export_says_it(rank, layout, said, tmp_path, capsys):
    checkpoint = attach(random_checkpoint(CFG), AdapterConfig((AdapterRule(r"decoder/layers_\d+/.*", rank, 5.0),)), 0)
    write_model(tmp_path / "tree", checkpoint)
    assert main(["export-lora", "--base", str(tmp_path / "tree"), "--layout", layout, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert said in out if said else "vLLM" not in out
