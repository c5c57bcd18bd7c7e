"""Report generation on IU X-Ray: the findings of a chest X-ray, from all images of the study.

    python train.py --config configs/report.py --workdir runs/report --config.data.train=DIRECTORY_OF_IU_XRAY
    python eval.py --config configs/eval/iu_xray.py --config.data.root=DIRECTORY_OF_IU_XRAY --checkpoint runs/report --workdir runs/eval
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

# LLaVA-Med was not fine-tuned on reports by its authors. The numbers of its downstream tasks (v1.0's README: batches of 64,
# 2e-5, 3 epochs) are our choice, and so is the one instruction for all studies (datasets/iu_xray.py).
TEMPLATES = {"v15": "v1.5:mistral_instruct", "v1": "v1.0:v0", "llava15": "up:vicuna_v1"}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=3)

    c = common.for_a_task("report", args, TEMPLATES[args.family])
    c.data.train = "data/iu_xray"
    c.data.mean_text = 98  # the instruction, and 40 words
    c.data.mean_images = 2.0
    c.batch_size = 64
    c.micro_batches = "auto"
    c.epochs = args.epochs
    c.max_length = 2048
    # As in v1.0: every sample weighs alike, whether its report is short or long.
    c.loss_weighting = "sample" if args.family == "v1" else "token"
    c.trainable = ("projector/.*", "decoder/.*")

    c.optimizer.update(
        learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8)
    c.seed = 42  # of HF's Trainer

    if args.small:  # on your copy of the set: the sample has no reports
        common.on_a_cpu(c, mean_text=108)
        c.max_length = 320
    return c
