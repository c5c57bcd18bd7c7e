"""LLaVA-Med's curriculum with parts of 2025: the tower SigLIP 2 so400m (patch14-384) and the language model Qwen3-8B.

    python -m convert build --decoder Qwen/Qwen3-8B --vision google/siglip2-so400m-patch14-384 --projector mlp2x_gelu \\
        --out runs/modern/start
    python train.py --config configs/modern.py:align --workdir runs/modern/align      then instruct, vqa

No such model was published with a recipe: every number here is ours, near those of LLaVA-1.5. In the last stage the last
four layers of the tower are trained too, at a tenth of the rate.
"""

from ml_collections import ConfigDict

from configs import common
from llavamed_jax.recipes import recipe_arguments

PRESET, CHAT = "modern-8b", "hf:qwen3"
DECODER = ("projector/.*", "decoder/.*")
LAST_FOUR = "vision_tower/layers_-[1-4]/.*"
# An image is 729 tokens; captions have about 100 more, conversations 500, questions 45.
STAGES = {
    "align": dict(init="runs/modern/start", train="data/alignment/llava_med_alignment_500k.json", template="up:plain", epochs=1,
                  sample="alignment", trainable=("projector/.*",), learning_rate=1e-3, overrides=(), batch_size=256, mean_text=101),
    "instruct": dict(init="runs/modern/align", train="data/instruct/llava_med_instruct_60k_inline_mention.json", template=CHAT,
                     epochs=3, sample="instruct", trainable=DECODER, learning_rate=1e-5, overrides=(), batch_size=128, mean_text=501),
    "vqa": dict(init="runs/modern/instruct", train=(dict(path="data/vqa_rad"), dict(path="data/slake")), template=CHAT,
                epochs=3, sample="vqa_train", trainable=(*DECODER, LAST_FOUR), learning_rate=1e-5, overrides=(("vision_tower/.*", 1e-6),),
                batch_size=64, mean_text=46),
}


def get_config(arg: str = "") -> ConfigDict:
    args = recipe_arguments(arg, epochs=0, words=tuple(STAGES), has_models=False)  # 0: the stage's own
    stage = STAGES[args.word]

    init, train = stage["init"], stage["train"]
    if args.small:  # on the sample that comes along
        init, train = "preset:small", f"{common.SAMPLE}/{stage['sample']}.json"
    c = common.base(f"modern {args.word} {'small' if args.small else PRESET}", init, stage["template"], train)
    if args.word != "vqa":
        c.data.images = "data/images"
    c.data.mean_text = stage["mean_text"]
    c.batch_size = stage["batch_size"]
    c.micro_batches = "auto"
    c.epochs = args.epochs or stage["epochs"]
    c.max_length = 2048
    c.trainable = stage["trainable"]
    c.optimizer.update(
        learning_rate=stage["learning_rate"], warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
        overrides=stage["overrides"])
    c.seed = 42
    if args.word == "vqa":
        c.protocol = None if args.small else "clean"
        c.checkpoint.every_steps = 100

    if args.small:  # whose tokenizer lacks the special tokens of Qwen3's template
        common.on_a_cpu(c, images=f"{common.SAMPLE}/images", mean_text=64)
        c.template = "up:plain" if args.word == "align" else "v1.5:mistral_instruct"
    return c
