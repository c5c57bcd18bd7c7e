"""`python eval.py` and `llavamed-eval`: asks a model the questions of a data set, scores the answers, writes a report.

Exit statuses are those of `cli.common.run`, and `signals.EXIT_SAVED`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common, eval_parts, preflight, processes
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils import signals

_EXAMPLES = f"""\
{common.MODEL_FLAGS}
endpoint: --model NAME --concurrency 8 --timeout 120 (seconds)
example: eval.py --config configs/eval/slake.py --config.data.root=DIR --checkpoint PATH --workdir W
The same command resumes a stopped evaluation. For research only, never for clinical decisions."""


def _parser() -> common.Parser:
    usage = "eval.py --config FILE|--suite NAME --workdir DIR --checkpoint PATH|--endpoint URL|..."
    parser = common.Parser(prog="eval.py", usage=usage,
                           description="Asks a model the questions of a data set, scores the answers, writes a report.",
                           epilog=_EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="what is asked: configs/eval/NAME.py[:ARGUMENTS]")
    what.add_argument("--suite", choices=["medical"], help="every medical set under --config.data.root=DIR")
    parser.add_argument("--workdir", metavar="DIR", help="directory for predictions, metrics and report")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    source.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server; needs --model NAME")
    source.add_argument("--predictions", metavar="FILE", help="an existing predictions.jsonl; no model is asked")
    source.add_argument("--write_llava", metavar="FILE", help="write the questions as a training file and exit")
    parser.add_argument("--control", choices=["image"], help="ask again with exchanged images and with noise")
    parser.add_argument("--against", metavar="FILE", help="compare with this predictions.jsonl in pairs")
    parser.add_argument("--dry_run", action="store_true", help="print what would be asked and what it costs, and exit")
    for name, kind in _SERVER_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="NAME" if kind is str else "N", help=argparse.SUPPRESS)
    preflight.add_flags(parser)
    processes.add_flags(parser)
    common.add_model_flags(parser, is_listed=False)
    return parser


_PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")
_SERVER_FLAGS = {"model": str, "concurrency": int, "timeout": float}


def program(argv: Sequence[str]) -> int:
    """Runs one evaluation; returns the exit status."""
    args, overrides = _parser().parse_with_overrides(argv)
    _check_flags(args)
    if args.suite is not None:
        from llavamed_jax.cli import eval_suite

        return eval_suite.program(args, overrides)
    # Processes join first: if one of them cannot read its config, all of them end.
    if args.preflight is None and args.write_llava is None:
        processes.join(processes.asked(args) if args.checkpoint is not None else None)
    cfg = common.load_config(args.config, overrides)
    if args.write_llava is not None:
        from llavamed_jax.evaluation import questions

        print(questions.write_llava(cfg, args.write_llava))
        eval_parts.say_void(args, cfg, overrides)
        return 0
    if args.checkpoint is not None:
        common.check_model_flags(args)
    if args.preflight is not None:
        status = _preflight(args, cfg)
        eval_parts.say_void(args, cfg, overrides)
        return status
    endpoint = eval_parts.open_endpoint(args)
    is_new = not os.path.exists(args.workdir)
    from llavamed_jax.evaluation import results, run  # after the flags are checked: the import takes a second

    remove = (lambda: results.remove_empty(Path(args.workdir))) if is_new else lambda: None  # only an empty workdir
    with signals.undone_by(remove):
        evaluation = run.open_evaluation(cfg, args.workdir, args.against)
        print(evaluation.scorer.describe(), flush=True)
        eval_parts.say_void(args, cfg, overrides)
        try:
            if endpoint is not None:
                endpoint.check(evaluation.generation)
            if args.predictions is None:
                run.check(evaluation, [args.control] if args.control else [])
            if args.dry_run:
                print(run.plan(evaluation, args.predictions, args.control is not None))
                return 0
            with results.locked(evaluation.workdir) as evaluation.place:
                metrics = eval_parts.measured(evaluation, lambda: _metrics(evaluation, args, endpoint),
                                              lambda: _stopped(evaluation, args))
                if metrics is None and evaluation.has_written:
                    evaluation.check_place()  # before the message that answers are kept there
        except results.Lost:
            remove = lambda: None  # the workdir now belongs to another process
            raise
        finally:
            remove()
    if metrics is None:
        if signals.failure():
            raise UserError(f"{signals.failure()}; {evaluation.n_kept} answers are kept in {args.workdir}: run again "
                            "to continue")
        print(_stopped(evaluation, args), file=sys.stderr)
        return signals.EXIT_SAVED
    print(evaluation.scorer.summary(metrics))
    print(f"report: {evaluation.workdir / 'report.html'}")
    return 0


def _stopped(evaluation, args: argparse.Namespace) -> str:
    return f"stopped; {evaluation.n_kept} answers are kept in {args.workdir}: run again to continue"


def _preflight(args: argparse.Namespace, cfg) -> int:
    from llavamed_jax.evaluation.settings import check_generation

    if "generation" not in cfg:
        raise UsageError(f"--config is {args.config!r}, which has no 'generation'; a file of configs/eval was expected")
    check_generation(cfg)
    if cfg.generation.num_beams > 1:
        raise UsageError(f"generation.num_beams is {cfg.generation.num_beams}; 1 was expected with --preflight, which "
                         "does not compile beam search")
    return preflight.run(args, cfg, checkpoint=args.checkpoint, vision_tower=args.vision_tower, mesh=args.mesh,
                         dtype=args.dtype, adapter=args.adapter, quantize=args.quantize,
                         kv_cache=args.kv_cache)


def _check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not belong to the given source of answers."""
    preflight.check_flags(args)
    if args.checkpoint == "":
        raise UsageError("--checkpoint is empty; a checkpoint's directory, owner/name of a hub or preset:NAME was "
                         "expected")
    if args.preflight is not None and args.checkpoint is None:
        raise UsageError("--preflight compiles the programs of a model; it needs --checkpoint")
    alone = [name for name in ("preflight", "predictions", "write_llava") if getattr(args, name) is not None]
    if args.suite is not None and alone:
        raise UsageError(f"--{alone[0]} is for one set; --config FILE was expected with it, not --suite")
    if args.preflight is None and (args.workdir is None) != (args.write_llava is not None):
        raise UsageError("--workdir is missing; a directory for predictions, metrics and report was expected"
                         if args.workdir is None else "--write_llava writes one file and needs no --workdir")
    if args.write_llava is not None and (args.against is not None or args.dry_run):
        raise UsageError(f"--{'dry_run' if args.dry_run else 'against'} cannot be used with --write_llava, which "
                         "evaluates nothing")
    given = [name for name in eval_parts.MODEL_FLAGS if getattr(args, name)]
    given += [name for name in _PROCESS_FLAGS if getattr(args, name) is not None]
    for source in ("predictions", "write_llava"):
        if getattr(args, source) is not None and (args.control or given):
            raise UsageError(f"--{(['control'] if args.control else given)[0]} needs a model; it cannot be used with "
                             f"--{source}")
    if args.endpoint is not None and given:
        raise UsageError(f"--{given[0]} is for a model that is loaded here; it cannot be used with --endpoint")
    if args.endpoint is not None and not args.model:
        raise UsageError("--endpoint needs --model NAME, the name under which the server offers the model")
    of_server = [name for name in _SERVER_FLAGS if getattr(args, name) is not None]
    if args.endpoint is None and of_server:
        raise UsageError(f"--{of_server[0]} can be used only with --endpoint")


def _metrics(evaluation, args: argparse.Namespace, endpoint) -> dict:
    from llavamed_jax.evaluation import run

    if args.predictions is not None:
        return run.score_file(evaluation, args.predictions)
    source, flags = eval_parts.source_of(args, endpoint)
    return run.evaluate(evaluation, eval_parts.answerer_of(args, endpoint), source,
                        [args.control] if args.control else [], flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `eval.py` or `llavamed-eval` and returns its exit status."""
    return common.command(lambda: program, argv, is_forked=True)


if __name__ == "__main__":
    sys.exit(main())
