"""BiomedCLIP's tower from open_clip's own files: tensors, features, pixels, a v1.0 checkpoint that names it, bad files."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import CLIP_MEAN, CLIP_STD, KNOWN_TOWERS, ImageSettings
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.config.towers import vit
from llavamed_jax.errors import UserError
from llavamed_jax.models.towers import tower_module
from llavamed_jax.processor import Processor
from tests.support import hf, tiny, towers
from tests.support.programs import apply

torch = hf.torch

NAME = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
CONFIG = {
    "model_cfg": {"embed_dim": 512, "vision_cfg": {"timm_model_name": "vit_test_patch7_28", "timm_model_pretrained": False, "timm_pool": "",
                                                   "timm_proj": "linear", "image_size": 28},
                  "text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "context_length": 256}},
    "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}}


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """A timm ViT of the width of tests/support/towers.py."""
    monkeypatch.setitem(vit._TIMM, "test", (48, 80, 3, 4))


def in_timm(model, order=("q", "k", "v")):
    """The state of a ViTModel under timm's names below open_clip's `visual.trunk`, with q, k and v in one tensor."""
    state, out = model.state_dict(), {}
    for name, value in state.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            new = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1",
                   "mlp.fc2": "mlp.fc2"}.get(rest.rpartition(".")[0])
            if new:
                out[f"blocks.{i}.{new}.{rest.rpartition('.')[2]}"] = value
        elif name.startswith("layernorm."):
            out[name.replace("layernorm", "norm")] = value
    out["cls_token"], out["pos_embed"] = state["embeddings.cls_token"], state["embeddings.position_embeddings"]
    for leaf in ("weight", "bias"):
        out[f"patch_embed.proj.{leaf}"] = state[f"embeddings.patch_embeddings.projection.{leaf}"]
        for i in range(model.config.num_hidden_layers):
            out[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([state[f"layers.{i}.attention.{part}_proj.{leaf}"] for part in order])
    rest = {"visual.head.proj.weight": torch.ones(512, 48), "logit_scale": torch.ones(()), "text.proj.0.weight": torch.ones(4, 4),
            "text.transformer.embeddings.word_embeddings.weight": torch.ones(8, 4)}
    return {**{f"visual.trunk.{name}": value.clone() for name, value in out.items()}, **rest}


def save(directory, state, file="open_clip_pytorch_model.bin", config=CONFIG):
    directory.mkdir(parents=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        state = {**state, "text.transformer.embeddings.position_ids": torch.arange(8)[None]}
        torch.save(state, directory / file)
    else:
        tiny.save(directory, {}, {key: value.contiguous().numpy() for key, value in state.items()}, file)
        (directory / "config.json").unlink()
    return directory


@pytest.fixture(scope="module")
def model():
    return towers.KINDS["vit"].theirs(layer_norm_eps=1e-6)


@pytest.fixture
def built(model, tmp_path):
    save(tmp_path / "biomedclip", in_timm(model))
    return build(towers.decoder_directory(tmp_path / "decoder"), tmp_path / "biomedclip", "mlp2x_gelu", tmp_path)[0]


def features(checkpoint, layer, images):
    """Our features [I,P,D] of LLaVA's layer, without the class token."""
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(feature_layer=layer))
    cfg, params = checkpoint.config, load_params(checkpoint)["vision_tower"]
    return apply(tower_module(cfg.vision)(cfg.vision, cfg.num_vision_layers_used), params, images)[:, 1:]


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_features_are_those_of_the_last_three_blocks(file, model, tmp_path, measured, capsys):
    """Timm's `get_intermediate_layers(n=3)` gives three blocks' outputs without the norm; LLaVA indexes them from the end."""
    directory = save(tmp_path / "tower", in_timm(model), file)
    checkpoint, _ = build(towers.decoder_directory(tmp_path / "decoder"), directory, "linear", tmp_path)
    images = hf.images(2)
    outputs = towers.hidden_states(model, images)[1:][-3:]
    for layer in (-1, -2, -3) if file.endswith(".bin") else (-2,):
        measured(features(checkpoint, layer, images), outputs[layer][:, 1:], 2e-5)
    vision = checkpoint.config.vision
    assert (vision.layer_norm_eps, vision.hidden_act, vision.image_mean, vision.image_std, vision.images) == (
        1e-6, "gelu", CLIP_MEAN, CLIP_STD, ImageSettings())
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("vision", [{"layers": 12, "width": 768}, CONFIG["model_cfg"]["vision_cfg"]], ids=["clip", "timm"])
def test_a_tower_in_both_formats_is_transformers(vision, tmp_path):
    """As LAION publishes CLIP: `config.json` of a CLIPModel and its weights, with open_clip's files beside them."""
    towers_only = build(towers.decoder_directory(tmp_path / "decoder"), tiny.save_clip(tmp_path / "one") or tmp_path / "one", "linear", tmp_path)[0]
    directory = tmp_path / "both"
    tiny.save_clip(directory)
    (directory / "open_clip_config.json").write_text(json.dumps({**CONFIG, "model_cfg": {"vision_cfg": vision}}))
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (directory / name).write_bytes(b"not read")
    checkpoint, _ = build(tmp_path / "decoder", directory, "linear", tmp_path)
    assert checkpoint.config.vision == towers_only.config.vision
    for name in checkpoint.tensors:
        if name.startswith("vision_tower/"):
            np.testing.assert_array_equal(checkpoint.read(name), towers_only.read(name))


