"""Towers whose tensors lie in the checkpoint under a name that means nothing here: `mm_vision_tower` of another machine."""

import json

import numpy as np
import pytest

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.torch import tower_shape
from llavamed_jax.cli.convert import main
from llavamed_jax.config import KNOWN_TOWERS, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from tests.checkpoints.test_layouts import sparse
from tests.support import released, tiny

TOWER = dict(model_type="clip_vision_model", hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2,
             image_size=28, patch_size=14)
KNOWN = "openai/tiny-clip"
PREFIX = "model.vision_tower.vision_tower."
LAYOUTS = {
    "v1.5": {**released.V15, "mm_hidden_size": 128},
    "LLaVA-1.5": {**released.V15, "model_type": "llava_llama", "mm_hidden_size": 128},
    "LLaVA-1.5 of before": {**released.V15, "model_type": "llava", "mm_hidden_size": 128, "num_key_value_heads": 2},
    "v1.0": {**tiny.V1, "mm_hidden_size": 128, "vocab_size": 73},
    "v0": {**tiny.LLAMA, "mm_hidden_size": 128, "vocab_size": 73},
}
NAMES = ["/data/models/tiny-clip", "./checkpoints/clip-tuned", "../clip", "C:\\models\\clip", "clip", "someone/clip-tuned"]


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    """A tower that is small, of a width that has its place in CLIP's table here, and known by one name."""
    monkeypatch.setattr(tower_shape, "CLIP_WIDTHS", (128, *tower_shape.CLIP_WIDTHS))
    monkeypatch.setitem(KNOWN_TOWERS, KNOWN, VisionConfig.from_hf(TOWER))


def tensors(layout, prefix):
    text = LAYOUTS[layout]
    kind = text.get("mm_projector_type", "linear")
    shapes = tiny.decoder_shapes(text) | tiny.projector_shapes(kind, 128) | tiny.clip_shapes(TOWER, prefix)
    return tiny.drawn(shapes, seed=4, dtype=np.float32)


