"""Stage 2, instruction tuning: conversations about figures train projector and decoder; the tower stays as it is.

    python train.py --config configs/finetune.py:v1 --workdir runs/finetune --config.init=runs/pretrain
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

# family: epochs, clip norm, template. All three: batches of 128, learning rate 2e-5.
# v1: the table of LLaVA-Med v1.0's README, stage 2 (the command beside it makes batches of 64), clipped by HF's Trainer.
# llava15: LLaVA-1.5's scripts/v1_5/finetune.sh (16 x 8 GPUs); its DeepSpeed config has no clipping.
# v15: LLaVA-Med v1.5's recipe was never published; v1's numbers with v1.5's model and template are our choice.
PUBLISHED = {"v15": (3, 1.0, "v1.5:mistral_instruct"), "v1": (3, 1.0, "v1.0:v0"), "llava15": (1, 0.0, "up:vicuna_v1")}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=0)  # 0: as published
    epochs, clip_norm, template = PUBLISHED[args.family]

    init = "preset:small" if args.small else "runs/pretrain"
    train = "data/instruct/llava_med_instruct_60k_inline_mention.json"
    c = common.base(f"finetune {args.preset}", init, template, train)
    c.data.images = "data/images"
    c.data.mean_text = 504
    c.batch_size = 128
    c.micro_batches = "auto"  # on eight devices two rows of 8,192 tokens each at a time
    c.epochs = args.epochs or epochs
    c.max_length = 2048  # all three
    # v1.0 ran one sample a micro-batch through HF's Trainer, which averages their means: every sample weighs alike.
    c.loss_weighting = "sample" if args.family == "v1" else "token"
    c.trainable = ("projector/.*", "decoder/.*")

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer.update(
        learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=clip_norm, b1=0.9, b2=0.999, eps=1e-8)
    c.seed = 42  # of HF's Trainer

    if args.small:  # on the sample that comes along
        common.on_a_cpu(c, train=f"{common.SAMPLE}/instruct.json", images=f"{common.SAMPLE}/images", mean_text=64)
    return c
