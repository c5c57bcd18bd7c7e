"""The LLaMA family (LLaMA, Vicuna and Mistral): config and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.checks import check_activation, check_counts, check_fields, is_plain, number, token_ids
from llavamed_jax.config.rope import RopeScaling, read_rope
from llavamed_jax.config.tensors import Row, kernel_axes, rows
from llavamed_jax.errors import UserError, short

# The defaults of transformers' LlamaConfig and MistralConfig for absent keys of `text_config`; published llava-hf
# configs rely on them.
_TEXT_DEFAULTS = {
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048),
    "mistral": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4,
                    max_position_embeddings=131072, sliding_window=4096),
}
# The keys of a window, for the `unread` of a kind without windows.
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
# The keys that LlamaConfig and MistralConfig do not obey, and `from_hf` therefore does not read.
_UNREAD = {"llama": WINDOW_KEYS, "mistral": ("attention_bias", "mlp_bias", *WINDOW_KEYS[1:])}
TABLE = """
embed_tokens/embedding                    embed_tokens.weight                        V D
layers_#/input_layernorm/scale            layers.#.input_layernorm.weight            D
layers_#/self_attn/q_proj/kernel          layers.#.self_attn.q_proj.weight           D N
layers_#/self_attn/k_proj/kernel          layers.#.self_attn.k_proj.weight           D K
layers_#/self_attn/v_proj/kernel          layers.#.self_attn.v_proj.weight           D K
layers_#/self_attn/o_proj/kernel          layers.#.self_attn.o_proj.weight           N D
layers_#/self_attn/q_proj/bias            layers.#.self_attn.q_proj.bias             N
layers_#/self_attn/k_proj/bias            layers.#.self_attn.k_proj.bias             K
layers_#/self_attn/v_proj/bias            layers.#.self_attn.v_proj.bias             K
layers_#/self_attn/o_proj/bias            layers.#.self_attn.o_proj.bias             D
layers_#/post_attention_layernorm/scale   layers.#.post_attention_layernorm.weight   D
layers_#/mlp/gate_proj/kernel             layers.#.mlp.gate_proj.weight              D F
layers_#/mlp/up_proj/kernel               layers.#.mlp.up_proj.weight                D F
layers_#/mlp/down_proj/kernel             layers.#.mlp.down_proj.weight              F D
layers_#/mlp/gate_proj/bias               layers.#.mlp.gate_proj.bias                F
layers_#/mlp/up_proj/bias                 layers.#.mlp.up_proj.bias                  F
layers_#/mlp/down_proj/bias               layers.#.mlp.down_proj.bias                D
norm/scale                                norm.weight                                D
"""
# Field -> the part of a name in the table that its biases have.
_BIASED = {"attention_bias": "/self_attn/", "mlp_bias": "/mlp/"}


def table_without(*names: str) -> str:
    """Returns LLaMA's table without the lines whose names contain one of these."""
    return "\n".join(line for line in TABLE.splitlines() if not any(name in line.split(" ")[0] for name in names))


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-family decoder: LLaMA, Vicuna or Mistral.

    A subclass for another kind of decoder sets its own `architecture`, `table`, `defaults`, `unread` and `hf_class`.

    Attributes:
      vocab_size: V, rows of the embedding table.
      hidden_size: D.
      intermediate_size: F.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads.
      head_dim: H.
      rms_norm_eps: eps of the norms.
      rope_theta: base of the rotary frequencies.
      max_position_embeddings: positions that the model was trained with.
      sliding_window: width of the attention window in tokens (not LLaMA's); None for no window.
      tie_word_embeddings: whether the head is the embedding table.
      architecture: `model_type` of transformers.
      bos_token_id: id that begins a sequence; None for none.
      eos_token_id: first id that ends a sequence; None for none.
      pad_token_id: id of padding; None for none.
      more_eos_ids: further ids that end a sequence.
      rope_scaling: scaling of the rotary frequencies; None for none.
      attention_bias: whether query, key, value and output have biases (not Mistral's).
      mlp_bias: whether the feed-forward layers have biases (not Mistral's).
      hidden_act: the activation, by its name in transformers.
      table: the tensors (`config/tensors.py`) without the head.
      defaults: architecture -> transformers' values for absent keys.
      unread: architecture -> keys of biases and window that its own code does not obey; others are read, or refused.
      original: what upstream LLaVA calls the kind in `model_type` and class, `llava_qwen` and `LlavaQwenForCausalLM`;
        None if it is the architecture and the class of transformers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    architecture: str = "llama"
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    more_eos_ids: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"

    table = TABLE
    defaults = _TEXT_DEFAULTS
    unread = _UNREAD
    original = None

    def __post_init__(self):
        check_fields(self, "decoder ")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even width")
        check_activation("the decoder's hidden_act", self.hidden_act)
        for key, module in _BIASED.items():
            if getattr(self, key) and not any(_is_bias(row.name, module) for row in rows(self.table)):
                raise UserError(f"the decoder's {key} is true; false was expected, because the layers of "
                                f"{self.architecture} have no such biases here")

    @property
    def hf_class(self) -> str:
        """The class of transformers, by which other projects find the decoder's code."""
        return {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[self.architecture]

    @property
    def original_type(self) -> str:
        """The `model_type` of upstream LLaVA's layout."""
        return f"llava_{self.original or self.architecture}"

    @property
    def has_original(self) -> bool:
        """Whether upstream LLaVA has a class of this kind: `original_class` of others exists in this project alone."""
        return self.original is not None or self.architecture in _TEXT_DEFAULTS

    @property
    def original_class(self) -> str:
        """The class of upstream LLaVA's layout."""
        return f"Llava{self.original.capitalize()}ForCausalLM" if self.original else f"Llava{self.hf_class}"

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of the table."""
        return dict(D=self.hidden_size, F=self.intermediate_size, V=self.vocab_size, N=self.num_heads * self.head_dim,
                    K=self.num_kv_heads * self.head_dim, H=self.head_dim)

    def axes(self, module: str) -> tuple[str | None, ...]:
        """Returns the logical axes of the kernel of a layer's module, by its name inside the layer."""
        return kernel_axes(self.table, module)

    def has_bias(self, module: str) -> bool:
        """Returns whether a layer's module has a bias, by its name inside the layer (`self_attn/o_proj`)."""
        return any(row.name == f"layers_#/{module}/bias" for row in self.tensors())

    def tensors(self) -> tuple[Row, ...]:
        """Returns the lines of the table that this decoder has."""
        without = [module for key, module in _BIASED.items() if not getattr(self, key)]
        return tuple(row for row in rows(self.table) if not any(_is_bias(row.name, module) for module in without))

    @property
    def max_positions(self) -> int:
        """The most positions of a text; a linear scaling multiplies the config's `max_position_embeddings`."""
        stretched = self.rope_scaling is not None and self.rope_scaling.rope_type == "linear"
        return int(self.max_position_embeddings * (self.rope_scaling.factor if stretched else 1))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], architecture: str | None = None) -> "DecoderConfig":
        """Reads a decoder's config as transformers writes it, with either spelling of the RoPE settings.

        Args:
          config: the dict.
          architecture: replaces its `model_type`; None keeps it.

        Raises:
          UserError: another architecture, or a RoPE scaling, activation, bias or window that this model does not have.
          ValueError: the `defaults` of the class lack a key that LLaMA's have.
        """
        arch = architecture or config.get("model_type", "llama")
        if not isinstance(arch, str) or arch not in cls.defaults:
            raise UserError(f"the decoder's model_type is {short(arch)}; {' or '.join(cls.defaults)} was expected")
        defaults = cls.defaults[arch]
        lacking = [key for key in _TEXT_DEFAULTS["llama"] if key not in defaults]
        if lacking:
            raise ValueError(f"the defaults[{arch!r}] of {cls.__module__}.{cls.__name__} have no {', '.join(lacking)}; "
                             "the values that transformers takes for absent keys were expected")
        # For these keys null is a value; for others it stands for the default.
        nullable = ("sliding_window", "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")
        c = {**defaults, **{k: v for k, v in config.items() if k not in cls.unread.get(arch, ())
                            and (v is not None or k not in defaults or k in nullable)}}
        check_counts(c, ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                         "max_position_embeddings",
                         *(["num_key_value_heads"] if c.get("num_key_value_heads") else [])])
        theta, scaling = read_rope(config, defaults["rope_theta"], c["max_position_embeddings"])
        heads = c["num_attention_heads"]
        return cls(
            vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"], num_heads=heads, num_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            rms_norm_eps=number(c["rms_norm_eps"], "rms_norm_eps"),
            rope_theta=theta, rope_scaling=scaling, hidden_act=c.get("hidden_act") or "silu",
            **{key: c.get(key) or False for key in _BIASED},
            max_position_embeddings=c["max_position_embeddings"],
            sliding_window=_window(c),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)), architecture=arch,
            bos_token_id=c.get("bos_token_id", 1), pad_token_id=c.get("pad_token_id"),
            **cls.ends_with(token_ids(c.get("eos_token_id", 2), "eos_token_id")))

    def to_hf(self) -> dict:
        """Returns the `config.json` dict, with every field and both spellings of the RoPE settings.

        Every version of transformers reads the same model from it.
        """
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else {}
        out = dict(model_type=self.architecture, vocab_size=self.vocab_size, hidden_size=self.hidden_size,
                   intermediate_size=self.intermediate_size, num_hidden_layers=self.num_layers,
                   num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim,
                   hidden_act=self.hidden_act, rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta,
                   rope_parameters={"rope_type": "default", **scaling, "rope_theta": self.rope_theta},
                   max_position_embeddings=self.max_position_embeddings, tie_word_embeddings=self.tie_word_embeddings,
                   attention_bias=self.attention_bias, mlp_bias=self.mlp_bias, bos_token_id=self.bos_token_id,
                   eos_token_id=self.eos_value, pad_token_id=self.pad_token_id)
        out |= dict(sliding_window=self.sliding_window, use_sliding_window=self.sliding_window is not None,
                    max_window_layers=0)
        unread = self.unread.get(self.architecture, ())
        out = {key: value for key, value in out.items() if key not in unread}
        if scaling.get("rope_type") == "linear":  # versions before 4.43 accept exactly these two keys
            out["rope_scaling"] = {"type": "linear", "factor": scaling["factor"]}
        elif scaling:
            out["rope_scaling"] = scaling
        return out

    @staticmethod
    def ends_with(ids: tuple[int, ...]) -> dict[str, Any]:
        """Returns the fields of a decoder whose sequences end with any of these ids."""
        return dict(eos_token_id=ids[0] if ids else None, more_eos_ids=ids[1:])

    @property
    def eos_value(self) -> int | list[int] | None:
        """The value of `eos_token_id` in transformers' files."""
        return list(self.eos_ids) if self.more_eos_ids else self.eos_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a sequence; () for a decoder that never ends one."""
        return (() if self.eos_token_id is None else (self.eos_token_id,)) + self.more_eos_ids

    @property
    def matmul_parameters(self) -> int:
        """The number of weights that a token is multiplied with: layers and head, without the embedding lookup."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h
        return self.num_layers * (attention + 3 * d * f) + d * self.vocab_size

    def forward_flops_per_token(self, length: int) -> float:
        """Returns the FLOPs of one token's forward pass in a row of `length` tokens: 2 N + causal attention (half)."""
        span = min(length, self.sliding_window or length)
        return 2 * self.matmul_parameters + 2 * self.num_layers * self.num_heads * self.head_dim * span