def save(directory, layout, name, files="safetensors", prefix=f"{PREFIX}vision_model."):
    key = "vision_tower" if layout == "v0" else "mm_vision_tower"
    config = {**LAYOUTS[layout], key: name}
    if files == "safetensors":
        return tiny.save(directory, config, tensors(layout, prefix))
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    tiny.save(directory, config)
    torch.save({key: torch.tensor(value) for key, value in tensors(layout, prefix).items()}, directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_that_under_the_known_name(layout, files, tmp_path):
    known = open_checkpoint(save(tmp_path / "known", layout, KNOWN))
    assert known.tower == "the tensors in the checkpoint"
    found = open_checkpoint(save(tmp_path / "found", layout, NAMES[0], files))
    assert found.config.vision == known.config.vision == VisionConfig.from_hf(TOWER)
    assert found.tower == ("the tensors in the checkpoint, which give its shape; 2 heads, quick_gelu and eps 1e-05 are assumed, as in "
                           "CLIP, because mm_vision_tower '/data/models/tiny-clip' is not here")
    assert found.tensors.keys() == known.tensors.keys() and found.config.replace(extra=known.config.extra) == known.config
    for name in known.tensors:
        np.testing.assert_array_equal(found.read(name), known.read(name), err_msg=name)


@pytest.mark.parametrize("prefix", [f"{PREFIX}vision_model.", PREFIX])
@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_means_nothing_here(name, prefix, tmp_path, capsys):
    directory = save(tmp_path / "found", "v1.5", name, prefix=prefix)
    found = open_checkpoint(directory)
    assert found.config.vision == read_config(directory).vision == Processor.load(directory).config.vision == VisionConfig.from_hf(TOWER)
    assert main(["import", "--checkpoint", str(directory), "--out", str(tmp_path / "tree")]) == 0
    assert f"are assumed, as in CLIP, because mm_vision_tower {name!r} is not here" in capsys.readouterr().out
    for layout in ("transformers", "llava"):
        export(open_checkpoint(tmp_path / "tree"), tmp_path / layout, layout)
        again = open_checkpoint(tmp_path / layout)
        assert again.config == open_checkpoint(tmp_path / "tree").config
        assert all(np.array_equal(again.read(n), found.read(n)) for n in found.tensors if n.startswith("vision_tower/"))


def test_a_directory_of_the_name_goes_before_the_assumption(tmp_path):
    """Its config may say what the tensors do not."""
    tiny.save(tmp_path / "clip-tuned", {**TOWER, "hidden_act": "gelu", "num_attention_heads": 4})
    directory = save(tmp_path / "found", "v1.5", "./checkpoints/clip-tuned")
    found = open_checkpoint(directory)
    assert (found.config.vision.hidden_act, found.config.vision.num_heads) == ("gelu", 4)
    assert found.tower == "the tensors in the checkpoint"


@pytest.mark.parametrize("width", [64, 96, 1152])
def test_another_width_asks_for_a_config_and_takes_it(width, tmp_path):
    tower = {**TOWER, "hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": 2}
    shapes = tiny.clip_shapes(tower, f"{PREFIX}vision_model.")
    rest = {n: t for n, t in released.v15_tensors(dtype=np.float32).items() if "vision_tower" not in n}
    rest["model.mm_projector.0.weight"] = np.ones((48, width), np.float32)
    config = {**released.V15, "mm_hidden_size": width, "mm_vision_tower": "/elsewhere/clip"}
    drawn = tiny.drawn(shapes)
    directory = tiny.save(tmp_path / "model", config, rest | drawn)
    for read in (open_checkpoint, read_config):
        with pytest.raises(UserError, match=f"'/elsewhere/clip', which is not here; its tensors have width {width}, which no CLIP tower has.*"
                                            "tower's config.json as vision_tower=PATH .--vision_tower PATH"):
            read(directory)
    tiny.save(tmp_path / "shape", tower)
    found = open_checkpoint(directory, tmp_path / "shape")
    assert found.tower == f"the tensors in the checkpoint, of the shape in {tmp_path / 'shape'}"
    assert found.config.vision == VisionConfig.from_hf(tower)
    np.testing.assert_array_equal(found.read("vision_tower/pre_layrnorm/scale"), drawn[f"{PREFIX}vision_model.pre_layrnorm.weight"])
    other = tiny.drawn(tiny.clip_shapes(tower), seed=9)
    tiny.save(tmp_path / "shape", tower, other)  # with weights it is another tower, as ever
    found = open_checkpoint(directory, tmp_path / "shape")
    assert found.tower == f"{tmp_path / 'shape'}, as asked for"
    np.testing.assert_array_equal(found.read("vision_tower/pre_layrnorm/scale"), other["vision_model.pre_layrnorm.weight"])


@pytest.mark.parametrize("change", ["no square of positions", "no patches", "a patch that is no square"])
def test_tensors_that_are_no_clip_ask_for_a_tower(change, tmp_path):
    wrong, start = tensors("v1.5", f"{PREFIX}vision_model."), f"{PREFIX}vision_model.embeddings."
    if change == "no square of positions":
        wrong[f"{start}position_embedding.weight"] = np.ones((4, 128), np.float32)
    elif change == "no patches":
        wrong.pop(f"{start}patch_embedding.weight")
    else:
        wrong[f"{start}patch_embedding.weight"] = np.ones((128, 3, 14, 7), np.float32)
    directory = tiny.save(tmp_path / "model", {**LAYOUTS["v1.5"], "mm_vision_tower": "/elsewhere/clip"}, wrong)
    with pytest.raises(UserError, match="its tensors are not those of a CLIP ViT; vision_tower=PATH"):
        open_checkpoint(directory)


def test_without_weights_the_last_part_of_the_name_tells(tmp_path):
    """A processor needs no weights. With them and without a tower inside, it still has to be given."""
    config = {**LAYOUTS["v1.5"], "mm_vision_tower": "/data/models/tiny-clip"}
    directory = tiny.save(tmp_path / "model", config)
    assert read_config(directory).vision == VisionConfig.from_hf(TOWER)
    tiny.save(directory, config, {n: t for n, t in tensors("v1.5", PREFIX).items() if "vision_tower" not in n})
    with pytest.raises(UserError, match="'/data/models/tiny-clip', which lies neither inside nor beside it; vision_tower=PATH"):
        open_checkpoint(directory)
    (directory / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "/data/models/another"}))
    with pytest.raises(UserError, match="'/data/models/another', which lies neither inside nor beside it; vision_tower=PATH"):
        read_config(directory)


@pytest.mark.parametrize(("width", "layers", "patch", "edge"), [
    (1024, 24, 14, 336), (1024, 24, 14, 224), (768, 12, 16, 224), (768, 12, 32, 224)])
def test_the_towers_of_clip_of_true_shapes(width, layers, patch, edge, tmp_path):
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
                 image_size=edge, patch_size=patch)
    shapes = {n: t.shape for n, t in released.v15_tensors().items() if "vision_tower" not in n}
    shapes |= {"model.mm_projector.0.weight": (48, width)} | tiny.clip_shapes(tower, f"{PREFIX}vision_model.")
    config = {**released.V15, "mm_hidden_size": width, "mm_vision_tower": "/data/clip"}
    found = open_checkpoint(sparse(tmp_path / "model", config, shapes))
    assert found.config.vision == VisionConfig.from_hf(tower)


@pytest.mark.parametrize("name", ["..", "/", ".", "/a/..", "a" * 300, "a\0b", "C:\\clip\\x", "clip\nx"])
@pytest.mark.parametrize("layout", ["v1.0", "v1.5"])
def test_names_that_no_directory_can_have(layout, name, tmp_path):
    """Neither the parent's files nor the checkpoint's own are taken for a tower's, and an export of v1.0 has its tower inside."""
    tiny.save(tmp_path, {**TOWER, "hidden_act": "gelu"})
    checkpoint = open_checkpoint(save(tmp_path / "found", layout, name))
    assert checkpoint.config.vision == VisionConfig.from_hf(TOWER)
    export(checkpoint, tmp_path / "out", "llava")
    again = open_checkpoint(tmp_path / "out")
    assert again.config.vision == checkpoint.config.vision
    assert all(np.array_equal(again.read(n), checkpoint.read(n)) for n in checkpoint.tensors)
    inside = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert [path.name for path in inside] == ([] if layout == "v1.5" else ["vision_tower"])
