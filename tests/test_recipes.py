"""Every recipe with every argument builds, is whole and short, and holds the numbers that were published."""

import ast
import itertools
import sys
from pathlib import Path

import pytest

from llavamed_jax.checkpoints.names import specs
from llavamed_jax.cli import common
from llavamed_jax.config import PRESETS, preset
from llavamed_jax.errors import UsageError
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.pipeline.sizes import rows_an_update
from llavamed_jax.preflight.programs import planned_length
from llavamed_jax.processor import Processor
from llavamed_jax.recipes import recipe_arguments
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.text.templates import TEMPLATES, get_template
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import layers, recipe, state
from llavamed_jax.training import optimizer as optimizers

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STAGES = ("pretrain", "finetune")
TASKS = ("vqa_rad", "slake", "pathvqa")
MODELS = ("", "v15", "v15,7b", "v1", "v1,7b", "v1,13b", "llava15", "llava15,7b", "llava15,13b", "small")
EXTRA = {"": (*TASKS, "report", *STAGES), "epochs=9": TASKS + STAGES, "epochs=15": TASKS, "protocol=paper": ("vqa_rad",)}
CASES = [(name, ",".join(filter(None, (model, extra))))
         for extra, names in EXTRA.items() for name, model in itertools.product(names, MODELS)]
CASES += [("demo", stage) for stage in ("", "warmup", "align", "instruct", "vqa")]
MODERN = ("align", "instruct", "vqa")


def load(name, argument=""):
    return common.load_config(f"{CONFIGS / name}.py:{argument}")


@pytest.mark.parametrize("name, argument", CASES)
def test_every_recipe_builds_and_is_checked(name, argument):
    cfg = load(name, argument)
    recipe.check(cfg)
    get_template(cfg.template)
    args = recipe_arguments(argument, epochs=0, protocol="clean", words=("warmup", "align", "instruct", "vqa"))
    if name == "demo":
        return
    assert args.preset in PRESETS and args.preset in cfg.name
    abstract = abstract_params(preset(args.preset), scan=True)
    trained, frozen = state.partition(abstract, cfg.trainable)
    assert all(n.startswith("vision_tower/") for n in frozen) or name == "pretrain"
    optimizers.build(cfg.optimizer, 100, list(trained))
    assert {n.split("/")[0] for n in specs(preset(args.preset))} == {"vision_tower", "projector", "decoder"}


@pytest.mark.parametrize("stage", MODERN)
@pytest.mark.parametrize("is_small", [False, True])
def test_the_modern_curriculum(stage, is_small):
    cfg = load("modern", f"{stage},small" if is_small else stage)
    recipe.check(cfg)
    name = cfg.name.split()[-1]
    assert (name, load("modern", f"{stage},epochs=2").epochs) == ("small" if is_small else "modern-8b", 2)
    assert is_small or cfg.init == f"runs/modern/{('start', *MODERN)[MODERN.index(stage)]}"
    model = preset(name)
    trained, _ = state.partition(abstract_params(model, scan=True), cfg.trainable)
    masks = layers.partly_trained(cfg.trainable, layers.depths(trained))
    used = model.num_vision_layers_used
    assert {name.split("/")[0] for name in masks} == ({"vision_tower"} if stage == "vqa" else set())
    assert all(mask.tolist() == [False] * (used - 4) + [True] * 4 for mask in masks.values())
    optimizers.build(cfg.optimizer, 100, list(trained), (), layers.depths(trained), masks)
    if not is_small:
        assert cfg.template == ("up:plain" if stage == "align" else "hf:qwen3") and model.tokens_per_image == 729
        assert planned_length(cfg, model) == 729 + cfg.data.mean_text


