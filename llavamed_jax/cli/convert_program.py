"""`python -m convert`: imports, exports, builds, inspects and compares checkpoints."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llavamed_jax.adapters import peft_write, vllm
from llavamed_jax.adapters.lora import merged
from llavamed_jax.adapters.open import has_own_base, open_model
from llavamed_jax.checkpoints.assemble.build import build, with_projector
from llavamed_jax.checkpoints.assemble.delta import apply_delta, make_delta
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.gguf.directory import import_decoder
from llavamed_jax.checkpoints.model_config import text_files
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG
from llavamed_jax.checkpoints.torch.write import total_bytes
from llavamed_jax.cli import convert_quantize
from llavamed_jax.cli.common import Parser
from llavamed_jax.config.adapter import FACTOR_A
from llavamed_jax.errors import UsageError, UserError, amount, cut, exists, warn
from llavamed_jax.text.chat_template import read_template
from llavamed_jax.text.templates import get_template
from llavamed_jax.text.tokenizer import TOKENIZERS, Tokenizer
from llavamed_jax.utils import progress, signals, terminal
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import read_json

_OF_TEXT = ("tokenizer", "special_", "added_", "chat_template")  # the files that --tokenizer replaces
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def program(argv: list[str]) -> int | None:
    """Runs one conversion; returns the exit status."""
    parser = Parser(prog="python -m convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_flags, action) in COMMANDS.items():
        command = commands.add_parser(name, may_be_buckets=["PATH", "A", "B"], help=action.__doc__,
                                      description=action.__doc__)
        add_flags(command)
        command.set_defaults(action=action)
    args = parser.parse_args(argv)
    return args.action(args)


def _checkpoint_flags(parser: argparse.ArgumentParser, path: str) -> None:
    parser.add_argument(path, required=True, **_PATH) if path.startswith("--") else parser.add_argument(path, **_PATH)
    _part_flags(parser, "a vision tower that replaces the checkpoint's own",
                "template of the result, such as v1.5:mistral_instruct")
    parser.add_argument("--dtype", choices=_DTYPES, metavar="TYPE",
                        help="float32, float16 or bfloat16; default: as it is stored")


def _part_flags(parser: argparse.ArgumentParser, tower: str, template: str) -> None:
    parser.add_argument("--vision_tower", metavar="PATH", help=tower)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.model, or a directory with a tokenizer")
    parser.add_argument("--template", metavar="NAME", help=template)


_PATH = dict(metavar="PATH", help="a directory, a workdir, owner/name of a hub or preset:NAME")


def _open(path: str, args: argparse.Namespace, dtype: type | None = None) -> Checkpoint:
    """Opens the checkpoint of a PATH, replaces the parts that the flags name, and prints what it is."""
    checkpoint = open_model(path, args.vision_tower, getattr(args, "adapter", None)).cast(dtype)
    if args.template is not None:
        _said_of("--template", get_template, args.template)
        checkpoint = checkpoint.replace(config=checkpoint.config.replace(template=args.template))
    if args.tokenizer is not None:
        source = Path(args.tokenizer)
        if not exists(source):
            raise UsageError(f"--tokenizer {cut(str(source))} does not exist; a tokenizer.model, a tokenizer.json or a "
                             "directory with one was expected")
        files = {"tokenizer.model": source} if source.is_file() and source.suffix == ".model" else text_files(source)
        if not any(name.startswith("tokenizer") for name in files):
            raise UsageError(f"--tokenizer {source} holds no tokenizer; tokenizer.model or tokenizer.json was expected")
        _said_of("--tokenizer", Tokenizer.load, source)  # raises before anything is written
        kept = {name: file for name, file in checkpoint.files.items() if not name.startswith(_OF_TEXT)}
        checkpoint = checkpoint.replace(files={**kept, **{name: file for name, file in files.items()
                                                          if name.startswith(_OF_TEXT)}})
    _check_text(checkpoint)
    print(terminal.sentence(f"{path}: {checkpoint.layout} layout, vision tower: {checkpoint.tower}"))
    if getattr(args, "projector", None) is not None:
        checkpoint, sentence = with_projector(checkpoint, Path(args.projector))
        print(sentence)
    return checkpoint


def _check_text(checkpoint: Checkpoint) -> None:
    """Raises UserError if settings or a tokenizer cannot be read; warns if ids have no row in the embedding table.

    These files are copied unchanged, so that otherwise only loading the result would fail. Some published tokenizers
    have one token too many.
    """
    for name, file in checkpoint.files.items():
        if name.endswith(".json"):
            read_json(file)
        elif name.endswith(".jinja"):
            read_template(file)
    rows = checkpoint.config.decoder.vocab_size
    pieces = max((Tokenizer.load(checkpoint.files[name]).vocab_size for name in TOKENIZERS if name in checkpoint.files),
                 default=0)
    if pieces > rows:
        print(f"warning: the tokenizer has {pieces} pieces and the embedding table {rows} rows; ids from {rows} on "
              "have no row", file=sys.stderr)


def _said_of(flag: str, check: Callable[[Any], object], value: Any) -> None:
    try:
        check(value)
    except UserError as error:
        raise UsageError(f"{flag}: {error}") from error


def _report(tensors: Mapping[str, Tensor], out: str) -> None:
    print(f"wrote {len(tensors)} tensors, {amount(total_bytes(tensors))}, to {out}")


def _import_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flags(parser, "--checkpoint")
    parser.add_argument("--projector", metavar="FILE",
                        help="an mm_projector.bin that replaces the checkpoint's projector")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory for the result")


def _import(args: argparse.Namespace) -> None:
    """Turn a checkpoint into a tree of this project."""
    from llavamed_jax.checkpoints.tree.model import write_model  # imports Orbax, which other commands do not need
    checkpoint = _open(args.checkpoint, args, _DTYPES.get(args.dtype))
    with new_directory(args.out, total_bytes(checkpoint.tensors), checkpoint.sources) as out:
        write_model(out, checkpoint, progress=progress.over)
    _report(checkpoint.tensors, args.out)


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "python -m convert export --checkpoint PATH --out DIR --layout LAYOUT [FLAG …]"  # they fill a screen
    _import_flags(parser)
    parser.add_argument("--layout", required=True, choices=("transformers", "llava"),
                        metavar="LAYOUT", help="transformers, or llava (the original's own)")
    convert_quantize.add_flags(parser)


def _export(args: argparse.Namespace) -> None:
    """Write a checkpoint in a PyTorch layout."""
    convert_quantize.check_flags(args)
    dtype = _DTYPES.get(args.dtype)
    checkpoint, rounding = _open(args.checkpoint, args, dtype if args.quantize is None else None), None
    if args.quantize is not None:
        rounding, checkpoint = convert_quantize.rounding_of(checkpoint, args, dtype)
    _report(export(checkpoint, args.out, args.layout, progress.over, rounding), args.out)


def _build_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoder", required=True, metavar="PATH",
                        help="a language model (LLaMA, Mistral, Qwen, OLMo-2 …): DIR, owner/name, or a GGUF file")
    parser.add_argument("--vision", required=True, metavar="PATH",
                        help="a tower (CLIP, SigLIP …) or whole model: DIR, owner/name, or preset:NAME (random)")
    parser.add_argument("--projector", required=True, metavar="TYPE|FILE",
                        help="linear or mlpNx_gelu with random weights, or an mm_projector.bin")
    parser.add_argument("--add_image_tokens", action="store_true",
                        help="add <im_patch>, <im_start> and <im_end>, as in LLaVA-Med v1.0")
    parser.add_argument("--add_pad_token", action="store_true",
                        help="add [PAD] before them, as v1.0's --version v0 does")
    parser.add_argument("--image_size", type=int, metavar="N",
                        help="edge of the images in pixels; the tower's position table is interpolated to it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights; default 0")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory for the tree")


def _build(args: argparse.Namespace) -> None:
    """Join a plain decoder and a vision tower with a projector: how stage 1 starts."""
    from llavamed_jax.checkpoints.tree.model import write_model
    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}; a whole number of at least 0 was expected")
    if args.add_pad_token and not args.add_image_tokens:
        raise UsageError("--add_pad_token adds [PAD] before the image tokens; --add_image_tokens was expected too")
    with (tempfile.TemporaryDirectory() as scratch,
          signals.undone_by(lambda: shutil.rmtree(scratch, ignore_errors=True))):
        checkpoint, said = build(args.decoder, args.vision, args.projector, Path(scratch), args.add_image_tokens,
                                 args.seed, args.add_pad_token, args.image_size)
        _check_text(checkpoint)
        print(*said, sep="\n")
        with new_directory(args.out, total_bytes(checkpoint.tensors), map(Path, (args.decoder, args.vision))) as out:
            write_model(out, checkpoint, progress=progress.over)
    _report(checkpoint.tensors, args.out)


def _import_decoder_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a language model as a GGUF file, llama.cpp's format")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", metavar="TYPE",
                        help="float32 (the default, exact), float16 or bfloat16")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory, in transformers' layout")


def _import_decoder(args: argparse.Namespace) -> None:
    """Write a GGUF file as a language model's directory of transformers."""
    tensors, said = import_decoder(args.file, args.out, _DTYPES[args.dtype], progress.over)
    print(*map(terminal.sentence, said), sep="\n")
    _report(tensors, args.out)


