"""Stage 1, concept alignment: captions teach the projector to speak the decoder's language; nothing else moves.

    python train.py --config configs/pretrain.py:v1 --workdir runs/pretrain --config.init=runs/start
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments

# family: learning rate, batch size, clip norm, template.
# v1: LLaVA-Med v1.0's README, stage 1 (2 samples x 8 steps x 8 GPUs), clipped as HF's Trainer does by itself.
# llava15: LLaVA-1.5's scripts/v1_5/pretrain.sh (32 x 8 GPUs); its DeepSpeed config has no clipping.
# v15: LLaVA-Med v1.5's recipe was never published; v1's numbers with v1.5's model and template are our choice.
PUBLISHED = {"v15": (2e-3, 128, 1.0, "v1.5:plain"), "v1": (2e-3, 128, 1.0, "v1.0:v0"), "llava15": (1e-3, 256, 0.0, "up:plain")}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=1)  # of all three
    rate, batch_size, clip_norm, template = PUBLISHED[args.family]

    c = ConfigDict()
    c.name = f"pretrain {args.preset}"
    c.init = "preset:small" if args.small else "runs/start"  # what `python -m convert build --out runs/start` writes
    c.vision_tower = placeholder(str)
    c.tokenizer = placeholder(str)
    c.template = template
    c.protocol = placeholder(str)  # of VQA-RAD: clean, or paper

    c.data = ConfigDict()
    c.data.train = "data/alignment/llava_med_alignment_500k.json"
    c.data.images = "data/images"
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)  # asked every samples_every steps; none: of data.validation, else of data.train
    c.data.packing = True  # several samples a row of row_length tokens (0: picked)
    c.data.row_length = 0
    c.data.mean_length = 680  # tokens a sample, image included: for planning where no data is at hand
    c.data.workers = 8
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = batch_size  # samples an update
    c.micro_batches = batch_size // 128  # on eight devices 10,240 tokens each at a time
    c.epochs = args.epochs
    c.total_steps = placeholder(int)  # in place of epochs
    c.max_length = 2048  # all three
    c.loss_weighting = "token"  # v1.0 ran two samples a micro-batch: neither this nor "sample" is quite that
    c.trainable = ("projector/.*",)
    if args.family == "v1":  # and the rows of the tokens about an image, where the model has them: the original's whole table
        # is open too, but nothing else of it is meant to move (quirk Q12)
        c.trainable += (("decoder/embed_tokens/embedding", ("<im_start>", "<im_end>")),)

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer = ConfigDict(dict(
        learning_rate=rate, warmup_ratio=0.03, weight_decay=0.0, clip_norm=clip_norm, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=()))

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tp=1, slices=1, auto=False))  # the frozen model fits each device
    c.remat = "full"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=500, every_minutes=30.0, keep=2, keep_best=False))
    c.log_every = 10
    c.samples_every = 200
    c.nan_limit = 10  # updates in a row that are not finite, or have no gradient, end the run
    c.seed = 42  # of HF's Trainer

    if args.small:  # on a CPU, from random weights, on the sample that comes along
        c.tokenizer = "samples/vqa_rad/tokenizer.model"
        c.data.update(train="samples/vqa_rad/alignment.json", images="samples/vqa_rad/images", mean_length=100, workers=0, packing=False)
        c.update(batch_size=8, micro_batches=1, max_length=160, remat="none")
        c.log_every = 1
    return c
