"""Llama 3, SmolLM2, Qwen2.5, Qwen3 and OLMo-2 on the whole way: built from a directory of transformers, computed, decoded, exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli.convert import main
from llavamed_jax.config import IMAGE_TOKEN, DecoderConfig, preset
from llavamed_jax.config.decoders import DECODERS, decoder_from_hf
from llavamed_jax.config.hf import llava_from_hf, llava_to_hf
from llavamed_jax.config.presets import PRESETS
from llavamed_jax.errors import UserError
from llavamed_jax.models import llava
from llavamed_jax.models.stacking import stack
from llavamed_jax.parallel.mesh import make_mesh, param_shardings
from llavamed_jax.processor import Processor
from llavamed_jax.training.losses import cross_entropy
from llavamed_jax.utils.nested import flatten
from tests.support import byte_level, tiny
from tests.support.programs import apply

TOLERANCE = 2e-5
KINDS = {"smollm2": "llama", "llama3": "llama", "llama3.1": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
TOKENIZER = {kind: kind for kind in KINDS}  # the tokenizer's files
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
            max_position_embeddings=512, tie_word_embeddings=False)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
OWN = {"smollm2": dict(tie_word_embeddings=True), "llama3": {}, "llama3.1": dict(tie_word_embeddings=True, head_dim=16), "qwen2.5": {},
       "qwen3": dict(head_dim=16), "olmo2": dict(attention_bias=True)}
_TEMPLATES = {kind: name for name, kind in byte_level.TEMPLATES.items()}
TEMPLATE = {kind: _TEMPLATES[files] for kind, files in TOKENIZER.items()}
END = {kind: "<|eot_id|>" if kind.startswith("llama3") else "<|im_end|>" for kind in KINDS} | {"olmo2": "<|endoftext|>"}
PIXELS = np.random.default_rng(0).standard_normal((1, 1, 28, 28, 3)).astype(np.float32)


class Built:
    """A language model of transformers, what `convert build` made of it, and its params."""

    def __init__(self, kind, root):
        from tests.support import hf
        self.kind, self.root, self.torch = kind, root, hf.torch
        directory = byte_level.save(root / "lm", TOKENIZER[kind])
        tokenizer = Processor.load(directory).tokenizer
        end = tokenizer.id_of(END[kind])
        self.base_end = tokenizer.id_of("<|end_of_text|>" if kind.startswith("llama3") else "<|endoftext|>")
        rope = {**(LLAMA3 if kind == "llama3.1" else {"rope_type": "default"}), "rope_theta": 5e5}
        # A base model's ids: what ends a document. The template's end token has to come from the tokenizer.
        text = {**TEXT, **OWN[kind], "vocab_size": tokenizer.vocab_size, "bos_token_id": None, "eos_token_id": self.base_end}
        config = hf.DECODERS[KINDS[kind]](**text, rope_parameters=rope)
        model = hf.transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        hf.randomise(model, seed=5)
        model.save_pretrained(directory)
        model.generation_config.eos_token_id = None
        self.model, self.end = model, end
        tiny.save_clip(root / "clip")
        assert main(["build", "--decoder", str(directory), "--vision", str(root / "clip"), "--projector", "mlp2x_gelu",
                     "--out", str(root / "built")]) == 0
        self.checkpoint = open_checkpoint(root / "built")
        self.params = load_params(self.checkpoint)

    @property
    def config(self):
        return self.checkpoint.config

    def ours(self, ids, positions=None, segments=None):
        """Our logits. Rows without an image are given one all the same, which none of them takes: one program for all."""
        positions = np.arange(ids.shape[1])[None] if positions is None else positions
        segments = np.ones_like(ids) if segments is None else segments
        return np.asarray(apply(llava.Llava(self.config), self.params, ids, PIXELS, positions, segments))

    def theirs(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor(np.asarray(ids)).long()).logits.numpy()


@pytest.fixture(scope="module", params=KINDS)
def built(request, tmp_path_factory):
    pytest.importorskip("torch", reason="torch's CPU build is not installed")
    pytest.importorskip("tokenizers")
    return Built(request.param, tmp_path_factory.mktemp(request.param))


IDS = np.array([[5, 9, 33, 7, 60, 61, 62, 9, 11, 40]], np.int32)
WITH_IMAGE = np.array([[5, *[IMAGE_TOKEN] * 4, 9, 33, 7, 60, 61]], np.int32)


def test_a_build_computes_what_transformers_computes_and_names_the_template(built):
    cfg = built.config
    assert type(cfg.decoder) is DECODERS[KINDS[built.kind]] and cfg.decoder.architecture == KINDS[built.kind]
    assert cfg.template == TEMPLATE[built.kind] and cfg.decoder.eos_ids == tuple(dict.fromkeys((built.base_end, built.end)))
    assert Processor.load(built.root / "built").eos_ids == cfg.decoder.eos_ids
    wanted = built.theirs(IDS)
    np.testing.assert_allclose(built.ours(IDS), wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


def test_samples_of_a_packed_row_do_not_see_each_other(built):
    positions = np.concatenate([np.arange(4), np.arange(6)])[None]
    together = built.ours(IDS, positions, np.repeat(np.int32([1, 2]), [4, 6])[None])
    wanted = np.concatenate([built.theirs(IDS[:, :4]), built.theirs(IDS[:, 4:])], axis=1)
    np.testing.assert_allclose(together, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("built", ["qwen3", "olmo2"], indirect=True)  # LLaMA's modules: test_decoder_variants.py
def test_decoding_with_the_cache_is_transformers(built):
    from llavamed_jax.generation.engine import Engine
    from llavamed_jax.generation.requests import Request
    row = np.random.default_rng(1).integers(3, 200, 40).tolist()
    tensor = built.torch.tensor([row])
    with built.torch.no_grad():
        wanted = built.model.generate(tensor, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    decoder = built.config.decoder
    ids = (0, wanted[7])  # of several stop ids the second, unless the first comes before it
    ending = dataclasses.replace(decoder, **decoder.ends_with(ids))
    found = Engine(built.config.replace(decoder=ending), built.params).generate([Request(row, [], 10)])
    assert len(wanted) == 10 and found == [wanted[:next(i for i, token in enumerate(wanted) if token in ids) + 1]]


@pytest.mark.parametrize("built", ["qwen2.5", "qwen3", "olmo2"], indirect=True)  # LLaMA's: test_decoder_variants.py
def test_every_leaf_has_one_place_on_a_mesh(built):
    shardings = param_shardings(llava.abstract_params(built.config, scan=True), llava.param_axes(built.config), make_mesh("data=2,fsdp=2,tp=2"))
    attention = shardings["decoder"]["layers"]["self_attn"]
    if built.kind == "qwen3":
        assert attention["q_norm"]["scale"].spec == attention["k_norm"]["scale"].spec == P(None, None)
    if built.kind == "qwen2.5":
        assert set(attention["o_proj"]) == {"kernel"} and attention["q_proj"]["bias"].spec == P(None, "tp")
    if built.kind == "olmo2":  # over all heads, which `tp` divides
        assert attention["q_norm"]["scale"].spec == attention["k_norm"]["scale"].spec == P(None, "tp")
        assert shardings["decoder"]["layers"]["post_feedforward_layernorm"]["scale"].spec == P(None, None)


@pytest.mark.parametrize("built", ["olmo2"], indirect=True)
def test_norms_over_all_heads_are_whole_where_tp_divides_the_heads(built):
    mesh = make_mesh("tp=2", jax.devices()[:2])
    placed = {}
    for scan in (False, True):
        shardings = param_shardings(llava.abstract_params(built.config, scan=scan), llava.param_axes(built.config), mesh)
        placed[scan] = jax.device_put(stack(built.params) if scan else built.params, shardings)
        layer = placed[scan]["decoder"]["layers" if scan else "layers_1"]["self_attn"]
        assert layer["k_norm"]["scale"].addressable_shards[0].data.shape[-1] == 8  # of 16
    with jax.set_mesh(mesh):
        found = apply(llava.Llava(built.config), placed[False], IDS)
    wanted = built.theirs(IDS)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("built", ["qwen2.5", "qwen3", "olmo2"], indirect=True)
def test_a_mesh_has_the_gradient_of_one_device(built):
    """Each leaf to float32's own error. In float64 the two are 2e-15 of a leaf's largest magnitude apart, and in float32 each
    is 2e-6 from float64's: the order of sums is all that a mesh changes."""
    # As in training, float32. The tower's file is in float16, and so would be its gradient, in steps of 1/2048.
    cfg, params = built.config, jax.tree.map(jnp.float32, stack(built.params))
    model = llava.Llava(cfg, scan=True, remat="qkvo")
    ids, pixels = np.repeat(WITH_IMAGE, 4, 0), np.repeat(PIXELS, 4, 0)

    def loss(params):
        total, count = cross_entropy(model.apply({"params": params}, ids, pixels), jnp.where(ids < 0, -100, ids), jnp.ones_like(ids))
        return total / count

    step = jax.jit(jax.value_and_grad(loss))
    value, wanted = step(params)
    mesh = make_mesh("data=2,fsdp=2,tp=2")
    shardings = param_shardings(llava.abstract_params(cfg, scan=True), llava.param_axes(cfg), mesh)
    with jax.set_mesh(mesh):
        on_mesh, found = step(jax.device_put(params, shardings))
    np.testing.assert_allclose(on_mesh, value, rtol=2e-6)
    wanted, found = flatten(wanted), flatten(found)
    assert wanted.keys() == found.keys()
    for name, right in wanted.items():
        # Scores are the same whatever is added to all of the tower's keys: its gradient is nothing but rounding errors.
        size = np.abs(right).max() if name != "vision_tower.layers.self_attn.k_proj.bias" else 1e-2
        assert size > 1e-3, name
        np.testing.assert_allclose(found[name], right, atol=1e-5 * size, rtol=0, err_msg=name)


