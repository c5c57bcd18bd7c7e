"""`eval.py --suite medical`: asks one model the questions of every medical data set under a folder.

Each set is an evaluation of its own in `DIR/SET`; `suite.json` and `suite.html` in DIR have the table of all sets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.cli import common, eval_parts, processes
from llavamed_jax.errors import UsageError, UserError, count_of, short, warn
from llavamed_jax.utils import signals
from llavamed_jax.utils.nested import flatten

_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "eval"
# Keys whose values fit one set only.
_OF_ONE_SET = ("data.name", "data.images", "data.train", "data.held_out")
_ROOT = "data.root"
_CHOSEN = {"data.split": "split", "scoring": "rule"}  # key -> what a set that does not have its value lacks


def program(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs a suite; returns the exit status.

    Args:
      args: the flags of `eval.py`, checked.
      overrides: `KEY=VALUE` of `--config.KEY=VALUE`. A key is set in each recipe that has it.
    """
    processes.join(processes.asked(args) if args.checkpoint is not None else None)
    root, rest = _root(overrides)
    if args.checkpoint is not None:
        common.check_model_flags(args)
    endpoint = eval_parts.open_endpoint(args)
    from llavamed_jax.datasets.find import find_sets  # after the flags are checked: the imports take a second
    from llavamed_jax.evaluation import results, suite

    found = find_sets(root, suite.SUITES[args.suite])
    members, not_asked = _members(args, found, rest)
    is_new, workdir = not Path(args.workdir).exists(), Path(args.workdir)
    remove = (lambda: results.remove_empty(workdir)) if is_new else lambda: None
    controls = [args.control] if args.control else []
    with signals.undone_by(remove):
        try:
            results.check_writable(workdir)
            _say_found(args, root, found, members, rest)
            suite.open_members(members, controls)
            for member in members:
                print(f"{member.name}: {member.error}" if member.error else member.what, flush=True)
            if endpoint is not None:
                for member in [member for member in members if not member.error][:1]:
                    endpoint.check(member.evaluation.generation)
            if args.dry_run:
                return _plan(members)
            with results.locked(workdir) as place:
                return _run(args, endpoint, members, place,
                            lambda: suite.record(args.suite, root, found, members, not_asked))
        finally:
            remove()


