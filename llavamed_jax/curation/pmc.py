"""`curation pmc`: images of articles from PubMed Central, by LLaVA-Med's list, another list, or the inventory."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llavamed_jax.curation import articles, bucket, inventory, kept, store
from llavamed_jax.curation.downloads import Client
from llavamed_jax.curation.fetch import Fetch, Settings
from llavamed_jax.curation.mirror import Mirror
from llavamed_jax.curation.resolved import Resolver
from llavamed_jax.curation.wanted import Rejected, Wanted, read_list
from llavamed_jax.errors import UsageError, UserError, count_of, short
from llavamed_jax.utils import signals
from llavamed_jax.utils.files import write_text
from llavamed_jax.utils.paths import is_address

_GRACE_S = 60.0  # for the files that are on their way when a signal comes
_SELECTED = "selected.txt"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--list", metavar="FILE", help="llava_med_image_urls.jsonl, or lines PMCn/FILE; a line PMCn asks for the "
        "article's XML and all of its images")
    add("--since", metavar="DATE", type=_date, help="in place of --list: articles that changed since this day "
        "(YYYY-MM-DD), from the bucket's inventory")
    add("--until", metavar="DATE", type=_date, help="the last day for --since")
    add("--limit", metavar="N", type=int, help="at most N articles for --since, the latest change first; "
        "with --licence, N that it allows")
    add("--out", metavar="DIR", required=True, help="where images, manifest and the list of missing files go")
    add("--licence", metavar="GROUPS", default="none", help="commercial, non-commercial (NLM's two groups), or both "
        "with a comma; none (the default) takes every licence")
    add("--mirror", metavar="URL", action="append", default=[], help="a folder or an address that fills gaps, with "
        "single files or the old packages; {pmcid}, {file}, {name} and {archive} may stand in an address; may be "
        "repeated")
    add("--training", metavar="FILE", action="append", default=[], help="a LLaVA JSON file that is written to DIR "
        "with the records whose images exist; may be repeated")
    add("--base_url", metavar="URL", default=bucket.BASE_URL, help=f"the bucket (default {bucket.BASE_URL})")
    add("--concurrency", metavar="N", type=int, default=16, help="requests at a time (default 16)")
    add("--rate", metavar="N", type=float, default=100.0, help="requests a second; 0 for no limit (default 100)")
    add("--retries", metavar="N", type=int, default=5, help="attempts after the first (default 5)")
    add("--timeout", metavar="S", type=float, default=120.0, help="seconds for an attempt (default 120)")
    add("--retry_missing", action="store_true", help="tries again what an earlier run could not get")


def run(args: argparse.Namespace) -> int | None:
    """Fetches, filters, and prints the counts; returns the exit status."""
    _check(args)
    sentence = f"ended by {{name}}; what was fetched is kept in {args.out}, run the same command to go on"
    signals.enter(signals.Phase(sentence, signals.EXIT_SAVED, grace=_GRACE_S, raises=True,
                                note="finishing the files on their way"))
    out = Path(args.out)
    client = Client(args.concurrency, args.rate, args.retries, args.timeout)
    folder = store.Store(out, {"licence": _groups_text(args.licence)})
    fetch = Fetch(bucket.Bucket(client, args.base_url), folder, [Mirror(place, client, out) for place in args.mirror],
                  Settings(bucket.licences_of(args.licence), args.concurrency, args.retry_missing))
    try:
        fetch.run(_rows(args, out, client, fetch.resolver))
        _report(fetch, client, out)
        _filter(args, out, fetch)
    except KeyboardInterrupt as error:
        print(f"{error}; {_count(fetch)} in {out}; run the same command to go on", file=sys.stderr)
        return signals.EXIT_SAVED
    except UserError as error:
        if not fetch.had:
            raise
        raise type(error)(f"{error}; {_count(fetch)} in {out}; run the same command to go on") from error
    finally:
        folder.close()
        client.close()
    for reason, who in ((articles.NOT_REACHED, "server"), (articles.MIRROR_FAILED, "mirror")):
        failed = [why for why in fetch.missing.values() if why.reason == reason]
        if failed:
            raise UserError(f"the {who} failed for {count_of(len(failed), 'file')}, first with {failed[0].detail}; run "
                            "the same command to try again")
    return None


def _count(fetch: Fetch) -> str:
    return f"{count_of(len(fetch.had), 'file is', 'files are')}"


def _check(args: argparse.Namespace) -> None:
    if (args.list is None) == (args.since is None):
        raise UsageError("one of --list FILE and --since DATE was expected")
    if args.since is None and (args.until is not None or args.limit is not None):
        raise UsageError(f"--{'until' if args.until is not None else 'limit'} can be used only with --since")
    if args.until is not None and args.until < args.since:
        raise UsageError(f"--until is {args.until}, which is before --since {args.since}")
    for name, value, is_right, wanted in (
        ("concurrency", args.concurrency, 1 <= args.concurrency <= 256, "1 to 256"),
        ("rate", args.rate, 0 <= args.rate < float("inf"), "at least 0"),
        ("retries", args.retries, 0 <= args.retries <= 100, "0 to 100"),
        ("timeout", args.timeout, 0 < args.timeout < float("inf"), "more than 0 seconds"),
        ("limit", args.limit, args.limit is None or args.limit >= 1, "at least 1"),
    ):  # fmt: skip
        if not is_right:
            raise UsageError(f"--{name} is {value}; {wanted} was expected")
    if not is_address(args.base_url):
        raise UsageError(f"--base_url is {short(args.base_url)}; an address such as {bucket.BASE_URL} was expected")
    for flag, files in (("list", [args.list] if args.list else []), ("training", args.training)):
        for file in files:
            if not Path(file).exists():
                raise UsageError(f"--{flag} is {short(file)}, which does not exist; a file was expected")
    names = Counter(Path(file).name for file in args.training)
    twice = [name for name, count in names.items() if count > 1 or name in (
        store.MANIFEST, store.MISSING, store.RESOLVED, store.SETTINGS, store.MIRRORS)]
    if twice:
        raise UsageError(f"--training names {short(twice[0])}, which --out already uses for another file; another name "
                         "was expected")
    bucket.licences_of(args.licence)


def _groups_text(text: str) -> str:
    return ",".join(sorted(set(text.split(","))))


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; YYYY-MM-DD was expected") from None


def _rows(args: argparse.Namespace, out: Path, client: Client, resolver: Resolver) -> Iterable[Wanted | Rejected]:
    """Returns the rows of the list, or those that the inventory gives; a choice of some is written for later runs."""
    if args.list is not None:
        return read_list(Path(args.list))
    chosen, first = out / _SELECTED, f"# since {args.since} until {args.until} limit {args.limit}"
    lines = chosen.read_text(encoding="utf-8").splitlines() if chosen.is_file() else []
    if len(lines) < 2:
        found, day = inventory.changed(bucket.Bucket(client, args.base_url), args.since, args.until)
        print(f"inventory of {day}: {len(found):,} article{'s' * (len(found) != 1)} changed in this span", flush=True)
        if args.limit is not None and args.licence != "none":
            found = resolver.choose(found, args.limit, args.concurrency)
            print(f"--licence {args.licence}: {count_of(len(found), 'article')} chosen", flush=True)
        lines = [first, *found[:args.limit]]
        if found:
            write_text(chosen, "\n".join(lines) + "\n")
        else:
            print("nothing is selected; the same command reads the inventory again", flush=True)
    elif lines[0] != first:
        raise UsageError(f"{chosen} holds another choice ({short(lines[0])}); the same --since, --until and --limit, "
                         "or another --out was expected")
    else:
        print(f"selection of {chosen}: {len(lines) - 1:,} article{'s' * (len(lines) != 2)}; remove the file to choose "
              "anew", flush=True)
    return (Wanted(line, None, articles.WHOLE, "") for line in lines[1:])


def _report(fetch: Fetch, client: Client, out: Path) -> None:
    """Prints what there is and what is missing, by reason."""
    new = f", {fetch.fetched:,} of them new" if fetch.fetched != len(fetch.had) else ""
    print(f"{out}: {len(fetch.had):,} files, {sum(fetch.had.values()) / 1e6:,.1f} MB{new}; "
          f"{len(fetch.missing):,} missing")
    for reason, count in Counter(why.reason for why in fetch.missing.values()).most_common():
        print(f"  {reason}: {count:,}")
    if fetch.repeated:
        print(f"  {count_of(fetch.repeated, 'row repeats an earlier one', 'rows repeat earlier ones')}")
    again = ", ".join(f"{reason} {count:,}" for reason, count in client.again.most_common())
    print(f"{client.requests:,} requests, {client.bytes / 1e6:,.1f} MB received"
          + (f"; again: {again}" if again else ""))


def _filter(args: argparse.Namespace, out: Path, fetch: Fetch) -> None:
    images = {path.removeprefix("images/") for path in fetch.had}
    for file in args.training:
        counts = kept.filter_records(Path(file), out / Path(file).name, images)
        print(f"{out / Path(file).name}: {counts.kept:,} of {counts.records:,} records; {counts.without_image:,} "
              f"without their image" + (f"; {counts.malformed:,} malformed" if counts.malformed else ""))
