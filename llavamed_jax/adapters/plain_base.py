"""Opens an adapter of LLaVA's training whose base is a plain language model.

Such a directory has the model's `config.json`, which names the tower, and the projector in `non_lora_trainables.bin`;
the base (`lmsys/vicuna-7b-v1.5`) has the decoder alone.

Source: the branch for `model_base` in `llava/model/builder.py` of LLaVA.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.adapters import peft
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.generation_file import FILE as GENERATION
from llavamed_jax.checkpoints.generation_file import with_stop_ids
from llavamed_jax.checkpoints.model_config import text_files
from llavamed_jax.checkpoints.preprocessor_file import with_image_settings
from llavamed_jax.checkpoints.torch.files import ADAPTER_OTHERS, read_weights
from llavamed_jax.checkpoints.torch.layout import canonical
from llavamed_jax.checkpoints.torch.tower import check_width, fetch_tower, find_tower, tower_config, tower_tensors
from llavamed_jax.config.decoders import DECODERS
from llavamed_jax.config.hf import llava_from_hf, tower_name
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_json

CONFIG = "config.json"


def is_plain(base: Path, adapter: Path) -> bool:
    """Returns whether a base is a plain language model, and an adapter's directory has the whole model's config."""
    if not (base / CONFIG).is_file() or not (adapter / CONFIG).is_file():
        return False
    return read_json(base / CONFIG).get("model_type") in DECODERS and "mm_vision_tower" in read_json(adapter / CONFIG)


def open_joined(base: Path, adapter: Path, vision_tower: Path | None) -> Checkpoint:
    """Returns the model of a plain base, a tower, and an adapter with its projector.

    Args:
      base: the language model's directory.
      adapter: the adapter's directory.
      vision_tower: the tower's directory; None for the one that the adapter's config names.

    Raises:
      UserError: the tower is not found, the adapter has no projector, or one of the parts does not fit.
    """
    raw = read_json(adapter / CONFIG)
    name = tower_name(raw)
    tower = vision_tower or find_tower(adapter, name) or find_tower(base, name) or fetch_tower(adapter, name)
    vision = tower_config(tower)
    try:
        config = llava_from_hf(raw, vision)
    except UserError as error:
        raise UserError(f"{adapter}: {error}") from None
    check_width(tower, vision, raw.get("mm_hidden_size"))
    source = adapter if (adapter / GENERATION).is_file() else base
    config = config.replace(decoder=with_stop_ids(config.decoder, source))
    config = with_image_settings(config, adapter, False, vision_tower)
    tensors = canonical(base, read_weights(base), config, "decoder") | tower_tensors(config, tower)
    plain = Checkpoint(config, "llava", base, tensors, text_files(base) | text_files(adapter),
                       f"{tower}, which mm_vision_tower names", tower_directory=tower)
    joined = peft.apply(plain, adapter)
    lacking = sorted(name for name in names.specs(joined.config) if name not in joined.tensors)
    if lacking:
        raise UserError(f"{adapter} lacks {lacking[0]}, and its base {base} is a plain language model; the projector "
                        f"in {ADAPTER_OTHERS} was expected")
    return joined
