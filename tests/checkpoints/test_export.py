"""What an export gives to others: processors with our ids and pixels, model cards, files that any safetensors reads, and
nothing that looks whole when it is not."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from llavamed_jax.checkpoints.export import directory
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch import write
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import IMAGE_TOKEN, DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.templates import TEMPLATES
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.utils import directories

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_TOKENIZER = ROOT / "samples" / "vqa_rad" / "tokenizer.model"
DECODER = dict(vocab_size=1024, hidden_size=48, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12,
               rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=512)


def config(source="llava_mistral", decoder=None, **changes):
    architecture = "mistral" if source == "llava_mistral" else "llama"
    return LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14), DecoderConfig(**{**DECODER, "architecture": architecture, **(decoder or {})}),
                       source=source, **changes)


def with_tokenizer(checkpoint, directory, settings=None, model=SAMPLE_TOKENIZER, added=None):
    """The checkpoint with tokenizer files as an original has them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(Path(model).read_bytes())
    for name, value in (("tokenizer_config.json", settings), ("added_tokens.json", added)):
        if value is not None:
            (directory / name).write_text(json.dumps(value))
    return checkpoint.replace(files={file.name: file for file in directory.iterdir()})


# --- ids -----------------------------------------------------------------------------------------------------------------------------

WORDS = [" ", "  ", "   ", " " * 21, "\n", "\r\n", "\t", "<image>", "<image>\n", "</s>", "USER: ", " ASSISTANT:", "[INST]", " [/INST]",
         "pleural", " effusion", "X-ray.", "naïve", "é", "½", "5 µm", "胸部", "🫁", "1,000", "'s", "don't", "_", "▁", "<",
         "image>", "e\u0301"]


