"""Says whether vLLM serves an adapter beside its base.

Source: `PEFTHelper` of vLLM 0.33, read and not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavamed_jax.errors import some

RANK = 16  # vLLM's default of --max-lora-rank


def refuses(settings: Mapping[str, Any]) -> str | None:
    """Returns a sentence about what vLLM refuses in an adapter, and what helps; None if it serves the adapter.

    Args:
      settings: the content of `adapter_config.json`.
    """
    if saved := settings.get("modules_to_save"):
        return (f"vLLM refuses this adapter, because {some(saved, 3)} was trained whole (modules_to_save); `convert "
                "merge-lora --layout transformers` makes a model that it serves")
    rank = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    return f"vLLM needs --max-lora-rank {rank} for this adapter; its default is {RANK}" if rank > RANK else None
