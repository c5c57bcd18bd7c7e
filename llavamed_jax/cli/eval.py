"""`python eval.py` and `llavamed-eval`: asks a model the questions of a data set, scores the answers, writes a report."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, UserError

_EXAMPLES = """\
example: python eval.py --config configs/eval/vqa_rad.py --config.data.root=DIR \\
                        --checkpoint runs/vqa_rad --workdir runs/eval --control image
Started again, it goes on where it was stopped. For research only, never for clinical decisions."""


def _parser() -> common.Parser:
    usage = "eval.py --config FILE --workdir DIR --checkpoint PATH|--predictions FILE [--config.KEY=VALUE]"
    parser = common.Parser(prog="eval.py", usage=usage, description="Asks a model a data set's questions, scores, reports.",
                           epilog=_EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE", help="what is asked: configs/eval/NAME.py[:ARGUMENTS]")
    parser.add_argument("--workdir", metavar="DIR", help="where predictions, metrics and report go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    source.add_argument("--predictions", metavar="FILE", help="predictions.jsonl that exists; no model is loaded")
    common.add_preflight_flags(parser)
    parser.add_argument("--control", choices=["image"], help="ask again with the images exchanged")
    common.add_model_flags(parser)
    return parser


# What is refused beside --predictions, where no model is loaded.
_MODEL_FLAGS = ("control", "vision_tower", "tokenizer", "template", "dtype", "mesh")


def program(argv: Sequence[str]) -> int:
    """Runs one evaluation; returns the exit status."""
    args, overrides = _parser().parse_with_overrides(argv)
    if args.predictions is not None:
        given = [name for name in (*_MODEL_FLAGS, "preflight") if getattr(args, name)]
        if given:
            raise UsageError(f"--{given[0]} needs a model; it cannot stand beside --predictions")
    cfg = common.load_config(args.config, overrides)
    if args.checkpoint is not None:
        common.check_model_flags(args)
    if args.preflight is not None:
        return common.preflight(args, cfg, checkpoint=args.checkpoint, mesh=args.mesh, dtype=args.dtype or "bfloat16")
    if args.workdir is None:
        raise UsageError("the following arguments are required: --workdir; `eval.py --help` lists the flags")
    from llavamed_jax.evaluation import run  # after the flags are known to be right: it takes a second

    is_new = not Path(args.workdir).exists()
    evaluation = run.Evaluation(cfg, args.workdir)
    print(evaluation.describe(), flush=True)
    try:
        metrics = evaluation.score_file(args.predictions) if args.predictions is not None else _ask(evaluation, args)
    except UserError:
        if is_new:
            with contextlib.suppress(OSError):
                evaluation.workdir.rmdir()  # only where nothing has been written
        raise
    if metrics is None:
        print(f"stopped; {evaluation.n_kept} answers are kept in {args.workdir}: run again to go on", file=sys.stderr)
        return common.EXIT_SAVED
    print(run.summary(metrics))
    print(f"report: {evaluation.workdir / 'report.html'}")
    return 0


def _ask(evaluation, args: argparse.Namespace) -> dict | None:
    """The metrics; None where SIGTERM or SIGINT stopped it. What was answered before is kept."""
    stops = (signal.SIGTERM, signal.SIGINT)
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in stops}
    try:
        model = common.load_assistant(args)
        flags = {name: getattr(args, name) for name in _MODEL_FLAGS if name != "control"}
        return evaluation.run(model, args.checkpoint, args.control == "image", flags)
    except KeyboardInterrupt:
        return None
    except UserError as error:
        kept = evaluation.n_kept
        raise type(error)(f"{error}; {kept} answers are kept in {args.workdir}" if kept else str(error)) from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `eval.py` and `llavamed-eval`."""
    return common.run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