def _delta_flags(parser: argparse.ArgumentParser, other: str, other_help: str) -> None:
    parser.add_argument("--base", required=True, metavar="PATH",
                        help="the plain decoder: a directory, or owner/name of a hub")
    parser.add_argument(other, required=True, metavar="PATH", help=other_help)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory, in the original's layout")


def _make_delta_flags(parser: argparse.ArgumentParser) -> None:
    _delta_flags(parser, "--target", "the model that was trained from the base, in the original's layout")


def _make_delta(args: argparse.Namespace) -> None:
    """Write a model as its difference from the base that it was trained from, in float16."""
    _report(make_delta(args.base, args.target, args.out, progress.over), args.out)


def _apply_delta_flags(parser: argparse.ArgumentParser) -> None:
    _delta_flags(parser, "--delta", "the delta that was released instead of the model")


def _apply_delta(args: argparse.Namespace) -> None:
    """Add a delta to its base, in float16: how LLaVA-Med v1.0 becomes a model."""
    _report(apply_delta(args.base, args.delta, args.out, progress.over), args.out)


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    _adapter_flags(parser)
    parser.add_argument("--layout", choices=("tree", "transformers", "llava"), metavar="LAYOUT",
                        help="tree (this project's own), transformers or llava; default: that of the base")
    parser.add_argument("--dtype", choices=_DTYPES, metavar="TYPE",
                        help="float32, float16 or bfloat16; default: as it is stored")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory for the model")


