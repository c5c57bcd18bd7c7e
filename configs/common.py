"""The plumbing of training recipes: every key there is, and how a run is laid out on machines.

Numbers with a source, such as the published hyperparameters, stand in each recipe. Here they are placeholders.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llavamed_jax.recipes import RecipeArguments

SAMPLE = "samples/vqa_rad"
DECODER = r"decoder/layers_\d+/.*_proj"  # every linear layer of the decoder but its head, as LLaVA adapts


def base(name: str, init: str, template: str, train: str | tuple) -> ConfigDict:
    """A recipe with all of its keys, for a cluster. The caller sets those that are placeholders.

    Args:
      name: the run's name.
      init: the checkpoint that the run starts from.
      template: the prompt template.
      train: `data.train`, a path, or a tuple of `{path, images, weight}`.
    """
    c = ConfigDict()
    c.name = name
    c.init = init
    c.vision_tower = placeholder(str)
    c.tokenizer = placeholder(str)
    c.template = template
    c.protocol = placeholder(str)  # of VQA-RAD: clean, or paper

    c.data = ConfigDict()
    c.data.train = train
    c.data.images = placeholder(str)  # none: beside the questions; those of parquet files are written there
    c.data.validation = placeholder(str)
    c.data.samples = placeholder(str)  # asked every samples_every steps; none: of data.validation, else of data.train
    c.data.packing = True  # several samples a row of row_length tokens (0: picked)
    c.data.row_length = 0
    # For planning where no data is at hand: a sample's text and images, whose positions are the model's. Or, of both together,
    c.data.mean_text = placeholder(int)
    c.data.mean_images = 1.0
    c.data.mean_length = placeholder(int)
    c.data.workers = 8
    c.data.skip_limit = 0.5  # of the samples, that may turn out unusable before the run stops

    c.batch_size = placeholder(int)  # samples an update
    c.micro_batches = placeholder(object)  # a number, or auto
    c.batch_size_may_grow = False
    c.epochs = placeholder(int)
    c.total_steps = placeholder(int)  # in place of epochs
    c.max_length = placeholder(int)  # tokens a sample
    c.loss_weighting = "token"  # or "sample"
    c.trainable = placeholder(tuple)
    c.quantize = placeholder(str)  # int8, int4 or nf4: rounds the frozen kernels of the decoder (QLoRA)

    c.optimizer = ConfigDict(dict(  # AdamW, with a cosine to 0
        learning_rate=placeholder(float), warmup_ratio=placeholder(float), weight_decay=placeholder(float),
        clip_norm=placeholder(float), b1=placeholder(float), b2=placeholder(float), eps=placeholder(float),
        mu_dtype="float32", overrides=()))

    # A rank of 0 trains the kernels themselves. Targets are regular expressions over modules' names.
    c.lora = ConfigDict(dict(rank=0, alpha=16.0, dropout=0.0, rslora=False, targets=(DECODER,)))
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tp=1, slices=1, auto=False))
    c.remat = "auto"
    c.compute = placeholder(str)  # bfloat16, float32 or fp8; none: bfloat16, and float32 on a CPU
    c.attention = "auto"
    c.checkpoint = ConfigDict(dict(every_steps=500, every_minutes=30.0, keep=2, keep_best=False))
    c.log_every = 10
    c.samples_every = 200
    c.nan_limit = 10  # updates in a row that are not finite, or have no gradient, end the run
    c.seed = placeholder(int)
    return c


def for_a_task(name: str, args: RecipeArguments, template: str) -> ConfigDict:
    """`base` for stage 3, fine-tuning on a data set in its own layout: it starts from stage 2 and saves more often.

    Args:
      name: the data set, as `data.name` of an evaluation has it.
      args: what stands after the colon.
      template: the prompt template.
    """
    c = base(f"{name} {args.preset}", "preset:small" if args.small else "runs/finetune", template, f"data/{name}")
    c.protocol = args.protocol
    c.checkpoint.every_steps = 100
    return c


def on_a_cpu(c: ConfigDict, **data) -> None:
    """Makes a recipe small, for a CPU and random weights. `data` are further keys of `c.data`."""
    c.tokenizer = f"{SAMPLE}/tokenizer.model"
    c.data.update(workers=0, packing=False, **data)
    c.update(batch_size=8, micro_batches=1, max_length=160, remat="none", log_every=1)