def test_the_export_gives_our_logits_in_transformers(built, tmp_path):
    import transformers
    export(built.checkpoint, tmp_path / "hf", "transformers")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager", dtype="float32")
    assert not any(info.values()), info
    assert type(model.model.language_model).__name__ == {"llama": "LlamaModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model",
                                                            "olmo2": "Olmo2Model"}[KINDS[built.kind]]
    image = json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_index"]
    with built.torch.no_grad():
        theirs = model.eval()(input_ids=built.torch.tensor(np.where(WITH_IMAGE == IMAGE_TOKEN, image, WITH_IMAGE)).long(),
                              pixel_values=built.torch.tensor(PIXELS[0]).permute(0, 3, 1, 2)).logits.numpy()
    rows = built.config.decoder.vocab_size
    ours = built.ours(WITH_IMAGE)
    np.testing.assert_allclose(theirs[..., :rows], ours, atol=TOLERANCE * np.abs(ours).max(), rtol=0)
    assert set(np.atleast_1d(model.generation_config.eos_token_id)) == {built.base_end, built.end}
    again = open_checkpoint(tmp_path / "hf")
    assert again.config.decoder == built.config.decoder and again.config.template == built.config.template


def test_the_export_in_upstreams_layout_is_read_again(built, tmp_path, capsys):
    export(built.checkpoint, tmp_path / "out", "llava")
    said = capsys.readouterr().err
    assert ("LLaVA's own code has no class Llava" in said) is (KINDS[built.kind] in ("qwen3", "olmo2")), said
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
             "qwen3": ("llava_qwen3", "LlavaQwen3ForCausalLM"), "olmo2": ("llava_olmo2", "LlavaOlmo2ForCausalLM")}
    assert (raw["model_type"], raw["architectures"][0]) == names[KINDS[built.kind]]
    again = open_checkpoint(tmp_path / "out")
    assert again.config.decoder == built.config.decoder and again.config.template == built.config.template
    for name in built.checkpoint.tensors:
        np.testing.assert_array_equal(again.read(name), built.checkpoint.read(name), err_msg=name)
    raw.pop("llavamed_jax")  # upstream's own file: it names no template, and qwen is asked with upstream's
    found = llava_from_hf(raw, built.config.vision)
    assert found.decoder == built.config.decoder
    assert Processor(found).template_name == {"qwen2": "up:qwen_1_5", "qwen3": "hf:qwen3"}.get(
        KINDS[built.kind], "hf:olmo2" if built.kind == "olmo2" else "up:vicuna_v1")


