"""Our forward pass against transformers' on CPU, float32, and a table of mutants that the same comparison rejects."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from llavamed_jax.config import RopeScaling
from llavamed_jax.models import layers, llava
from llavamed_jax.models.attention import backend
from llavamed_jax.models.decoders import llama, olmo, qwen
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.stacking import stack
from llavamed_jax.models.towers import clip
from tests.support import hf
from tests.support.programs import apply

torch = hf.torch

TOLERANCE = 2e-5
P = 16  # patches of an image of hf.VISION
IMG = [-200] * P
B, T, I = 4, 64, 3  # rows, positions and images of every batch: cases of one shape share what is compiled
# One case of each kind of decoder has an image; without one the tower does not run.
FAR = 1150  # positions between the two parts of a row that stands for a long one
rng = np.random.default_rng(0)


def text(n):
    return rng.integers(3, 90, n).tolist()


DEEP = {"num_hidden_layers": 2}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
# The released settings where a tiny model can have them.
SMOLLM2 = dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8, rope_theta=1e5, tie_word_embeddings=True,
               pad_token_id=2)
QWEN25 = dict(rms_norm_eps=1e-6, rope_theta=1e6, bos_token_id=None, eos_token_id=92, pad_token_id=None,
              sliding_window=131072)
QWEN3 = {**QWEN25, "head_dim": 32, "sliding_window": None}
OLMO2 = dict(rms_norm_eps=1e-6, rope_theta=5e5, bos_token_id=None, eos_token_id=92, pad_token_id=None,
             sliding_window=7)  # its code knows no window


@dataclasses.dataclass
class Case:
    """A model, of one layer unless its text says otherwise, and a batch. `rows` hold ids with P image positions an image; short rows are padded on the right.

    `gap` positions are left out in front of the last 32 of the T.
    """

    rows: list
    num_images: list
    model: dict = dataclasses.field(default_factory=dict)
    image_scale: float = 1.0
    gap: int = 0

    @functools.cached_property
    def torch_side(self):
        model, cfg = hf.llava(**{**self.model, "text": {"num_hidden_layers": 1, **self.model.get("text", {})}})
        ids, segments, positions = self.batch
        pixels = hf.images(sum(self.num_images), scale=self.image_scale) if sum(self.num_images) else None
        with torch.no_grad():  # the head is scaled so that the logits' standard deviation is 1
            reference = hf.torch_logits(model, np.maximum(ids, -200), pixels, segments, positions)
            head = model.get_output_embeddings().weight
            head *= float(1 / reference[segments == 1].std())
        return hf.torch_logits(model, ids, pixels, segments, positions), hf.params_of(model), cfg, pixels

    @property
    def batch(self):
        """Ids, segments (0 is padding) and positions [B,T]; the rows behind the case's own are padding."""
        ids, segments = np.zeros((2, B, T), np.int32)
        for row, own in enumerate(self.rows):
            ids[row, :len(own)], segments[row, :len(own)] = own, 1
        positions = np.arange(T) + self.gap * (np.arange(T) >= T - 32)
        return ids, segments, np.tile(positions, (B, 1))

    @property
    def slots(self):
        """The images where our model takes them, [B,I,height,width,3]; None where the rows have none."""
        pixels = self.torch_side[-1]
        if pixels is None:
            return None
        slots, taken = np.zeros((B, I, *pixels.shape[1:]), np.float32), iter(pixels)
        for row, n in enumerate(self.num_images):
            for slot in range(n):
                slots[row, slot] = next(taken)
        return slots

    def difference(self, change_cfg=None, scan=False):
        """Largest absolute difference of logits at real positions."""
        expected, params, cfg, _ = self.torch_side
        ids, segments, positions = self.batch
        cfg = change_cfg(cfg) if change_cfg else cfg
        batch = ids, self.slots, positions, segments
        got = apply(Llava(cfg, scan=True), stack(params), *batch) if scan else Llava(cfg).apply({"params": params}, *batch)
        assert 0.5 < expected[segments == 1].std() < 2
        return np.abs(np.asarray(got) - expected)[segments == 1].max()


