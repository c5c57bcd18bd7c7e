"""Stage 3 on VQA-RAD with low-rank factors (LoRA): factors beside the decoder's kernels are trained with the projector.

    python train.py --config configs/lora_vqa.py --workdir runs/lora_vqa --config.data.train=DIRECTORY_OF_VQA_RAD

A run stores factors and projector only; it needs the checkpoint that it was started from. `convert merge-lora` makes a
model of both, `convert export-lora` writes the factors as PEFT reads them.
"""

from ml_collections import ConfigDict

from configs import vqa_rad
from llavamed_jax.recipes import recipe_arguments

# LLaVA-1.5's scripts/v1_5/finetune_task_lora.sh: rank 128, alpha 256 and its default dropout of 0.05, factors at 2e-4, projector
# at 2e-5 (mm_projector_lr), everything else as in vqa_rad.py.


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=3, protocol="clean")

    c = vqa_rad.get_config(arg)
    c.name = f"lora_vqa {args.preset}"
    c.lora.update(rank=128, alpha=256.0, dropout=0.05)
    c.trainable = ("decoder/.*_lora_[ab]", "projector/.*")
    c.optimizer.learning_rate = 2e-4
    c.optimizer.overrides = (("projector/.*", 2e-5),)
    if args.small:
        c.lora.update(rank=8, alpha=16.0)
    return c