def _adapter_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="PATH",
                        help="the model that the adapter was trained on, or a run of this project that trains one")
    parser.add_argument("--adapter", metavar="PATH", help="an adapter in PEFT's or LLaVA's layout; not for a run")
    _part_flags(parser, "a vision tower that replaces the base's own", "template of the result")


def _open_with_adapter(args: argparse.Namespace) -> Checkpoint:
    if args.base is None and args.adapter is None:
        raise UsageError("--base and --adapter are both absent; a base with its adapter, or a run, was expected")
    return _open(args.base or args.adapter, args)


def _merge_lora(args: argparse.Namespace) -> None:
    """Merge a LoRA adapter into its base: a model without an adapter."""
    from llavamed_jax.checkpoints.tree.model import write_model
    checkpoint = merged(_open_with_adapter(args), _DTYPES.get(args.dtype))
    layout = args.layout or (checkpoint.layout if checkpoint.layout in ("transformers", "llava") else "tree")
    if layout == "tree":
        with new_directory(args.out, total_bytes(checkpoint.tensors), checkpoint.sources) as out:
            write_model(out, checkpoint, progress=progress.over)
    else:
        export(checkpoint, args.out, layout, progress.over)
    _report(checkpoint.tensors, args.out)


def _export_lora_flags(parser: argparse.ArgumentParser) -> None:
    _adapter_flags(parser)
    parser.add_argument("--layout", default="transformers", choices=("transformers", "llava"), metavar="LAYOUT",
                        help="names of transformers 5 (the default), or llava (the original's own)")
    parser.add_argument("--base_name", metavar="NAME", help="base_model_name_or_path of the result; default: the base")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory for the adapter")


def _export_lora(args: argparse.Namespace) -> None:
    """Write a LoRA adapter alone, as PEFT reads it."""
    checkpoint = _open_with_adapter(args)
    written = peft_write.write(checkpoint, args.out, args.layout, args.base_name)
    print(f"wrote {len(written)} tensors to {args.out}")
    if args.base_name is None and has_own_base(checkpoint):
        print(f"{ADAPTER_CONFIG} names the run itself, which PEFT cannot open; --base_name with the model that the run "
              "began with was expected if the adapter is for PEFT")
    if args.layout == "transformers" and (reason := vllm.refuses(read_json(Path(args.out) / ADAPTER_CONFIG))):
        print(reason)


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flags(parser, "path")


