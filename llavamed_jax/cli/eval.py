"""`python eval.py` and `llavamed-eval`: asks a model the questions of a data set, scores the answers, writes a report."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common, processes
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
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where predictions, metrics and report go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    source.add_argument("--predictions", metavar="FILE", help="predictions.jsonl that exists; no model is loaded")
    parser.add_argument("--control", choices=["image"], help="ask again with the images exchanged")
    processes.add_flags(parser)
    common.add_model_flags(parser)
    return parser


# What is refused beside --predictions, where no model is loaded.
_MODEL_FLAGS = ("control", "vision_tower", "tokenizer", "template", "dtype", "mesh")
_PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")


def program(argv: Sequence[str]) -> int:
    """Runs one evaluation; returns the exit status."""
    args, overrides = _parser().parse_with_overrides(argv)
    if args.predictions is not None:
        given = [name for name in (*_MODEL_FLAGS, *_PROCESS_FLAGS) if getattr(args, name)]
        if given:
            raise UsageError(f"--{given[0]} needs a model; it cannot stand beside --predictions")
    cfg = common.load_config(args.config, overrides)
    if args.checkpoint is not None:
        common.check_model_flags(args)
        processes.join(processes.asked(args))
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
    from llavamed_jax.parallel import distributed

    def interrupt(*_):
        for number in earlier:  # what reaches several processes may reach this one twice
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    distributed.when_stopped(lambda: os.kill(os.getpid(), signal.SIGTERM))
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
        distributed.when_stopped(None)
        if not processes.is_joined():  # where it is, another signal may be on its way
            for number, handler in earlier.items():
                signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `eval.py` and `llavamed-eval`."""
    return common.run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
