"""Writes the model card of an export: what the model is, how it was trained, and its intended use."""

from __future__ import annotations

import json
from pathlib import Path

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.chat_template import chat_template, template_name
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.config.towers.vit import is_biomedclip
from llavamed_jax.utils.files import read_json

_MAX_RUNS = 20  # in a chain of recipes, each started from the one before

_CARD = """\
---
language: en
license: other
pipeline_tag: image-text-to-text
tags: [llava, medical, biomedical, research-only]
{library}---

# A LLaVA-Med style vision-language model

Exported by llavamed-jax, independent work that is not affiliated with Microsoft.
**For research only, never for clinical decisions. English only.**

## Model

| | |
|---|---|
{facts}

{use}

## Training record

{training}

## Intended use

Research on biomedical vision-language models: reproducing and comparing results, and studying what such models get \
wrong.
Questions and answers are in English; images are single two-dimensional pictures such as radiographs, slices and \
micrographs.

## Out-of-scope use

Any clinical use. It must not inform diagnosis, triage, treatment or advice to patients. It is not a medical device, and
no regulator has evaluated it. Other languages, volumes, video and images that are not biomedical are out of scope too.

## Limitations

- It states wrong findings fluently, and answers questions that the image cannot answer. Check every answer.
- It may answer from the question alone. Compare with exchanged images (`eval.py --control image`) before believing a \
score.
- It carries the biases of its data: figures of publications, few institutions, common findings.
- Image detail below the resolution of the vision tower is lost before the model sees it.
- It has no safeguards against offensive or harmful text.

## Licences

Each part keeps its own, and all of them hold for the whole.

| part | licence |
|---|---|
| decoder | {decoder_licence} |
| vision tower ({tower}) | {tower_licence} |
| LLaVA-Med's weights, if this was made from them | that of their release: research use |
| LLaVA-Med's data, if this was trained on them | CC BY-NC 4.0, and OpenAI's terms for what GPT-4 wrote |
| further training data | that of the data named above |
"""
_DECODER_LICENCES = {"mistral": "Apache-2.0, if it was made from Mistral-7B-Instruct",
                     "llama": "the LLaMA licence (LLaMA 1 and Vicuna v0), the Llama 2 Community License (Vicuna v1.5), "
                              "that of Llama 3, 3.1 or 3.2, or Apache-2.0 (SmolLM2), by its origin",
                     "qwen2": "Apache-2.0, or the Qwen licences of some sizes of Qwen2.5 (3B and 72B), by its origin",
                     "qwen3": "Apache-2.0, if it was made from Qwen3",
                     "olmo2": "Apache-2.0, if it was made from OLMo-2"}
_IN_TRANSFORMERS = """\
```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(PATH, backend="pil")
model = LlavaForConditionalGeneration.from_pretrained(PATH)
messages = [{{"role": "user", "content": [{{"type": "image"}}, \
{{"type": "text", "text": "What is shown in this image?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
tokens = model.generate(**processor(text=prompt, images=[image], return_tensors="pt"), \
max_new_tokens=64, do_sample=False)
```

- `backend="pil"` gives the pixels that the model was trained with; torchvision resizes a little differently.
{notes}"""
_PAD = """\
- Images are padded to a square in the mean colour, by `do_pad` of `LlavaImageProcessor`, which transformers has \
since 4.49.
  Software that reads `preprocessor_config.json` and does not know that class must be given square images."""
_NO_CHAT_TEMPLATE = "- This export has no Jinja chat template for {name}: write the prompt as text."
_ADDED_ROWS = """\
- `<image>` is token {image}, `<pad>` {pad}. Rows {first} to {last} of both tables over the vocabulary are additions \
of this layout:
  means of the other rows. An import by llavamed-jax removes them again."""
_COMPRESSED = """\
- transformers needs the package `compressed-tensors` for these kernels, and vLLM, which has it, takes their format from
  `config.json`."""
_UNUSED_ROWS = """\
- `<image>` is token {image}, `<pad>` {pad}: of the {rows} rows of the tables over the vocabulary, these had no token \
before."""
_IN_LLAVA = """\
The tensors have the names of LLaVA's own code ({model_type}). That code takes the vision tower that \
`mm_vision_tower` in
`config.json` names, {tower}"""
_TOWER_INSIDE = "here the directory `{name}`: give its path there."
_TOWER_FETCHED = "and takes BiomedCLIP from its hub whatever the path. llavamed-jax reads the directory `{name}` here."
_TOWER_IGNORED = ("and not the tower's tensors in this checkpoint. If the two towers differ, so do the answers; "
                  "llavamed-jax reads the tensors here.")
_SETTINGS_IGNORED = (" It does not read `preprocessor_config.json` here either, whose settings are not its kind's own: "
                     "it takes the settings of the tower that it fetches.")