@pytest.mark.parametrize("order", ["kqv", "qvk", "vkq"])
def test_another_order_of_the_fused_tensor_fails(order, model, tmp_path):
    directory = save(tmp_path / "tower", in_timm(model, order))
    checkpoint, _ = build(towers.decoder_directory(tmp_path / "decoder"), directory, "linear", tmp_path)
    images = hf.images(2)
    wrong = features(checkpoint, -2, images)
    assert np.abs(wrong - towers.hidden_states(model, images)[-2][:, 1:]).max() >= 4e-5


def test_the_published_tower_is_vit_b_16():
    vision = KNOWN_TOWERS[NAME]
    config = llava_from_hf({**tiny.V1, "mm_vision_tower": NAME, "mm_hidden_size": 768})
    assert config.vision == vision
    shapes = {name: spec.shape for name, spec in names.specs(config).items() if spec.part == "vision_tower"}
    assert sum(map(np.prod, shapes.values())) == 85_798_656  # timm's vit_base_patch16_224 without a head
    assert (vision.num_positions, vision.num_heads, vision.layer_norm_eps) == (197, 12, 1e-6)


def test_an_export_goes_to_transformers_and_back(built, tmp_path, measured):
    """Transformers' LLaVA takes a ViT as its tower."""
    from llavamed_jax.models.llava import Llava
    images, ids = hf.images(1), towers.row(built.config)
    ours = np.asarray(jax.jit(Llava(built.config).apply)({"params": load_params(built)}, ids, images[None]))
    for layout in ("transformers", "llava"):
        export(built, tmp_path / layout, layout)
        again = open_checkpoint(tmp_path / layout)
        assert again.config.vision == built.config.vision
        for name in built.tensors:
            if name.startswith("vision_tower/"):
                np.testing.assert_array_equal(again.read(name), built.read(name))
    theirs = towers.their_logits(tmp_path / "transformers", ids, images)
    measured(ours, theirs[..., :ours.shape[-1]], 2e-5 * max(1, np.abs(ours).max()))
    assert "ViT, 3 layers" in (tmp_path / "transformers" / "README.md").read_text()


# --- pixels ---------------------------------------------------------------------------------------------------------


def open_clips(image, size, mode, resample, mean, std):
    """open_clip's transform for evaluation, by torchvision's documented steps, written with Pillow."""
    if mode == "squash":
        image = image.resize((size, size), resample)
    else:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        new = (size, int(size * long / short))
        image = image.resize(new if width <= height else new[::-1], resample)
        left, top = (int(round((edge - size) / 2)) for edge in image.size)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return (pixels - np.float32(mean)) / np.float32(std)


SIZES = [(90, 60), (60, 90), (28, 28), (29, 27), (40, 28), (28, 33), (113, 31), (300, 211), (28, 30), (31, 28), (28, 35)]


@pytest.mark.parametrize("mode", ["shortest", "squash", None])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", None])
def test_pixels(mode, interpolation, tmp_path):
    """Those of open_clip, but for the documented pixel where the resized edge exceeds the input by 3, 7, 11 …"""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    given = {"mean": mean, "std": std, "resize_mode": mode, "interpolation": interpolation}
    config = {**CONFIG, "preprocess_cfg": {key: value for key, value in given.items() if value is not None}}
    directory = save(tmp_path / "tower", {}, config=config)
    tiny.save_clip(tmp_path / "tiny-tower")
    tiny.save(tmp_path / "model", {**tiny.V1, "mm_hidden_size": 48})
    processor = Processor(read_config(tmp_path / "model", directory))
    seen = set()
    for width, height in SIZES:
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
        resample = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
        wanted = open_clips(image, 28, mode, resample, mean, std)
        found = processor.images([image])[0]
        excess = int(28 * max(image.size) / min(image.size)) - 28
        later = mode != "squash" and excess % 4 == 3
        seen.add(later)
        if not later:
            np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)
        else:  # the same columns or rows, one pixel earlier
            axis = 0 if height > width else 1
            np.testing.assert_allclose(np.delete(found, 0, axis), np.delete(wanted, -1, axis), atol=1e-6, rtol=0)
    assert seen == ({False} if mode == "squash" else {False, True})


# --- checkpoints that name it ---------------------------------------------------------------------------------------


