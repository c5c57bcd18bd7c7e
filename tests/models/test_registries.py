"""A tower without a class token (SigLIP's) and a decoder with q/k norms (Qwen3's), added from this file alone.

Both run through what the package has: opening torch's files, forward pass, loss, sharding, export and generation.
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llavamed_jax as lm
from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import IMAGE_TOKEN, DecoderConfig, LlavaConfig, VisionConfig, preset
from llavamed_jax.config.decoders import DECODERS
from llavamed_jax.config.decoders.llama import TABLE as LLAMA_TABLE
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.config.towers import TOWERS
from llavamed_jax.config.towers.clip import TABLE as CLIP_TABLE
from llavamed_jax.errors import UserError
from llavamed_jax.models import decoders, llava, towers
from llavamed_jax.models.decoders import llama
from llavamed_jax.models.decoders.cache import init_cache
from llavamed_jax.models.layers import RMSNorm
from llavamed_jax.models.stacking import layer_stack, run_layers
from llavamed_jax.models.towers import clip
from llavamed_jax.models.towers.pixels import normalize
from llavamed_jax.parallel.mesh import make_mesh, param_shardings
from llavamed_jax.training.losses import cross_entropy
from tests.support import tiny
from tests.support.programs import apply

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


# --- a decoder ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NormsConfig(DecoderConfig):
    """Qwen3's: queries and keys are normalised, each head by itself, before they are rotated."""

    architecture: str = "toy_norms"
    table = LLAMA_TABLE + """
layers_#/self_attn/q_norm/scale   layers.#.self_attn.q_norm.weight   H
layers_#/self_attn/k_norm/scale   layers.#.self_attn.k_norm.weight   H
"""
    defaults = {"toy_norms": {**DecoderConfig.defaults["llama"], "rope_theta": 1e6}}
    hf_class = "ToyNormsForCausalLM"


class NormsAttention(llama.Attention):
    def query_key(self, q, k):
        norm = lambda name: RMSNorm(self.cfg.rms_norm_eps, self.dtype, name=name)
        return norm("q_norm")(q), norm("k_norm")(k)


class NormsBlock(llama.Block):
    attention = NormsAttention


class NormsDecoder(llama.Decoder):
    block = NormsBlock


# --- a tower --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlainConfig(VisionConfig):
    """SigLIP's: no class token, no norm before the layers, a bias of the patches."""

    model_type = "toy_tower"
    class_tokens = 0
    table = "\n".join(
        line for line in CLIP_TABLE.splitlines() if not line.startswith(("pre_layrnorm", "embeddings/class"))
    ) + "\nembeddings/patch_bias embeddings.patch_embedding.bias D\n"


class PlainEmbeddings(nn.Module):
    cfg: PlainConfig
    dtype: object

    @nn.compact
    def __call__(self, pixels):
        cfg = self.cfg
        patches = clip.PatchEmbedding(cfg, self.dtype, name="patch_embedding")(pixels)
        bias = self.param("patch_bias", nn.initializers.zeros, (cfg.hidden_size,))
        positions = clip.PositionEmbedding(cfg.num_positions, cfg.hidden_size, name="position_embedding")()
        return patches + (bias + positions).astype(self.dtype)


class PlainTower(nn.Module):
    cfg: PlainConfig
    num_layers: int
    dtype: object = jnp.float32
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        self.embeddings = PlainEmbeddings(self.cfg, self.dtype)
        self.layers = layer_stack(clip.Block, self.num_layers, self.cfg, self.dtype, self.attention, scan=self.scan, remat=self.remat)

    def __call__(self, pixels):
        return run_layers(self.layers, self.embeddings(normalize(pixels, self.cfg)), None)[0]


# --- both -----------------------------------------------------------------------------------------------------------

TEXT = dict(vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14,
              layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh", num_channels=3)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(DECODERS, "toy_norms", NormsConfig)
        monkeypatch.setitem(TOWERS, "toy_tower", PlainConfig)
        monkeypatch.setitem(decoders.MODULES, NormsConfig, NormsDecoder)
        monkeypatch.setitem(towers.MODULES, PlainConfig, PlainTower)
        yield


@pytest.fixture(scope="module")
def theirs():
    """transformers' models of the same kinds, with norms that are not 1 and biases that are not 0."""
    torch.manual_seed(0)
    decoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, vision_use_head=False))
    with torch.no_grad():
        for model in (decoder, tower):
            for name, x in model.named_parameters():
                x.copy_(torch.randn(x.shape) * 0.15 + ("norm" in name and name.endswith("weight")))
    return decoder.eval(), tower.eval()


