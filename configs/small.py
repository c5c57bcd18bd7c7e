"""What a small model learns from VQA-RAD and SLAKE on a CPU in 20 minutes: no pretrained part, one stage, all of it trained.

    python train.py --config configs/small.py --workdir runs/small
    python eval.py --config configs/eval/slake.py --config.data.root=data/slake --config.data.split=validation \\
        --checkpoint runs/small --workdir runs/small_slake --control image

It is the whole path on real data, not LLaVA-Med's recipe: every number here is ours. SLAKE's validation images are in no
training row, of VQA-RAD or of SLAKE.
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=4, has_models=False)

    # 1,797 and 4,919 questions, in their official layouts.
    train = (dict(path="data/vqa_rad"), dict(path="data/slake"))
    c = common.base("small", "preset:small", "v1.5:mistral_instruct", train)
    c.tokenizer = f"{common.SAMPLE}/tokenizer.model"  # of 1,024 pieces; what they lack is spelled in bytes
    c.protocol = "clean"
    c.data.row_length = 256
    c.data.mean_text = 44
    c.data.workers = 0  # two cores have enough to do

    c.batch_size = 29  # what eight rows hold
    c.micro_batches = 1
    c.epochs = args.epochs
    c.max_length = 160
    c.trainable = ("vision_tower/.*", "projector/.*", "decoder/.*")
    c.optimizer.update(  # the tower half as fast: it sees 870 images
        learning_rate=6e-4, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        overrides=(("vision_tower/.*", 3e-4),))
    c.seed = 42

    c.mesh.update(data=-1, fsdp=1)
    c.remat = "none"
    c.checkpoint.update(every_steps=200, every_minutes=0.0, keep=1)
    c.log_every = 20
    c.samples_every = 0
    return c