def _root(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the folder with the sets, and the other overrides; raises UsageError for keys of one set."""
    given = [override.partition("=") for override in overrides]
    roots = list(dict.fromkeys(value for key, _, value in given if key == _ROOT))
    if len(roots) > 1:
        raise UsageError(f"--config.{_ROOT} is given twice, with {short(roots[0])} and with {short(roots[1])}; one "
                         "value was expected")
    if not roots or not roots[0]:
        raise UsageError(f"{_ROOT} is empty; the folder with the data sets was expected: --config.{_ROOT}=DIR")
    for key, _, _ in given:
        if key in _OF_ONE_SET:
            raise UsageError(f"the config key {key!r} is for one data set; --config FILE was expected with it, not "
                             "--suite")
    return roots[0], [override for override in overrides if not override.startswith(f"{_ROOT}=")]


def _members(args: argparse.Namespace, found, overrides: Sequence[str]) -> tuple[list, dict[str, str]]:
    """Returns the sets to ask, each with the overrides whose keys its recipe has, and why others are not asked."""
    from llavamed_jax.datasets.find import asked_split
    from llavamed_jax.datasets.registry import SETS
    from llavamed_jax.evaluation import suite

    if not found.folders:
        signs = "; ".join(SETS[name].title for name in suite.SUITES[args.suite])
        raise UserError(f"{_ROOT} holds no data set of the suite ({count_of(found.num_folders, 'folder')} searched); "
                        f"one of these was expected: {signs}")
    given = dict(override.partition("=")[::2] for override in overrides)
    recipes = {name: common.load_config(str(_CONFIGS / f"{name}.py")) for name in found.folders}
    without = {name: why for name, cfg in recipes.items() if (why := _not_asked(name, given))}
    for _, sentence in without.values():
        warn(sentence)
    recipes = {name: cfg for name, cfg in recipes.items() if name not in without}
    if not recipes:
        keys = dict.fromkeys(key for key, _ in without.values())
        raise UsageError(f"{' and '.join(f'{key} is {given[key]!r}' for key in keys)}; none of the data sets found has "
                         f"such a {' and '.join(_CHOSEN[key] for key in keys)}")
    _check_keys(recipes, overrides)
    members = []
    for name, cfg in recipes.items():
        folder, usual = found.folders[name], cfg.data.split
        own = [override for override in overrides if override.partition("=")[0] in flatten(cfg)]
        if "data.split" not in given and (split := asked_split(name, folder, usual)) != usual:
            warn(f"{folder} has no {usual} split of {name}; its {split} split is asked instead")
            own.append(f"data.split={split}")
        cfg = common.override(cfg, [*own, f"{_ROOT}={folder}"])
        members.append(suite.Member(name, cfg, Path(args.workdir) / name, _against(args.against, name)))
    return members, {name: sentence for name, (_, sentence) in without.items()}


def _not_asked(name: str, given: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the key whose value a set does not have, and a sentence that says so; None if the set can be asked."""
    from llavamed_jax.datasets.registry import SETS
    from llavamed_jax.evaluation.scoring.programs import PROGRAMS

    split, scoring = given.get("data.split"), given.get("scoring")
    if split is not None and split not in SETS[name].splits:
        return "data.split", f"{name} has no split {split!r} and is not asked; it has {_all(SETS[name].splits)}"
    if scoring in PROGRAMS and name not in PROGRAMS[scoring].sets:
        return "scoring", (f"{name} is not asked, because scoring={scoring} has no rule for it; there is one for "
                           f"{_all(PROGRAMS[scoring].sets)}")
    if scoring in PROGRAMS and (name, split) in PROGRAMS[scoring].fails_on:
        return "scoring", f"{name} is not asked, because {scoring} itself stops with an error on the split {split!r}"
    return None


def _all(names: Sequence[str]) -> str:
    return " and ".join(names)


def _check_keys(recipes: Mapping, overrides: Sequence[str]) -> None:
    """Checks that each override has a key of one of the recipes at least; warns if not all of them have it."""
    from ml_collections import ConfigDict

    every = ConfigDict()
    for cfg in recipes.values():
        every.update(ConfigDict(cfg.to_dict()))
    every.lock()
    for key, _, value in (override.partition("=") for override in overrides):
        have = [name for name, cfg in recipes.items() if key in flatten(cfg)]
        if not have:
            try:
                common.override(every, [f"{key}={value}"])
            except UsageError as error:
                raise UsageError(f"{error}; the data sets that are asked are {', '.join(recipes)}") from None
        if len(have) < len(recipes):
            warn(f"the config key {key!r} is used only for {', '.join(have)}; the other sets have no such key")


def _against(folder: str | None, name: str) -> Path | None:
    """Returns the predictions of another suite's workdir for a set; None, with a warning, if it has none."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise UsageError(f"--against is {folder!r}; the workdir of another suite was expected with --suite")
    file = Path(folder) / name / "predictions.jsonl"
    if file.is_file():
        return file
    warn(f"{name} is not compared: {file} does not exist")
    return None


def _say_found(args: argparse.Namespace, root: str, found, members: Sequence, overrides: Sequence[str]) -> None:
    from llavamed_jax.datasets.registry import SETS
    from llavamed_jax.evaluation import suite

    asked = suite.SUITES[args.suite]
    print(f"suite {args.suite}: {len(found.folders)} of {len(asked)} data sets found in "
          f"{count_of(found.num_folders, 'folder')} under {root}", flush=True)
    for member in members:
        print(f"  {member.name}: {member.cfg.data.root}, split {member.cfg.data.split}", flush=True)
    absent = [f"{name} ({SETS[name].sign})" for name in asked if name not in found.folders]
    if absent:
        print(f"  not found: {'; '.join(absent)}", flush=True)
    for name, folder in found.repeated:
        warn(f"{folder} holds {name} too and is not asked; {found.folders[name]} is")
    for name, folder in found.others:
        warn(f"{folder} holds {SETS[name].label if name in SETS else name} and is not asked: it is not a set of the "
             f"suite (configs/eval/{name}.py asks it)")
    for sentence in found.unread:
        warn(sentence)
    void: dict[str, list[str]] = {}
    for member in members:
        typed = [override for override in overrides if override.partition("=")[0] in flatten(member.cfg)]
        for sentence in eval_parts.void_keys(args, member.cfg, typed):
            void.setdefault(sentence, []).append(member.name)
    for sentence, names in void.items():
        warn(sentence if len(names) == len(members) else f"{sentence} ({', '.join(names)})")


def _plan(members: Sequence) -> int:
    from llavamed_jax.evaluation import run, suite

    for member in members:
        if not member.error:
            print(f"{member.name}: {run.plan(member.evaluation, None, bool(member.controls))}")
    if failed := suite.failures(members):
        raise UserError(failed)
    return 0


def _run(args: argparse.Namespace, endpoint, members: Sequence, place, say) -> int:
    """Asks the sets one after another; returns the exit status.

    Args:
      args: the flags.
      endpoint: the answerer of `--endpoint`, or None.
      members: the sets, opened.
      place: the locked workdir of the suite.
      say: returns the object of `suite.json`.
    """
    from llavamed_jax.evaluation import suite
    from llavamed_jax.evaluation.report import suite_rows
    from llavamed_jax.parallel import distributed

    workdir = Path(args.workdir)
    able = [member for member in members if not member.error]
    answerer = None
    suite.write(workdir, say(), args.model or args.checkpoint)  # so that a page of earlier settings does not stay
    for number, member in enumerate(able, 1):
        print(f"{member.name} ({number} of {len(able)})", file=sys.stderr, flush=True)
        if answerer is None:
            answerer = eval_parts.measured(member.evaluation, lambda: eval_parts.answerer_of(args, endpoint),
                                           lambda: _stopped(members, workdir))
        is_stopped = answerer is None or not _ask(args, endpoint, answerer, member, members, workdir)
        place.check()
        if answerer is not None:
            suite.write(workdir, say(), answerer.name)
        if is_stopped:
            break
    if any(member.state == suite.LEFT for member in members):
        if signals.failure():
            raise UserError(f"{signals.failure()}; {_kept(members, workdir)}: run again to continue")
        print(_stopped(members, workdir), file=sys.stderr)
        return signals.EXIT_SAVED
    if table := suite_rows.table(say()["sets"]):
        print(table)
        print(f"report: {workdir / 'suite.html'}")
    if failed := suite.failures(members):
        distributed.end_alike()
        raise UserError(failed)
    return 0


def _ask(args: argparse.Namespace, endpoint, answerer, member, members: Sequence, workdir: Path) -> bool:
    """Asks and scores one set; returns False if a signal stopped it. An error of the set is kept in `member.error`."""
    from llavamed_jax.evaluation import results, run
    from llavamed_jax.openai_client.replies import ServiceError
    from llavamed_jax.parallel import distributed

    evaluation = member.evaluation
    source, flags = eval_parts.source_of(args, endpoint)
    is_new = not member.workdir.exists()
    try:
        with results.locked(member.workdir) as evaluation.place:
            member.metrics = eval_parts.measured(
                evaluation, lambda: run.evaluate(evaluation, answerer, source, member.controls, flags,
                                                 is_repeated=False), lambda: _stopped(members, workdir))
            if member.metrics is None and evaluation.has_written:
                evaluation.check_place()  # before the message that answers are kept there
    except (ServiceError, results.Lost):  # nobody answers, or the workdir is gone
        raise
    except UserError as error:
        if distributed.process_count() > 1:  # the other processes may be at another place
            raise
        member.error = str(error)
        warn(f"{member.name} failed: {error}")
    finally:
        if is_new:
            results.remove_empty(member.workdir)
    return bool(member.metrics or member.error)


def _kept(members: Sequence, workdir: Path) -> str:
    from llavamed_jax.evaluation import suite

    done = sum(member.state == suite.DONE for member in members)
    kept = sum(member.evaluation.n_kept for member in members if member.state == suite.LEFT)
    return (f"{done} of {count_of(len(members), 'set')} are finished, and {kept} answers of the others are kept in "
            f"{workdir}")


def _stopped(members: Sequence, workdir: Path) -> str:
    return f"stopped; {_kept(members, workdir)}: run again to continue"
