"""`python eval.py` and `llavamed-eval`: asks a model the questions of a data set, scores the answers, writes a report."""

import sys
from collections.abc import Sequence

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError

_EXAMPLES = """\
examples:
  python eval.py --config configs/eval/vqa_rad.py --config.data.root=DIR --checkpoint PATH --workdir runs/eval
  python eval.py --config configs/eval/vqa_rad.py --config.data.root=DIR --checkpoint PATH --workdir runs/eval --control image
  python eval.py --config configs/eval/vqa_rad.py --config.data.root=DIR --predictions FILE.jsonl --workdir runs/eval

For research use only, never for clinical decisions.
"""


def _parser() -> common.Parser:
    parser = common.Parser(prog="eval.py", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENTS]", help="what is asked: configs/eval/NAME.py")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where predictions, metrics and report go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="the model: a checkpoint in any layout, or a run's workdir")
    source.add_argument("--predictions", metavar="FILE.jsonl", help="answers that exist; no model is loaded")
    parser.add_argument("--control", choices=["image"], help="ask again with the images exchanged")
    common.add_model_flags(parser)
    return parser


# What is refused beside --predictions, where no model is loaded.
_MODEL_FLAGS = ("control", "vision_tower", "tokenizer", "template", "dtype", "mesh")


def program(argv: Sequence[str]) -> int:
    """Runs one evaluation; returns the exit status."""
    args, overrides = _parser().parse_with_overrides(argv)
    if args.predictions:
        given = [name for name in _MODEL_FLAGS if getattr(args, name)]
        if given:
            raise UsageError(f"--{given[0]} needs a model; it cannot stand beside --predictions")
    cfg = common.load_config(args.config, overrides)
    from llavamed_jax.evaluation import run  # after the flags are known to be right: it takes a second

    evaluation = run.Evaluation(cfg, args.workdir)
    print(evaluation.describe(), flush=True)
    if args.predictions:
        metrics = evaluation.score_file(args.predictions)
    else:
        model = common.load_assistant(args)
        metrics = evaluation.run(model, args.checkpoint, with_control=args.control == "image")
    print(run.summary(metrics))
    print(f"report: {evaluation.workdir / 'report.html'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `eval.py` and `llavamed-eval`."""
    return common.run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
