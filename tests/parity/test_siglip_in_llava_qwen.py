"""SigLIP with Qwen2: logits of transformers, and upstream's files, whose tower lacks its last layer (LLaVA-NeXT's `SigLipVisionTower`)."""

import copy
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch's CPU build is not installed")

from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.torch.files import read_weights
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import KNOWN_TOWERS
from llavamed_jax.errors import UserError
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.towers import tower_module
from tests.support import hf, tiny, towers
from tests.support.programs import apply

TOLERANCE = 2e-5
LAYER = "model.vision_tower.vision_tower.vision_model.encoder.layers.2."  # the last of three
IMAGES = hf.images(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """transformers' tower of three layers, and what `convert build` makes of it with transformers' Qwen2."""
    root = tmp_path_factory.mktemp("parts")
    tower = towers.KINDS["siglip"].theirs()
    tower.save_pretrained(root / "tower")
    text = {key: value for key, value in hf.TEXT.items() if key not in ("rope_theta", "head_dim")}
    config = hf.DECODERS["qwen2"](**text, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    decoder = hf.transformers.AutoModelForCausalLM.from_config(config).float().eval()
    hf.randomise(decoder, seed=7)
    decoder.save_pretrained(root / "decoder")
    return tower, build(root / "decoder", root / "tower", "mlp2x_gelu", root)[0], root / "tower"


def test_logits_are_those_of_transformers(parts, tmp_path):
    checkpoint, ids = parts[1], towers.row(parts[1].config)
    assert (checkpoint.config.vision.model_type, checkpoint.config.decoder.architecture) == ("siglip_vision_model", "qwen2")
    ours = np.asarray(apply(Llava(checkpoint.config), load_params(checkpoint), ids, IMAGES[None]))
    export(checkpoint, tmp_path / "out")
    theirs = towers.their_logits(tmp_path / "out", ids, IMAGES)[..., :ours.shape[-1]]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(ours).max(), rtol=0)
    assert np.abs(theirs - np.roll(theirs, 1, -1)).max() > 0.1


def of_upstream(parts, directory, name, layers, select):
    """A directory as LLaVA-NeXT saves it: no key of ours, and the tower's first `layers` layers, or no tower (0)."""
    export(parts[1], directory, "llava")
    config = json.loads((directory / "config.json").read_text())
    del config["llavamed_jax"]
    assert (config["model_type"], config["architectures"]) == ("llava_qwen", ["LlavaQwenForCausalLM"])
    kept = {key: tensor.load() for key, tensor in read_weights(directory).items()
            if layers and not (layers < 3 and key.startswith(LAYER)) or "vision_tower" not in key}
    return tiny.save(directory, {**config, "mm_vision_tower": name, "mm_vision_select_layer": select}, kept)


def features_of_upstream(tower, images):
    """`load_model` deletes the last layer; `forward` takes `hidden_states[-1]`."""
    tower = copy.deepcopy(tower)
    del tower.encoder.layers[-1:]
    return towers.hidden_states(tower, images)[-1]


def check(parts, checkpoint, layers):
    cfg = checkpoint.config
    assert (cfg.vision.num_layers, cfg.num_vision_layers_used) == (layers, 2)
    tower = tower_module(cfg.vision)(cfg.vision, cfg.num_vision_layers_used, scan=False)
    ours = np.asarray(tower.apply({"params": load_params(checkpoint)["vision_tower"]}, IMAGES))
    wanted = features_of_upstream(parts[0], IMAGES)
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


# A tuned tower, a whole one, and none: the tower that the name stands for. Upstream does not read the feature layer.
@pytest.mark.parametrize("layers, select", [(2, -2), (3, -1), (0, -1)])
@pytest.mark.parametrize("is_known", [True, False])
def test_the_features_are_upstreams(is_known, layers, select, parts, tmp_path, monkeypatch):
    tower, checkpoint, stock = parts
    name = "google/siglip-tiny" if is_known else str(stock)
    if is_known:
        monkeypatch.setitem(KNOWN_TOWERS, name, checkpoint.config.vision)
    if layers == 0:
        tower.save_pretrained(tmp_path / "siglip-tiny")  # beside it
    directory = of_upstream(parts, tmp_path / "model", name, layers, select)
    found = open_checkpoint(directory)
    check(parts, found, layers or 3)
    assert read_config(directory) == found.config


def test_exports_of_a_tuned_tower_state_its_layers(parts, tmp_path, monkeypatch):
    """And a whole tower may take its place, in the checkpoint, in its export and in our own tree."""
    monkeypatch.setitem(KNOWN_TOWERS, "google/siglip-tiny", parts[1].config.vision)
    directory = of_upstream(parts, tmp_path / "model", "google/siglip-tiny", 2, -1)
    found = open_checkpoint(directory)
    write_model(tmp_path / "tree", found)
    for layout in ("llava", "transformers"):
        export(found, tmp_path / layout, layout)
        check(parts, open_checkpoint(tmp_path / layout), 2)
    for path in (directory, tmp_path / "llava", tmp_path / "tree"):
        whole = open_checkpoint(path, parts[2])
        assert (whole.config.vision.num_layers, whole.config.feature_layer) == (3, -2)
    joined = build(parts[2].parent / "decoder", directory, "mlp2x_gelu", tmp_path)[0]
    assert (joined.config.feature_layer, json.loads(joined.config.extra)["mm_vision_tower"]) == (-1, "google/siglip-tiny")
    check(parts, joined, 2)


def test_a_tower_that_lacks_more_is_refused(parts, tmp_path, monkeypatch):
    deeper = {**parts[1].config.vision.to_hf(), "num_hidden_layers": 5}
    monkeypatch.setitem(KNOWN_TOWERS, "google/siglip-tiny", type(parts[1].config.vision).from_hf(deeper))
    with pytest.raises(UserError, match="32 tensors missing: .*layers.3"):
        open_checkpoint(of_upstream(parts, tmp_path / "model", "google/siglip-tiny", 3, -2))


def test_a_config_alone_gives_the_shape_of_the_layers_that_are_left(parts, tmp_path, monkeypatch):
    """A directory with the config of a tower of two layers, or of the whole one, for a tower of a known name."""
    monkeypatch.setitem(KNOWN_TOWERS, "google/siglip-tiny", parts[1].config.vision)
    directory = of_upstream(parts, tmp_path / "model", "google/siglip-tiny", 2, -2)
    for layers in (2, 3):
        tiny.save(tmp_path / f"shape-{layers}", {**parts[1].config.vision.to_hf(), "num_hidden_layers": layers})
        check(parts, open_checkpoint(directory, tmp_path / f"shape-{layers}"), 2)
