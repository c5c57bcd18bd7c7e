"""Stage 2, instruction tuning: conversations about figures train projector and decoder; the tower stays as it is.

    python train.py --config configs/finetune.py:v1 --workdir runs/finetune --config.init=runs/pretrain
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments

# family: epochs, clip norm, template. All three: batches of 128, learning rate 2e-5.
# v1: the table of LLaVA-Med v1.0's README, stage 2 (the command beside it makes batches of 64), clipped by HF's Trainer.
# llava15: LLaVA-1.5's scripts/v1_5/finetune.sh (16 x 8 GPUs); its DeepSpeed config has no clipping.
# v15: LLaVA-Med v1.5's recipe was never published; v1's numbers with v1.5's model and template are our choice.
PUBLISHED = {"v15": (3, 1.0, "v1.5:mistral_instruct"), "v1": (3, 1.0, "v1.0:v0"), "llava15": (1, 0.0, "up:vicuna_v1")}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=0)  # 0: as published
    epochs, clip_norm, template = PUBLISHED[args.family]

    c = ConfigDict()
    c.name = f"finetune {args.preset}"
    c.init = "preset:small" if args.small else "runs/pretrain"
    c.vision_tower = placeholder(str)
    c.tokenizer = placeholder(str)
    c.template = template
    c.protocol = placeholder(str)  # of VQA-RAD: clean, or paper

    c.data = ConfigDict()
    c.data.train = "data/instruct/llava_med_instruct_60k_inline_mention.json"
    c.data.images = "data/images"
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)  # asked every samples_every steps; none: of data.validation, else of data.train
    c.data.packing = True  # several samples a row of row_length tokens (0: picked)
    c.data.row_length = 0
    c.data.mean_length = 1080  # tokens a sample, image included: for planning where no data is at hand
    c.data.workers = 8
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = 128  # samples an update
    c.micro_batches = 2  # on eight devices a row of 8,192 tokens each at a time
    c.epochs = args.epochs or epochs
    c.total_steps = placeholder(int)  # in place of epochs
    c.max_length = 2048  # all three
    # v1.0 ran one sample a micro-batch through HF's Trainer, which averages their means: every sample weighs alike.
    c.loss_weighting = "sample" if args.family == "v1" else "token"
    c.trainable = ("projector/.*", "decoder/.*")

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer = ConfigDict(dict(
        learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=clip_norm, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=()))

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tp=1, slices=1, auto=False))
    c.remat = "full"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=500, every_minutes=30.0, keep=2, keep_best=False))
    c.log_every = 10
    c.samples_every = 200
    c.nan_limit = 10  # updates in a row that are not finite, or have no gradient, end the run
    c.seed = 42  # of HF's Trainer

    if args.small:  # on a CPU, from random weights, on the sample that comes along
        c.tokenizer = "samples/vqa_rad/tokenizer.model"
        c.data.update(train="samples/vqa_rad/instruct.json", images="samples/vqa_rad/images", mean_length=100, workers=0, packing=False)
        c.update(batch_size=8, micro_batches=1, max_length=160, remat="none")
        c.log_every = 1
    return c