def modules_of(path):
    return {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", ["demo", "small"])
@pytest.mark.parametrize("argument", ["v1", "v15", "llava15", "7b", "13b", "v1,13b"])
def test_a_recipe_of_one_model_refuses_the_name_of_another(name, argument):
    """It trained its own model all the same, and said nothing."""
    with pytest.raises(UsageError, match=f"the recipe argument '{argument.partition(',')[0]}' does not exist; one of small"):
        load(name, argument)


def test_smollm2_has_no_small_model():
    """It trained SmolLM2 all the same, and said nothing."""
    with pytest.raises(UsageError, match="the recipe argument 'small' does not exist; one of vqa, align, instruct, epochs=N was"):
        load("smol", "align,small")
    assert load("smol", "align").init == "runs/smol/init"


@pytest.mark.parametrize("name", [*STAGES, *TASKS, "demo", "small", "modern"])
def test_recipes_are_short_and_import_nothing_of_each_other(name):
    path = CONFIGS / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 80
    assert modules_of(path) == {"ml_collections", "configs", "llavamed_jax.recipes"}  # common, of configs
    assert {path.stem for path in CONFIGS.glob("*.py")} >= {*STAGES, *TASKS, "demo"}


@pytest.mark.parametrize("name", [*STAGES, *TASKS, "demo", "small", "modern"])
def test_a_recipe_states_every_number_that_has_a_source(name):
    """In its own file: `configs/common.py` has a placeholder for each of them, so that none can be taken over unseen."""
    tree = ast.parse((CONFIGS / f"{name}.py").read_text())
    set_here = {ast.unparse(target) for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets}
    set_here |= {f"{ast.unparse(node.func.value)}.{word.arg}" for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Attribute) and node.func.attr == "update" for word in node.keywords}
    numbers = {"c.batch_size", "c.micro_batches", "c.max_length", "c.trainable", "c.data.mean_text", "c.seed",
               *(f"c.optimizer.{key}" for key in ("learning_rate", "warmup_ratio", "weight_decay", "clip_norm", "b1", "b2", "eps"))}
    assert numbers <= set_here and {"c.epochs", "c.total_steps"} & set_here


def test_the_plumbing_has_no_number_of_its_own_where_a_recipe_states_one():
    sys.path.insert(0, str(CONFIGS.parent))
    try:
        from configs import common as plumbing
    finally:
        sys.path.remove(str(CONFIGS.parent))
    base = plumbing.base("n", "i", "t", "d")
    with pytest.raises(UsageError):
        recipe.check(base)
    for key in ("batch_size", "micro_batches", "epochs", "total_steps", "max_length", "trainable", "seed"):
        assert base[key] is None, key
    assert {key for key, value in base.optimizer.items() if value is not None} == {"mu_dtype", "overrides"}
    with pytest.raises(TypeError):
        base.batch_size = "64"  # a placeholder has its key's type


# ---- where recipes may lie

