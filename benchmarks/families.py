"""Towers, decoders and templates beside transformers' own, and what mistakes in them would make: `python benchmarks/families.py`.

Tiny shapes, random weights, float32 on a CPU. For each family the largest difference of logits (or of a tower's features) and of
the gradient, divided by the largest magnitude of the same array, and the same quotient for code that is wrong in one point (the
mutants of tests/parity). Prompts are compared id by id. The results go to docs/fidelity/families.json, which
benchmarks/fidelity.py prints; exit status 1 if a family is too far from transformers, or a mutant too near.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import pytest
import torch

from benchmarks.measure import ROOT, circumstances
from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.config.towers.clip import CLIP_MEAN, CLIP_STD
from llavamed_jax.errors import UserError
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.towers import tower_module
from llavamed_jax.processor import Processor
from llavamed_jax.utils.nested import flatten
from llavamed_jax.utils.paths import local
from tests.parity import test_parity, test_towers
from tests.support import byte_level, hf, towers
from tests.text import test_language_templates

OUT = ROOT / "docs" / "fidelity" / "families.json"
ALLOWED, ALLOWED_GRADIENT = 5e-6, 2e-5
# A family of decoders: the cases of tests/parity/test_parity.py that it has.
DECODERS = {
    "Llama 3.x": ["Llama 3.2: tied, llama3 scaling, free head width", "llama3 scaling at 1,200 positions"],
    "SmolLM2": ["SmolLM2: 9 heads over 3, tied"],
    "Qwen2.5": ["Qwen2.5", "Qwen2.5, tied", "Qwen2.5, a window in every layer", "Qwen2.5, a window that is switched off",
                "Qwen2.5, a window above the layers"],
    "Qwen3": ["Qwen3, heads wider than the model", "Qwen3, small activations", "Qwen3, small queries and keys",
              "Qwen3, tied, biased, narrow heads", "Qwen3 at 1,200 positions"],
    "OLMo-2": ["OLMo-2", "OLMo-2, small activations", "OLMo-2, small queries and keys", "OLMo-2, tied, biased, equal heads"],
}
TOWERS = {"SigLIP, SigLIP 2": "siglip", "ViT (BiomedCLIP)": "vit"}
# Templates that write with special tokens of each other's tokenizers: each also stands in for the others, as a mutant.
TEMPLATES = [("hf:chatml", "hf:qwen", "hf:qwen3", "up:qwen_1_5", "hf:olmo2"), ("hf:llama3", "hf:llama3.1")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local, default=OUT)
    parser.add_argument("--only", action="append", metavar="FAMILY", choices=[*families()], help="this family alone, or `templates`; others "
                        "keep the rows that they have in OUT")
    args = parser.parse_args()
    rows = list(chosen(args.only))
    wrong = [f"{row['family']}, {row['what']}: {problem}" for row in rows for problem in problems(row)]
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong:
        return 1
    found = {**circumstances(), "rows": rows}
    if args.only:
        found = joined(json.loads(args.out.read_text(encoding="utf-8")), found, args.only)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")
    return 0


def families() -> dict[str, Callable[[], Iterator[dict]]]:
    """What measures the rows of each family, in the order of the table."""
    return {**{name: functools.partial(decoder, name) for name in DECODERS}, **{name: functools.partial(vision_tower, name) for name in TOWERS},
            "templates": templates}


def chosen(only: list[str] | None) -> Iterator[dict]:
    for name, measure in families().items():
        if only is None or name in only:
            yield from measure()


def joined(before: dict, now: dict, only: list[str]) -> dict:
    """The file of before with the rows of now in their places, in the order of the table, and when these were measured.

    Raises SystemExit if the rows would be of other versions of packages.
    """
    if before["versions"] != now["versions"]:
        raise SystemExit(f"error: the file's rows are of {before['versions']}, and these are of {now['versions']}; all families have to be "
                         "measured")
    rows = {(row["family"], row["what"]): row for row in (*before["rows"], *now["rows"])}
    order = [*DECODERS, *TOWERS, *itertools.chain(*TEMPLATES)]
    later = {name: {"commit": now["commit"], "date": now["date"]} for name in only}
    return {**before, "later": {**before.get("later", {}), **later},
            "rows": sorted(rows.values(), key=lambda row: order.index(row["family"]))}


def problems(row: dict) -> Iterator[str]:
    """What is wrong with a row: the family differs, or a mutant does not."""
    if not row["difference"] <= row["allowed"]:
        yield f"{row['difference']:.1e} is more than {row['allowed']:.1e}"
    for name, difference in row["mutants"].items():
        if not difference >= max(2 * row["allowed"], 1e-9):
            yield f"the mutant '{name}' makes a difference of {difference:.1e} alone"


def result(family: str, what: str, difference: float, allowed: float = ALLOWED, mutants: dict[str, float] | None = None) -> dict:
    print(f"{family:18} {what:9} {difference:.1e}   {mutants or ''}", flush=True)
    return {"family": family, "what": what, "difference": float(difference), "allowed": allowed, "mutants": mutants or {}}


def with_change(change_code: Callable | None, measure: Callable[..., float], *args) -> float:
    """Returns what `measure` finds while the code is changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if change_code:
            change_code(monkeypatch)
        return float(measure(*args))


