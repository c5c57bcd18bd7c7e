"""Stage 2 with low-rank factors (LoRA): the decoder's kernels stay, and factors beside them are trained with the projector.

    python train.py --config configs/lora.py --workdir runs/lora --config.init=runs/pretrain

A run stores factors and projector only; it needs the checkpoint that it was started from. `convert merge-lora` makes a
model of both, `convert export-lora` writes the factors as PEFT reads them.
"""

from ml_collections import ConfigDict

from configs import finetune
from llavamed_jax.recipes import RecipeArguments, recipe_arguments

# LLaVA-1.5's scripts/v1_5/finetune_lora.sh: rank 128, alpha 256 and its default dropout of 0.05, factors at 2e-4, projector
# at 2e-5 (mm_projector_lr), everything else as in finetune.sh. For v15 and v1 the same numbers are our choice.


def get_config(arg: str = "") -> ConfigDict:
    return adapted(finetune.get_config(arg), "lora", recipe_arguments(arg, epochs=0))  # 0: as published


def adapted(c: ConfigDict, name: str, args: RecipeArguments) -> ConfigDict:
    """The recipe of a whole decoder with factors in its place."""
    c.name = f"{name} {args.preset}"
    c.lora.update(rank=128, alpha=256.0, dropout=0.05)
    c.trainable = ("decoder/.*_lora_[ab]", "projector/.*")
    c.optimizer.learning_rate = 2e-4
    c.optimizer.overrides = (("projector/.*", 2e-5),)
    if args.small:
        c.lora.update(rank=8, alpha=16.0)
    return c
