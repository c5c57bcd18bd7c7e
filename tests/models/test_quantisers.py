"""A quantiser or an adapter that intercepts `jax.lax.dot_general` reaches every kernel of the model.

qwix patches the product while a module is traced. A product inside a jitted function (`jnp.matmul`, `@`) is traced once for
each shape and reused, so that qwix sees only the first of several equal layers, and says nothing.
"""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest
import qwix
from qwix._src.providers.ptq import WithAux

from llavamed_jax.config import DecoderConfig, LlavaConfig
from llavamed_jax.config.decoders import DECODERS, decoder_from_hf
from llavamed_jax.config.towers import TOWERS
from llavamed_jax.models.llava import Llava

# Feature layer -2: three of the tower's four layers are used.
CONFIGS = {kind.model_type: LlavaConfig(
    kind(32, 64, 4, 2, 8, 4),
    DecoderConfig(64, 32, 64, 3, 4, 2, 8, 1e-5, 1e4, 128, architecture="mistral"),
    projector_type="mlp2x_gelu") for kind in TOWERS.values()}
# Every kind of decoder but LLaMA's, which is the towers' own.
CONFIGS |= {kind: next(iter(CONFIGS.values())).replace(decoder=decoder_from_hf(dict(
    model_type=kind, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128))) for kind, config in DECODERS.items() if config is not DecoderConfig}
IDS = jnp.arange(12).reshape(2, 6) % 64
PIXELS = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 1, 8, 8, 3)
INPUTS = (IDS.at[:, 1:5].set(-200), PIXELS)
# Every projection has one name in its layer; each is one kernel when scanned, and one a layer when unrolled.
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def expected(scan):
    """Paths of all kernels of the model, written down here and not read from it."""
    def of_layers(part, names, count):
        layers = ["layers"] if scan else [f"layers_{i}" for i in range(count)]
        return {(part, layer, "mlp" if re.match("fc|gate|up|down", name) else "self_attn", name)
                for layer in layers for name in names}

    return (of_layers("decoder", DECODER, 3) | of_layers("vision_tower", TOWER, 3)
            | {("decoder", "lm_head"), ("projector", "linear_0"), ("projector", "linear_1"),
               ("vision_tower", "embeddings", "patch_embedding")})


def shapes(model):
    """The variables that a model's initialisation would make."""
    return jax.eval_shape(model.init, jax.random.key(0), *INPUTS)["params"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_list_is_complete(kind):
    for scan in (False, True):
        flat = flax.traverse_util.flatten_dict(shapes(Llava(CONFIGS[kind], scan=scan)))
        assert {path[:-1] for path in flat if path[-1] == "kernel"} == expected(scan)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_lora_reaches_every_kernel(kind, scan):
    shapes(Llava(CONFIGS[kind], scan=scan))  # traced before, as in a process that has run the model: caches must not hide a product
    adapted = qwix.apply_lora_to_model(Llava(CONFIGS[kind], scan=scan), qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0))
    flat = flax.traverse_util.flatten_dict(shapes(adapted))
    for leaf in ("kernel_lora_a", "kernel_lora_b"):
        assert {path[:-1] for path in flat if path[-1] == leaf} == expected(scan)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_int8_reaches_every_kernel(kind, scan):
    shapes(Llava(CONFIGS[kind], scan=scan))
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)
    flat = flax.traverse_util.flatten_dict(shapes(qwix.quantize_model(Llava(CONFIGS[kind], scan=scan), qwix.PtqProvider([rule]))))
    int8 = {path[:-1] for path, leaf in flat.items()
            if path[-1] == "kernel" and isinstance(leaf, WithAux) and leaf.array.qvalue.dtype == jnp.int8}
    assert int8 == expected(scan)