CASES = {
    "text only": Case([text(12), text(12)], [0, 0]),
    "one image": Case([[1] + IMG + text(9)], [1]),
    "several images in a row": Case([[1] + IMG + text(3) + IMG + IMG + text(4)], [3]),
    "padded and text-only rows": Case(
        [[1] + text(5), text(2) + IMG + text(20), [1] + text(8), IMG + text(3) + IMG + text(4)], [0, 1, 0, 2]),
    "llama, equal heads": Case([[1] + IMG + text(9)], [1], dict(architecture="llama", text=dict(num_key_value_heads=4, rms_norm_eps=1e-6))),
    "theta 1e6 at 1,200 positions": Case([[1] + text(62)], [0], dict(text=dict(rope_theta=1e6)), gap=FAR),
    "small activations": Case([[1] + text(11)], [0], dict(activation_scale=2e-3)),
    "llama, small activations": Case(
        [[1] + text(11)], [0], dict(architecture="llama", text=dict(rms_norm_eps=1e-6), activation_scale=2e-3)),
    "small images": Case([[1] + IMG + text(6)], [1], dict(vision=dict(layer_norm_eps=1e-4), seed=3), image_scale=1e-2),
    "window shorter than the sequence": Case([[1] + IMG + text(30), [1] + text(46)], [1, 0], dict(text=dict(sliding_window=7))),
    "tied head": Case([[1] + IMG + text(9)], [1], dict(text=dict(tie_word_embeddings=True))),
    "class token kept, last layer": Case(
        [[1] + [-200] * (P + 1) + text(9)], [1], dict(vision_feature_layer=-1, vision_feature_select_strategy="full")),
    "projector without bias": Case([[1] + IMG + text(9)], [1], dict(multimodal_projector_bias=False)),
    "exact GELU in the tower": Case([[1] + IMG + text(9)], [1], dict(vision=dict(hidden_act="gelu"))),
    "biased attention": Case([[1] + IMG + text(9)], [1], dict(architecture="llama", text=dict(attention_bias=True))),
    "biased attention and MLP": Case(
        [[1] + text(25), [1] + text(6)], [0, 0], dict(architecture="llama", text=dict(**DEEP, attention_bias=True, mlp_bias=True))),
    "linear scaling at 1,200 positions": Case(
        [[1] + text(62)], [0], dict(architecture="llama", text=dict(rope_scaling=LINEAR)), gap=FAR),
    "llama3 scaling at 1,200 positions": Case(
        [[1] + text(62)], [0], dict(architecture="llama", text=dict(rope_scaling=LLAMA3, rope_theta=5e5)), gap=FAR),
    "mistral, linear scaling, window": Case([[1] + IMG + text(30)], [1], dict(text=dict(**DEEP, rope_scaling=LINEAR, sliding_window=7))),
    "tanh GELU in decoder, projector and tower": Case(
        [[1] + IMG + text(9)], [1], dict(text=dict(hidden_act="gelu_pytorch_tanh"), vision=dict(hidden_act="gelu_new"),
                                         projector_hidden_act="gelu_fast")),
    "SmolLM2: 9 heads over 3, tied": Case([[1] + text(25), [1] + text(14)], [0, 0], dict(architecture="llama", text=SMOLLM2)),
    "Llama 3.2: tied, llama3 scaling, free head width": Case(
        [[1] + text(62)], [0], dict(architecture="llama", text=dict(
            tie_word_embeddings=True, rope_scaling=LLAMA3 | {"factor": 32.0}, rope_theta=5e5, head_dim=32, bos_token_id=90, eos_token_id=[91, 92],
            pad_token_id=None)), gap=FAR),
    "Qwen2.5": Case([[5] + text(25), text(14)], [0, 0], dict(architecture="qwen2", text=QWEN25)),
    "Qwen2.5, tied": Case([[5] + IMG + text(9)], [1], dict(architecture="qwen2", text={**QWEN25, "tie_word_embeddings": True})),
    "Qwen2.5, a window in every layer": Case(
        [[5] + text(46)], [0], dict(architecture="qwen2", text={**QWEN25, "use_sliding_window": True, "sliding_window": 7,
                                                                      "max_window_layers": 0})),
    "Qwen2.5, a window that is switched off": Case(
        [[5] + text(46)], [0], dict(architecture="qwen2", text={**QWEN25, "use_sliding_window": False, "sliding_window": 7})),
    "Qwen2.5, a window above the layers": Case(
        [[5] + text(46)], [0], dict(architecture="qwen2", text={**QWEN25, "use_sliding_window": True, "sliding_window": 7})),
    "Qwen3, heads wider than the model": Case([[5] + text(25), text(14)], [0, 0], dict(architecture="qwen3", text=QWEN3 | DEEP)),
    "Qwen3, small activations": Case([text(12)], [0], dict(architecture="qwen3", text=QWEN3, activation_scale=2e-3)),
    "Qwen3, small queries and keys": Case([text(12)], [0], dict(architecture="qwen3", text=QWEN3, projection_scale=2e-3)),
    "Qwen3, tied, biased, narrow heads": Case(
        [[5] + IMG + text(9)], [1], dict(architecture="qwen3", text={**QWEN3, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 8,
                                                                     "num_attention_heads": 9, "num_key_value_heads": 3})),
    "Qwen3 at 1,200 positions": Case([[5] + text(62)], [0], dict(architecture="qwen3", text=QWEN3), gap=FAR),
    "OLMo-2": Case([[5] + text(25), text(14)], [0, 0], dict(architecture="olmo2", text=OLMO2 | DEEP)),
    "OLMo-2, small activations": Case([text(12)], [0], dict(architecture="olmo2", text=OLMO2, activation_scale=2e-3)),
    "OLMo-2, small queries and keys": Case([text(12)], [0], dict(architecture="olmo2", text=OLMO2, projection_scale=2e-3)),
    "OLMo-2, tied, biased, equal heads": Case(
        [[5] + IMG + text(9)], [1], dict(architecture="olmo2", text={**OLMO2, "tie_word_embeddings": True, "attention_bias": True,
                                                                     "num_key_value_heads": 4})),
    "a list of one feature layer": Case([[1] + IMG + text(9)], [1], dict(vision_feature_layer=[-3])),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, measured):
    measured(CASES[name].difference(), 0.0, TOLERANCE)