def texts(count=400):
    rng = random.Random(0)
    fixed = ["", " ", "<image>", "<image><image>", " <image> ", "a <image> b </s> c", "[INST] <image>\nWhat is shown? [/INST]",
             "</s> x", "a\n▁<image>b", "USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:", *("a" + " " * n + "b" for n in range(40))]
    return fixed + ["".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.fixture
def tokenizers_of(tmp_path, request):
    """Tokenizer in transformers from an export, and ours, for a SentencePiece file and its settings."""
    transformers = pytest.importorskip("transformers")

    def make(model, settings=None, added=None):
        rows = Tokenizer.load(model).vocab_size + len(added or ())
        checkpoint = with_tokenizer(random_checkpoint(config(decoder={"vocab_size": rows})), tmp_path / "files", settings, model, added)
        export(checkpoint, tmp_path / "hf")
        ours = Processor(None, Tokenizer.load(tmp_path / "files"))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        return theirs, lambda text: [rows if i == IMAGE_TOKEN else i for i in ours.encode(text)]
    return make


@pytest.mark.parametrize("is_legacy", [True, False])
@pytest.mark.parametrize("model", ["sample", "mistral_tokenizer", "llama_tokenizer"])
def test_ids_in_transformers_are_those_of_the_original(model, is_legacy, tokenizers_of, request):
    """Blanks beside `<image>`, runs of blanks, text after `</s>`: where transformers' own conversion differs."""
    file = SAMPLE_TOKENIZER if model == "sample" else request.getfixturevalue(model)
    theirs, ours = tokenizers_of(file, {"legacy": is_legacy, "model_max_length": 77})
    assert theirs.pad_token == "<pad>" and theirs.padding_side == "left" and theirs.model_max_length == 77
    for text in texts():
        assert theirs(text)["input_ids"] == ours(text), repr(text)
    assert theirs.decode(ours("a nodule, 5 µm.</s><image>"), skip_special_tokens=True) == "a nodule, 5 µm."


def test_ids_beside_added_tokens(tokenizers_of):
    theirs, ours = tokenizers_of(SAMPLE_TOKENIZER, {"legacy": False}, {"<im_patch>": 1024, "<im_start>": 1025, "<im_end>": 1026})
    for text in ("USER: <im_start><image><im_end>\nWhere? ASSISTANT:", "<im_start> <image>x<im_end>y</s> z", *texts(50)):
        assert theirs(text)["input_ids"] == ours(text), repr(text)


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_tokenizer_json_alone_keeps_its_ids(is_legacy, tmp_path):
    """Exact with `legacy`, and for one question without; after `</s>` there is then a prefix that the original has not."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.model").write_bytes(SAMPLE_TOKENIZER.read_bytes())
    transformers.LlamaTokenizer.from_pretrained(tmp_path / "source", legacy=is_legacy).save_pretrained(tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "fast" / "tokenizer_config.json").read_text())
    (tmp_path / "fast" / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": is_legacy}))
    checkpoint = random_checkpoint(config()).replace(files={f.name: f for f in (tmp_path / "fast").iterdir()})
    export(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Processor(None, Tokenizer.load(tmp_path / "fast"))
    for text in ("[INST] <image>\nWhat is shown? [/INST]", "a <image>b", "USER: <image>\nQ ASSISTANT:", "left lung"):
        assert theirs(text)["input_ids"] == [1024 if i == IMAGE_TOKEN else i for i in ours.encode(text)]
    assert (theirs("No.</s>USER: hi")["input_ids"] == ours.encode("No.</s>USER: hi")) == is_legacy


# --- prompts, pixels, tokens ---------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image"}
CONVERSATIONS = [
    [("user", [IMAGE, {"type": "text", "text": " What is shown? "}])],
    [("user", "Is it normal?"), ("assistant", "No, there is a nodule."), ("user", "  Where?\n")],
    [("system", "Answer in one word."), ("user", [{"type": "text", "text": "Which side?"}, IMAGE, IMAGE])],
    [("system", [{"type": "text", "text": "Short."}]), ("user", "<image>\nWhere?"), ("assistant", " Left. "), ("user", "Sure?")],
    [("user", [{"type": "text", "text": "one <image> here"}, IMAGE, {"type": "text", "text": "and after"}])],
    [("user", "Q1"), ("assistant", ""), ("user", "Q2")],
]


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("template", sorted(name for name in TEMPLATES if not name.startswith(("v1.0", "hf:"))))
def test_chat_templates_write_our_prompts(template, is_wrapped, tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = config(template=template, use_start_end=is_wrapped)
    export(with_tokenizer(random_checkpoint(cfg), tmp_path / "files"), tmp_path / "hf")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    ours = Processor.load(tmp_path / "hf")
    for turns in CONVERSATIONS[:1] if template.endswith("plain") else CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        filled = [{"role": role, "content": [part | {"image": "x.png"} if part["type"] == "image" else part for part in content]
                   if isinstance(content, list) else content} for role, content in turns]
        wanted = ours.prompt(filled)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True) == wanted
        assert not wanted.startswith("<s>")


def test_templates_that_are_ours_alone_are_said(tmp_path):
    cfg = config("llava", template="v1.0:simple")
    export(random_checkpoint(cfg), tmp_path / "hf")
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert "no Jinja chat template for `v1.0:simple`" in (tmp_path / "hf" / "README.md").read_text()


def prepared(processor, ours):
    """(ids and pixels of transformers' processor, our row, our images) of conversations, with images that are not square and without."""
    rng = np.random.default_rng(0)
    for shape, turns in (((40, 61, 3), CONVERSATIONS[0]), ((64, 33, 3), CONVERSATIONS[0]), ((28, 28, 3), CONVERSATIONS[3]),
                         (None, CONVERSATIONS[1])):
        pictures = [] if shape is None else [Image.fromarray(rng.integers(0, 256, shape, np.uint8))]
        messages = [{"role": role, "content": content} for role, content in turns]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        batch = processor(text=text, images=pictures or None, return_tensors="pt")
        row, images = ours.encode(text), list(ours.images(pictures))
        assert batch["input_ids"][0].tolist() == [1024 if i == IMAGE_TOKEN else i for i in ours.expand(row)]
        if pictures:
            np.testing.assert_allclose(batch["pixel_values"].permute(0, 2, 3, 1).numpy(), np.stack(images), atol=1e-6, rtol=0)
        yield batch, row, images


def test_the_processor_gives_our_ids_and_pixels(tmp_path):
    """Of another class, template and way to make images square than the next test's."""
    transformers = pytest.importorskip("transformers")
    cfg = config("llava_llama", template="up:vicuna_v1", image_aspect_ratio="square")
    export(with_tokenizer(random_checkpoint(cfg), tmp_path / "files"), tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert len(list(prepared(processor, Processor.load(tmp_path / "hf")))) == 4


def test_processor_and_generate_give_our_tokens(tmp_path):
    """The whole way of a user of transformers, offline: prompt, ids, pixels of images that are not square, greedy tokens."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    transformers = pytest.importorskip("transformers")
    import llavamed_jax as lm
    cfg = config(template="v1.5:mistral_instruct", image_aspect_ratio="pad")
    export(lively(random_checkpoint(cfg, seed=3), tmp_path / "files"), tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ours, rows, images, theirs = lm.load(tmp_path / "hf", dtype="float32"), [], [], []
    for batch, row, pixels in prepared(processor, ours.processor):
        with torch.no_grad():
            new = model.generate(**batch, max_new_tokens=12, do_sample=False)
        rows.append(row)
        images.append(pixels)
        theirs.append(new[0, batch["input_ids"].shape[1]:].tolist())
    assert ours.generate_tokens(rows, images, max_new_tokens=12) == theirs
    assert len(set(map(tuple, theirs))) > 2 and max(len(set(new)) for new in theirs) >= 6


def lively(checkpoint, directory):
    """Weights under which greedy tokens change from step to step and with the image."""
    scale = {"decoder/embed_tokens/embedding": 3.0, "projector/linear_1/kernel": 6.0}

    def scaled(name, tensor):
        return Tensor(tensor.shape, tensor.dtype, lambda: tensor.load() * np.float32(scale.get(name, 1)))
    tensors = {name: scaled(name, tensor) for name, tensor in checkpoint.tensors.items()}
    return with_tokenizer(checkpoint.replace(tensors=tensors), directory)


# --- round trips ---------------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "v1.5": (config(), ["transformers", "llava"]),
    "v1.5, tied": (config(decoder={"tie_word_embeddings": True}), ["transformers", "llava"]),
    "v1.0": (config("llava", projector_type="linear", use_start_end=True, decoder={"vocab_size": 1027, "num_kv_heads": 4}), ["llava"]),
    "v1.0, no start and end": (config("llava", projector_type="linear", decoder={"vocab_size": 1025}), ["llava"]),
    "llava_llama": (config("llava_llama"), ["transformers", "llava"]),
    "llava_llama, tied, more rows": (config("llava_llama", decoder={"vocab_size": 1027, "tie_word_embeddings": True}),
                                     ["transformers", "llava"]),
    "rows that are full": (config(decoder={"vocab_size": 1022}), ["transformers", "llava"]),
    "all positions": (config(feature_select="cls_patch", feature_layer=-1, image_aspect_ratio="square"), ["transformers", "llava"]),
}


def shards(directory):
    return {f"{file.parent.name if file.parent != directory else ''}/{name}": tensor
            for file in sorted(directory.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trips_to_the_bit(case, tmp_path):
    """Original -> ours -> transformers -> ours -> original, or twice through ours where transformers' layout has no place."""
    cfg, layouts = ROUND_TRIPS[case]
    export(random_checkpoint(cfg, seed=5).cast(ml_dtypes.bfloat16), tmp_path / "original", "llava")
    path = tmp_path / "original"
    for i, layout in enumerate(layouts):
        write_model(tmp_path / f"ours{i}", open_checkpoint(path))
        path = tmp_path / f"{i}-{layout}"
        export(open_checkpoint(tmp_path / f"ours{i}"), path, layout)
    found, wanted = shards(path), shards(tmp_path / "original")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name
    assert (path / "config.json").read_bytes() == (tmp_path / "original" / "config.json").read_bytes()
    assert open_checkpoint(path).config == open_checkpoint(tmp_path / "original").config


# --- the config and the card ---------------------------------------------------------------------------------------------------------


def test_the_config_leaves_nothing_to_defaults(tmp_path):
    transformers = pytest.importorskip("transformers")
    export(random_checkpoint(config(decoder={"sliding_window": 7, "head_dim": 8})), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    text = raw["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e4
    # What LlavaConfig would fill in must be there: a model's shape and arithmetic, not settings of training or of the library.
    library = {"initializer_range", "use_cache", "attention_dropout", "pretraining_tp", "initializer_factor", "layer_types"}
    for mine, theirs in ((text, transformers.MistralConfig()), (raw["vision_config"], transformers.CLIPVisionConfig())):
        common = set(transformers.PretrainedConfig().to_dict()) | library
        assert not set(theirs.to_dict()) - common - set(mine)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "hf").text_config
    assert (loaded.sliding_window, loaded.head_dim, loaded.vocab_size, loaded.rms_norm_eps) == (7, 8, 1088, 1e-5)


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_every_export_has_a_card(layout, tmp_path):
    export(random_checkpoint(config()), tmp_path / "out", layout)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlanguage: en\n") and "{" not in card.split("```")[0]
    for heading in ("## Training record", "## Intended use", "## Out-of-scope use", "## Limitations", "## Licences"):
        assert heading in card
    assert "None: these are random weights." in card and "English only" in card and "clinical" in card and "Apache-2.0" in card
    assert ("LlavaForConditionalGeneration" in card, "`mm_vision_tower`" in card) == (layout == "transformers", layout == "llava")
    assert ("`do_pad`" in card) == (layout == "transformers")
    export(open_checkpoint(tmp_path / "out"), tmp_path / "again", layout)
    assert "No training record comes with these weights" in (tmp_path / "again" / "README.md").read_text()


def test_the_card_tells_the_runs_that_led_here(tmp_path):
    for name, init in (("pretrain", str(tmp_path / "released" / "v15")), ("vqa", str(tmp_path / "pretrain"))):
        write_model(tmp_path / name, random_checkpoint(config("llava_llama")))
        recipe = {"name": name, "init": init, "trainable": ["projector/.*|decoder/.*"], "data.train": "/home/me/train.json", "epochs": 3}
        (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": recipe, "resolved": {"samples": 12}}))
    export(open_checkpoint(tmp_path / "vqa"), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    first, second = card.index("### Run `vqa`\n\nStarted from `pretrain`."), card.index("### Run `pretrain`\n\nStarted from `v15`.")
    assert first < second
    for row in ("| `epochs` | `3` |", '| `trainable` | `["projector/.*\\|decoder/.*"]` |', '| `data.train` | `"train.json"` |',
                "| `settled: samples` | `12` |"):
        assert row in card
    assert str(tmp_path) not in card and "LLaMA licence" in card


# --- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "sentence"), [
    ({"projector_type": "linear"}, "projector is 'linear', .*only a two-layer projector"),
    ({"projector_type": "mlp3x_gelu"}, "projector is 'mlp3x_gelu', .*only a two-layer projector"),
    ({"decoder": {"vocab_size": 1000}}, "the tokenizer has 1024 pieces, but the embedding table has 1000 rows")])
def test_what_a_layout_cannot_hold_is_refused_before_a_tensor_is_read(change, sentence, tmp_path):
    checkpoint = with_tokenizer(random_checkpoint(config(**change)), tmp_path / "files")
    never = {name: Tensor(t.shape, t.dtype, lambda: pytest.fail("a tensor was read")) for name, t in checkpoint.tensors.items()}
    with pytest.raises(UserError, match=sentence) as error:
        export(checkpoint.replace(tensors=never), tmp_path / "hf")
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["files"]


def test_the_original_layout_has_biases(tmp_path):
    with pytest.raises(UserError, match="projector has no biases.*--layout transformers"):
        export(random_checkpoint(config(projector_bias=False)), tmp_path / "out", "llava")


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint = random_checkpoint(config())
    size = directory.total_bytes(checkpoint.tensors)
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda path: type("", (), {"free": size - 1}))
    for attempt in (lambda: export(checkpoint, tmp_path / "deep" / "out", "llava"), lambda: write_model(tmp_path / "tree", checkpoint)):
        with pytest.raises(UserError, match=r"needs 0\.\d+ MB; its disk has 0\.\d+ MB free"):
            attempt()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(write, "_write_shard", full)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        export(random_checkpoint(config()), tmp_path / "out")
    assert not list(tmp_path.iterdir())