def _is_bias(name: str, module: str) -> bool:
    """Returns whether a name of the table is a bias in this part of a layer, such as `/mlp/`."""
    return name.endswith("/bias") and module in name


def _window(config: Mapping[str, Any]) -> int | None:
    """Returns the window of a `config.json`, which its keys may limit to some layers; None for no window.

    Raises:
      UserError: only some of the layers have the window, or some have another kind of attention.
    """
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    is_used, first = config.get("use_sliding_window", True), config.get("max_window_layers", 0)
    if not isinstance(is_used, bool | None):
        raise UserError(f"the decoder's use_sliding_window is {short(is_used)}; true or false was expected")
    window, kinds = window if is_used else None, config.get("layer_types")
    if kinds is not None:
        named = set(kinds) if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds) else {None}
        if named == {"full_attention"}:
            return None
        if named == {"sliding_attention"} and window is not None:
            return window
        raise UserError(f"the decoder's layer_types is {short(kinds)} and its window {short(window)}; one window for "
                        "all layers, or full_attention for all, was expected")
    if window is None:
        return None
    first = 0 if first is None else first
    if not is_plain(first, (int,)) or 0 < first < layers:
        raise UserError(f"the decoder's max_window_layers is {short(first)}; 0 (all {layers} layers have the window) "
                        f"or {layers} (none has it) was expected")
    return window if first <= 0 else None
