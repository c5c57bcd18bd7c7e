"""Stage 3 on VQA-RAD with low-rank factors (LoRA): factors beside the decoder's kernels are trained with the projector.

    python train.py --config configs/lora_vqa.py --workdir runs/lora_vqa --config.data.train=DIRECTORY_OF_VQA_RAD

A run stores factors and projector only; it needs the checkpoint that it was started from. `convert merge-lora` makes a
model of both, `convert export-lora` writes the factors as PEFT reads them.
"""

from ml_collections import ConfigDict

from configs import lora, vqa_rad
from llavamed_jax.recipes import recipe_arguments

# LLaVA-1.5's scripts/v1_5/finetune_task_lora.sh has the numbers of its finetune_lora.sh; everything else as in vqa_rad.py.


def get_config(arg: str = "") -> ConfigDict:
    return lora.adapted(vqa_rad.get_config(arg), "lora_vqa", recipe_arguments(arg, epochs=3, protocol="clean"))
