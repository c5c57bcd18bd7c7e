"""The LLaMA-family decoder: LLaMA, Vicuna, SmolLM2, Mistral and Qwen2.

Training scans rematerialised layers; decoding runs them one by one, because a scanned stack copies the whole
key/value cache every step.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, H head width, D model
width, V vocabulary.

Source: transformers' LlamaModel and MistralModel.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llavamed_jax.config import DecoderConfig
from llavamed_jax.models import joined
from llavamed_jax.models.attention.backend import AttentionMask, attention
from llavamed_jax.models.backward import kernels_first
from llavamed_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, apply_rope, rope_tables
from llavamed_jax.models.stacking import layer_stack, run_layers
from llavamed_jax.parallel.mesh import RULES, constrain, spec_of


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped queries and an optional cache.

    A subclass that normalises queries and keys before they are rotated overrides `query_key` and `is_normed`.

    Attributes:
      cfg: the decoder's shapes.
      dtype: dtype of the computation.
      backend: attention backend (`attention.backend_of`).
      is_normed: whether queries and keys are normalised. Rematerialisation then saves them as the norms take them, and
        else as attention takes them, so that the backward pass rotates none again.
    """

    cfg: DecoderConfig
    dtype: Any
    backend: str

    is_normed = False

    @nn.compact
    def __call__(self, x, rope, mask, cache):  # [B,T,D] -> [B,T,D] ([B,1,D] if `mask` wants one query), cache
        """Returns the attention's output and the updated cache.

        Args:
          x: [B,T,D].
          rope: tables of `rope_tables`.
          mask: the `AttentionMask`.
          cache: the layer's `LayerCache`, or None.
        """
        cfg, (B, T, _) = self.cfg, x.shape

        heads = cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads
        products = joined.products(self, "self_attn", x, [n * cfg.head_dim for n in heads])
        q, k, v = (y.reshape(B, T, n, cfg.head_dim) for y, n in zip(products, heads, strict=True))
        if self.is_normed:
            q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        q, k = self.query_key(q, k)
        context, cache = attend(q, k, v, rope, mask, cache, self.backend, is_saved=not self.is_normed)
        context = mask.narrowed(context.reshape(B, T, -1))
        axes, has_bias = cfg.axes("self_attn/o_proj"), cfg.has_bias("self_attn/o_proj")
        return Linear(cfg.hidden_size, axes, has_bias, self.dtype, name="o_proj")(context), cache

    def query_key(self, q, k):
        """Returns the queries [B,T,N,H] and keys [B,T,K,H] that are rotated; here those that are given.

        An override may create submodules, with a `name`.
        """
        return q, k


def attend(q, k, v, rope, mask, cache, backend: str, is_saved: bool = False):
    """Rotates queries and keys, writes keys and values into the cache if there is one, and attends.

    Args:
      q: [B,T,N,H].
      k: [B,T,K,H].
      v: [B,T,K,H].
      rope: tables of `rope_tables`.
      mask: the `AttentionMask`.
      cache: the layer's `LayerCache`, or None.
      backend: attention backend (`attention.backend_of`).
      is_saved: whether rematerialisation saves queries and keys as attention takes them.

    Returns:
      The context [B,T,N,H] and the updated cache.
    """
    name, _, interpreted = backend.partition("_")
    if cache is not None and name == "flash":
        from llavamed_jax.models.attention import cached  # imported here, since Pallas takes a second to import
        if cached.is_for(cache, q.shape[-1]):
            return cached.attend(q, k, v, rope, cache, mask.q_positions, mask.window, bool(interpreted))
    q = constrain(apply_rope(q, rope), "act_batch", None, "act_heads", None)
    k, v = apply_rope(k, rope).swapaxes(1, 2), checkpoint_name(v.swapaxes(1, 2), "value")  # [B,K,T,H]
    if is_saved:
        q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
    if cache is None:
        return attention(q, k, v, mask, backend), None
    cache = cache.write(k, v, mask.q_positions[:, 0])
    return attention(q, cache.k, cache.v, mask, "xla", cache.k_scale, cache.v_scale), cache


