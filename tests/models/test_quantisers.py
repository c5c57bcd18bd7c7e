"""A quantiser or an adapter that intercepts `jax.lax.dot_general` reaches every kernel of the model.

qwix patches the product while a module is traced. A product inside a jitted function (`jnp.matmul`, `@`) is traced once for
each shape and reused, so that qwix sees only the first of several equal layers, and says nothing.
"""

import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest
import qwix
from qwix._src.providers.ptq import WithAux

from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.decoders import DECODERS, decoder_from_hf
from llavamed_jax.config.towers import TOWERS
from llavamed_jax.models.llava import Llava

# Every kind of tower and every kind of decoder once. Feature layer -2: two of the tower's three layers are used.
SHAPES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=128)
KINDS = list(dict.fromkeys(TOWERS.values())), list({config: kind for kind, config in DECODERS.items()}.values())
PAIRS = [[kinds[i % len(kinds)] for kinds in KINDS] for i in range(max(map(len, KINDS)))]
CONFIGS = {f"{tower.model_type}, {decoder}": LlavaConfig(
    tower(32, 64, 3, 2, 8, 4), decoder_from_hf(dict(SHAPES, model_type=decoder)), projector_type="mlp2x_gelu") for tower, decoder in PAIRS}
IDS = jnp.arange(12).reshape(2, 6) % 64
PIXELS = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 1, 8, 8, 3)
INPUTS = (IDS.at[:, 1:5].set(-200), PIXELS)
# All kinds run their layers through the same stack, so one kind is tested scanned.
EVERY_KIND = pytest.mark.parametrize("kind, scan", [*((kind, False) for kind in CONFIGS), (next(iter(CONFIGS)), True)])
# Every projection has one name in its layer; each is one kernel when scanned, and one a layer when unrolled.
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def expected(scan):
    """Paths of all kernels of the model, written down here and not read from it."""
    def of_layers(part, names, count):
        layers = ["layers"] if scan else [f"layers_{i}" for i in range(count)]
        return {(part, layer, "mlp" if re.match("fc|gate|up|down", name) else "self_attn", name)
                for layer in layers for name in names}

    return (of_layers("decoder", DECODER, 2) | of_layers("vision_tower", TOWER, 2)
            | {("decoder", "lm_head"), ("projector", "linear_0"), ("projector", "linear_1"),
               ("vision_tower", "embeddings", "patch_embedding")})


def shapes(model):
    """The variables that a model's initialisation would make."""
    return jax.eval_shape(model.init, jax.random.key(0), *INPUTS)["params"]


@functools.cache
def plain(kind, scan):
    """A model's own variables. Every test takes them first, as a process does that has run the model: what JAX then holds of it
    must not hide a product from a quantiser."""
    return flax.traverse_util.flatten_dict(shapes(Llava(CONFIGS[kind], scan=scan)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_list_is_complete(kind):
    for scan in (False, True):
        assert {path[:-1] for path in plain(kind, scan) if path[-1] == "kernel"} == expected(scan)


@EVERY_KIND
def test_lora_reaches_every_kernel(kind, scan):
    plain(kind, scan)
    adapted = qwix.apply_lora_to_model(Llava(CONFIGS[kind], scan=scan), qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0))
    flat = flax.traverse_util.flatten_dict(shapes(adapted))
    for leaf in ("kernel_lora_a", "kernel_lora_b"):
        assert {path[:-1] for path in flat if path[-1] == leaf} == expected(scan)


@EVERY_KIND
def test_int8_reaches_every_kernel(kind, scan):
    plain(kind, scan)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)
    flat = flax.traverse_util.flatten_dict(shapes(qwix.quantize_model(Llava(CONFIGS[kind], scan=scan), qwix.PtqProvider([rule]))))
    int8 = {path[:-1] for path, leaf in flat.items()
            if path[-1] == "kernel" and isinstance(leaf, WithAux) and leaf.array.qvalue.dtype == jnp.int8}
    assert int8 == expected(scan)