def _inspect(args: argparse.Namespace) -> None:
    """Print what a checkpoint holds."""
    checkpoint = _open(args.path, args, _DTYPES.get(args.dtype))
    if doubt := checkpoint.doubt():
        warn(doubt)
    cfg, v, d = checkpoint.config, checkpoint.config.vision, checkpoint.config.decoder
    tokenizer = next((n for n in TOKENIZERS if n in checkpoint.files), "none")
    window = f", window {d.sliding_window}" if d.sliding_window else ""
    step = f", step {checkpoint.step}" if checkpoint.step is not None else ""
    rows = [
        ("layout", f"{checkpoint.layout}{step}"),
        ("vision tower", f"{v.num_layers} layers, width {v.hidden_size}, {v.num_heads} heads, {v.image_size} px, patch "
                         f"{v.patch_size}"),
        ("", f"feature layer {cfg.feature_layer}, {cfg.feature_select}: {cfg.tokens_per_image} tokens per image"),
        ("images", f"{cfg.image_aspect_ratio}, {v.images.words(v.image_size)}"),
        ("projector", f"{cfg.projector_type}, {v.hidden_size} -> {d.hidden_size}"),
        ("decoder", f"{d.architecture}, {d.num_layers} layers, width {d.hidden_size}, {d.num_heads} heads, "
                    f"{d.num_kv_heads} of keys"),
        ("", f"vocabulary {d.vocab_size}, feed-forward {d.intermediate_size}, theta {d.rope_theta:g}, eps "
             f"{d.rms_norm_eps:g}{window}"),
        *([("few bits", f"{checkpoint.few_bits}, in compressed-tensors' format")] if checkpoint.few_bits else []),
        *([("adapter", _adapter_words(checkpoint))] if cfg.adapter is not None else []),
        ("tokenizer", tokenizer),
        ("template", cfg.template or "by model type"),
    ]
    for label, text in rows:
        print(f"{label:<13} {terminal.sentence(text)}")
    print(f"\n{'part':<13} {'tensors':>8} {'parameters':>15}  dtype")
    unused = set(checkpoint.unused)
    parts = {part: [n for n in checkpoint.tensors if n.startswith(part) and n not in unused]
             for part in ("vision_tower", "projector", "decoder")}
    for part, members in {**parts, "unused": unused, "all": checkpoint.tensors}.items():
        tensors = [checkpoint.tensors[name] for name in members]
        dtypes = ", ".join(sorted({t.dtype.name for t in tensors}))
        print(f"{part:<13} {len(tensors):>8} {sum(math.prod(t.shape) for t in tensors):>15,}  {dtypes}")


def _adapter_words(checkpoint: Checkpoint) -> str:
    adapter = checkpoint.config.adapter
    number = sum(name.endswith(FACTOR_A) for name in checkpoint.tensors)
    said = [f"{word} {', '.join(f'{value:g}' for value in sorted(values))}" for word, values in (
        ("rank", {rule.rank for rule in adapter.rules}), ("alpha", {rule.alpha for rule in adapter.rules}))]
    return f"{number} kernels, {', '.join(said)}{', rsLoRA' * adapter.use_rslora}"


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", **_PATH | {"metavar": "A"})
    parser.add_argument("b", metavar="B", help="the other checkpoint")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X",
                        help="largest difference of values, relative to the largest magnitude of the tensor or of "
                             "the logits; default 1e-4")
    parser.add_argument("--tensors_only", action="store_true",
                        help="compare only tensors, no logits and greedy tokens; no model is loaded")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the computation; default float32")
    _part_flags(parser, "a vision tower for both", "template of both, such as v1.5:mistral_instruct")


def _verify(args: argparse.Namespace) -> int:
    """Say whether two checkpoints are the same model; exit status 1 if they are not."""
    from llavamed_jax.verification.compare import compare, table  # imports jax
    if not 0 <= args.tolerance < math.inf:
        raise UsageError(f"--tolerance is {args.tolerance}; a number of at least 0 was expected")
    checkpoints = [_open(path, args) for path in (args.a, args.b)]
    rows = compare(*checkpoints, args.tolerance, args.tensors_only, _DTYPES[args.dtype], progress.over)
    print(f"\n{table(rows)}\n")
    differing = [row.what for row in rows if row.counts and not row.is_equal]
    print(f"not equal: {'; '.join(differing)}" if differing
          else f"equal within {args.tolerance:g} of the largest magnitude")
    return 1 if differing else 0


COMMANDS = {
    "import": (_import_flags, _import),
    "export": (_export_flags, _export),
    "build": (_build_flags, _build),
    "import-decoder": (_import_decoder_flags, _import_decoder),
    "make-delta": (_make_delta_flags, _make_delta),
    "apply-delta": (_apply_delta_flags, _apply_delta),
    "merge-lora": (_merge_flags, _merge_lora),
    "export-lora": (_export_lora_flags, _export_lora),
    "inspect": (_inspect_flags, _inspect),
    "verify": (_verify_flags, _verify),
}
