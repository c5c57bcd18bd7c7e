"""`convert build`: a plain decoder, a plain tower and a projector become a model, and stage 1 starts from it."""

import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from llavamed_jax.adapters.lora import attach
from llavamed_jax.checkpoints.assemble.build import build, with_projector
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.checkpoints.tree.store import StepWriter
from llavamed_jax.cli.convert import main
from llavamed_jax.config import preset
from llavamed_jax.config.adapter import AdapterConfig, AdapterRule, is_factor
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from tests.support import tiny, training_runs

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
PIECES = SAMPLE / "tokenizer.model"  # 1,024 of them
DECODER = {**tiny.MISTRAL, "vocab_size": 1024}


@pytest.fixture
def parts(tmp_path):
    """A Mistral directory with a tokenizer and a chat template, and a whole CLIP model's."""
    tiny.save(tmp_path / "mistral", DECODER, tiny.drawn(tiny.decoder_shapes(DECODER), dtype=ml_dtypes.bfloat16))
    (tmp_path / "mistral" / "tokenizer.model").write_bytes(PIECES.read_bytes())
    (tmp_path / "mistral" / "chat_template.jinja").write_text("{{ messages }}")
    tiny.save_clip(tmp_path / "clip-tiny")
    (tmp_path / "clip-tiny" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return tmp_path


def command(parts, out="built", decoder="mistral", vision="clip-tiny", projector="mlp2x_gelu", *flags):
    vision = vision if vision.startswith("preset:") else str(parts / vision)
    return main(["build", "--decoder", str(parts / decoder), "--vision", vision, "--projector", str(projector),
                 "--out", str(parts / out), *flags])


def test_the_parts_are_there_to_the_bit_and_the_projector_is_torchs(parts, capsys):
    assert command(parts) == 0
    assert "projector: mlp2x_gelu, drawn from seed 0" in capsys.readouterr().out
    built = open_checkpoint(parts / "built")
    assert built.layout == "tree"
    decoder, tower = tiny.drawn(tiny.decoder_shapes(DECODER), dtype=ml_dtypes.bfloat16), tiny.drawn(tiny.clip_shapes(), 1)
    for name, wanted in {"decoder/layers_1/self_attn/k_proj/kernel": decoder["model.layers.1.self_attn.k_proj.weight"].T,
                         "decoder/embed_tokens/embedding": decoder["model.embed_tokens.weight"],
                         "decoder/lm_head/kernel": decoder["lm_head.weight"].T,
                         "vision_tower/post_layernorm/bias": tower["vision_model.post_layernorm.bias"],
                         "vision_tower/layers_2/mlp/fc1/kernel": tower["vision_model.encoder.layers.2.mlp.fc1.weight"].T}.items():
        assert built.read(name).dtype == wanted.dtype
        np.testing.assert_array_equal(built.read(name), wanted, name)
    cfg = built.config
    assert (cfg.source, cfg.feature_layer, cfg.feature_select, cfg.image_aspect_ratio, cfg.max_length, cfg.use_start_end) == (
        "llava_mistral", -2, "patch", "pad", 2048, False)
    assert (cfg.decoder.rope_theta, cfg.decoder.sliding_window, cfg.decoder.num_kv_heads) == (1e6, None, 2)
    assert built.files.keys() == {"tokenizer.model", "preprocessor_config.json"}  # the chat template knows no images
    assert Processor.load(parts / "built").template_name == "v1.5:mistral_instruct"
    for n, fan_in in ((0, 32), (1, 48)):
        for leaf in ("kernel", "bias"):
            values = built.read(f"projector/linear_{n}/{leaf}")
            assert values.dtype == np.float32 and np.abs(values).max() <= fan_in**-0.5
            assert values.std() == pytest.approx((fan_in * 3) ** -0.5, rel=0.05 if leaf == "kernel" else 0.3)


def test_the_seed_alone_decides(parts):
    for out, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert command(parts, out, "mistral", "clip-tiny", "linear", "--seed", str(seed)) == 0
    one, same, other = (open_checkpoint(parts / out).read("projector/linear_0/kernel") for out in ("one", "same", "other"))
    assert one.tobytes() == same.tobytes() and not np.array_equal(one, other)


def test_an_export_of_it_is_an_original(parts):
    assert command(parts) == 0
    export(open_checkpoint(parts / "built"), parts / "original", "llava")
    config = json.loads((parts / "original" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["mm_vision_tower"]) == (
        "llava_mistral", ["LlavaMistralForCausalLM"], "clip-tiny")
    assert open_checkpoint(parts / "original").config == open_checkpoint(parts / "built").config


@pytest.mark.parametrize("kind", ["llama", "mistral", "tied", "bin"])
def test_the_decoder_of_transformers_answers_as_before(kind, tmp_path):
    """What save_pretrained writes of decoder and tower, joined: the same logits on text, the same features of an image."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    import jax
    import transformers

    from llavamed_jax.checkpoints.load import load_params
    from llavamed_jax.models.llava import Llava
    from tests.support.hf import randomise
    text = {key: tiny.MISTRAL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
                                               "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
    config, model = ((transformers.LlamaConfig, transformers.LlamaForCausalLM) if kind == "llama" else
                     (transformers.MistralConfig, transformers.MistralForCausalLM))
    decoder = model(config(**text, tie_word_embeddings=kind in ("tied", "bin"))).float().eval()
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**tiny.CLIP)).float().eval()
    randomise(decoder, 3)
    randomise(tower, 4)
    decoder.save_pretrained(tmp_path / "decoder")
    tower.save_pretrained(tmp_path / "tower")
    if kind == "bin":  # which holds a tied head twice
        (tmp_path / "decoder" / "model.safetensors").unlink()
        torch.save(decoder.state_dict(), tmp_path / "decoder" / "pytorch_model.bin")
    checkpoint, _ = build(tmp_path / "decoder", tmp_path / "tower", "linear", tmp_path)
    assert ("decoder/lm_head/kernel" in checkpoint.tensors) == (kind in ("llama", "mistral"))
    params, module = {"params": load_params(checkpoint)}, Llava(checkpoint.config)
    ids = np.array([[1, 5, 9, 69, 2, 33, 7]], np.int32)
    pixels = np.random.default_rng(0).standard_normal((1, 28, 28, 3), np.float32)
    with torch.no_grad():
        logits = decoder(torch.from_numpy(ids).long()).logits.numpy()
        states = tower(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2][:, 1:].numpy()
    kernel, bias = checkpoint.read("projector/linear_0/kernel"), checkpoint.read("projector/linear_0/bias")
    np.testing.assert_allclose(jax.jit(module.apply)(params, ids), logits, atol=2e-5, rtol=0)
    features = jax.jit(functools.partial(module.apply, method="encode_images"))(params, pixels[None])
    np.testing.assert_allclose(features[0], states @ kernel + bias, atol=2e-5, rtol=0)


# --- image tokens ------------------------------------------------------------------------------------------------------------------


def test_image_tokens_come_in_v1s_order_and_start_as_the_mean(parts):
    llama = {**tiny.LLAMA, "vocab_size": 1024, "initializer_range": 0.5}
    tensors = tiny.drawn(tiny.decoder_shapes(llama), dtype=np.float32)
    tiny.save(parts / "llama", llama, tensors)
    (parts / "llama" / "tokenizer.model").write_bytes(PIECES.read_bytes())
    assert command(parts, "built", "llama", "clip-tiny", "linear", "--add_image_tokens") == 0
    built = open_checkpoint(parts / "built")
    cfg = built.config
    assert (cfg.source, cfg.decoder.vocab_size, cfg.use_start_end, cfg.image_aspect_ratio) == ("llava", 1027, True, "square")
    tokenizer = Processor.load(parts / "built").tokenizer
    assert tokenizer.encode("<im_patch><im_start><im_end>", bos=False) == [1024, 1025, 1026]
    assert tokenizer.vocab_size == 1027
    for name, torch_name, axis in (("decoder/embed_tokens/embedding", "model.embed_tokens.weight", 0),
                                   ("decoder/lm_head/kernel", "lm_head.weight", 1)):
        table, before = np.moveaxis(built.read(name), axis, 0), tensors[torch_name]
        np.testing.assert_array_equal(table[:1024], before)
        assert 0.3 < table[1024].std() < 0.7  # drawn, with the config's deviation
        for row in (1025, 1026):
            np.testing.assert_allclose(table[row], table[:1025].mean(0), atol=1e-7)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_pad_token_comes_first_as_with_version_v0(is_tied, parts):
    """Spec 1.8: 32,004 rows in place of 32,003; the mean counts the rows of [PAD] and <im_patch>."""
    llama = {**tiny.LLAMA, "vocab_size": 1024, "tie_word_embeddings": is_tied}
    tensors = tiny.drawn(tiny.decoder_shapes(llama), dtype=np.float32)
    tiny.save(parts / "llama", llama, tensors)
    (parts / "llama" / "tokenizer.model").write_bytes(PIECES.read_bytes())
    assert command(parts, "built", "llama", "clip-tiny", "linear", "--add_image_tokens", "--add_pad_token") == 0
    built = open_checkpoint(parts / "built")
    assert built.config.decoder.vocab_size == 1028
    assert Processor.load(parts / "built").tokenizer.encode("[PAD]<im_patch><im_start><im_end>", bos=False) == [1024, 1025, 1026, 1027]
    assert json.loads(built.files["tokenizer_config.json"].read_text())["pad_token"] == "[PAD]"
    table = built.read("decoder/embed_tokens/embedding")
    np.testing.assert_array_equal(table[:1024], tensors["model.embed_tokens.weight"])
    np.testing.assert_allclose(table[1024], table[:1024].mean(0), atol=1e-7)
    for row in (1026, 1027):
        np.testing.assert_allclose(table[row], table[:1026].mean(0), atol=1e-7)
    assert not np.allclose(table[1026], table[:1024].mean(0), atol=1e-7)  # <im_patch>'s drawn row counts
    assert ("decoder/lm_head/kernel" in built.tensors) != is_tied
    if not is_tied:  # each table's row of <im_patch> is drawn by itself
        assert abs(np.corrcoef(table[1025], built.read("decoder/lm_head/kernel")[:, 1025])[0, 1]) < 0.9


def test_a_pad_token_alone_is_refused(parts, capsys):
    assert command(parts, "built", "mistral", "clip-tiny", "linear", "--add_pad_token") == 2
    assert "--add_image_tokens was expected too" in capsys.readouterr().err


def test_image_tokens_that_are_there_stay(parts):
    assert command(parts, "first", "mistral", "clip-tiny", "linear", "--add_image_tokens") == 0
    first = open_checkpoint(parts / "first")
    tensors = {"model.embed_tokens.weight": first.read("decoder/embed_tokens/embedding"),
               "lm_head.weight": np.ascontiguousarray(first.read("decoder/lm_head/kernel").T)}
    old = tiny.drawn(tiny.decoder_shapes(DECODER), dtype=ml_dtypes.bfloat16)
    tiny.save(parts / "grown", {**DECODER, "vocab_size": 1027}, {**old, **tensors})
    for name in ("tokenizer.model", "added_tokens.json"):
        (parts / "grown" / name).write_bytes(first.files[name].read_bytes())
    assert command(parts, "second", "grown", "clip-tiny", "linear", "--add_image_tokens") == 0
    second = open_checkpoint(parts / "second")
    assert second.config.use_start_end and second.config.decoder.vocab_size == 1027
    for name in ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel"):
        assert second.read(name).tobytes() == first.read(name).tobytes()


def test_image_tokens_enter_every_file_that_lists_tokens(parts):
    """A fast tokenizer, as Mistral's directory has one beside the SentencePiece model."""
    from tokenizers import Tokenizer, models
    core = {"<unk>": 0, "<s>": 1, "</s>": 2}
    fast = Tokenizer(models.WordLevel({**core, **{f"w{i}": i for i in range(3, 1024)}}, unk_token="<unk>"))
    fast.add_special_tokens(list(core))
    fast.save(str(parts / "mistral" / "tokenizer.json"))
    (parts / "mistral" / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in core.items()}}))
    assert command(parts, "both", "mistral", "clip-tiny", "linear", "--add_image_tokens") == 0
    (parts / "mistral" / "tokenizer.model").unlink()
    assert command(parts, "fast", "mistral", "clip-tiny", "linear", "--add_image_tokens") == 0
    for out in ("both", "fast"):
        tokenizer = Processor.load(parts / out).tokenizer
        assert tokenizer.encode("<im_start><im_patch><im_end>", bos=False) == [1025, 1024, 1026]
        files = open_checkpoint(parts / out).files
        assert Tokenizer.from_file(str(files["tokenizer.json"])).token_to_id("<im_end>") == 1026
        assert json.loads(files["tokenizer_config.json"].read_text())["added_tokens_decoder"]["1024"]["content"] == "<im_patch>"
        assert ("added_tokens.json" in files) == (out == "both")