OWN = """from configs import common
from ml_collections import ConfigDict

def get_config(arg=''):
    c = common.base('mine', 'preset:small', 'v1.5:plain', 'data.json')
    c.batch_size = 7
    return c
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Neither the place where the command is started nor Python's path has the project's `configs/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "configs").is_dir()])
    return tmp_path


def test_recipes_load_wherever_the_command_is_started(elsewhere):
    before = list(sys.path), [name for name in sys.modules if name.split(".")[0] == "configs"]
    assert load("vqa_rad", "v1,7b").batch_size == 64 and load("eval/slake").data.language == "en"
    assert before == (sys.path, [name for name in sys.modules if name.split(".")[0] == "configs"])


def test_a_recipe_of_ones_own_may_lie_anywhere(elsewhere):
    (elsewhere / "mine.py").write_text(OWN)
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "mine.py").write_text(OWN)
    for place in ("mine.py", "configs/mine.py"):
        assert common.load_config(place).batch_size == 7
    (elsewhere / "old.py").write_text(OWN.replace("from configs", "from llavamed_jax.cli.common import recipe_arguments\nfrom configs"))
    assert common.load_config("old.py", ["batch_size=8"]).batch_size == 8


def test_another_checkouts_plumbing_is_its_own(elsewhere):
    """Loaded in one process with this one's, in either order; and a package `configs` of the user's does not hide ours."""
    (elsewhere / "a" / "configs").mkdir(parents=True)
    (elsewhere / "a" / "configs" / "mine.py").write_text(OWN)
    text = (CONFIGS / "common.py").read_text()
    (elsewhere / "a" / "configs" / "common.py").write_text(text.replace("every_steps=500", "every_steps=77"))
    assert load("finetune").checkpoint.every_steps == 500
    assert common.load_config("a/configs/mine.py").checkpoint.every_steps == 77
    assert load("finetune").checkpoint.every_steps == 500
    (elsewhere / "b" / "configs").mkdir(parents=True)
    (elsewhere / "b" / "configs" / "__init__.py").write_text("common = None")
    (elsewhere / "b" / "configs" / "extra.py").write_text("SIZE = 3")
    sys.path.insert(0, str(elsewhere / "b"))
    assert load("finetune").checkpoint.every_steps == 500
    (elsewhere / "b" / "mine.py").write_text(OWN.replace("import common", "import common, extra").replace("= 7", "= extra.SIZE"))
    assert common.load_config("b/mine.py").batch_size == 3
    (elsewhere / "b" / "configs" / "mine.py").write_text(OWN.replace("from configs import common", "from configs import SIZE, common"))
    (elsewhere / "b" / "configs" / "__init__.py").write_text("SIZE = 9")
    assert common.load_config("b/configs/mine.py").batch_size == 7


def test_a_recipe_that_is_missing_is_named_beside_recipes_alone():
    with pytest.raises(UsageError, match="holds demo.py, finetune.py, lora.py, lora_vqa.py, modern.py, pathvqa.py, pretrain.py, report.py, slake.py, small.py, smol.py, vqa_rad.py$"):
        load("fintune")
    with pytest.raises(UsageError, match=r"common.py defines no get_config\(arg\); .* holds captions.py, chat.py, choices.py"):
        load("eval/common")


@pytest.mark.parametrize("name", [*STAGES, *TASKS])
def test_there_is_no_mistral_of_13b(name):
    with pytest.raises(UsageError, match="'13b' can be used only with"):
        load(name, "v15,13b")
    with pytest.raises(UsageError, match="'13b' can be used only with"):
        load(name, "13b")


# ---- the numbers, written down a second time

def test_numbers_of_the_stages():
    """Spec 4.1 and the issue's: LLaVA-Med v1.0, whose numbers v1.5's recipe takes too, and LLaVA-1.5."""
    def numbers(name, family):
        cfg = load(name, family)
        return cfg.optimizer.learning_rate, cfg.batch_size, cfg.epochs, cfg.optimizer.clip_norm

    for family in ("v1", "v15", "v1,13b"):
        assert numbers("pretrain", family) == (2e-3, 128, 1, 1.0)
        assert numbers("finetune", family) == (2e-5, 128, 3, 1.0)
    for family in ("llava15", "llava15,13b"):
        assert numbers("pretrain", family) == (1e-3, 256, 1, 0.0)
        assert numbers("finetune", family) == (2e-5, 128, 1, 0.0)
    for name in TASKS:
        assert numbers(name, "v1") == numbers(name, "v15") == (2e-5, 64, 3, 1.0)
        assert numbers(name, "v1,epochs=15") == (2e-5, 64, 15, 1.0)


@pytest.mark.parametrize("name", [*STAGES, *TASKS])
@pytest.mark.parametrize("family", ["v1", "v15", "llava15"])
def test_what_all_of_them_share(name, family):
    """HF's Trainer and the originals' scripts: AdamW, 3 % warm-up, no decay, and 2,048 tokens."""
    cfg, opt = load(name, family), load(name, family).optimizer
    assert (opt.warmup_ratio, opt.weight_decay, opt.b1, opt.b2, opt.eps) == (0.03, 0.0, 0.9, 0.999, 1e-8)
    assert cfg.max_length == 2048 and cfg.epochs and cfg.total_steps is None
    assert cfg.trainable[0] == "projector/.*" and ("decoder/.*" in cfg.trainable) == (name != "pretrain")


def test_v1_weighs_samples_in_stages_2_and_3():
    """Spec 4.1: one sample a micro-batch there, two in stage 1; elsewhere tokens weigh alike."""
    for name in (*STAGES, *TASKS):
        for family in ("v1", "v1,13b", "v15", "llava15", "small"):
            is_by_sample = family.startswith("v1") and family != "v15" and name != "pretrain"
            assert load(name, family).loss_weighting == ("sample" if is_by_sample else "token"), (name, family)
    assert load("demo").loss_weighting == load("small").loss_weighting == "token"


def test_templates_are_the_families_own():
    """Spec 3.4, 3.7 and 4.6: v1.0 trains with its default version, LLaVA-1.5 with `plain` and then `v1`."""
    found = {(name, family): load(name, family).template for name in (*STAGES, *TASKS) for family in ("v1", "v15", "llava15")}
    assert set(found.values()) <= set(TEMPLATES)
    for (name, family), template in found.items():
        wanted = {"v1": "v1.0:v0", "v15": "v1.5:mistral_instruct", "llava15": "up:vicuna_v1"}[family]
        if name == "pretrain" and family != "v1":
            wanted = {"v15": "v1.5:plain", "llava15": "up:plain"}[family]
        assert template == wanted


def test_stages_chain_by_init():
    for family in ("v1", "v15", "llava15"):
        before = load("pretrain", family)
        assert "convert build --out runs/start" in (CONFIGS / "pretrain.py").read_text() and before.init == "runs/start"
        assert load("finetune", family).init == "runs/pretrain"
        assert {load(name, family).init for name in TASKS} == {"runs/finetune"}


@pytest.mark.parametrize("family", ["v1", "v1,13b", "v15", "llava15", "llava15,13b"])
@pytest.mark.parametrize("name", [*STAGES, "vqa_rad"])
def test_template_and_tokens_teach_an_answer(name, family, llama_tokenizer, mistral_tokenizer):
    """With the family's tokenizer: one image, ids that have a row in the table, and the answer is what is supervised."""
    cfg = load(name, family)
    shapes = preset(recipe_arguments(family).preset)
    tokenizer = Tokenizer.load(mistral_tokenizer if shapes.decoder.architecture == "mistral" else llama_tokenizer)
    processor = Processor(shapes, tokenizer, template=cfg.template)
    ids, labels = processor.training_example([{"from": "human", "value": f"What is shown?\n{IMAGE_MARKER}"},
                                              {"from": "gpt", "value": "A chest radiograph."}], num_images=1)
    assert max(ids) < shapes.decoder.vocab_size and len(ids) == len(labels)
    assert "A chest radiograph." in processor.decode([label for label in labels if label >= 0])
    expanded, _ = processor.expand(ids, labels)
    assert len(expanded) == len(ids) - 1 + {224: 256, 336: 576}[shapes.vision.image_size]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("family", ["v1", "v15", "llava15"])