def farthest(found, wanted) -> float:
    """Largest difference of any array of two trees, over the largest magnitude of the same array.

    Gradients that are zero in exact arithmetic (of the tower's key biases, which change no score) are judged by the tree's largest.
    """
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    largest = max(np.abs(x).max() for x in wanted.values())
    size = lambda x: s if (s := np.abs(x).max()) > 1e-6 * largest else largest
    return max(np.abs(np.asarray(found[name]) - wanted[name]).max() / size(wanted[name]) for name in wanted)


@torch.no_grad()
def holding_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model whose parameters are its gradients: names and layouts are translated as those of weights are."""
    holder = copy.deepcopy(model)
    for mine, theirs in zip(holder.parameters(), model.parameters(), strict=True):
        mine.copy_(torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)
    return holder


# ---- decoders


def decoder(family: str) -> Iterator[dict]:
    cases = DECODERS[family]
    mutants = {title: with_change(change_code, logits_apart, case, change_cfg)
               for title, case, change_cfg, change_code in test_parity.MUTANTS if case in cases}
    yield result(family, "logits", max(map(logits_apart, cases)), mutants=mutants)
    yield result(family, "gradient", gradient_of_decoder(**test_parity.CASES[cases[0]].model), ALLOWED_GRADIENT)


def logits_apart(name: str, change_cfg: Callable | None = None) -> float:
    case = test_parity.CASES[name]
    return case.difference(change_cfg) / np.abs(case.torch_side[0][case.batch[1] == 1]).max()


def gradient_of_decoder(**settings) -> float:
    """Gradient of a weighted sum of the logits by all parameters of tower, projector and decoder."""
    model, cfg = hf.llava(**settings)
    ids = np.array([[5, *test_parity.IMG, *test_parity.text(24)]], np.int32)
    pixels = hf.images(1)
    weights = np.random.default_rng(3).standard_normal((*ids.shape, cfg.decoder.vocab_size)).astype(np.float32)
    logits = model(input_ids=torch.tensor(np.where(ids < 0, hf.IMAGE_ID, ids)).long(),
                   pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits
    (logits * torch.tensor(weights)).sum().backward()
    ours = jax.jit(jax.grad(lambda params: (Llava(cfg).apply({"params": params}, ids, pixels[None]) * weights).sum()))
    found, wanted = ours(hf.params_of(model)), hf.params_of(holding_gradients(model))
    if cfg.decoder.tie_word_embeddings:  # the table's gradient under a second name
        found["decoder"].pop("lm_head"), wanted["decoder"].pop("lm_head")
    return farthest(found, wanted)


# ---- towers


def vision_tower(family: str) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        root, images = Path(folder), hf.images(2)
        model, checkpoint = towers.built(TOWERS[family], root)
        states = towers.hidden_states(model, images)
        mutants = {title: with_change(change_code, features_apart, checkpoint, layer, images, states[layer], change_cfg)
                   for title, layer, change_cfg, change_code in test_towers.MUTANTS}
        mutants["feature layer -2 -> -1"] = features_apart(checkpoint, -1, images, states[-2])
        mutants |= normalised_otherwise(checkpoint, model)
        if checkpoint.config.vision.class_tokens:
            patches = states[-2][:, 1:]
            mutants["the class token in place of the last patch"] = float(
                np.abs(states[-2][:, :-1] - patches).max() / np.abs(patches).max())
        yield result(family, "features", max(features_apart(checkpoint, layer, images, states[layer]) for layer in (-1, -2, -3)), mutants=mutants)
        yield result(family, "gradient", gradient_of_tower(model, checkpoint, root, images), ALLOWED_GRADIENT)


def features_apart(checkpoint, layer: int, images, wanted, change_cfg: Callable | None = None) -> float:
    found = np.asarray(test_towers.state(checkpoint, layer, images, change=change_cfg))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def normalised_otherwise(checkpoint, model) -> dict[str, float]:
    """Features of uint8 pixels that are normalised with the mean and deviation of another kind of tower."""
    raw, tower = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), np.uint8), checkpoint.config.vision
    mean, std, scale = (np.asarray(x, np.float32) for x in tower.normalization)
    wanted = towers.hidden_states(model, (raw * scale - mean) / std)[-2]
    assert features_apart(checkpoint, -2, raw, wanted) <= ALLOWED
    halves = (0.5,) * 3
    other, name = ((halves, halves), "0.5") if tower.image_mean == CLIP_MEAN else ((CLIP_MEAN, CLIP_STD), "CLIP's")
    change = lambda vision: dataclasses.replace(vision, image_mean=other[0], image_std=other[1])
    return {f"mean and deviation of pixels: {name}": features_apart(checkpoint, -2, raw, wanted, change)}


def gradient_of_tower(model, checkpoint, root: Path, images) -> float:
    """Gradient of a weighted sum of the features of layer -2 by all parameters that they depend on."""
    cfg, params = test_towers.tower_params(checkpoint, -2)
    states = model(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    weights = np.random.default_rng(3).standard_normal(states[-2].shape).astype(np.float32)
    (states[-2] * torch.tensor(weights)).sum().backward()
    holding_gradients(model).save_pretrained(root / "gradients")
    wanted = load_params(build(root / "decoder", root / "gradients", "linear", root / "scratch")[0])
    tower = tower_module(cfg.vision)(cfg.vision, cfg.num_vision_layers_used)
    found = jax.jit(jax.grad(lambda params: (tower.apply({"params": params}, images) * weights).sum()))(params["vision_tower"])
    return farthest(found, wanted["vision_tower"])


# ---- templates


def templates() -> Iterator[dict]:
    """The share of prompts whose ids are not those of the model's own chat template, also where another template is taken."""
    for group in TEMPLATES:
        for name in group:
            shares = {}
            for other in group:
                with contextlib.suppress(UserError):  # the tokenizer lacks a token of the other template: nothing to mistake it for
                    shares[other] = share_of_other_ids(name, other)
            yield result(name, "prompts", shares.pop(name), 0.0, {f"written as {other}": share for other, share in shares.items()})


def share_of_other_ids(name: str, template: str) -> float:
    """The share of prompts, written with `template`, whose ids are not those of the chat template that `name` stands for."""
    kind = byte_level.TEMPLATES[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = byte_level.save(Path(folder) / kind, kind)
        theirs, processor = byte_level.theirs(directory, kind), Processor.load(directory, template, image_size=56)
        different = []
        for talk, system in itertools.product(test_language_templates.TALKS.values(), (None, "Answer in one word.")):
            for length in range(1, len(talk) + 1, 2):
                messages = test_language_templates.messages_of(talk[:length], system)
                wanted = test_language_templates.rendered(theirs, messages, is_question=True)[1]
                different.append(processor.encode(processor.prompt(messages)) != wanted)
    return sum(different) / len(different)


if __name__ == "__main__":
    sys.exit(main())