def model_card(checkpoint: Checkpoint, layout: str, ids: tuple[int, int] | None = None,
               rounding: Rounding | None = None) -> str:
    """Returns the README.md of an export, in Markdown with the front matter of model hubs.

    Args:
      checkpoint: the exported checkpoint.
      layout: `transformers` or `llava`.
      ids: the ids of `<image>` and `<pad>`, which an export in transformers' layout adds; None if it adds none.
      rounding: how the kernels of the decoder's layers are rounded; None if they are not.
    """
    cfg = checkpoint.config
    return _CARD.format(
        library="library_name: transformers\n" if layout == "transformers" else "",
        facts=_table(_facts(checkpoint, rounding)), use=_use(cfg, layout, ids, rounding),
        training=_training(checkpoint), tower=cfg.vision.label,
        tower_licence=cfg.vision.licence,
        decoder_licence=_DECODER_LICENCES.get(cfg.decoder.architecture, "the licence of the model that it was made "
                                                                        "from"))


def _facts(checkpoint: Checkpoint, rounding: Rounding | None) -> dict[str, object]:
    cfg, v, d = checkpoint.config, checkpoint.config.vision, checkpoint.config.decoder
    rounded = {} if rounding is None else {"kernels of the decoder's layers": rounding.words}
    step = {} if checkpoint.step is None else {"training step": checkpoint.step}
    return {
        "vision "
        "tower": f"{v.label}, {v.num_layers} layers, width {v.hidden_size}, {v.image_size} px, patch {v.patch_size}; "
                        f"layer {cfg.feature_layer}, {cfg.tokens_per_image} tokens an image, images in mode "
                        f"`{cfg.image_aspect_ratio}`",
        "projector": f"`{cfg.projector_type}`",
        "decoder": f"{d.architecture}, {d.num_layers} layers, width {d.hidden_size}, {d.num_heads} heads "
                   f"({d.num_kv_heads} of keys and values), vocabulary {d.vocab_size}",
        "precision": ", ".join(sorted({t.dtype.name for t in checkpoint.tensors.values()})), **rounded,
        "prompt template": f"`{template_name(cfg)}`", **step,
    }


def _use(cfg: LlavaConfig, layout: str, ids: tuple[int, int] | None, rounding: Rounding | None) -> str:
    if layout == "llava":
        name = Path(llava_to_hf(cfg, layout)["mm_vision_tower"]).name
        inside = (_TOWER_FETCHED if is_biomedclip(name) else _TOWER_INSIDE).format(name=name)
        kind = cfg.source if cfg.source != "transformers" else f"llava_{cfg.decoder.architecture}"
        ignored = _TOWER_IGNORED + ("" if cfg.vision == cfg.vision.plain() else _SETTINGS_IGNORED)
        return _IN_LLAVA.format(model_type=f"`model_type` `{kind}`", tower=inside if cfg.source == "llava" else ignored)
    notes = [_PAD] if cfg.image_aspect_ratio == "pad" else []
    rows, now = cfg.decoder.vocab_size, cfg.rows_in_transformers(ids) if ids else 0
    if now > rows:
        notes.append(_ADDED_ROWS.format(first=rows, last=now - 1, image=ids[0], pad=ids[1]))
    elif ids:
        notes.append(_UNUSED_ROWS.format(rows=rows, image=ids[0], pad=ids[1]))
    if rounding is not None:
        notes.append(_COMPRESSED)
    if chat_template(cfg) is None:
        notes.append(_NO_CHAT_TEMPLATE.format(name=f"`{template_name(cfg)}`"))
    return _IN_TRANSFORMERS.format(notes="\n".join(notes))


def _training(checkpoint: Checkpoint) -> str:
    """Returns the recipes that led to the checkpoint, the last run first, each as a table of its keys."""
    if checkpoint.layout == "preset":
        return "None: these are random weights."
    directory, runs, seen = checkpoint.directory, [], set()
    while (directory is not None and (directory / "recipe.json").is_file() and directory.resolve() not in seen
           and len(runs) < _MAX_RUNS):
        seen.add(directory.resolve())
        found = read_json(directory / "recipe.json")
        recipe = found.get("recipe", found)
        values = {**recipe, **{f"settled: {key}": value for key, value in found.get("resolved", {}).items()}}
        runs.append(
            f"### Run `{recipe.get('name', directory.name)}`\n\nStarted from "
            f"`{_shown(recipe.get('init'))}`.\n\n" + _table(
                {f"`{key}`": f"`{json.dumps(_shown(value))}`" for key, value in sorted(values.items())
                 if key not in ("init", "name")}, True))
        directory = Path(str(recipe.get("init")))
        directory = directory.parents[1] if directory.parent.name == "checkpoints" else directory
    if not runs:
        return ("No training record comes with these weights: they were converted from another checkpoint, whose own "
                "card says how it was trained.")
    return "The runs of llavamed-jax that produced these weights, the latest first.\n\n" + "\n\n".join(runs)


def _shown(value):
    """Returns a recipe's value without the directories of the machine where it was written."""
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(rows: dict[str, object], has_head: bool = False) -> str:
    head = ["| key | value |", "|---|---|"] if has_head else []
    return "\n".join([*head, *("| {} | {} |".format(key, str(value).replace("|", "\\|"))
                               for key, value in rows.items())])