# --- mm_projector.bin --------------------------------------------------------------------------------------------------------------


def save_projector(file, kind, table=None, config=None, **other):
    """As the original's trainer leaves it: tensors of model.mm_projector and, of v1.0, the embedding table."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    tensors = tiny.drawn(tiny.projector_shapes(kind), 5) | ({} if table is None else {"model.embed_tokens.weight": table}) | other
    file.parent.mkdir(exist_ok=True)
    torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, file)
    if config is not None:
        (file.parent / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_projector_from_stage_1_over_its_base(kind, parts, capsys):
    file = parts / "stage1" / "mm_projector.bin"
    tensors = save_projector(file, kind, config={"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch",
                                                 "image_aspect_ratio": "square"})
    assert command(parts, "built", "mistral", "clip-tiny", file) == 0
    assert f"projector: {kind} of {file}" in capsys.readouterr().out
    built = open_checkpoint(parts / "built")
    assert (built.config.projector_type, built.config.feature_layer, built.config.feature_select, built.config.image_aspect_ratio) == (
        kind, -1, "cls_patch", "square")
    last = {"linear": "", "mlp2x_gelu": "2."}[kind]
    n = {"linear": 0, "mlp2x_gelu": 1}[kind]
    np.testing.assert_array_equal(built.read(f"projector/linear_{n}/kernel"), tensors[f"model.mm_projector.{last}weight"].T)
    np.testing.assert_array_equal(built.read(f"projector/linear_{n}/bias"), tensors[f"model.mm_projector.{last}bias"])


def test_a_projector_over_a_whole_checkpoint(parts, capsys):
    assert command(parts) == 0
    file = parts / "stage1" / "mm_projector.bin"
    tensors = save_projector(file, "mlp2x_gelu", table=np.ones((1024, 48), np.float16))
    flags = ["import", "--checkpoint", str(parts / "built"), "--projector", str(file), "--out", str(parts / "again")]
    assert main(flags) == 0
    assert "embed_tokens are not used, because this model has no <im_start>" in capsys.readouterr().out
    before, again = open_checkpoint(parts / "built"), open_checkpoint(parts / "again")
    np.testing.assert_array_equal(again.read("projector/linear_0/kernel"), tensors["model.mm_projector.0.weight"].T)
    np.testing.assert_array_equal(again.read("decoder/embed_tokens/embedding"), before.read("decoder/embed_tokens/embedding"))


@pytest.mark.parametrize("rows", [2, 1027])
def test_rows_of_image_tokens_come_from_the_projectors_file(rows, parts):
    file = parts / "stage1" / "mm_projector.bin"
    table = tiny.drawn({"x": (rows, 48)}, 6)["x"]
    save_projector(file, "linear", table=table, config={"mm_use_im_start_end": True})
    assert command(parts, "built", "mistral", "clip-tiny", file, "--add_image_tokens") == 0
    found = open_checkpoint(parts / "built").read("decoder/embed_tokens/embedding")
    np.testing.assert_array_equal(found[-2:], table[-2:].astype(found.dtype))
    assert not np.array_equal(found[1024], table[0].astype(found.dtype))
    before = tiny.drawn(tiny.decoder_shapes(DECODER), dtype=ml_dtypes.bfloat16)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found[:1024], before)


def test_projectors_that_do_not_fit(parts):
    file = parts / "stage1" / "mm_projector.bin"
    checkpoint, _ = build(parts / "mistral", parts / "clip-tiny", "linear", parts, image_tokens=True)
    save_projector(file, "linear", **{"model.vision_resampler.query": np.ones(3, np.float16)})
    with pytest.raises(UserError, match="holds model.vision_resampler.query; only tensors of mm_projector and embed_tokens"):
        with_projector(checkpoint, file)
    save_projector(file, "linear", table=np.ones((1024, 48), np.float16))
    with pytest.raises(UserError, match=r"embed_tokens of \[1024, 48\]; \[1027, 48\] or \[2, 48\] was expected"):
        with_projector(checkpoint, file)
    save_projector(file, "linear", **{"model.mm_projector.weight": np.ones((48, 64), np.float16)})
    with pytest.raises(UserError, match=r"projector/linear_0/kernel is \[48, 64\]; \[48, 32\]"):
        with_projector(checkpoint, file)
    save_file({"unrelated": np.ones(2, np.float16)}, parts / "x.safetensors")
    with pytest.raises(UserError, match="holds unrelated"):
        with_projector(checkpoint, parts / "x.safetensors")
    (parts / "stage1" / "config.json").write_text('{"mm_use_im_start_end": true}')
    plain, _ = build(parts / "mistral", parts / "clip-tiny", "linear", parts)
    save_projector(file, "linear")
    with pytest.raises(UserError, match="has mm_use_im_start_end set, but the model has no <im_start>.*--add_image_tokens"):
        with_projector(plain, file)


# --- what does not fit -------------------------------------------------------------------------------------------------------------


def edit(parts, part, **changes):
    file = parts / part / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))


BAD = {
    "no decoder": (lambda p: (p / "mistral" / "config.json").unlink(), "mistral holds no config.json"),
    "other decoder": (lambda p: edit(p, "mistral", model_type="gpt2"), "mistral has model_type 'gpt2'; one of llama, mistral"),
    "a config without its keys": (lambda p: edit(p, "mistral", hidden_size="drop", num_key_value_heads="drop"),
                                  "mistral: config.json lacks hidden_size, num_key_value_heads"),
    "a config with words": (lambda p: edit(p, "mistral", hidden_size="wide"), "hidden_size 'wide'; a whole number"),
    "other shapes": (lambda p: edit(p, "mistral", hidden_size=64), r"tensors misshapen: model.embed_tokens.weight is \[1024, 48\]"),
    "no tower": (lambda p: (p / "clip-tiny" / "config.json").unlink(), "clip-tiny holds no config.json"),
    "other tower": (lambda p: edit(p, "clip-tiny", model_type="blip", vision_config={"model_type": "blip_vision_model"}),
                    "clip-tiny has model_type 'blip'; clip_vision_model or siglip_vision_model or vit was"),
    "NaFlex": (lambda p: edit(p, "clip-tiny", model_type="siglip2", vision_config={"model_type": "siglip2_vision_model"}),
               "clip-tiny has model_type 'siglip2', SigLIP 2 with images of any shape .NaFlex.; a SigLIP 2 of one resolution was expected"),
    "no tokenizer": (lambda p: (p / "mistral" / "tokenizer.model").unlink(), "no tokenizer files to add image tokens to"),
    "a tokenizer of another table": (lambda p: (p / "mistral" / "added_tokens.json").write_text('{"<x>": 1024}'),
                                     "the tokenizer has 1025 pieces and the embedding table 1024 rows"),
    "a broken tokenizer": (lambda p: (p / "mistral" / "tokenizer.model").write_bytes(b"?"), "tokenizer.model is not a SentencePiece model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parts_are_one_sentence_and_leave_nothing(case, parts, capsys):
    damage, sentence = BAD[case]
    damage(parts)
    assert command(parts, "built", "mistral", "clip-tiny", "linear", "--add_image_tokens") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(sentence, error), error
    assert sorted(p.name for p in parts.iterdir()) == ["clip-tiny", "mistral"]


def test_a_projector_that_is_neither_file_nor_type(parts, capsys):
    assert command(parts, "built", "mistral", "clip-tiny", "resampler") == 2
    assert "the projector type is 'resampler'; linear, mlpNx_gelu or identity was expected" in capsys.readouterr().err
    assert command(parts, "built", "mistral", "clip-tiny", parts / "mm_projector.bin") == 2
    assert "mm_projector.bin does not exist; a file or a type such as mlp2x_gelu" in capsys.readouterr().err


# --- stage 1 -----------------------------------------------------------------------------------------------------------------------


def test_stage_1_starts_from_it(parts, monkeypatch):
    from llavamed_jax.cli.train import main as train
    monkeypatch.chdir(ROOT)
    assert command(parts, "built", "mistral", "clip-tiny", "mlp2x_gelu", "--add_image_tokens") == 0
    settings = dict(init=parts / "built", total_steps=2, max_length=64, batch_size=8, micro_batches=1, log_every=1, remat="none", samples_every=0) | {
        "data.train": SAMPLE / "alignment.json", "data.images": training_runs.images(), "data.workers": 0, "data.packing": False,
        "mesh.data": 1}
    assert train(["--config", "configs/pretrain.py", "--workdir", str(parts / "run"),
                  *(f"--config.{key}={value}" for key, value in settings.items())]) == 0
    before, after = open_checkpoint(parts / "built"), open_checkpoint(parts / "run")
    assert after.step == 2 and after.config.use_start_end
    changed = {name for name in before.tensors if not np.array_equal(before.read(name), after.read(name))}
    assert changed == {name for name in before.tensors if name.startswith("projector/")}
    losses = [json.loads(line)["loss"] for line in (parts / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(np.isfinite(losses))


def test_a_presets_tower_is_random_and_of_the_seed(parts, capsys):
    """For a model that learns to see from nothing; another preset's name is refused with the list of them."""
    assert command(parts, "one", "mistral", "preset:small") == 0
    found = open_checkpoint(parts / "one")
    wanted = random_checkpoint(found.config, 0)
    assert found.config.vision == preset("small").vision
    for name in found.tensors:
        is_tower = name.startswith("vision_tower/")
        assert np.array_equal(found.read(name), wanted.read(name)) == is_tower or not is_tower, name
    assert command(parts, "two", "mistral", "preset:small", "mlp2x_gelu", "--seed", "1") == 0
    for layout in ("llava", "transformers"):
        export(found, parts / layout, layout)
        assert open_checkpoint(parts / layout).config.vision == found.config.vision
    name = "vision_tower/layers_0/mlp/fc1/kernel"
    assert (open_checkpoint(parts / "two").read(name) != found.read(name)).all()
    capsys.readouterr()
    assert command(parts, "three", "mistral", "preset:smal") == 1
    assert "small" in capsys.readouterr().err and not (parts / "three").exists()


