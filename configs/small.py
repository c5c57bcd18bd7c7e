"""What a small model learns from VQA-RAD and SLAKE on a CPU in under an hour: no pretrained part, one stage, all of it trained.

    python train.py --config configs/small.py --workdir runs/small
    python eval.py --config configs/eval/slake.py --config.data.root=data/slake --config.data.split=validation \\
        --checkpoint runs/small --workdir runs/small_slake --control image

It is the whole path on real data, not LLaVA-Med's recipe: every number here is ours. SLAKE's validation images are in no
training row, of VQA-RAD or of SLAKE.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=4)

    c = ConfigDict()
    c.name = "small"
    c.init = "preset:small"
    c.vision_tower = placeholder(str)
    c.tokenizer = "samples/vqa_rad/tokenizer.model"  # of 1,025 pieces; what they lack is spelled in bytes
    c.template = "v1.5:mistral_instruct"
    c.protocol = "clean"

    c.data = ConfigDict()
    c.data.train = (dict(path="data/vqa_rad"), dict(path="data/slake"))  # 1,797 and 4,919 questions, in their official layouts
    c.data.images = placeholder(str)  # beside the questions
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)
    c.data.packing = True  # several samples a row of row_length tokens
    c.data.row_length = 256
    c.data.mean_length = 80
    c.data.workers = 0  # two cores have enough to do
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = 32  # samples an update
    c.micro_batches = 1
    c.epochs = args.epochs
    c.total_steps = placeholder(int)  # in place of epochs
    c.max_length = 160
    c.loss_weighting = "token"  # or "sample"
    c.trainable = ("vision_tower/.*", "projector/.*", "decoder/.*")

    c.optimizer = ConfigDict(dict(  # the tower half as fast: it sees 870 images
        learning_rate=6e-4, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=(("vision_tower/.*", 3e-4),)))

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tp=1, slices=1, auto=False))
    c.remat = "none"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=200, every_minutes=0.0, keep=1, keep_best=False))
    c.log_every = 20
    c.samples_every = 0
    c.nan_limit = 10
    c.seed = 42
    return c