@pytest.fixture(scope="module")
def built(theirs, registered, tmp_path_factory):
    return joined(*theirs, TEXT, tmp_path_factory.mktemp("built"))


def joined(decoder, tower, text, tmp_path):
    decoder, tower = ({k: v.numpy() for k, v in model.state_dict().items()} for model in (decoder, tower))
    tiny.save(tmp_path / "decoder", {"model_type": "toy_norms", **text}, decoder)
    tiny.save(tmp_path / "tower", {"model_type": "toy_tower", **VISION}, tower)
    return build(tmp_path / "decoder", tmp_path / "tower", "mlp2x_gelu", tmp_path / "scratch")[0]


IDS = np.array([[1, *[IMAGE_TOKEN] * 4, 5, 9, 33, 7]], np.int32)
PIXELS = np.random.default_rng(0).standard_normal((1, 1, 28, 28, 3)).astype(np.float32)


@pytest.mark.parametrize("scan", [False, True])
def test_both_compute_what_transformers_computes(built, theirs, scan):
    cfg, params = built.config, load_params(built, scan=scan)
    assert (type(cfg.vision), type(cfg.decoder), cfg.tokens_per_image) == (PlainConfig, NormsConfig, 4)
    model = llava.Llava(cfg, scan=scan)
    decoder, tower = theirs
    with torch.no_grad():
        logits = decoder(torch.tensor(IDS[:, 5:]).long()).logits.numpy()
        states = tower(torch.tensor(PIXELS[0]).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(apply(model, params, IDS[:, 5:]), logits, atol=2e-5)
    got = apply(model, params, PIXELS[0], method=lambda model, x: model.vision_tower(x))
    np.testing.assert_allclose(got, states[cfg.feature_layer].numpy(), atol=2e-5)


# The keys of a Qwen3 that limit its window, and the window that its layers have.
WINDOWS = [({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}, 3), ({"sliding_window": 3, "use_sliding_window": False}, None),
           ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}, None),
           ({"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, 3),
           ({"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention"] * 2}, None)]


@pytest.mark.parametrize("keys, window", WINDOWS)
def test_biases_and_windows_of_a_new_kind_are_read(keys, window, theirs, tmp_path):
    text = {**TEXT, **keys, "attention_bias": True}
    torch.manual_seed(1)
    decoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    with torch.no_grad():
        for name, x in decoder.named_parameters():
            x.copy_(torch.randn(x.shape) * 0.15 + ("norm" in name))
        logits = decoder.eval()(torch.tensor(IDS[:, [0, *[5] * 4, 6, 7, 8]]).long()).logits.numpy()
    checkpoint = joined(decoder, theirs[1], text, tmp_path)
    cfg = checkpoint.config
    assert (cfg.decoder.attention_bias, cfg.decoder.mlp_bias, cfg.decoder.sliding_window) == (True, False, window)
    got = apply(llava.Llava(cfg.replace(extra="{}")), load_params(checkpoint), IDS[:, [0, *[5] * 4, 6, 7, 8]])
    np.testing.assert_allclose(got, logits, atol=2e-5)
    again = NormsConfig.from_hf(json.loads(json.dumps(cfg.decoder.to_hf())))
    assert again == cfg.decoder
    written = transformers.Qwen3Config(**cfg.decoder.to_hf())
    assert (written.attention_bias, written.sliding_window, set(written.layer_types)) == (
        True, window, {"full_attention" if window is None else "sliding_attention"})