def test_packed_rows_of_the_stages_fit_eight_devices(name, family):
    """As in the paper's machine: within a tenth of the published batch, and few enough tokens on a device at a time. An image
    of v1.0 has 256 positions and its start and end tokens, one of the others 576."""
    cfg = load(name, family)
    length = planned_length(cfg, preset(cfg.name.split()[-1]))
    assert cfg.data.packing and length == {"pretrain": 680, "finetune": 1080}[name] - (576 - 258) * (family == "v1")
    update = rows_an_update(cfg.batch_size, length, 8, cfg.micro_batches, longest=cfg.max_length)
    assert update.is_close and abs(update.samples / cfg.batch_size - 1) <= 0.1
    assert update.rows * update.row_length // (8 * update.micro_batches) <= 16384


@pytest.mark.parametrize("family", ["v1", "v15", "llava15"])
@pytest.mark.parametrize("name", TASKS)
def test_packed_rows_of_the_tasks_make_their_batch(name, family):
    cfg = load(name, family)
    length = planned_length(cfg, preset(cfg.name.split()[-1]))
    assert length == 620 - (576 - 258) * (family == "v1")
    update = rows_an_update(cfg.batch_size, length, 8, cfg.micro_batches, longest=cfg.max_length)
    assert cfg.data.packing and update.is_close and update.rows == 8 and round(update.samples) == 64


def test_the_small_model_is_not_packed():
    assert not any(load(name, "small").data.packing for name in (*STAGES, *TASKS))