class Mlp(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`; the activation is SiLU in every published model.

    Attributes:
      cfg: the decoder's shapes.
      dtype: dtype of the computation.
    """

    cfg: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        """Maps [B,T,D] to [B,T,D]."""
        cfg = self.cfg
        x, kernels = kernels_first(self, x, ("gate_proj", "up_proj", "down_proj"))
        gate, up = joined.products(self, "mlp", x, [cfg.intermediate_size] * 2, kernels)
        product, down = ACTIVATIONS[cfg.hidden_act](gate) * up, kernels.get("down_proj")
        axes = cfg.axes("mlp/down_proj")
        return Linear(cfg.hidden_size, axes, cfg.mlp_bias, self.dtype, name="down_proj")(product, down)


class Block(nn.Module):
    """A decoder layer. A subclass with another attention sets `attention`.

    Attributes:
      cfg: the decoder's shapes.
      dtype: dtype of the computation.
      backend: attention backend (`attention.backend_of`).
      attention: class of the self-attention.
    """

    cfg: DecoderConfig
    dtype: Any
    backend: str

    attention = Attention

    @nn.compact
    def __call__(self, x, shared, cache):  # [B,T,D], (rope, mask), cache -> [B,T,D], cache
        """Maps [B,T,D], (rope, mask) and a cache to [B,T,D] and the updated cache."""
        rope, mask = shared
        eps = self.cfg.rms_norm_eps
        h = RMSNorm(eps, self.dtype, name="input_layernorm")(x)
        h, cache = self.attention(self.cfg, self.dtype, self.backend, name="self_attn")(h, rope, mask, cache)
        x = checkpoint_name(mask.narrowed(x) + h, "middle")
        x = x + Mlp(self.cfg, self.dtype, name="mlp")(RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x))
        return constrain(x, "act_batch", None, None), cache


class Decoder(nn.Module):
    """Embeddings, layers, norm and head. A subclass with other layers sets `block`, with another norm `final_norm`.

    Attributes:
      cfg: the decoder's shapes.
      dtype: dtype of the computation.
      scan: whether layers are stacked and scanned, for training.
      remat: `none`, `full`, `qkvo`, `attention` or `minimal` (models/stacking.py).
      attention: attention backend (`attention.backend_of`).
      block: class of a layer.
      final_norm: class of the norm behind the layers.
    """

    cfg: DecoderConfig
    dtype: Any = jnp.float32
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    block = Block
    final_norm = RMSNorm

    def setup(self):
        """Creates the submodules."""
        cfg = self.cfg
        self.embed_tokens = nn.Embed(cfg.vocab_size, cfg.hidden_size, embedding_init=nn.initializers.normal(0.02))
        self.layers = layer_stack(self.block, cfg.num_layers, cfg, self.dtype, self.attention, scan=self.scan,
                                  remat=self.remat)
        self.norm = self.final_norm(cfg.rms_norm_eps, self.dtype)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.vocab_size, ("embed", "vocab"), False, self.dtype, out_dtype=jnp.float32)

    def embed(self, ids):
        """Embeds int32 ids [B,T] as [B,T,D].

        Negative ids (image and padding markers) give row 0; ids of V or more give NaN.
        """
        return _lookup(self.dtype, self.embed_tokens.embedding, jnp.clip(ids, 0))

    def __call__(self, x, positions, segments=None, caches=None, wanted=None):
        """Runs the layers and the final norm.

        Args:
          x: [B,T,D], as `embed` returns it (with image features merged in).
          positions: int32 [B,T]; with caches, consecutive in a row: keys and values are written at them.
          segments: int32 [B,T], the sample of each position, 0 for padding; None if each row is one sample.
          caches: a tuple of LayerCache, one a layer (unscanned layers only), or None.
          wanted: int32 [B], the one place of each row whose output is wanted, with caches only; None for all of them.
            The last layer then computes keys and values for all positions, and the rest for one.

        Returns:
          [B,T,D], or [B,1,D] of what is wanted, and the new caches.
        """
        keys = positions if caches is None else jnp.broadcast_to(
            jnp.arange(caches[0].k.shape[2]), (x.shape[0], caches[0].k.shape[2]))
        mask = AttentionMask(positions, keys, segments, segments, window=self.cfg.sliding_window)
        rope = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
        x = constrain(x, "act_batch", None, None)
        if wanted is None:
            x, caches = run_layers(self.layers, x, (rope, mask), caches)
        else:
            last = mask.replace(wanted=wanted)
            x, before = run_layers(self.layers[:-1], x, (rope, mask), caches[:-1])
            x, behind = run_layers(self.layers[-1:], x, (rope, last), caches[-1:])
            x, caches = last.narrowed(x), before + behind
        return self.norm(x), caches

    def logits(self, x):
        """Maps hidden states [..., D] to float32 logits [..., V]."""
        if self.cfg.tie_word_embeddings:
            table = self.embed_tokens.embedding.astype(self.dtype)
            return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
        return self.lm_head(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype, table, ids):
    """Looks up rows of a table [V,D] by int ids [B,T] -> [B,T,D] in `dtype`.

    The gradient of a row that is looked up often is summed in the table's precision. Only reverse-mode differentiation
    is defined (`jax.custom_vjp`): `jax.jvp` raises an error.
    """
    # Gathering the table first is FSDP's ordinary weight gather, in the narrower dtype; for a lookup in the sharded
    # table XLA would replicate it in the wider one.
    return jnp.take(constrain(table.astype(dtype), "vocab", None), ids, axis=0)


def _lookup_forward(dtype, table, ids):
    # The backward pass needs the table's length and dtype, not its values: an empty array has both.
    return _lookup(dtype, table, ids), (jnp.zeros((0, table.shape[0]), table.dtype), ids)


def _lookup_backward(_, kept, by_rows):
    like, ids = kept
    V, dtype = like.shape[1], like.dtype
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _sum_rows(ids, by_rows, V, dtype), None

    # Sums this device's rows of the batch into its part of the vocabulary; XLA's own plan would move the rows.
    def on_one_device(ids, by_rows):
        part = V // mesh.shape[RULES["vocab"]]
        by_table = _sum_rows(ids - jax.lax.axis_index(RULES["vocab"]) * part, by_rows, part, dtype)
        by_table = jax.lax.psum(by_table, tuple(axis for axis in RULES["act_batch"] if axis != RULES["embed"]))
        return jax.lax.psum_scatter(by_table, RULES["embed"], scatter_dimension=1, tiled=True)

    rows = spec_of(("act_batch", None)), spec_of(("act_batch", None, None))
    return jax.shard_map(on_one_device, in_specs=rows, out_specs=spec_of(("vocab", "embed")),
                         check_vma=False)(ids, by_rows), None


def _sum_rows(ids, by_rows, rows: int, dtype):
    """Sums the rows [B,T,D] of each id, int [B,T], to [rows,D]; ids outside 0..rows-1 are left out."""
    ids = jnp.where((ids >= 0) & (ids < rows), ids, rows)
    return jnp.zeros((rows, by_rows.shape[-1]), dtype).at[ids].add(by_rows.astype(dtype), mode="drop")


_lookup.defvjp(_lookup_forward, _lookup_backward)


def head_kernel(params):
    """Returns the head [D,V] of a model's parameters: the embeddings transposed if the head is tied to them."""
    decoder = params["decoder"]
    return decoder["lm_head"]["kernel"] if "lm_head" in decoder else decoder["embed_tokens"]["embedding"].T