# ---- what is refused ---------------------------------------------------------------------------------------------------


def hf_text(kind, **keys):
    return {"model_type": kind, **TEXT, "vocab_size": 70, **keys}


WINDOWS = [({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}, 3), ({"sliding_window": 3}, None),
           ({"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 1}, None), ({"use_sliding_window": True}, None),
           ({"use_sliding_window": True, "sliding_window": 3}, None), ({"use_sliding_window": True, "sliding_window": None}, None),
           ({"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, 3),
           ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, None)]


@pytest.mark.parametrize("keys, window", WINDOWS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_are_those_of_transformers(kind, keys, window):
    """transformers' own reading: the window of each layer follows from `layer_types` and `sliding_window`."""
    hf = pytest.importorskip("tests.support.hf")
    theirs = hf.DECODERS[kind](**{k: v for k, v in hf_text(kind, **keys).items() if k != "model_type"})
    wanted = {theirs.sliding_window if each == "sliding_attention" else None for each in theirs.layer_types}
    found = decoder_from_hf(hf_text(kind, **keys))
    assert {found.sliding_window} == wanted == {window}
    written = hf.DECODERS[kind](**{k: v for k, v in found.to_hf().items() if k != "model_type"})
    assert {written.sliding_window if each == "sliding_attention" else None for each in written.layer_types} == {window}
    assert decoder_from_hf(json.loads(json.dumps(found.to_hf()))) == found


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("keys, sentence", [
    ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, "max_window_layers is 1; 0 .all 2 layers have the window. or 2"),
    ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, "one window for all layers"),
    ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; true or false was expected"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, "rope_scaling is .*yarn.*; plain rotary"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'")])
def test_what_the_layers_do_not_do_is_refused(kind, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        decoder_from_hf(hf_text(kind, **keys))


def test_biases_are_those_of_transformers():
    read = lambda kind, **keys: decoder_from_hf(hf_text(kind, **keys))
    biases = lambda d: [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if d.has_bias(f"self_attn/{name}")]
    for keys in ({}, {"attention_bias": False}, {"attention_bias": True, "mlp_bias": True}):  # Qwen2's class knows neither key
        assert biases(read("qwen2", **keys)) == ["q_proj", "k_proj", "v_proj"] and not read("qwen2", **keys).has_bias("mlp/up_proj")
    assert biases(read("qwen3")) == [] and biases(read("qwen3", attention_bias=True)) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert biases(read("llama", attention_bias=True)) == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("kind", DECODERS)
def test_absent_keys_have_transformers_values(kind):
    hf = pytest.importorskip("tests.support.hf")
    theirs, ours = hf.DECODERS[kind](), decoder_from_hf({"model_type": kind})
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.rms_norm_eps,
            ours.max_position_embeddings, ours.bos_token_id, ours.eos_value, ours.pad_token_id, ours.tie_word_embeddings, ours.hidden_act,
            ours.rope_theta) == (
        theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads, theirs.rms_norm_eps, theirs.max_position_embeddings, theirs.bos_token_id, theirs.eos_token_id,
        theirs.pad_token_id, theirs.tie_word_embeddings, theirs.hidden_act, theirs.rope_parameters["rope_theta"])
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads) == 128
    assert decoder_from_hf(theirs.to_dict()) == ours
    null = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # a value, not the default
    ours, theirs = decoder_from_hf({"model_type": kind, **null}), hf.DECODERS[kind](**null)
    assert (ours.bos_token_id, ours.eos_value, ours.pad_token_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert decoder_from_hf(json.loads(json.dumps(ours.to_hf()))) == ours


@pytest.mark.parametrize("other, sentence", [
    ("more tokens", r"the decoder .*lm has the tokenizer of another model \(.*tokenizer.json: \d+ tokens for 300 rows of the embedding table\)"),
    ("another end", r"has the tokenizer of another model \(.*: \d+ tokens, and the decoder's end-of-sequence id is 900\)")])
def test_a_tokenizer_that_is_not_the_decoders_is_one_sentence(other, sentence, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    rows = {"more tokens": 300, "another end": 1000}[other]
    config = {**tiny.LLAMA, "vocab_size": rows, "eos_token_id": 2 if other == "more tokens" else 900}
    byte_level.save(tmp_path / "lm", "smollm2")
    tiny.save(tmp_path / "lm", config, tiny.drawn(tiny.decoder_shapes(config)))
    tiny.save_clip(tmp_path / "clip")
    assert main(["build", "--decoder", str(tmp_path / "lm"), "--vision", str(tmp_path / "clip"), "--projector", "linear",
                 "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    import re
    assert re.search(sentence + "; the decoder's own tokenizer was expected", said) and said.count("\n") == 1


# ---- released shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", [("llama3-8b", 8_030_261_248), ("llama3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512),
                                              ("qwen3-8b", 8_190_735_360), ("smollm2-135m", 134_515_008)])
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    """The totals that the model cards' safetensors headers state."""
    abstract = llava.abstract_params(preset(name), scan=True)["decoder"]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters
    assert Processor(preset(name)).template_name == PRESETS[name].template
    assert llava_from_hf(llava_to_hf(preset(name), "transformers")).decoder == preset(name).decoder
    assert isinstance(preset(name).decoder, DecoderConfig)