@pytest.mark.parametrize("keys, sentence", [
    ({"sliding_window": 3, "max_window_layers": 1}, "max_window_layers is 1; 0 .all 2 layers have the window. or 2 .none has it. was expected"),
    ({"sliding_window": 3, "max_window_layers": "x"}, "max_window_layers is 'x'; 0 "),
    ({"sliding_window": 3, "use_sliding_window": "no"}, "use_sliding_window is 'no'; true or false was expected"),
    ({"sliding_window": 0}, "sliding_window 0; a whole number of at least 1 was expected"),
    ({"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}, "one window for all layers, or full_attention"),
    ({"layer_types": ["sliding_attention"] * 2}, "its window None; one window for all layers"),
    ({"layer_types": ["linear_attention"] * 2}, "layer_types is .'linear_attention', .*one window for all layers"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention' and"),
    ({"attention_bias": "yes"}, "attention_bias 'yes'; true or false was expected"),
    ({"mlp_bias": True}, "the decoder's mlp_bias is true; false was expected, because the layers of toy_norms have no such biases here")])
def test_what_a_new_kind_does_not_do_is_refused(keys, sentence, monkeypatch):
    bare = "\n".join(line for line in NormsConfig.table.splitlines() if not ("/mlp/" in line and "/bias" in line))
    monkeypatch.setattr(NormsConfig, "table", bare)
    assert NormsConfig.from_hf({"model_type": "toy_norms", **TEXT, "sliding_window": 4}).sliding_window == 4
    with pytest.raises(UserError, match=sentence):
        NormsConfig.from_hf({"model_type": "toy_norms", **TEXT, **keys})


def test_llama_and_mistral_read_what_their_own_code_reads():
    keys = {"attention_bias": True, "mlp_bias": True, "sliding_window": 4, "use_sliding_window": False, "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"]}
    read = lambda kind: DecoderConfig.from_hf({"model_type": kind, **TEXT, **keys})
    fields = lambda d: (d.attention_bias, d.mlp_bias, d.sliding_window)
    assert (fields(read("llama")), fields(read("mistral"))) == ((True, True, None), (False, False, 4))
    assert "sliding_window" not in read("llama").to_hf() and "max_window_layers" not in read("mistral").to_hf()


def test_scanned_layers_refuse_caches(built):
    caches = init_cache(built.config.decoder, 1, 16)
    args = np.ones((1, 3, 32), np.float32), np.arange(3)[None], caches
    step = lambda scan: jax.eval_shape(functools.partial(apply, llava.Llava(built.config, scan=scan), method="step"),
                                       load_params(built, scan=scan), *args)
    assert len(step(False)[1]) == len(caches)
    with pytest.raises(ValueError, match="scanned layers take no caches"):
        step(True)


def test_loss_gradients_and_shardings(built):
    cfg, params = built.config, load_params(built, scan=True)
    model = llava.Llava(cfg, scan=True, remat="minimal")

    def loss(params):
        total, count = cross_entropy(model.apply({"params": params}, IDS, PIXELS), jnp.where(IDS < 0, -100, IDS), jnp.ones_like(IDS))
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    where = param_shardings(llava.abstract_params(cfg, scan=True), llava.param_axes(cfg), make_mesh("data=2,fsdp=2,tp=2"))
    assert where["decoder"]["layers"]["self_attn"]["q_norm"]["scale"].spec == P(None, None)
    assert where["vision_tower"]["layers"]["self_attn"]["q_proj"]["kernel"].spec == P(None, "fsdp", "tp")


@pytest.mark.parametrize("layout", ["transformers", "llava", "tree"])
def test_out_and_in_again(built, theirs, tmp_path, layout):
    if layout == "tree":
        write_model(tmp_path / "out", built)
    else:
        export(built, tmp_path / "out", layout)
    again = open_checkpoint(tmp_path / "out")
    assert (again.config.vision, again.config.decoder.table) == (built.config.vision, NormsConfig.table)
    assert LlavaConfig.from_dict(json.loads(json.dumps(again.config.to_dict()))) == again.config
    vocabulary = built.config.decoder.vocab_size
    for name in built.tensors:
        np.testing.assert_array_equal(again.read(name)[..., :vocabulary] if "lm_head" in name else again.read(name)[:vocabulary],
                                      built.read(name), err_msg=name)


def test_generation_with_the_cache(built, tmp_path):
    export(built, tmp_path / "out", "llava")
    model = lm.load(tmp_path / "out")
    row = IDS[0].tolist()
    (found,) = model.generate_tokens([row], [list(PIXELS[0])], max_new_tokens=3)
    assert (len(found) == 3 or found[-1] == 2) and 2 not in found[:-1]
    logits = model.logits(np.array([row + found], np.int32), PIXELS[0])[0]  # without a cache, of what was generated
    assert found == np.argmax(logits[len(row) - 1:-1], axis=-1).tolist()


def test_what_is_not_registered_is_refused_with_what_is(monkeypatch):
    text, vision = {"model_type": "toy_norms", **TEXT}, {"model_type": "toy_tower", **VISION}
    raw = {"model_type": "llava", "text_config": text, "vision_config": vision, "vision_feature_select_strategy": "full"}
    assert llava_from_hf(raw).tokens_per_image == 4
    with pytest.raises(UserError, match="drops the class token, but the tower toy_tower has no class token; full was expected"):
        llava_from_hf({**raw, "vision_feature_select_strategy": "default"})
    monkeypatch.delitem(TOWERS, "toy_tower")
    with pytest.raises(UserError, match="the vision tower's model_type is 'toy_tower'; clip_vision_model or siglip_vision_model or vit was"):
        llava_from_hf(raw)
    monkeypatch.setitem(TOWERS, "toy_tower", PlainConfig)
    monkeypatch.delitem(DECODERS, "toy_norms")
    with pytest.raises(UserError, match=f"the decoder's model_type is 'toy_norms'; one of {', '.join(DECODERS)} was expected"):
        llava_from_hf(raw)


@pytest.mark.parametrize("kind", ["toy_norms", "mistral"])
@pytest.mark.parametrize("tower", [None, "tower"])
def test_a_plain_decoder_of_any_kind_is_told_how_to_become_a_model(kind, tower, tmp_path):
    tiny.save(tmp_path / "plain", {"model_type": kind, **TEXT}, {"model.norm.weight": np.ones(32, np.float32)})
    tiny.save(tmp_path / "tower", {"model_type": "toy_tower", **VISION})
    for opened in (open_checkpoint, read_config):
        with pytest.raises(UserError, match=f"plain: config.json has model_type '{kind}', so it is a plain decoder: `convert build --decoder"):
            opened(tmp_path / "plain", tower and tmp_path / tower)


@pytest.mark.parametrize("part, kinds, kind, row", [
    ("decoder", DECODERS, NormsConfig, "layers_#/mlp/up_proj/kernel"), ("vision_tower", TOWERS, PlainConfig, "layers_#/mlp/fc1/kernel")])
def test_a_kind_of_other_axes_leaves_the_others_as_they_are(part, kinds, kind, row, monkeypatch):
    cfg, mesh = preset("small"), make_mesh("fsdp=2,tp=2", jax.devices()[:4])
    shardings = lambda: param_shardings(llava.abstract_params(cfg), llava.param_axes(cfg), mesh)
    before = shardings()
    lines = [line[:-3] + "F D" if line.startswith(row) else line for line in map(str.rstrip, kind.table.splitlines())]
    odd = type("Odd", (kind,), {"table": "\n".join(lines)})
    monkeypatch.setitem(kinds, "odd", odd)
    assert shardings() == before
    old = cfg.decoder if part == "decoder" else cfg.vision
    new = odd(**{field.name: getattr(old, field.name) for field in dataclasses.fields(old)})
    changed = set(llava.param_axes(cfg.replace(**{"decoder" if part == "decoder" else "vision": new})))
    pattern = f"{part}/{row.replace('layers_#', 'layers(_[0-9]+)?')}"
    assert (pattern, ("mlp", "embed")) in changed and (pattern, ("embed", "mlp")) not in changed


def test_every_kind_has_a_module():
    """Its own, or that of a kind whose table has its every line."""
    for kinds, modules in ((TOWERS, towers.MODULES), (DECODERS, decoders.MODULES)):
        for kind in kinds.values():
            found = next(base for base in kind.__mro__ if base in modules)
            assert set(kind.table.splitlines()) <= set(found.table.splitlines()), kind


def test_a_kind_without_a_default_is_named(monkeypatch):
    monkeypatch.setattr(NormsConfig, "defaults", {"toy_norms": {k: v for k, v in NormsConfig.defaults["toy_norms"].items() if k != "rope_theta"}})
    with pytest.raises(ValueError, match=r"the defaults\['toy_norms'\] of tests.models.test_registries.NormsConfig have no rope_theta; the values"):
        NormsConfig.from_hf({"model_type": "toy_norms", **TEXT})


def test_a_module_that_the_table_does_not_have_is_named():
    with pytest.raises(ValueError, match="the axes of layers_#/mlp/fc3/kernel, which has no line in the table"):
        PlainConfig(32, 48, 3, 4, 28, 14).axes("mlp/fc3")
