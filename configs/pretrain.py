"""Stage 1, concept alignment: captions teach the projector to speak the decoder's language; nothing else moves.

    python train.py --config configs/pretrain.py:v1 --workdir runs/pretrain --config.init=runs/start
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

# family: learning rate, batch size, clip norm, template.
# v1: LLaVA-Med v1.0's README, stage 1 (2 samples x 8 steps x 8 GPUs), clipped as HF's Trainer does by itself.
# llava15: LLaVA-1.5's scripts/v1_5/pretrain.sh (32 x 8 GPUs); its DeepSpeed config has no clipping.
# v15: LLaVA-Med v1.5's recipe was never published; v1's numbers with v1.5's model and template are our choice.
PUBLISHED = {
    "v15": (2e-3, 128, 1.0, "v1.5:plain"), "v1": (2e-3, 128, 1.0, "v1.0:v0"), "llava15": (1e-3, 256, 0.0, "up:plain"),
}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=1)  # of all three
    rate, batch_size, clip_norm, template = PUBLISHED[args.family]

    init = "preset:small" if args.small else "runs/start"  # what `python -m convert build --out runs/start` writes
    c = common.base(f"pretrain {args.preset}", init, template, "data/alignment/llava_med_alignment_500k.json")
    c.data.images = "data/images"
    c.data.mean_text = 104
    c.batch_size = batch_size
    c.micro_batches = "auto"  # on eight devices 10,240 tokens each at a time
    c.epochs = args.epochs
    c.max_length = 2048  # all three
    c.loss_weighting = "token"  # v1.0 ran two samples a micro-batch: neither this nor "sample" is quite that
    c.trainable = ("projector/.*",)
    if args.family == "v1":  # and the rows of the tokens about an image, where the model has them: the original's whole
        # table is open too, but nothing else of it is meant to move (quirk Q12)
        c.trainable += (("decoder/embed_tokens/embedding", ("<im_start>", "<im_end>")),)

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer.update(
        learning_rate=rate, warmup_ratio=0.03, weight_decay=0.0, clip_norm=clip_norm, b1=0.9, b2=0.999, eps=1e-8)
    c.seed = 42  # of HF's Trainer
    c.mesh.update(data=-1, fsdp=1)  # the frozen model fits each device

    if args.small:  # on the sample that comes along
        common.on_a_cpu(
            c, train=f"{common.SAMPLE}/alignment.json", images=f"{common.SAMPLE}/images", mean_text=64)
    return c
