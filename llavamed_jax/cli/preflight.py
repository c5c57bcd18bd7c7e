"""The flags of `--preflight`, and its run, for training and evaluation."""

from __future__ import annotations

import argparse
import json

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.utils import signals


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--preflight`, and the flags for the file of its result and for the peaks of its floor."""
    parser.add_argument("--preflight", metavar="NAMES", help="compile for machines such as h100-8,v5e-64 and exit")
    parser.add_argument("--preflight_json", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--peak", metavar="LIST", help=argparse.SUPPRESS)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError if a flag of `--preflight` is wrong or given without it."""
    if args.preflight is None and args.peak is not None:
        raise UsageError("--peak changes the peaks that --preflight divides by; --preflight NAMES was expected too")
    if args.peak is not None:
        from llavamed_jax.preflight import peaks
        peaks.read(args.peak)
    if args.preflight is None and args.preflight_json is not None:
        raise UsageError("--preflight_json names the file for the result of --preflight; --preflight NAMES was "
                         "expected too")


def run(args: argparse.Namespace, config: ConfigDict, slices: int = 1, **job) -> int:
    """Compiles `config` for the machines of `--preflight`, each with the fields of `job`; returns the exit status."""
    from llavamed_jax.preflight import report
    machines = report.topologies(args.preflight, slices)
    from llavamed_jax.preflight import compile  # imports jax
    job["config"] = json.loads(config.to_json())
    job["peak"] = args.peak
    jobs = [dict(topology=machine.name, slices=machine.slices, **job) for machine in machines]
    compile.check_model(jobs[0])
    compiler = compile.Compiler()
    signals.watch()
    signals.enter(signals.Phase("error: interrupted twice"))
    return report.check(jobs, compiler, args.preflight_json, compiler.stop)
