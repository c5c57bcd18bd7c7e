"""Trains a recipe. Flags and exit statuses only; `training.trainer.fit` does the work."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from llavamed_jax.cli import common, preflight
from llavamed_jax.errors import UserError
from llavamed_jax.utils import signals

_USAGE = """\
examples:
  train.py --config configs/pretrain.py --workdir runs/pretrain --config.data.train=alignment.json
  train.py --config configs/vqa_rad.py:v15,epochs=9 --workdir runs/vqa_rad --config.init=runs/finetune
  train.py --config configs/finetune.py --preflight a100-40g-8,h200-1,v5e-64

The same command with the same workdir resumes from the newest intact step.
exit status: 0 done; 1 failed; 2 wrong flag, config key or value; 75 stopped by a signal with everything saved
"""


def train(argv: list[str]) -> int:
    """Runs `train.py`.

    Args:
      argv: the arguments, without the program's name.

    Returns:
      The exit status.

    Raises:
      UserError: an argument or config key is wrong, or the run failed.
    """
    from llavamed_jax.cli import compilation_cache, processes
    parser = common.Parser(["--workdir"], prog="train.py", description="Trains a recipe.", epilog=_USAGE)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENTS]",
                        help="the recipe; --config.KEY=VALUE changes one key")
    parser.add_argument("--workdir", metavar="DIR",
                        help="the run's directory, also gs://… or s3://…; created if it does not exist")
    parser.add_argument("--profile", type=_span, metavar="START:STOP", help="trace these updates into DIR/tensorboard")
    preflight.add_flags(parser)
    processes.add_flags(parser)
    parser.add_argument("--help-config", action=_HelpConfig, nargs=0,
                        help="list every config key with type, range and meaning, and exit")
    args, overrides = parser.parse_with_overrides(argv)
    preflight.check_flags(args)
    if args.preflight is not None:
        if args.profile is not None:
            parser.error("--profile traces updates; it cannot be used with --preflight, which runs none")
        config = _configured(args.config, overrides)
        from llavamed_jax.training import recipe, void_keys
        recipe.check(config)
        status = preflight.run(args, config, slices=config.mesh.slices)
        print(*(f"warning: {line}\n" for line in void_keys.sentences(config)), sep="", end="", file=sys.stderr)
        return status
    if args.workdir is None:
        parser.error("the following arguments are required: --workdir")
    if not args.workdir:
        parser.error("--workdir is empty; a directory was expected")
    processes.join(processes.asked(args))  # first: if one cannot read its config, all of them end
    config = _configured(args.config, overrides)
    from llavamed_jax.evaluation import during_training  # imports jax; a wrong command line fails before that
    from llavamed_jax.training.callbacks import Callbacks
    from llavamed_jax.training.trainer import fit
    compilation_cache.enable()
    model = during_training.TrainedModel()
    callbacks = Callbacks([during_training.ClosedAccuracy(model)], during_training.Samples(model), args.profile)
    if fit(config, args.workdir, callbacks):
        return 0
    if signals.failure():
        raise UserError(f"{signals.failure()}; the trained state is saved in {args.workdir}: run again to continue")
    return signals.EXIT_SAVED


class _HelpConfig(argparse.Action):
    """Prints the keys of a recipe in the width of the terminal, and exits."""

    def __call__(self, parser, *_):
        from llavamed_jax.training import recipe
        print(recipe.help_text(shutil.get_terminal_size().columns))
        parser.exit()


def _configured(spec: str, overrides: Sequence[str]):
    """Returns the recipe with its overrides.

    If one of `epochs` and `total_steps` is typed, it counts, and the recipe's value of the other is unset. Raises
    UsageError if both are typed, and the errors of `common.load_config`.
    """
    from llavamed_jax.cli import common
    from llavamed_jax.errors import UsageError
    config = common.load_config(spec, overrides)
    typed = dict(override.partition("=")[::2] for override in overrides)
    for argument in spec.partition(":")[2].split(","):
        name, _, value = argument.partition("=")
        if name in ("epochs", "protocol") and typed.get(name, value) != value:
            print(f"{name} is {typed[name]} because of --config.{name}; the recipe argument {argument} has no effect",
                  flush=True)
    lengths = ("epochs", "total_steps")
    if any(key not in config or config[key] is None for key in lengths):
        return config
    if all(key in typed for key in lengths):
        raise UsageError(f"the config keys 'epochs' ({config.epochs}) and 'total_steps' ({config.total_steps}) are "
                         "both given, and each sets the length of the run; one of them was expected")
    for key, other in (lengths, lengths[::-1]):
        if key in typed:
            print(f"{key} is {config[key]}, so {other} ({config[other]} in the recipe) has no effect", flush=True)
            with config.ignore_type():
                config[other] = None
    return config


def _span(text: str) -> tuple[int, int]:
    """Reads START:STOP; argparse reports the ValueError."""
    first, last = map(int, text.split(":"))
    if not 1 <= first <= last:
        raise ValueError
    return first, last


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `train.py` and returns its exit status."""
    return common.command(lambda: train, argv, is_forked=True)