def named(root, state, **keys):
    """A v1.0 checkpoint, and BiomedCLIP's directory beside it, which the name's last part finds."""
    save(root / NAME.split("/")[1], state)
    config = {**tiny.V1, "vocab_size": 73, "mm_vision_tower": f"hf-hub:{NAME}", "mm_hidden_size": 48, **keys}
    return tiny.save(root / "v1", config, tiny.drawn(tiny.decoder_shapes({**tiny.LLAMA, "vocab_size": 73})
                                                     | tiny.projector_shapes(width=48), dtype=np.float32))


@pytest.mark.parametrize("layer, means", [(-1, -1), (-2, -2), (-3, -3), (0, -3), (1, -2), (2, -1), (None, -1)])
def test_a_checkpoint_of_v1_that_names_it(layer, means, model, tmp_path):
    keys = {"mm_vision_select_feature": "cls_patch"} if layer is None else {"mm_vision_select_layer": layer}
    directory = named(tmp_path, in_timm(model), **keys)
    if layer is None:
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "mm_vision_select_layer"}))
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.config.feature_layer, checkpoint.config.tokens_per_image) == (means, 16)
    assert "which mm_vision_tower names" in checkpoint.tower
    images = hf.images(2)
    wanted = towers.hidden_states(model, images)[means][:, 1:]
    np.testing.assert_allclose(features(checkpoint, checkpoint.config.feature_layer, images), wanted, atol=2e-5)


def test_an_export_of_v1_keeps_it_in_a_directory(model, tmp_path):
    """The original fetches BiomedCLIP by itself; this project reads the directory that it wrote."""
    first = open_checkpoint(named(tmp_path, in_timm(model), mm_vision_select_layer=-2))
    export(first, tmp_path / "elsewhere" / "out", "llava")
    tower = tmp_path / "elsewhere" / "out" / NAME.split("/")[1]
    assert json.loads((tower / "config.json").read_text())["architectures"] == ["ViTModel"]
    again = open_checkpoint(tmp_path / "elsewhere" / "out")
    assert (again.config.vision, again.config.feature_layer) == (first.config.vision, -2)
    for name in first.tensors:
        np.testing.assert_array_equal(again.read(name), first.read(name))
    assert "takes BiomedCLIP from its hub whatever the path" in (tmp_path / "elsewhere" / "out" / "README.md").read_text()


@pytest.mark.parametrize("layer", [-4, 3, "x"])
def test_layers_that_the_original_does_not_have_are_refused(layer, model, tmp_path):
    with pytest.raises(UserError, match=f"mm_vision_select_layer is {layer!r}; -3, -2 or -1 was expected with BiomedCLIP"):
        read_config(named(tmp_path, in_timm(model), mm_vision_select_layer=layer))


@pytest.mark.parametrize("change, sentence", [
    (dict(model_cfg={"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}), "has timm_model_name 'vit_base_patch16_siglip_224'"),
    (dict(model_cfg={"vision_cfg": {"layers": 12, "width": 768}}), "has timm_model_name None; vit_base_patch16_224"),
    (dict(model_cfg={}), "has timm_model_name None"), (dict(model_cfg=5), "model_cfg 5; an object was expected"),
    (dict(preprocess_cfg={"resize_mode": "longest"}), "has resize_mode 'longest'; shortest or squash was expected"),
    (dict(preprocess_cfg={"interpolation": "random"}), "has interpolation 'random'; bicubic or bilinear was expected"),
    (dict(preprocess_cfg={"size": [384, 384]}), r"has size \[384, 384\] in preprocess_cfg; 28, the vision tower's"),
    (dict(preprocess_cfg={"mean": [0.5]}), r"has image_mean \[0.5\]; a list of three numbers was expected")])
def test_what_is_not_read_is_one_sentence(change, sentence, model, tmp_path):
    directory = save(tmp_path / "tower", in_timm(model), config={**CONFIG, **change})
    with pytest.raises(UserError, match=sentence) as error:
        build(towers.decoder_directory(tmp_path / "decoder"), directory, "linear", tmp_path)
    assert "open_clip_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.pop("visual.trunk.blocks.1.attn.qkv.bias"), "3 tensors missing: encoder.layer.1.attention.attention.query.bias"),
    (lambda s: s.update({"visual.trunk.blocks.0.ls1.gamma": torch.ones(48)}), "1 tensor unexpected: visual.trunk.blocks.0.ls1.gamma"),
    (lambda s: s.update({"visual.conv1.weight": torch.ones(4)}), "1 tensor unexpected: visual.conv1.weight"),
    (lambda s: s.update({"visual.trunk.pos_embed": torch.ones(1, 5, 48)}), "its position table has 5, which is that of 14 pixels")])
def test_tensors_that_do_not_fit_are_named(change, sentence, model, tmp_path):
    state = in_timm(model)
    change(state)
    directory = save(tmp_path / "tower", state)
    with pytest.raises(UserError, match=sentence):
        build(towers.decoder_directory(tmp_path / "decoder"), directory, "linear", tmp_path)
