"""Stage 3 on PathVQA: short answers to clinicians' questions, trained as in stage 2.

    python train.py --config configs/pathvqa.py:epochs=9 --workdir runs/pathvqa --config.data.train=DIRECTORY_OF_PATHVQA

The 19,755 training questions (2,599 images) of the release's folder, of the hub's parquet files, or of a LLaVA file made of them.
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

# LLaVA-Med v1.0's README, downstream: batches of 64 (1 sample x 8 steps x 8 GPUs), 2e-5, 3 epochs, clipped by HF's Trainer;
# its released weights were trained for epochs=9, the paper's best rows for epochs=15. LLaVA-Med v1.5's own recipe was never
# published, nor one for LLaVA-1.5: to take the same numbers for both is our choice.
TEMPLATES = {"v15": "v1.5:mistral_instruct", "v1": "v1.0:v0", "llava15": "up:vicuna_v1"}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=3)

    c = common.for_a_task("pathvqa", args, TEMPLATES[args.family])
    c.data.mean_text = 44
    c.batch_size = 64
    c.micro_batches = "auto"  # on eight devices 5,000 tokens each
    c.epochs = args.epochs
    c.max_length = 2048  # as in its command
    # v1.0 ran one sample a micro-batch through HF's Trainer, which averages their means: every sample weighs alike.
    c.loss_weighting = "sample" if args.family == "v1" else "token"
    c.trainable = ("projector/.*", "decoder/.*")

    # HF's Trainer, with which all of them train: AdamW and a cosine to 0; warm-up and no decay as in each one's command.
    c.optimizer.update(
        learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8)
    c.seed = 42  # of HF's Trainer

    if args.small:  # the questions are PathVQA's own all the same
        common.on_a_cpu(c, mean_text=34)
    return c