@pytest.mark.parametrize("layout", ["tree", "llava", "transformers"])
def test_the_tower_of_a_whole_model_is_taken_with_its_settings(layout, parts, capsys):
    """A tower that another model has trained; here with a projector, a decoder and a preprocessor of its own."""
    assert command(parts, "whole") == 0
    whole = open_checkpoint(parts / "whole")
    whole = whole.replace(config=whole.config.replace(feature_layer=-3, feature_select="cls_patch"))
    write_model(parts / layout, whole) if layout == "tree" else export(whole, parts / layout, layout)
    assert command(parts, "two", "mistral", layout, "linear", "--seed", "5") == 0
    assert f"features: hidden state -3 of the tower, cls_patch, as in {parts / layout}\n" in capsys.readouterr().out
    two, tower = open_checkpoint(parts / "two"), [name for name in whole.tensors if name.startswith("vision_tower/")]
    assert two.config.vision == whole.config.vision and two.config.vision.image_mean == (0.5, 0.5, 0.5)
    assert len(tower) > 10 and two.config.projector_type == "linear"
    assert (two.config.feature_layer, two.config.feature_select) == (-3, "cls_patch")
    assert json.loads(two.config.extra)["mm_vision_tower"] == "clip-tiny"  # which an export names
    for name in tower:
        assert two.read(name).tobytes() == whole.read(name).tobytes(), name
    assert Processor.load(parts / "two").config.vision == Processor.load(parts / "whole").config.vision


