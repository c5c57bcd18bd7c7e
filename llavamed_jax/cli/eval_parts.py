"""What the evaluation of one set and that of a suite share: who answers, and how a signal stops them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from llavamed_jax.cli import common, processes
from llavamed_jax.errors import UserError, warn
from llavamed_jax.utils import signals

T = TypeVar("T")

# Flags of a model that is loaded in this process.
MODEL_FLAGS = ("vision_tower", "tokenizer", "template", "dtype", "mesh", "adapter", "quantize", "kv_cache")
_GRACE_S = 10  # from a first signal to the end of the process


def void_keys(args: argparse.Namespace, cfg, overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for each config key that is not used."""
    from llavamed_jax.evaluation import void

    sources = ("preflight", "checkpoint", "endpoint", "predictions", "write_llava")
    source = next(name for name in sources if getattr(args, name) is not None)
    typed = [override.partition("=")[0] for override in overrides]
    return void.sentences(cfg, typed, source)


def say_void(args: argparse.Namespace, cfg, overrides: Sequence[str]) -> None:
    """Warns of config keys that are not used."""
    for sentence in void_keys(args, cfg, overrides):
        warn(sentence)


def open_endpoint(args: argparse.Namespace):
    """Returns the answerer of `--endpoint`; None without that flag."""
    if args.endpoint is None:
        return None
    from llavamed_jax.evaluation.answering.endpoint import Endpoint  # imports the client, but not jax
    from llavamed_jax.openai_client.client import Service

    settings = {name: getattr(args, name) for name in ("concurrency", "timeout") if getattr(args, name) is not None}
    return Endpoint(Service(args.endpoint, args.model, **settings))


def local(args: argparse.Namespace):
    """Loads the model of `--checkpoint`, which answers."""
    from llavamed_jax.evaluation.answering.local import LocalModel, model_name

    return LocalModel(common.load_assistant(args), model_name(args.checkpoint))


def answerer_of(args: argparse.Namespace, endpoint):
    """Returns who answers: `endpoint`, or the model of `--checkpoint`, which is loaded."""
    return endpoint or local(args)


def source_of(args: argparse.Namespace, endpoint) -> tuple[dict, dict]:
    """Returns who answers, as `run.evaluate` takes it, and the flags that the answers depend on."""
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    if endpoint is None:
        return {"checkpoint": args.checkpoint}, flags
    service = endpoint.service
    return {"endpoint": service.url, "model": endpoint.name}, flags | {"query": service.address.identity}


def measured(evaluation, make: Callable[[], T], stopped: Callable[[], str]) -> T | None:
    """Returns the result of `make`; None if a signal stopped it. Earlier answers are kept, a judge's too.

    Every answer is written to disk at once. If the evaluation does not stop in time, in a native call or a request, the
    process is ended without further saving.

    Args:
      evaluation: the evaluation that `make` runs.
      make: asks and scores.
      stopped: returns the sentence that a process prints when it is ended.
    """
    from llavamed_jax.evaluation import results
    from llavamed_jax.parallel import distributed

    signals.enter(signals.Phase(stopped, signals.EXIT_SAVED, grace=_GRACE_S, raises=True,
                                last=lambda: processes.part(signals.EXIT_SAVED, None)))
    distributed.when_stopped(lambda: signals.ask("another process"))
    try:
        return make()
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
        where = f"; {kept} answers are kept in {evaluation.workdir}" if kept else ""
        raise type(error)(f"{error}{where}") from error
    finally:
        distributed.when_stopped(None)
