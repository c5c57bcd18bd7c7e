"""The command `instruct`: makes conversations about figures by asking a language model behind an API.

    python -m llavamed_jax.curation instruct --figures figures.jsonl --out made --endpoint URL --model NAME

Exit statuses are those of `cli.common.run`; 75 says that a signal or the budget stopped the run with every reply saved.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.curation import instruct_folder, instruct_prompt
from llavamed_jax.curation.conversations import RULES, Tally, conversations
from llavamed_jax.curation.figure_file import Figure, FigureFile
from llavamed_jax.curation.instruct_batch import Batches
from llavamed_jax.curation.instruct_cost import Budget, Estimate, Prices, tokens_of
from llavamed_jax.curation.json_list import check_place, write_records
from llavamed_jax.errors import UsageError, UserError, count_of, some
from llavamed_jax.utils import signals, terminal
from llavamed_jax.utils.files import to_jsonl, write_json, write_text
from llavamed_jax.utils.progress import progress

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import Reply

CONVERSATIONS, DROPPED, SUMMARY = "conversations.json", "dropped.jsonl", "summary.json"
_MOST_IN_VAIN = 16  # replies without content in a row, after which asking on only costs money
_MORE = ("a higher --max_tokens, with which all but withheld ones are asked for again, or another --model in another "
         "--out was expected")
_REMEDY = {"content_filter": "withheld replies are not asked for again: another --model or --prompt, in another --out, "
                             "was expected"}
_GRACE_S = 30.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--figures", metavar="FILE", required=True, help="records with pair_id, fig_caption and in_text_mention")
    add("--out", metavar="DIR", required=True, help="replies, conversations and dropped pairs; a run resumes there")
    add("--model", metavar="NAME", help="the model's name on the server")
    add("--endpoint", metavar="URL", help="http(s)://HOST[:PORT]/v1, or Azure's address; key: OPENAI_API_KEY")
    add("--azure_version", metavar="NAME", help="Azure's api-version, if the address does not hold it")
    add("--prompt", metavar="FILE", help="system message and examples that replace this project's own")
    add("--without_mentions", action="store_true", help="send captions only, as the original does by default")
    add("--max_figures", metavar="N", type=int, help="at most N figures, round robin over the domains")
    add("--max_tokens", metavar="N", type=int, default=1024, help="the most tokens of a reply (default 1024)")
    add("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default 0)")
    add("--concurrency", metavar="N", type=int, default=8, help="requests in flight (default 8)")
    add("--timeout", metavar="S", type=float, default=120.0, help="seconds for an attempt (default 120)")
    add("--retries", metavar="N", type=int, default=8, help="attempts after the first (default 8)")
    add("--price_prompt", metavar="X", type=float, help="US dollars for a million prompt tokens")
    add("--price_answer", metavar="X", type=float, help="US dollars for a million reply tokens")
    add("--budget", metavar="X", type=float, help="US dollars; the run stops before it costs more, exit status 75")
    add("--dry_run", action="store_true", help="print what it will cost; send and write nothing")
    add("--batch", choices=("write", "read"), help="write files for a batch service, or read its results")
    add("--batch_results", metavar="FILE", nargs="+", help="with --batch read: files of results and of errors")
    add("--results", action="store_true", help="clean the replies that the records have under `result`; ask nothing")
    add("--rules", choices=RULES, default="ours", help="rules that clean the replies: ours (default) or the original's")
    add("--seed", metavar="N", type=int, default=0, help="draws the place of the first image (default 0)")


def run(args: argparse.Namespace) -> int | None:
    """Runs the command; returns its exit status.

    Raises:
      UsageError: a flag is wrong, or the folder belongs to other settings.
      UserError: a file cannot be read or written, the server cannot be asked, or figures were not answered.
    """
    prices = _check(args)
    prompt = instruct_prompt.read_instruct_prompt(Path(args.prompt) if args.prompt else None)
    service = None
    if args.batch is None and not args.results:
        from llavamed_jax.openai_client.client import Service  # imports openai, which takes a second

        service = Service(args.endpoint, args.model, concurrency=args.concurrency, timeout=args.timeout,
                          retries=args.retries, azure_version=args.azure_version)
    figures, out = FigureFile(Path(args.figures)), Path(args.out)
    print(figures.describe(), flush=True)
    if not figures.places():
        raise UserError(f"{figures.path} has no usable figure: {figures.describe().partition('; ')[2]}")
    if args.results:
        check_place("--out", out / CONVERSATIONS)
        return _Run(args, figures, prompt, prices, None, None).finish(out, _result)
    settings = {"model": args.model, "prompt": prompt.wording, "mentions": not args.without_mentions,
                "max_tokens": args.max_tokens, "temperature": args.temperature}
    with instruct_folder.opened(out, settings, not args.dry_run) as kept:
        made = _Run(args, figures, prompt, prices, kept, Batches(out, settings, kept.over))
        estimate = made.estimate()
        print(estimate, flush=True)
        if args.dry_run:
            return None
        if args.batch == "write":
            return made.write_batch()
        if args.batch == "read":
            made.read_batch()
        else:
            made.ask(service, estimate)
        return made.finish(out, lambda figure: kept.replies.get(made.key(figure)))


def _result(figure: Figure) -> Reply | None:
    from llavamed_jax.openai_client.replies import Reply  # imports openai, which takes a second

    return Reply(figure.result, "stop") if figure.result is not None else None


def _check(args: argparse.Namespace) -> Prices:
    at_least = {"--max_figures": 1, "--max_tokens": 1, "--temperature": 0, "--price_prompt": 0, "--price_answer": 0,
                "--budget": 0}
    for flag, least in at_least.items():
        value = getattr(args, flag[2:])
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"{flag} is {value}; at least {least} was expected")
    if args.results:
        given = [flag for flag in ("endpoint", "model", "batch", "budget") if getattr(args, flag) is not None]
        if given or args.dry_run:
            raise UsageError(f"--results asks nothing, so --{(given or ['dry_run'])[0]} has no effect; leave it out")
        return Prices(args.price_prompt, args.price_answer)
    if args.model is None:
        raise UsageError("--model is missing; the name under which the server offers the model was expected")
    if args.batch is None and args.endpoint is None:
        raise UsageError("--endpoint is missing; the server's address was expected, or --batch write")
    if args.batch is not None and args.endpoint is not None:
        raise UsageError("--endpoint and --batch are both given; one of them was expected, because a batch is a file")
    if (args.batch == "read") != (args.batch_results is not None):
        raise UsageError("--batch read and --batch_results FILES belong together; both were expected")
    prices = Prices(args.price_prompt, args.price_answer)
    if args.budget is not None and not prices.is_known:
        raise UsageError("--budget needs --price_prompt and --price_answer, in US dollars for a million tokens")
    if args.budget is not None and args.batch == "read":
        raise UsageError("--budget has no effect with --batch read, whose replies are paid for; leave it out")
    return prices


class _Run:
    """One start of the command."""

    def __init__(self, args: argparse.Namespace, figures: FigureFile, prompt: instruct_prompt.InstructPrompt,
                 prices: Prices, kept: instruct_folder.Folder | None, batches: Batches | None):
        self.args, self.figures, self.prompt, self.prices = args, figures, prompt, prices
        self.folder, self.replies, self.batches = kept, kept and kept.replies, batches
        self.budget = Budget(args.budget, prices, args.max_tokens)
        self.failed: dict[str, UserError] = {}
        self.ended: UserError | None = None  # why no figure can be asked about any more
        self.why_stopped = self.why_useless = ""
        self._in_vain = 0  # replies without content in a row

    def chosen(self) -> Iterator[Figure]:
        """Yields the figures of this run, in the order in which they are asked about."""
        return self.figures.round_robin(self.args.max_figures)

    def messages(self, figure: Figure) -> list[dict]:
        """Returns the request for a figure."""
        return self.prompt.messages(figure, not self.args.without_mentions)

    def key(self, figure: Figure) -> str:
        """Returns the key under which the reply about a figure is kept: that of what is asked about it."""
        return self.prompt.key(figure, not self.args.without_mentions)

    def left(self) -> Iterator[Figure]:
        """Yields the figures that have no reply and are in no batch."""
        return (figure for figure in self.chosen()
                if (key := self.key(figure)) not in self.replies and not self.batches.is_pending(key))

    def estimate(self) -> Estimate:
        """Estimates what the rest costs, and adds the cost of all kept replies, batches and losses to the budget."""
        found = Estimate(max_tokens=self.args.max_tokens, prices=self.prices)
        others, tokens = {*self.replies.keys(), *self.batches.keys()}, 0
        for figure in self.chosen():
            key, tokens = self.key(figure), tokens_of(self.messages(figure))
            others.discard(key)
            if not self._pay(key, tokens, found):
                found.requests += 1
                found.prompt_tokens += tokens
        for _, prompt, answer in self.folder.lost:
            self.budget.pay_tokens(prompt, answer)
        found.lost = len(self.folder.lost)
        before = found.kept, found.pending
        for key in sorted(others):  # of figures that have changed since, or that this run leaves out
            self._pay(key, tokens, found)
        found.others = found.kept + found.pending - sum(before)
        found.kept, found.pending = before
        return found

    def _pay(self, key: str, tokens: int, found: Estimate) -> bool:
        """Counts a question as paid for if it has a reply or is in a batch; returns whether it is."""
        reply = self.replies.get(key)
        if reply is not None:
            found.kept += 1
            self.budget.pay(reply, tokens)
        elif self.batches.is_pending(key):
            found.pending += 1
            self.budget.pay_pending(tokens)
        return reply is not None or self.batches.is_pending(key)

    def ask(self, service, estimate: Estimate) -> None:
        """Asks about the figures that are left; stores each reply before the next request."""
        from llavamed_jax.openai_client.replies import ServiceError  # imports openai, which takes a second

        total = estimate.requests + estimate.kept
        signals.enter(signals.Phase(lambda: self.kept("stopped"), signals.EXIT_SAVED, grace=_GRACE_S, raises=True))
        advance, close = progress(total, estimate.kept, "figures") if estimate.requests else (lambda _: None, None)
        try:
            while self._wave(service, advance):
                pass
        except KeyboardInterrupt as error:
            if signals.failure():
                raise UserError(self.kept(str(error))) from None
            self.why_stopped = "stopped"
        except UserError as error:
            sentence = type(error)(self.kept(str(error)) if len(self.replies) else str(error))
            if not isinstance(error, ServiceError) or not len(self.replies):
                raise sentence from error
            self.ended = sentence  # the replies that are paid for become conversations first
        finally:
            if close is not None:
                close()
            signals.enter(signals.Phase(lambda: self.kept("stopped"), signals.EXIT_SAVED, grace=_GRACE_S))

    def _wave(self, service, advance) -> bool:
        """Asks until nothing is left or the budget allows no more; returns whether another wave may go on."""
        from llavamed_jax.openai_client.replies import UnpaidError  # imports openai, which takes a second

        asked: dict[int, Figure] = {}
        is_short = False

        def requests() -> Iterator[tuple[int, list[dict]]]:
            nonlocal is_short
            for number, figure in enumerate(each for each in self.left() if each.pair_id not in self.failed):
                messages = self.messages(figure)
                if not self.budget.may_send(figure.pair_id, tokens_of(messages)):
                    is_short = True
                    return
                asked[number] = figure
                yield number, messages

        def lost(number: int, counts: tuple[int, int] | None) -> bool:
            figure = asked[number]
            tokens, is_room = self.budget.lose(figure.pair_id, counts)
            self.folder.lose(self.key(figure), *tokens)
            return is_room

        found = service.each(requests(), max_tokens=self.args.max_tokens, temperature=self.args.temperature, lost=lost)
        with contextlib.closing(found):
            for number, reply in found:
                figure = asked.pop(number)
                name = figure.pair_id
                if isinstance(reply, UserError):
                    why = (f"; the budget of {self.budget.dollars:,.2f} US dollars allows no further attempt"
                           if isinstance(reply, UnpaidError) else "")
                    self.failed[name] = UserError(f"{reply}{why}")
                    self.budget.free(name)
                else:
                    self.replies.add(self.key(figure), reply)
                    self.budget.settle(name, reply)
                    self._in_vain = self._in_vain + 1 if instruct_folder.has_no_content(reply) else 0
                advance(1)
                if self._in_vain == _MOST_IN_VAIN:
                    self.why_useless = (f"{_MOST_IN_VAIN} replies in a row have no content (finish_reason of the last: "
                                        f"{reply.finish_reason}); {_REMEDY.get(reply.finish_reason, _MORE)}")
                    return False
        if not is_short:
            return False
        next_figure = next((each for each in self.left() if each.pair_id not in self.failed), None)
        if next_figure is None:
            return False
        # Replies are shorter than the longest that was reserved for them, so there may be room for more.
        if self.budget.may_send(next_figure.pair_id, tokens_of(self.messages(next_figure))):
            self.budget.free(next_figure.pair_id)
            return True
        self.why_stopped = f"the budget of {self.budget.dollars:,.2f} US dollars allows no further request"
        return False

    def kept(self, why: str) -> str:
        """Returns the sentence of a run that ends early."""
        kept = count_of(len(self.replies), "reply is", "replies are")
        return f"{why}; {kept} kept in {self.args.out}: run again to continue"

    def write_batch(self) -> int | None:
        """Writes request files for the figures that are left."""
        def affordable() -> Iterator[tuple[str, Figure]]:
            for figure in self.left():
                if not self.budget.may_send(figure.pair_id, tokens_of(self.messages(figure))):
                    self.why_stopped = f"the budget of {self.budget.dollars:,.2f} US dollars allows no further request"
                    return
                yield self.key(figure), figure

        # All of OpenAI's chat models and vLLM know this name of the limit; the newest models refuse the older one.
        body = lambda figure: {"model": self.args.model, "messages": self.messages(figure),
                               "max_completion_tokens": self.args.max_tokens, "temperature": self.args.temperature}
        files = self.batches.write(affordable(), body)
        for file, count in files:
            print(f"{file}: {count_of(count, 'request')}")
        print("run the files with a batch service or `vllm run-batch`, then --batch read --batch_results FILES"
              if files else "nothing is left to be written")
        if self.why_stopped:
            print(self.why_stopped, file=sys.stderr)
            return signals.EXIT_SAVED
        return None

    def read_batch(self) -> None:
        """Reads the results of batches into the replies."""
        outcome = self.batches.read(map(Path, self.args.batch_results), self.folder)
        print("results: " + (", ".join(f"{count:,} {name}" for name, count in outcome.items()) or "none"), flush=True)

    def finish(self, out: Path, reply_of: Callable[[Figure], Reply | None]) -> int | None:
        """Writes the conversations, what was dropped, and the counts; returns the exit status."""
        tally = Tally()
        records = conversations(self.chosen(), reply_of, self.args.rules, self.args.seed, tally)
        write_records(out / CONVERSATIONS, records)
        write_text(out / DROPPED, to_jsonl(tally.lost))
        tokens = tally.prompt_tokens, tally.completion_tokens
        dollars = self.prices.dollars(*tokens) if self.prices.is_known else None
        try:
            write_json(out / SUMMARY, {
                "figures": sum(map(len, self.figures.places().values())), "figures_not_used": self.figures.skipped,
                "replies": tally.figures, "conversations": tally.records, "pairs": tally.pairs,
                "dropped_pairs": tally.dropped_pairs, "replies_without_a_conversation": tally.dropped_figures,
                "images_lost": tally.images_lost, "not_answered": len(self.failed), "prompt_tokens": tokens[0],
                "completion_tokens": tokens[1], "dollars": dollars,
                "paid_without_a_reply": len(self.folder.lost) if self.folder is not None else 0,
                "rules": self.args.rules, "seed": self.args.seed,
            })  # fmt: skip
        except OSError as error:
            raise UserError(f"{out / SUMMARY} cannot be written: {error.strerror or error}") from error
        print(tally.summary())
        if not self.args.results:
            cost = f", {dollars:,.4f} US dollars" if dollars is not None else ""
            print(f"{tokens[0]:,} prompt tokens and {tokens[1]:,} reply tokens{cost}, as the server counted them")
        print(f"written: {out / CONVERSATIONS}, {out / DROPPED}, {out / SUMMARY}", flush=True)
        if self.ended is not None:
            raise self.ended
        if self.failed:
            names = some([terminal.sentence(name) for name in self.failed])
            first = next(iter(self.failed.values()))
            raise UserError(self.kept(f"{count_of(len(self.failed), 'figure was', 'figures were')} not answered "
                                      f"({names}): {first}"))
        if self.why_useless:
            raise UserError(self.kept(self.why_useless))
        if self.why_stopped:
            print(self.kept(self.why_stopped), file=sys.stderr)
            return signals.EXIT_SAVED
        return None
