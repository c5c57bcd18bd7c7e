"""The demo: a small model through the whole curriculum, on the CPU of any machine and the images that come along.

    python train.py --config configs/demo.py:warmup --workdir runs/demo/warmup        then align, instruct, vqa

No pretrained decoder or tower exists offline, so a stage of its own stands in for them: it warms both up on the sample.
The three stages after it are LLaVA-Med's. Every number here is ours; fifteen images are in no stage.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments

# stage: what it starts from, its data, template, what is trained, learning rate, epochs.
SAMPLE = "samples/vqa_rad"
STAGES = {
    "warmup": ("preset:small", "vqa_train.json", "v1.5:mistral_instruct", ("vision_tower/.*", "decoder/.*"), 1e-3, 12),
    "align": ("runs/demo/warmup", "alignment.json", "v1.5:plain", ("projector/.*",), 1e-3, 8),
    "instruct": ("runs/demo/align", "instruct.json", "v1.5:mistral_instruct", ("projector/.*", "decoder/.*"), 3e-4, 8),
    "vqa": ("runs/demo/instruct", "vqa_train.json", "v1.5:mistral_instruct", ("projector/.*", "decoder/.*"), 3e-4, 4),
}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=0, words=tuple(STAGES))  # epochs 0: the stage's own
    init, data, template, trainable, rate, epochs = STAGES[args.word]

    c = ConfigDict()
    c.name = args.word
    c.init = init
    c.vision_tower = placeholder(str)
    c.tokenizer = f"{SAMPLE}/tokenizer.model" if init.startswith("preset:") else placeholder(str)
    c.template = template

    c.data = ConfigDict()
    c.data.train = f"{SAMPLE}/{data}"
    c.data.images = f"{SAMPLE}/images"
    c.data.validation = placeholder(str)
    c.data.protocol = placeholder(str)
    c.data.packing = False  # several samples a row of row_length tokens (0: picked); not available yet
    c.data.row_length = 0
    c.data.mean_length = 70
    c.data.workers = 0  # two cores have enough to do

    c.batch_size = 8
    c.micro_batches = 1
    c.epochs = args.epochs or epochs
    c.total_steps = placeholder(int)
    c.max_length = 96
    c.trainable = trainable

    c.optimizer = ConfigDict(dict(
        learning_rate=rate, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=()))

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tp=1, slices=1, auto=False))
    c.remat = "none"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=0, every_minutes=0.0, keep=1, keep_best=False))  # at the end only
    c.log_every = 10
    c.seed = 42
    return c
