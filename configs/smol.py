"""SmolLM2-135M-Instruct, real pretrained weights, learns to see with a small tower, on the CPU of any machine.

    make smol                                        builds the model, trains a short version, evaluates and asks
    python train.py --config configs/smol.py:align --workdir runs/smol/align             then instruct, then vqa:
    python train.py --config configs/smol.py:epochs=2 --workdir runs/smol/vqa     # 73 minutes on two busy cores

The stages start from what `python samples/smol.py --prepare --source data/vqa_rad --source data/slake` makes: the model in
`runs/smol/init`, and captions, conversations and questions in `runs/smol/texts`, from the training rows of VQA-RAD and
SLAKE. With `--vision runs/small` the tower is the one that `configs/small.py` has trained on the same rows, in a decoder
that costs a tenth; without, it is random. README's figures are of such a tower, align, and vqa from it
(`--config.init=runs/smol/align`). Tower and projector learn faster than the pretrained decoder. Every number is ours.
README's third epoch joins other questions of an image:

    python samples/smol_texts.py --source data/vqa_rad --source data/slake --out runs/smol/texts_1 --seed 1
    python train.py --config configs/smol.py:epochs=1 --config.init=runs/smol/vqa --workdir runs/smol/more \
      --config.data.train=runs/smol/texts_1/questions.json --config.optimizer.learning_rate=1e-4 --config.seed=43
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

ROOT = "runs/smol"
SEEING = ("vision_tower/.*", "projector/.*")
# The decoder's table, which is its head too, stays: a fifth of the parameters, and a tenth of an update's time.
LAYERS = (*SEEING, "decoder/layers_.*", "decoder/norm/.*")
TOWER_AND_PROJECTOR = (("vision_tower/.*", 3e-4), ("projector/.*", 5e-4))
STAGES = {
    # Captions: the decoder is frozen, and tower and projector learn to say what it reads.
    "align": dict(init=f"{ROOT}/init", train=f"{ROOT}/texts/captions.json", trainable=SEEING, learning_rate=1e-3,
                  overrides=(("vision_tower/.*", 3e-4),), batch_size=16, max_length=96, row_length=384, mean_text=48),
    "instruct": dict(init=f"{ROOT}/align", train=f"{ROOT}/texts/conversations.json", trainable=LAYERS, learning_rate=1e-4,
                     overrides=TOWER_AND_PROJECTOR, batch_size=9, max_length=288, row_length=512, mean_text=123),
    # Up to six questions of an image in a conversation, about five.
    "vqa": dict(init=f"{ROOT}/instruct", train=f"{ROOT}/texts/questions.json", trainable=LAYERS, learning_rate=2e-4,
                overrides=TOWER_AND_PROJECTOR, batch_size=6, max_length=320, row_length=512, mean_text=123),
}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=1, words=("vqa", "align", "instruct"), has_models=False, has_small=False)
    stage = STAGES[args.word]

    c = common.base(f"smol {args.word}", stage["init"], "hf:chatml", stage["train"])
    c.protocol = "clean"
    c.data.row_length = stage["row_length"]
    c.data.mean_text = stage["mean_text"]
    c.data.workers = 0  # two cores have enough to do

    c.batch_size = stage["batch_size"]
    c.micro_batches = 1
    c.epochs = args.epochs
    c.max_length = stage["max_length"]
    c.trainable = stage["trainable"]
    c.optimizer.update(
        learning_rate=stage["learning_rate"], warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        overrides=stage["overrides"])
    c.seed = 42

    c.mesh.update(data=-1, fsdp=1)
    c.remat = "none"
    c.checkpoint.update(every_steps=0, every_minutes=10.0, keep=1)
    c.log_every = 10
    c.samples_every = 0
    return c
