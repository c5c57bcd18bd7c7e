"""The original's two tiny models as directories in the originals' layouts, and a forward pass in torch alone.

The reference joins transformers' CLIP tower and language models as the originals' `llava.py` and `llava_arch.py` do, with
splicing written here: no line of it is shared with the code under test. It is judged by the printed known answers first.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")

from tests.support.tiny import clip_shapes  # noqa: E402

IMAGE = -200
TOWER = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             image_size=28, patch_size=14, hidden_act="quick_gelu", layer_norm_eps=1e-5)
TEXT = dict(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="silu",
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
MULTIMODAL = dict(mm_vision_tower="openai/tiny-tower", mm_vision_select_layer=-2, mm_vision_select_feature="patch", use_mm_proj=True)
V15 = TEXT | MULTIMODAL | dict(
    model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e6,
    max_position_embeddings=32768, sliding_window=None, mm_hidden_size=32, mm_projector_type="mlp2x_gelu", mm_use_im_start_end=False,
    mm_use_im_patch_token=False, image_aspect_ratio="pad", tokenizer_padding_side="right", tokenizer_model_max_length=2048)
V1_TOWER = TOWER | dict(hidden_size=1024, num_attention_heads=16)
V1 = TEXT | MULTIMODAL | dict(
    model_type="llava", architectures=["LlavaLlamaForCausalLM"], rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048,
    mm_hidden_size=1024, mm_use_im_start_end=True, use_cache=False, pad_token_id=0)
PATCH, START, END = 61, 62, 63  # ids of v1.0's image tokens in the tiny model

PIXELS = np.sin(0.05 * np.arange(2 * 3 * 28 * 28)).reshape(2, 3, 28, 28).transpose(0, 2, 3, 1).astype(np.float32)  # [2,H,W,3]


def filled(shapes, scale):
    """The fill rule of A8: a sine over each tensor, its phase from the tensor's place among the sorted names."""
    tensors = {}
    for k, name in enumerate(sorted(shapes)):
        wave = scale * np.sin(0.7 * (np.arange(math.prod(shapes[name])) + 1) + 1.3 * (k + 1)).reshape(shapes[name])
        tensors[name] = (wave + ("norm" in name and name.endswith("weight"))).astype(np.float32)
    return tensors


def text_shapes(config):
    V, D, F, N = (config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"))
    K = D // N * config.get("num_key_value_heads", N)
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": s for p, s in dict(q=(D, D), k=(K, D), v=(K, D), o=(D, D)).items()}
        shapes |= {f"{layer}mlp.{p}_proj.weight": s for p, s in dict(gate=(F, D), up=(F, D), down=(D, F)).items()}
    return shapes


def projector_shapes(config):
    C, D = config["mm_hidden_size"], config["hidden_size"]
    layers = {"": (D, C)} if "mm_projector_type" not in config else {"0.": (D, C), "2.": (D, D)}
    return {f"model.mm_projector.{n}{leaf}": s[:1] if leaf == "bias" else s for n, s in layers.items() for leaf in ("weight", "bias")}


def write(directory, config, tensors):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def save_v15(directory, scale=0.15, **changes):
    """LLaVA-Med v1.5's layout: one file with the tower in it, the tower's own directory beside it for its shape."""
    config = V15 | changes
    shapes = text_shapes(config) | projector_shapes(config) | clip_shapes(TOWER, "model.vision_tower.vision_tower.vision_model.")
    tensors = filled(shapes, scale)
    write(directory / "tiny-tower", TOWER, {})
    return write(directory / "v15", config, tensors), Reference(config, TOWER, tensors)


def save_v1(directory):
    """LLaVA-Med v1.0's layout: the tower is in a directory of its own and nowhere else."""
    tower = filled(clip_shapes(V1_TOWER, "vision_model."), 0.05)
    tensors = filled(text_shapes(V1) | projector_shapes(V1), 0.15)
    assert len(tensors) == 23
    write(directory / "tiny-tower", V1_TOWER, tower)
    return write(directory / "v1", V1, tensors), Reference(V1, V1_TOWER, tensors | tower)


@dataclasses.dataclass
class Reference:
    """Tower, projector and language model in torch, float32; `tensors` under the original's names."""

    config: dict
    tower_config: dict
    tensors: dict

    def __post_init__(self):
        tensors = {name: torch.from_numpy(t) for name, t in self.tensors.items()}

        def part(prefix):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        c = self.config
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**self.tower_config)).eval()
        vision = part("model.vision_tower.vision_tower.vision_model.") or part("vision_model.")
        own = next(iter(self.tower.state_dict())).startswith("vision_model.")
        self.tower.load_state_dict({("vision_model." if own else "") + name: t for name, t in vision.items()})
        shapes = projector_shapes(c)
        linears = [torch.nn.Linear(*reversed(shape)) for name, shape in shapes.items() if name.endswith("weight")]
        self.projector = linears[0] if len(linears) == 1 else torch.nn.Sequential(linears[0], torch.nn.GELU(), linears[1])
        self.projector.load_state_dict(part("model.mm_projector."))
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "sliding_window")
        text = {key: c[key] for key in keys if key in c} | dict(rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})
        kind = {"llava_mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
                "llava": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}[c["model_type"]]
        settings = kind[0](**text)
        settings._attn_implementation = "eager"
        self.language = kind[1](settings).eval()
        self.language.load_state_dict({n: t for n, t in tensors.items() if "vision" not in n and "mm_projector" not in n})

    @torch.no_grad()
    def tower_out(self, pixels):
        """float32 [I,H,W,3] -> [I,P,C]: hidden state -2 without the class token."""
        states = self.tower(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        return states[self.config["mm_vision_select_layer"]][:, 1:]

    @torch.no_grad()
    def features(self, pixels):
        return self.projector(self.tower_out(pixels))

    @torch.no_grad()
    def embeddings(self, row, pixels, max_length=None):
        """A row of ids with one IMAGE an image -> [T,D], expanded, then cut as v1.5's `llava_arch.py` cuts."""
        features = iter(self.features(pixels)) if len(pixels) else iter(())
        pieces = [next(features) if i == IMAGE else self.language.get_input_embeddings().weight[i][None] for i in row]
        return torch.cat(pieces)[:max_length]

    @torch.no_grad()
    def logits(self, row, pixels=(), max_length=None):
        """float32 [T,V]."""
        return self.language(inputs_embeds=self.embeddings(row, pixels, max_length)[None]).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, row, pixels, n):
        """Up to n tokens, each from the whole sequence anew."""
        x, tokens = self.embeddings(row, pixels), []
        while len(tokens) < n and 2 not in tokens:
            tokens.append(int(self.language(inputs_embeds=x[None]).logits[0, -1].argmax()))
            x = torch.cat([x, self.language.get_input_embeddings().weight[tokens[-1]][None]])
        return tokens