@pytest.mark.parametrize("name", ["biased attention and MLP", "mistral, linear scaling, window", "Qwen3, heads wider than the model",
                                  "OLMo-2"])
def test_scanned_layers_equal_transformers(name, measured):
    measured(CASES[name].difference(scan=True), 0.0, TOLERANCE)


def decoder(**changes):
    return lambda cfg: cfg.replace(decoder=dataclasses.replace(cfg.decoder, **changes))


def vision(**changes):
    return lambda cfg: cfg.replace(vision=dataclasses.replace(cfg.vision, **changes))


def interleaved_heads(monkeypatch):
    """Query head n reads key head n mod K instead of n div G."""
    real = backend.attention

    def wrong(q, k, v, mask=None, backend="xla"):
        B, T, N, H = q.shape
        K = k.shape[1]
        swap = lambda x, a, b: x.reshape(B, T, a, b, H).swapaxes(2, 3).reshape(B, T, N, H)
        return swap(real(swap(q, N // K, K), k, v, mask, backend), K, N // K)
    for module in (llama, clip):
        monkeypatch.setattr(module, "attention", wrong)


def last_token_dropped(monkeypatch):
    real = clip.VisionTower.__call__
    monkeypatch.setattr(clip.VisionTower, "__call__", lambda self, pixels: jax.numpy.roll(real(self, pixels), 1, axis=1))


def batch_wide_merge(monkeypatch):
    """Features counted over the whole batch, as several neighbours do."""
    real = llava.merge

    def wrong(text, is_image, features):
        B, T, D = text.shape
        flat = features.reshape(1, 1, -1, features.shape[-1])
        return real(text.reshape(1, B * T, D), is_image.reshape(1, -1), flat).reshape(B, T, D)
    monkeypatch.setattr(llava, "merge", wrong)


def interleaved_rope(monkeypatch):
    def wrong(x, rope):
        H = x.shape[-1]
        pairs = x.reshape(*x.shape[:-1], H // 2, 2).swapaxes(-1, -2).reshape(x.shape)
        return layers.apply_rope(pairs, rope)
    monkeypatch.setattr(llama, "apply_rope", wrong)


def without_bias(part):
    """One projection of the decoder computed without its bias, which stays among the parameters."""
    def change(monkeypatch):
        real = layers.Linear.__call__

        def wrong(self, x, *kernel):
            y = real(self, x, *kernel)
            return y - self.get_variable("params", "bias") if self.name == part and "decoder" in self.path else y
        monkeypatch.setattr(layers.Linear, "__call__", wrong)
    return change


def norm_left_out(name):
    """The norm of queries or keys computes nothing."""
    def change(monkeypatch):
        real = layers.RMSNorm.__call__

        def wrong(self, x):
            y = real(self, x)
            return x if self.name == name else y
        monkeypatch.setattr(layers.RMSNorm, "__call__", wrong)
    return change


def unit(x, eps, axes=-1):
    return x * jax.lax.rsqrt((x * x).mean(axes, keepdims=True) + eps)


def norms_after_the_rotation(monkeypatch):
    """The scales are applied to rotated queries and keys."""
    real, scales = llama.apply_rope, []

    def wrong(self, q, k):
        scales[:] = [self.variables["params"][name]["scale"] for name in ("q_norm", "k_norm")]
        return unit(q, self.cfg.rms_norm_eps), unit(k, self.cfg.rms_norm_eps)
    monkeypatch.setattr(qwen.Attention, "query_key", wrong)
    monkeypatch.setattr(llama, "apply_rope", lambda x, rope: real(x, rope) * scales.pop(0))


def norms_over_all_heads(monkeypatch):
    """The mean of squares runs over the heads too, as in OLMo 2."""
    def wrong(self, q, k):
        scale = lambda name: self.variables["params"][name]["scale"]
        return tuple(unit(x, self.cfg.rms_norm_eps, (-2, -1)) * scale(name) for x, name in ((q, "q_norm"), (k, "k_norm")))
    monkeypatch.setattr(qwen.Attention, "query_key", wrong)


def heads_eps(eps):
    def change(monkeypatch):
        scale = lambda self, name: self.variables["params"][name]["scale"]
        monkeypatch.setattr(qwen.Attention, "query_key", lambda self, q, k: (
            unit(q, eps) * scale(self, "q_norm"), unit(k, eps) * scale(self, "k_norm")))
    return change


def norms_exchanged(monkeypatch):
    """Queries get the norm of keys, and keys that of queries."""
    right = qwen.Attention.query_key
    monkeypatch.setattr(qwen.Attention, "query_key", lambda self, q, k: right(self, k, q)[::-1])


def olmos_norms(change_heads):
    """Queries and keys of OLMo-2 normalised in another way: a function of heads [B,T,N,H], eps and the scale [N,H]."""
    def change(monkeypatch):
        def wrong(self, q, k):
            scale = lambda x, name: self.variables["params"][name]["scale"].reshape(x.shape[2:])
            return tuple(change_heads(x, self.cfg.rms_norm_eps, scale(x, name)) for x, name in ((q, "q_norm"), (k, "k_norm")))
        monkeypatch.setattr(olmo.Attention, "query_key", wrong)
    return change


def by_halves(x, eps, scale):
    """What each of two devices would compute if it normalised its own heads only."""
    return jax.numpy.concatenate([unit(half, eps, (-2, -1)) for half in jax.numpy.split(x, 2, axis=2)], axis=2) * scale


def olmos_norms_exchanged(monkeypatch):
    right = olmo.Attention.query_key
    monkeypatch.setattr(olmo.Attention, "query_key", lambda self, q, k: right(self, k, q)[::-1])


def olmos_norms_after_the_rotation(monkeypatch):
    real, scales = llama.apply_rope, []

    def unscaled(x, eps, scale):
        scales.append(scale)
        return unit(x, eps, (-2, -1))
    olmos_norms(unscaled)(monkeypatch)
    monkeypatch.setattr(llama, "apply_rope", lambda x, rope: real(x, rope) * scales.pop(0))


def olmos_layers(layer):
    """OLMo-2's layers computed by a function of x, attention, feed-forward and the two norms."""
    class Wrong(olmo.Block):
        @nn.compact
        def __call__(self, x, shared, cache):
            first, second = (olmo.RMSNorm(self.cfg.rms_norm_eps, self.dtype, name=f"post_{name}_layernorm") for name in (
                "attention", "feedforward"))
            attention = self.attention(self.cfg, self.dtype, self.backend, name="self_attn")
            mlp = llama.Mlp(self.cfg, self.dtype, name="mlp")
            return layer(x, lambda x: attention(x, *shared, cache)[0], mlp, first, second), cache
    return lambda monkeypatch: monkeypatch.setattr(olmo.Olmo2Decoder, "block", Wrong)


def right_layer(x, attention, mlp, first, second):
    x = x + first(attention(x))
    return x + second(mlp(x))


def norms_before(x, attention, mlp, first, second):
    x = x + attention(first(x))
    return x + mlp(second(x))


def norms_of_the_sum(x, attention, mlp, first, second):
    x = first(x + attention(x))
    return second(x + mlp(x))


def scaling(keys, **changes):
    return RopeScaling(**{**keys, **changes})


# (mutant, case, change of the config or None, change of the code or None)
MUTANTS = [
    ("decoder eps 1e-5 -> 1e-6", "small activations", decoder(rms_norm_eps=1e-6), None),
    ("decoder eps 1e-6 -> 1e-5", "llama, small activations", decoder(rms_norm_eps=1e-5), None),
    ("tower eps 1e-4 -> 1e-5", "small images", vision(layer_norm_eps=1e-5), None),
    ("theta 1e6 -> 1e4", "theta 1e6 at 1,200 positions", decoder(rope_theta=1e4), None),
    ("theta 1e6 -> 999,000", "theta 1e6 at 1,200 positions", decoder(rope_theta=999e3), None),
    ("window 7 -> none", "window shorter than the sequence", decoder(sliding_window=None), None),
    ("window 7 -> 8", "window shorter than the sequence", decoder(sliding_window=8), None),
    ("projector GELU exact -> tanh", "one image",
     lambda cfg: cfg.replace(projector_act="gelu_pytorch_tanh"), None),
    ("tower quick-GELU -> GELU", "one image", vision(hidden_act="gelu"), None),
    ("feature layer -2 -> -3", "one image", lambda cfg: cfg.replace(feature_layer=-3), None),
    ("class token in place of the last patch", "one image", None, last_token_dropped),
    ("query heads grouped the other way", "one image", None, interleaved_heads),
    ("rotary pairs interleaved", "one image", None, interleaved_rope),
    ("features counted over the batch", "padded and text-only rows", None, batch_wide_merge),
    *((f"a bias left out: {part}", "biased attention and MLP", None, without_bias(part)) for part in (
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ("linear factor 2.5 -> none", "linear scaling at 1,200 positions", decoder(rope_scaling=None), None),
    ("linear factor 2.5 -> 2.501", "linear scaling at 1,200 positions", decoder(rope_scaling=scaling(LINEAR, factor=2.501)), None),
    ("llama3 -> none", "llama3 scaling at 1,200 positions", decoder(rope_scaling=None), None),
    ("llama3 factor 8 -> 8.01", "llama3 scaling at 1,200 positions", decoder(rope_scaling=scaling(LLAMA3, factor=8.01)), None),
    ("llama3 low factor 1 -> 1.01", "llama3 scaling at 1,200 positions", decoder(rope_scaling=scaling(LLAMA3, low_freq_factor=1.01)), None),
    ("llama3 high factor 4 -> 4.01", "llama3 scaling at 1,200 positions",
     decoder(rope_scaling=scaling(LLAMA3, high_freq_factor=4.01)), None),
    ("llama3 length 512 -> 513", "llama3 scaling at 1,200 positions",
     decoder(rope_scaling=scaling(LLAMA3, original_max_position_embeddings=513)), None),
    ("decoder tanh GELU -> SiLU", "tanh GELU in decoder, projector and tower", decoder(hidden_act="silu"), None),
    ("decoder tanh GELU -> exact", "tanh GELU in decoder, projector and tower", decoder(hidden_act="gelu"), None),
    ("projector tanh GELU -> exact", "tanh GELU in decoder, projector and tower", lambda cfg: cfg.replace(projector_act="gelu"), None),
    ("tower tanh GELU -> exact", "tanh GELU in decoder, projector and tower", vision(hidden_act="gelu"), None),
    *((f"Qwen2.5: a bias left out: {part}", "Qwen2.5", None, without_bias(part)) for part in ("q_proj", "v_proj")),
    ("Qwen2.5: theta 1e6 -> 1e4", "Qwen2.5", decoder(rope_theta=1e4), None),
    ("Qwen2.5: window 7 -> none", "Qwen2.5, a window in every layer", decoder(sliding_window=None), None),
    ("Qwen2.5: no window -> 7", "Qwen2.5, a window that is switched off", decoder(sliding_window=7), None),
    ("Qwen2.5: no window -> 7 where it begins above the layers", "Qwen2.5, a window above the layers", decoder(sliding_window=7), None),
    ("Qwen3: no norm of queries", "Qwen3, heads wider than the model", None, norm_left_out("q_norm")),
    ("Qwen3: no norm of keys", "Qwen3, heads wider than the model", None, norm_left_out("k_norm")),
    ("Qwen3: norms behind the rotation", "Qwen3, heads wider than the model", None, norms_after_the_rotation),
    ("Qwen3: norms over all heads", "Qwen3, heads wider than the model", None, norms_over_all_heads),
    ("Qwen3: norms exchanged", "Qwen3, heads wider than the model", None, norms_exchanged),
    ("Qwen3: eps 1e-6 -> 1e-5", "Qwen3, small activations", decoder(rms_norm_eps=1e-5), None),
    ("Qwen3: eps of the heads' norms 1e-6 -> 0", "Qwen3, small queries and keys", None, heads_eps(0.0)),
    ("Qwen3: a bias left out: o_proj", "Qwen3, tied, biased, narrow heads", None, without_bias("o_proj")),
    ("OLMo-2: norms before attention and feed-forward", "OLMo-2", None, olmos_layers(norms_before)),
    ("OLMo-2: norms of the sum", "OLMo-2", None, olmos_layers(norms_of_the_sum)),
    ("OLMo-2: the layers' norms exchanged", "OLMo-2", None,
     olmos_layers(lambda x, attention, mlp, first, second: right_layer(x, attention, mlp, second, first))),
    *((f"OLMo-2: no {name}", "OLMo-2", None, norm_left_out(name)) for name in (
        "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm")),
    ("OLMo-2: norms head by head", "OLMo-2", None, olmos_norms(lambda x, eps, scale: unit(x, eps) * scale)),
    ("OLMo-2: norms over half of the heads", "OLMo-2", None, olmos_norms(by_halves)),
    ("OLMo-2: one head's scale for all", "OLMo-2", None, olmos_norms(lambda x, eps, scale: unit(x, eps, (-2, -1)) * scale[:1])),
    ("OLMo-2: norms behind the rotation", "OLMo-2", None, olmos_norms_after_the_rotation),
    ("OLMo-2: norms exchanged", "OLMo-2, tied, biased, equal heads", None, olmos_norms_exchanged),
    ("OLMo-2: eps 1e-6 -> 1e-5", "OLMo-2, small activations", decoder(rms_norm_eps=1e-5), None),
    ("OLMo-2: eps of the heads' norms 1e-6 -> 0", "OLMo-2, small queries and keys", None,
     olmos_norms(lambda x, eps, scale: unit(x, 0.0, (-2, -1)) * scale)),
    ("OLMo-2: a bias left out: o_proj", "OLMo-2, tied, biased, equal heads", None, without_bias("o_proj")),
    ("OLMo-2: no window -> 7", "OLMo-2", decoder(sliding_window=7), None),
    ("Llama 3.2: factor 32 -> 8", "Llama 3.2: tied, llama3 scaling, free head width", decoder(rope_scaling=scaling(LLAMA3)), None),
    ("SmolLM2: theta 1e5 -> 1e4", "SmolLM2: 9 heads over 3, tied", decoder(rope_theta=1e4), None),
    ("SmolLM2: query heads grouped the other way", "SmolLM2: 9 heads over 3, tied", None, interleaved_heads),
    ("feature layer [-3] -> -4", "a list of one feature layer", lambda cfg: cfg.replace(feature_layer=-4), None),
]


@pytest.mark.parametrize("name,case,change_cfg,change_code", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_mutants_fail_by_twice_the_tolerance(name, case, change_cfg, change_code, monkeypatch):
    if change_code:
        change_code(monkeypatch)
    assert CASES[case].difference(change_cfg) >= 2 * TOLERANCE


@pytest.mark.parametrize("change", [olmos_layers(right_layer), olmos_norms(lambda x, eps, scale: unit(x, eps, (-2, -1)) * scale)])
def test_olmos_mutants_differ_by_their_change_alone(change, monkeypatch, measured):
    change(monkeypatch)
    measured(CASES["OLMo-2"].difference(), 0.0, TOLERANCE)


def test_untied_head_in_place_of_a_tied_one_fails():
    case = CASES["tied head"]
    expected, params, cfg, _ = case.torch_side
    other = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    untied = {**params, "decoder": {**params["decoder"], "lm_head": {"kernel": other}}}
    ids, segments, positions = case.batch
    got = Llava(decoder(tie_word_embeddings=False)(cfg)).apply({"params": untied}, ids, case.slots, positions, segments)
    assert np.abs(np.asarray(got) - expected)[segments == 1].max() >= 2 * TOLERANCE


def main():
    """Prints both tables: `python tests/parity/test_parity.py`."""
    print(f"{'case':42} largest difference (tolerance {TOLERANCE:.0e})")
    for name, case in CASES.items():
        print(f"{name:42} {case.difference():.1e}")
    print(f"\n{'mutant':42} {'case':34} largest difference (must be {2 * TOLERANCE:.0e} or more)")
    for name, case, change_cfg, change_code in MUTANTS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            if change_code:
                change_code(monkeypatch)
            print(f"{name:42} {case:34} {CASES[case].difference(change_cfg):.1e}")


if __name__ == "__main__":
    main()
