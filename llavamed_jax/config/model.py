"""The config of a whole model, as a frozen (hashable) dataclass that is read from and written to `config.json`.

No field has a default that a checkpoint could contradict: the values of `config.json` are used, and the few defaults
that published configs rely on stand in the files of `towers/` and `decoders/` with their source.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.adapter import AdapterConfig
from llavamed_jax.config.checks import as_object, check_activation, check_fields
from llavamed_jax.config.decoders import decoder_from_dict
from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.towers import tower_from_dict
from llavamed_jax.config.towers.clip import VisionConfig
from llavamed_jax.errors import UserError, short

IMAGE_TOKEN = -200  # stands for an image in token ids (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE = -100  # a label that is not supervised
MOST_BEAMS = 128  # limit of a beam search, which keeps a cache for each beam
PAD_TOKEN = -1  # pads short rows of `logits` on the right
QUANTIZED = ("int8", "int4", "nf4")  # how kernels may be rounded (`quantized.rounding.ROUNDINGS`)
KV_CACHES = ("int8",)  # dtypes of a key/value cache beside the computation's own
# The key of an exported config.json for settings that the layout itself has no key for.
OURS = "llavamed_jax"

@dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a projector and a decoder, and how the three are joined.

    Attributes:
      vision: the tower's config.
      decoder: the decoder's config.
      projector_type: `linear`, `mlpNx_gelu` or `identity`.
      projector_bias: whether the projector has biases.
      feature_layer: index of the tower's hidden state that the projector reads (0 is the embedding after
        `pre_layrnorm`, k the output of block k, negative from the end).
      feature_select: `patch` leaves out the class token, `cls_patch` keeps it.
      image_aspect_ratio: `pad` pads images to a square, `square` does not.
      max_length: the longest prompt in tokens; None for no limit.
      use_start_end: whether images stand between `<im_start>` and `<im_end>`.
      template: name of the prompt template; None for that of `source`.
      source: the `model_type` of the original that the model follows, or `transformers`.
      image_token_id: the id of `<image>` in transformers' layout; None if the model has none.
      extra: JSON text of the keys of the source `config.json` that this class does not model; an export writes them.
      projector_act: the projector's activation, by its name in transformers.
      adapter: the low-rank factors beside the kernels; None for a model without an adapter.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    projector_type: str = "mlp2x_gelu"
    projector_bias: bool = True
    feature_layer: int = -2
    feature_select: str = "patch"
    image_aspect_ratio: str = "pad"
    max_length: int | None = 2048
    use_start_end: bool = False
    template: str | None = None
    source: str = "llava_mistral"
    image_token_id: int | None = None
    extra: str = "{}"
    projector_act: str = "gelu"
    adapter: AdapterConfig | None = None

    def __post_init__(self):
        check_fields(self, "")
        if self.feature_select not in ("patch", "cls_patch"):
            raise UserError(f"the vision feature selection is {short(self.feature_select)}; patch or cls_patch was "
                            "expected")
        if self.image_aspect_ratio not in ("pad", "square"):
            raise UserError(f"the config has image_aspect_ratio {short(self.image_aspect_ratio)}; pad or square was "
                            "expected")
        if not -self.vision.num_layers - 1 <= self.feature_layer <= self.vision.num_layers:
            raise UserError(f"feature layer {self.feature_layer} does not exist in a tower of {self.vision.num_layers} "
                            "layers")
        projector_depth(self.projector_type)
        check_activation("projector_hidden_act", self.projector_act)

    @property
    def num_vision_layers_used(self) -> int:
        """The number of blocks that the selected hidden state needs: 23 of CLIP-L's 24 for layer -2."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.vision.num_layers + 1 + layer

    @functools.cached_property
    def tokens_per_image(self) -> int:
        """The number of positions that an image takes in the decoder."""
        return self.vision.num_patches + self.vision.class_tokens * (self.feature_select == "cls_patch")

    @property
    def image_length(self) -> int:
        """The positions that an image takes in a prompt, with the start and end tokens about it."""
        return self.tokens_per_image + 2 * self.use_start_end

    @property
    def select_strategy(self) -> str:
        """The `vision_feature_select_strategy` of transformers; `default` leaves out any tower's first position."""
        return "default" if self.feature_select == "patch" and self.vision.class_tokens else "full"

    def rows_in_transformers(self, ids: tuple[int, int]) -> int:
        """Returns the rows of the embedding table in transformers' layout.

        A table that has an <image> of its own, or unused rows for <image> and <pad>, stays as it is. Other tables are
        filled up to a multiple of 64, as transformers' `convert_llava_weights_to_hf.py` does.

        Args:
          ids: the ids of <image> and <pad>.
        """
        rows, needed = self.decoder.vocab_size, 1 + max(ids)
        return rows if self.image_token_id is not None or needed <= rows else -(-needed // 64) * 64

    def vision_flops_per_image(self) -> float:
        """Returns the FLOPs of one image's forward pass through the used blocks; attention is over the full square."""
        v, n = self.vision, self.vision.num_positions
        block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
        return self.num_vision_layers_used * (2 * n * block + 4 * n * n * v.hidden_size)

    def replace(self, **changes) -> "LlavaConfig":
        """Returns a copy with other values of some fields."""
        return dataclasses.replace(self, **changes)

    def ending_with(self, eos_ids: tuple[int, ...]) -> "LlavaConfig":
        """Returns a copy whose answers end with these ids."""
        return self.replace(decoder=dataclasses.replace(self.decoder, **self.decoder.ends_with(eos_ids)))

    def to_dict(self) -> dict:
        """Returns the content of this project's own `model/config.json`."""
        out = {"model_type": "llavamed_jax", **dataclasses.asdict(self), "extra": json.loads(self.extra)}
        if self.vision.model_type != VisionConfig.model_type:  # older files, with CLIP only, do not name the kind
            out["vision"]["model_type"] = self.vision.model_type
        if self.adapter is None:  # as older files
            del out["adapter"]
        return out

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "LlavaConfig":
        """Reads the content of this project's own `model/config.json`. Raises UserError for unknown keys."""
        d = {k: v for k, v in d.items() if k != "model_type"}
        d |= {part: as_object(d.get(part), part) for part in ("vision", "decoder")}
        known = {f.name for f in dataclasses.fields(cls)}
        if set(d) - known:
            raise UserError(f"config.json has the unknown keys {sorted(set(d) - known)}")
        if d.get("adapter") is not None:
            d["adapter"] = AdapterConfig.from_dict(d["adapter"])
        return cls(**{**d, "vision": tower_from_dict(d["vision"]), "decoder": decoder_from_dict(d["decoder"]),
                      "extra": json.dumps(as_object(d.get("extra", {}), "extra"), sort_keys=True)})


def projector_depth(projector_type: str) -> int:
    """Returns the number of linear layers of `linear` (1), `mlpNx_gelu` (N) or `identity` (0).

    Raises:
      UserError: another type of projector.
    """
    if projector_type == "identity":
        return 0
    if projector_type == "linear":
        return 1
    found = re.fullmatch(r"mlp0*([1-9][0-9]?)x_gelu", projector_type)
    if found:
        return int(found[1])
    raise UserError(f"the projector type is {short(projector_type)}; linear, mlpNx_gelu or identity was expected")
