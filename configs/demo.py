"""The demo: a small model through the whole curriculum, on the CPU of any machine and the images that come along.

    python train.py --config configs/demo.py:warmup --workdir runs/demo/warmup        then align, instruct, vqa

No pretrained decoder or tower exists offline, so a stage of its own stands in for them: it warms both up on the sample.
The three stages after it are LLaVA-Med's. Every number here is ours; fifteen images are in no stage.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.cli.common import recipe_arguments

SAMPLE = "samples/vqa_rad"
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
    args = recipe_arguments(arg, words=tuple(STAGES))
    stage = STAGES[args.word]

    c = ConfigDict()
    c.name = args.word
    c.init = stage["init"]
    c.vision_tower = placeholder(str)
    c.tokenizer = f"{SAMPLE}/tokenizer.model" if args.word == "warmup" else placeholder(str)
    c.template = stage["template"]
    c.protocol = placeholder(str)  # of VQA-RAD: clean, or paper

    c.data = ConfigDict()
    c.data.train = stage["train"]
    c.data.images = f"{SAMPLE}/images"
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)
    c.data.packing = False  # several samples a row of row_length tokens (0: picked)
    c.data.row_length = 0
    c.data.mean_length = 70
    c.data.workers = 0  # two cores have enough to do
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = stage["batch_size"]
    c.micro_batches = 1
    c.epochs = placeholder(int)  # in place of total_steps
    c.total_steps = stage["total_steps"]
    c.max_length = stage["max_length"]
    c.loss_weighting = "token"  # or "sample"
    c.trainable = stage["trainable"]

    c.optimizer = ConfigDict(dict(
        learning_rate=stage["learning_rate"], warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        mu_dtype="float32", overrides=stage["overrides"]))

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tp=1, slices=1, auto=False))
    c.remat = "none"
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=0, every_minutes=0.0, keep=1, keep_best=False))  # at the end only
    c.log_every = 10
    c.samples_every = 0
    c.nan_limit = 10
    c.seed = 42
    return c
