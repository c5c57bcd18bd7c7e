"""Says whether vLLM serves an adapter beside its base.

Source: `PEFTHelper` and `LoRAConfig` in the wheel of vLLM 0.33, read and not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavamed_jax.errors import some

RANKS, RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16  # values of vLLM's --max-lora-rank, and its default


def refuses(settings: Mapping[str, Any]) -> str | None:
    """Returns a sentence about what vLLM refuses in an adapter, and what helps; None if it serves the adapter.

    Args:
      settings: the content of `adapter_config.json`.
    """
    merge = "`convert merge-lora --layout transformers` makes a model that it serves"
    if saved := settings.get("modules_to_save"):
        return f"vLLM refuses this adapter, because {some(saved, 3)} was trained whole (modules_to_save); {merge}"
    rank = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    if rank <= RANK:
        return None
    if rank > RANKS[-1]:
        return f"vLLM refuses this adapter, because its rank is {rank}, and at most {RANKS[-1]} is possible; {merge}"
    taken = min(each for each in RANKS if each >= rank)
    return f"vLLM needs --max-lora-rank {taken} for this adapter; its default is {RANK}"
