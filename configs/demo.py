"""The demo: a small model through the whole curriculum, on the CPU of any machine and the images that come along.

    python train.py --config configs/demo.py:warmup --workdir runs/demo/warmup        then align, instruct, vqa

No pretrained decoder or tower exists offline, so a stage of its own stands in for them: it warms both up on the sample.
The three stages after it are LLaVA-Med's. Every number here is ours; fifteen images are in no stage.
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

SAMPLE = common.SAMPLE
CAPTIONS, TURNS, QUESTIONS, ORGAN = (f"{SAMPLE}/{name}.json" for name in ("alignment", "instruct", "vqa_train", "organ"))
CHAT, ALL_TEXT = "v1.5:mistral_instruct", ("projector/.*", "decoder/.*")
# Rows are as long as a stage's longest sample. The tower moves a tenth as fast as the decoder: with 45 images it would
# learn them by heart, and a random tower's features already tell the three organs apart.
STAGES = {
    "warmup": dict(init="preset:small", train=CAPTIONS, template="v1.5:plain", trainable=("vision_tower/.*", "decoder/.*"),
                   learning_rate=1e-3, overrides=(("vision_tower/.*", 1e-4),), batch_size=32, max_length=52, total_steps=20),
    "align": dict(init="runs/demo/warmup", train=CAPTIONS, template="v1.5:plain", trainable=("projector/.*",),
                  learning_rate=1e-3, overrides=(), batch_size=32, max_length=52, total_steps=10),
    "instruct": dict(init="runs/demo/align", train=TURNS, template=CHAT, trainable=ALL_TEXT,
                     learning_rate=4e-4, overrides=(), batch_size=8, max_length=360, total_steps=50),
    "vqa": dict(init="runs/demo/instruct", template=CHAT, trainable=ALL_TEXT,
                # The organ question, which only the image answers, is asked more often than it stands in the data.
                train=(dict(path=QUESTIONS), dict(path=ORGAN, weight=4)),
                learning_rate=1e-4, overrides=(), batch_size=32, max_length=104, total_steps=36),
}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, words=tuple(STAGES), has_models=False)
    stage = STAGES[args.word]

    c = common.base(args.word, stage["init"], stage["template"], stage["train"])
    if args.word == "warmup":
        c.tokenizer = f"{SAMPLE}/tokenizer.model"
    c.data.images = f"{SAMPLE}/images"
    c.data.packing = False
    c.data.mean_text = 34
    c.data.workers = 0  # two cores have enough to do

    c.batch_size = stage["batch_size"]
    c.micro_batches = 1
    c.total_steps = stage["total_steps"]
    c.max_length = stage["max_length"]
    c.trainable = stage["trainable"]
    c.optimizer.update(
        learning_rate=stage["learning_rate"], warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        overrides=stage["overrides"])
    c.seed = 42

    c.mesh.update(data=-1, fsdp=1)
    c.remat = "none"
    c.checkpoint.update(every_steps=0, every_minutes=0.0, keep=1)  # at the end only
    c.samples_every = 0
    return c
