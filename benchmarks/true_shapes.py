"""A model of the released shapes, layer by layer beside torch: `python benchmarks/true_shapes.py [--checkpoint PATH] [--out FILE]`.

One image and one question go through tower, projector and decoder in float32, through transformers' own layer modules and
through this project's blocks. Each side feeds on its own output, so that differences add up as they do in a whole model.
Weights are read layer by layer and let go again: the process stays under 8 GB where a 7B model in float32 takes 30 on each
side. A preset's weights are drawn at the same time, with norm scales and biases that are not 1 and 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from benchmarks.measure import ROOT, circumstances
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import IMAGE_TOKEN, LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image, normalize, preprocess_uint8
from llavamed_jax.models import projector
from llavamed_jax.models.attention.backend import AttentionMask
from llavamed_jax.models.decoders import llama
from llavamed_jax.models.layers import LayerNorm, RMSNorm, rope_tables
from llavamed_jax.models.llava import merge
from llavamed_jax.models.towers import clip
from llavamed_jax.utils.paths import local

# "[INST] <image>\nWhat is shown in this image? [/INST]" with Mistral's tokenizer; LLaMA's vocabulary is as large.
QUESTION = [1, 733, 16289, 28793, 28705, IMAGE_TOKEN, 28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]
IMAGE = ROOT / "samples" / "vqa_rad" / "images" / "synpic17738.jpg"
LANGUAGE = {"mistral": (modeling_mistral, "Mistral"), "llama": (modeling_llama, "Llama")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="preset:v15-7b", metavar="PATH", help="of any kind; default preset:v15-7b, random")
    parser.add_argument("--image", type=local, default=IMAGE)
    parser.add_argument("--out", type=local, default=ROOT / "docs" / "fidelity" / "true_shapes.json", help="where the table is written")
    args = parser.parse_args()
    try:
        checkpoint = open_checkpoint(args.checkpoint)
        if checkpoint.layout == "preset":
            checkpoint = roughened(checkpoint)
        cfg = checkpoint.config
        image = preprocess_uint8(load_image(args.image), cfg.vision.image_size, cfg.image_aspect_ratio)
        pixels = normalize(image)[None]
        start, rows = time.perf_counter(), []
        print(f"{'after':<24}{'largest difference':>20}{'largest magnitude':>20}", flush=True)
        for row in compare(checkpoint, [i % cfg.decoder.vocab_size if i != IMAGE_TOKEN else i for i in QUESTION], pixels):
            rows.append(row)
            print(f"{row['after']:<24}{row['difference']:>20.3g}{row['magnitude']:>20.3g}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = dict(checkpoint=args.checkpoint, parameters=sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values()),
                  positions=len(QUESTION) - 1 + cfg.tokens_per_image, seconds=round(time.perf_counter() - start),
                  peak_resident_bytes=peak, rows=rows, **circumstances())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(args.out)
    print(f"{result['positions']} positions, {result['seconds']} s, at most {peak / 1e9:.1f} GB resident; written to {args.out}")
    return 0


def roughened(checkpoint: Checkpoint) -> Checkpoint:
    """Random norm scales and biases: those of a fresh model, 1 and 0, hide whether they are applied."""
    def rough(name, tensor):
        leaf = name.rsplit("/", 1)[1]
        if leaf not in ("scale", "bias"):
            return tensor

        def load():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            return tensor.load() + np.float32(0.1) * rng.standard_normal(tensor.shape, np.float32)
        return dataclasses.replace(tensor, load=load)
    return checkpoint.replace(tensors={name: rough(name, tensor) for name, tensor in checkpoint.tensors.items()})


class Weights:
    """The tensors below a canonical prefix, float32, in both sides' orientation."""

    def __init__(self, checkpoint: Checkpoint, prefix: str):
        specs = names.specs(checkpoint.config)
        arrays = {name: checkpoint.read(name).astype(np.float32, copy=False) for name in specs if name.startswith(prefix)}
        self.ours = unflatten_dict({name.removeprefix(prefix): array for name, array in arrays.items()}, sep="/")
        self.torch = {_torch_name(specs[name].torch, name.removeprefix(prefix)):
                      torch.from_numpy(np.ascontiguousarray(names.to_torch(name, array))) for name, array in arrays.items()}

    def into(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module without memory of its own gets these tensors; strict."""
        module.load_state_dict(self.torch, assign=True)
        return module.eval()


def _torch_name(torch_name: str, name: str) -> str:
    """What of a torch name lies below the prefix: as many words as the canonical name has there."""
    return ".".join(torch_name.split(".")[-name.count("/") - 1:])


@torch.no_grad()
def compare(checkpoint: Checkpoint, question: list[int], pixels: np.ndarray) -> Iterator[dict]:
    """Yields a row after each module: largest difference between both sides, and the largest magnitude on torch's."""
    cfg = checkpoint.config

    def row(after: str, ours, theirs) -> dict:
        ours, theirs = np.asarray(ours), theirs.numpy()
        return dict(after=after, difference=float(np.abs(ours - theirs).max()), magnitude=float(np.abs(theirs).max()))

    x, y = None, None
    for after, x, y in tower(checkpoint, pixels):
        yield row(after, x, y)
    skip = int(cfg.feature_select == "patch")
    weights = Weights(checkpoint, "projector/")
    x = projector.Projector(cfg).apply({"params": weights.ours}, x[:, skip:])
    y = torch_projector(cfg, weights)(y[:, skip:])
    yield row("projector", x, y)

    P = cfg.tokens_per_image
    ids = np.array([i for token in question for i in ([token] * P if token == IMAGE_TOKEN else [token])])
    table = checkpoint.read("decoder/embed_tokens/embedding")[np.maximum(ids, 0)].astype(np.float32)[None]
    x = merge(jnp.asarray(table), jnp.asarray(ids == IMAGE_TOKEN)[None], x[:, None])
    spliced = torch.from_numpy(table)
    first = question.index(IMAGE_TOKEN)
    y = torch.cat([spliced[:, :first], y, spliced[:, first + P:]], dim=1)
    for after, ours, theirs in language(checkpoint, x, y):
        yield row(after, ours, theirs)


def tower(checkpoint: Checkpoint, pixels: np.ndarray):
    """Yields (where, ours [1,P+1,D], torch's) after the embeddings and each block that the feature layer needs."""
    cfg = checkpoint.config
    config = transformers.CLIPVisionConfig(**cfg.vision.to_hf())
    config._attn_implementation = "eager"
    weights, norm = Weights(checkpoint, "vision_tower/embeddings/"), Weights(checkpoint, "vision_tower/pre_layrnorm/")
    embeddings = modeling_clip.CLIPVisionEmbeddings(config)
    embeddings.load_state_dict(weights.torch)
    layer_norm = norm.into(torch.nn.LayerNorm(cfg.vision.hidden_size, eps=cfg.vision.layer_norm_eps, device="meta"))
    y = layer_norm(embeddings(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    x = clip.Embeddings(cfg.vision, jnp.float32).apply({"params": weights.ours}, pixels)
    x = LayerNorm(cfg.vision.layer_norm_eps).apply({"params": norm.ours}, x)
    yield "tower embeddings", x, y
    block = jax.jit(lambda params, x: clip.Block(cfg.vision, jnp.float32, "xla").apply({"params": params}, x, None, None)[0])
    for i in range(cfg.num_vision_layers_used):
        weights = Weights(checkpoint, f"vision_tower/layers_{i}/")
        with torch.device("meta"):
            layer = modeling_clip.CLIPEncoderLayer(config)
        x, y = block(weights.ours, x), weights.into(layer)(y, None)
        yield f"tower layer {i + 1}", x, y


def torch_projector(cfg: LlavaConfig, weights: Weights) -> torch.nn.Module:
    """The original's projector (`llava/model/multimodal_projector/builder.py` of LLaVA-Med v1.5)."""
    linears = [torch.nn.Linear(cfg.vision.hidden_size if n == 0 else cfg.decoder.hidden_size, cfg.decoder.hidden_size,
                               bias=cfg.projector_bias, device="meta") for n in range(len(weights.ours))]
    modules = [m for n, linear in enumerate(linears) for m in ([torch.nn.GELU()] if n else []) + [linear]]
    for n, linear in enumerate(linears):
        linear.load_state_dict({leaf: weights.torch[f"{n}.{leaf}"] for leaf in linear.state_dict()}, assign=True)
    return torch.nn.Sequential(*modules)


def language(checkpoint: Checkpoint, x, y):
    """Yields (where, ours [1,T,D], torch's) after each decoder layer, the last norm and the head (logits [1,T,V])."""
    cfg = checkpoint.config.decoder
    modules, family = LANGUAGE[cfg.architecture]
    config = getattr(transformers, f"{family}Config")(**cfg.to_hf())
    config._attn_implementation = "eager"
    T = x.shape[1]
    positions = jnp.arange(T)[None]
    mask = AttentionMask(positions, positions, window=cfg.sliding_window)
    rope = rope_tables(positions, cfg.head_dim, cfg.rope_theta)
    block = jax.jit(lambda params, x: llama.Block(cfg, jnp.float32, "xla").apply({"params": params}, x, (rope, mask), None)[0])
    index = torch.arange(T)
    seen = (index <= index[:, None]) & (index > index[:, None] - (cfg.sliding_window or T))
    torch_mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    torch_rope = getattr(modules, f"{family}RotaryEmbedding")(config)(y, index[None])
    yield "image and text joined", x, y
    for i in range(cfg.num_layers):
        weights = Weights(checkpoint, f"decoder/layers_{i}/")
        with torch.device("meta"):
            layer = getattr(modules, f"{family}DecoderLayer")(config, i)
        x, y = block(weights.ours, x), weights.into(layer)(y, attention_mask=torch_mask, position_embeddings=torch_rope)
        yield f"decoder layer {i + 1}", x, y
    weights = Weights(checkpoint, "decoder/norm/")
    with torch.device("meta"):
        norm = getattr(modules, f"{family}RMSNorm")(cfg.hidden_size, eps=cfg.rms_norm_eps)
    x, y = RMSNorm(cfg.rms_norm_eps).apply({"params": weights.ours}, x), weights.into(norm)(y)
    yield "decoder norm", x, y
    if cfg.tie_word_embeddings:
        kernel = checkpoint.read("decoder/embed_tokens/embedding").astype(np.float32).T
    else:
        kernel = checkpoint.read("decoder/lm_head/kernel").astype(np.float32, copy=False)
    yield "logits", jnp.asarray(x) @ kernel, y @ torch.from_numpy(kernel)


if __name__ == "__main__":
    sys.exit(main())