def save_run(parts, start, trained):
    """A workdir whose run has trained these tensors, and saved them after two updates."""
    write_model(parts / "run", start, without=trained)
    trained = {name: jnp.asarray(start.read(name)) + 1 for name in trained}
    with StepWriter(parts / "run") as writer:
        writer.save(2, trained, optax.sgd(1e-3).init(trained), {"step": 2})


def test_a_workdirs_tower_is_that_of_its_newest_step(parts):
    assert command(parts) == 0
    start = open_checkpoint(parts / "built")
    save_run(parts, start, [name for name in start.tensors if name.startswith("vision_tower/")])
    assert command(parts, "two", "mistral", "run") == 0
    name, run, two = "vision_tower/layers_0/mlp/fc1/kernel", open_checkpoint(parts / "run"), open_checkpoint(parts / "two")
    assert run.step == 2 and name in run.changed
    np.testing.assert_array_equal(two.read(name), np.asarray(start.read(name) + np.float16(1), two.read(name).dtype))
    assert two.read(name).tobytes() == run.read(name).tobytes()


def test_a_tower_with_an_adapter_is_refused(parts, capsys):
    assert command(parts) == 0
    rules = (AdapterRule(r"vision_tower/layers_\d+/.*", 2, 4.0),)
    start = attach(open_checkpoint(parts / "built"), AdapterConfig(rules), 0)
    save_run(parts, start, [name for name in start.tensors if is_factor(name)])
    capsys.readouterr()
    assert command(parts, "two", "mistral", "run") == 1
    assert "an adapter changes the vision tower of" in capsys.readouterr().err and not (parts / "two").exists()
