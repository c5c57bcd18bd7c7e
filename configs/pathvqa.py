"""Stage 3 on PathVQA: short answers to clinicians' questions, trained as in stage 2.

    python train.py --config configs/pathvqa.py:epochs=9 --workdir runs/pathvqa --config.data.train=DIRECTORY_OF_PATHVQA

The 19,755 training questions (2,599 images) of the release's folder, of the hub's parquet files, or of a LLaVA file made of them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments

# LLaVA-Med v1.0's README, downstream: batches of 64 (1 sample x 8 steps x 8 GPUs), 2e-5, 3 epochs, clipped by HF's Trainer;
# its released weights were trained for epochs=9, the paper's best rows for epochs=15. LLaVA-Med v1.5's own recipe was never
# published, nor one for LLaVA-1.5: to take the same numbers for both is our choice.
TEMPLATES = {"v15": "v1.5:mistral_instruct", "v1": "v1.0:v0", "llava15": "up:vicuna_v1"}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=3)

    c = ConfigDict()
    c.name = f"pathvqa {args.preset}"
    c.init = "preset:small" if args.small else "runs/finetune"
    c.vision_tower = placeholder(str)
    c.tokenizer = placeholder(str)
    c.template = TEMPLATES[args.family]
    c.protocol = placeholder(str)

    c.data = ConfigDict()
    c.data.train = "data/pathvqa"  # the official layout: qas/, images/
    c.data.images = placeholder(str)  # beside the questions; those of parquet files are written there
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)  # asked every samples_every steps; none: of data.validation, else of data.train
    c.data.packing = True  # several samples a row of row_length tokens (0: picked)
    c.data.row_length = 0
    c.data.mean_length = 620  # tokens a sample, image included: for planning where no data is at hand
    c.data.workers = 8
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = 64  # samples an update
    c.micro_batches = 1  # on eight devices 4,096 tokens each
    c.epochs = args.epochs
    c.total_steps = placeholder(int)  # in place of epochs
    c.max_length = 2048  # as in its command
    # v1.0 ran one sample a micro-batch through HF's Trainer, which averages their means: every sample weighs alike.
    c.loss_weighting = "sample" if args.family == "v1" else "token"
    c.trainable = ("projector/.*", "decoder/.*")

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer = ConfigDict(dict(
        learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=()))

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tp=1, slices=1, auto=False))
    c.remat = "full"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=100, every_minutes=30.0, keep=2, keep_best=False))
    c.log_every = 10
    c.samples_every = 200
    c.nan_limit = 10  # updates in a row that are not finite, or have no gradient, end the run
    c.seed = 42  # of HF's Trainer

    if args.small:  # on a CPU, from random weights; the questions are PathVQA's own all the same
        c.tokenizer = "samples/vqa_rad/tokenizer.model"
        c.data.update(mean_length=70, workers=0, packing=False)
        c.update(batch_size=8, micro_batches=1, max_length=160, remat="none")
        c.log_every = 1
    return c
