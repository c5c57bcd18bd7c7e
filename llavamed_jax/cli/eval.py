"""`python eval.py` and `llavamed-eval`: asks a model the questions of a data set, scores the answers, writes a report.

Exit statuses are those of `cli.common.run`, and `signals.EXIT_SAVED`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common, preflight, processes
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils import signals

_EXAMPLES = f"""\
{common.MODEL_FLAGS}
endpoint: --model NAME --concurrency 8 --timeout 120 (seconds)
example: eval.py --config configs/eval/slake.py --config.data.root=DIR --checkpoint PATH --workdir W
The same command resumes a stopped evaluation. For research only, never for clinical decisions."""


def _parser() -> common.Parser:
    usage = "eval.py --config FILE --workdir DIR --checkpoint PATH|--predictions FILE|--endpoint URL"
    parser = common.Parser(prog="eval.py", usage=usage,
                           description="Asks a model the questions of a data set, scores the answers, writes a report.",
                           epilog=_EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="what is asked: configs/eval/NAME.py[:ARGUMENTS]")
    parser.add_argument("--workdir", metavar="DIR", help="directory for predictions, metrics and report")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    source.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server; needs --model NAME")
    source.add_argument("--predictions", metavar="FILE", help="an existing predictions.jsonl; no model is asked")
    source.add_argument("--write_llava", metavar="FILE", help="write the questions as a training file and exit")
    parser.add_argument("--control", choices=["image"], help="ask again with exchanged images and with noise")
    parser.add_argument("--against", metavar="FILE",
                        help="compare with this predictions.jsonl: differences, intervals, p")
    parser.add_argument("--dry_run", action="store_true", help="print what would be asked and what it costs, and exit")
    for name, kind in _SERVER_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="NAME" if kind is str else "N", help=argparse.SUPPRESS)
    preflight.add_flags(parser)
    processes.add_flags(parser)
    common.add_model_flags(parser, is_listed=False)
    return parser


# Flags of a model that is loaded in this process; `_SERVER_FLAGS` are those of a model behind an endpoint.
_MODEL_FLAGS = ("vision_tower", "tokenizer", "template", "dtype", "mesh", "adapter", "quantize", "kv_cache")
_PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")
_GRACE_S = 10  # from a first signal to the end of the process
_SERVER_FLAGS = {"model": str, "concurrency": int, "timeout": float}


def program(argv: Sequence[str]) -> int:
    """Runs one evaluation; returns the exit status."""
    args, overrides = _parser().parse_with_overrides(argv)
    _check_flags(args)
    # Processes join first, so that all hear of a config that only one of them cannot read.
    if args.preflight is None and args.write_llava is None:
        processes.join(processes.asked(args) if args.checkpoint is not None else None)
    cfg = common.load_config(args.config, overrides)
    if args.write_llava is not None:
        from llavamed_jax.evaluation import questions

        print(questions.write_llava(cfg, args.write_llava))
        _say_void(args, cfg, overrides)
        return 0
    if args.checkpoint is not None:
        common.check_model_flags(args)
    if args.preflight is not None:
        status = _preflight(args, cfg)
        _say_void(args, cfg, overrides)
        return status
    endpoint = None if args.endpoint is None else _endpoint(args)
    is_new = not os.path.exists(args.workdir)
    from llavamed_jax.evaluation import results, run  # after the flags are checked: the import takes a second

    remove = (lambda: results.remove_empty(Path(args.workdir))) if is_new else lambda: None  # only an empty workdir
    with signals.undone_by(remove):
        evaluation = run.open_evaluation(cfg, args.workdir, args.against)
        print(evaluation.scorer.describe(), flush=True)
        _say_void(args, cfg, overrides)
        try:
            if endpoint is not None:
                endpoint.check(evaluation.generation)
            if args.predictions is None:
                run.check(evaluation, [args.control] if args.control else [])
            if args.dry_run:
                print(run.plan(evaluation, args.predictions, args.control is not None))
                return 0
            with results.locked(evaluation.workdir) as evaluation.place:
                metrics = _measure(evaluation, args, endpoint)
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


def _say_void(args: argparse.Namespace, cfg, overrides: Sequence[str]) -> None:
    """Warns of config keys that are not used."""
    from llavamed_jax.evaluation import void

    sources = ("preflight", "checkpoint", "endpoint", "predictions", "write_llava")
    source = next(name for name in sources if getattr(args, name) is not None)
    typed = [override.partition("=")[0] for override in overrides]
    for line in void.sentences(cfg, typed, source):
        print(f"warning: {line}", file=sys.stderr, flush=True)


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
    if args.preflight is None and (args.workdir is None) != (args.write_llava is not None):
        raise UsageError("--workdir is missing; a directory for predictions, metrics and report was expected"
                         if args.workdir is None else "--write_llava writes one file and needs no --workdir")
    if args.write_llava is not None and (args.against is not None or args.dry_run):
        raise UsageError(f"--{'dry_run' if args.dry_run else 'against'} cannot be used with --write_llava, which "
                         "evaluates nothing")
    given = [name for name in _MODEL_FLAGS if getattr(args, name)]
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


def _endpoint(args: argparse.Namespace):
    from llavamed_jax.evaluation.answering.endpoint import Endpoint  # imports the client, but not jax
    from llavamed_jax.openai_client.client import Service

    settings = {name: getattr(args, name) for name in ("concurrency", "timeout") if getattr(args, name) is not None}
    return Endpoint(Service(args.endpoint, args.model, **settings))


def _local(args: argparse.Namespace):
    from llavamed_jax.evaluation.answering.local import LocalModel, model_name

    return LocalModel(common.load_assistant(args), model_name(args.checkpoint))


def _measure(evaluation, args: argparse.Namespace, endpoint) -> dict | None:
    """Returns the metrics; None if a signal stopped the evaluation. Earlier answers are kept, a judge's too.

    Every answer is written to disk at once. If the evaluation does not stop in time, in a native call or a request, the
    process is ended without further saving.
    """
    from llavamed_jax.evaluation import results, run
    from llavamed_jax.parallel import distributed

    signals.enter(signals.Phase(lambda: _stopped(evaluation, args), signals.EXIT_SAVED, grace=_GRACE_S, raises=True,
                                last=lambda: processes.part(signals.EXIT_SAVED, None)))
    distributed.when_stopped(lambda: signals.ask("another process"))
    try:
        if args.predictions is not None:
            return run.score_file(evaluation, args.predictions)
        answerer = endpoint or _local(args)
        source = ({"endpoint": endpoint.service.url, "model": endpoint.name} if endpoint
                  else {"checkpoint": args.checkpoint})
        flags = {name: getattr(args, name) for name in _MODEL_FLAGS}
        flags |= {"query": endpoint.service.address.identity} if endpoint else {}
        return run.evaluate(evaluation, answerer, source, [args.control] if args.control else [], flags)
    except KeyboardInterrupt:
        return None
    except results.Lost:
        raise
    except (UserError, OSError) as error:
        if evaluation.has_written or isinstance(error, OSError):
            evaluation.check_place()  # raises if the workdir is gone, which is then the reason
        if isinstance(error, OSError):
            raise
        kept = evaluation.n_kept
        raise type(error)(f"{error}; {kept} answers are kept in {args.workdir}" if kept else str(error)) from error
    finally:
        distributed.when_stopped(None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `eval.py` or `llavamed-eval` and returns its exit status."""
    return common.command(lambda: program, argv, is_forked=True)


if __name__ == "__main__":
    sys.exit(main())
