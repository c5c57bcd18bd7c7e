"""The kinds of decoder. A new kind is a file here, a line of `DECODERS`, and its module in `models/decoders`.

This package does not import jax: a processor reads configs in programs without jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavamed_jax.config.checks import as_object
from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.decoders.olmo import Olmo2Config
from llavamed_jax.config.decoders.qwen import Qwen2Config, Qwen3Config
from llavamed_jax.config.rope import RopeScaling
from llavamed_jax.errors import UserError, short

# By `model_type` of a config.json.
DECODERS: dict[str, type[DecoderConfig]] = {
    "llama": DecoderConfig,
    "mistral": DecoderConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
}


def _kind(name: Any) -> type[DecoderConfig]:
    if not isinstance(name, str) or name not in DECODERS:
        raise UserError(f"the decoder's model_type is {short(name)}; one of {', '.join(DECODERS)} was expected")
    return DECODERS[name]


def kind_of_original(model_type: Any) -> str | None:
    """Returns the decoder's kind in the `model_type` of an original (`llava_qwen`) or a plain decoder, or None."""
    for kind, config in DECODERS.items():
        if model_type in (kind, f"llava_{kind}", f"llava_{config.original or kind}"):
            return kind
    return None


def decoder_from_hf(config: Mapping[str, Any], architecture: str | None = None) -> DecoderConfig:
    """Reads a decoder's config from its `config.json`.

    Args:
      config: the content of `config.json`.
      architecture: replaces the `model_type` in it; None keeps it.

    Raises:
      UserError: an unknown kind of decoder, or settings that the kind does not have.
    """
    return _kind(architecture or config.get("model_type", "llama")).from_hf(config, architecture)


def decoder_from_dict(fields: Mapping[str, Any]) -> DecoderConfig:
    """Reads a decoder's config from this project's own file, where `architecture` names the kind."""
    fields = dict(fields)
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**as_object(fields["rope_scaling"], "rope_scaling"))
    if isinstance(fields.get("more_eos_ids"), list):  # JSON has no tuples
        fields["more_eos_ids"] = tuple(fields["more_eos_ids"])
    kind = fields.get("architecture", DecoderConfig.architecture)
    # The class refuses a value that is not text, with the field's name.
    return (_kind(kind) if isinstance(kind, str) else DecoderConfig)(**fields)
