"""Tiny towers of every kind as transformers has them, with random weights that make wrong code show."""

import dataclasses
import json

import numpy as np
import transformers

from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.config import IMAGE_TOKEN
from tests.support import hf, tiny

torch = hf.torch

SHAPE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7,
             layer_norm_eps=1e-4)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tower.

    `config` and `model` are transformers' classes, `strategy` what its LLaVA has to select, `act` the kind's activation.
    """

    config: type
    model: type
    strategy: str
    act: str
    more: dict = dataclasses.field(default_factory=dict)

    def theirs(self, seed=0, **changes):
        model = self.model(self.config(**{**SHAPE, "hidden_act": self.act, **self.more, **changes})).eval()
        hf.randomise(model, seed, activation_scale=0.02)  # larger activations would hide eps
        return model

    @property
    def class_tokens(self):
        return int(self.strategy == "default")


KINDS = {
    "clip": Kind(transformers.CLIPVisionConfig, transformers.CLIPVisionModel, "default", "quick_gelu"),
    "siglip": Kind(transformers.SiglipVisionConfig, transformers.SiglipVisionModel, "full", "gelu_pytorch_tanh"),
    "vit": Kind(transformers.ViTConfig, transformers.ViTModel, "default", "gelu"),
}


def decoder_directory(directory, config=None):
    config = config or tiny.LLAMA
    return tiny.save(directory, config, tiny.drawn(tiny.decoder_shapes(config), seed=2, dtype=np.float32))


def built(kind, root, seed=0, projector="mlp2x_gelu", settings=None, **changes):
    """Transformers' tower, saved by transformers, and our checkpoint of it: `convert build`'s."""
    model = KINDS[kind].theirs(seed, **changes)
    model.save_pretrained(root / "tower")
    if settings is not None:
        (root / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    return model, build(decoder_directory(root / "decoder"), root / "tower", projector, root / "scratch")[0]


def hidden_states(model, pixels):
    """float32 [I,T,D] of each hidden state; pixels [I,H,W,3]."""
    with torch.no_grad():
        states = model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    return [state.numpy() for state in states]


def row(cfg, text=(5, 9, 33, 7)):
    """Ids int32 [1,T] with one image."""
    return np.array([[1, *[IMAGE_TOKEN] * cfg.tokens_per_image, *text]], np.int32)


def their_logits(directory, ids, pixels):
    """Logits of the exported checkpoint in transformers; None of its weights may be missing or new."""
    model, said = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    missing = {key for key in said["missing_keys"] if ".pooler." not in key}  # ViT's, which LLaVA does not read
    assert not missing and not said["unexpected_keys"] and not said["mismatched_keys"], said
    model.config._attn_implementation = "eager"
    ids = torch.tensor(np.where(ids == IMAGE_TOKEN, model.config.image_token_id, ids)).long()
    with torch.no_grad():
        return model.float().eval()(input_ids=ids, pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
