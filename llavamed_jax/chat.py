"""A terminal chat: `python -m llavamed_jax.chat --checkpoint PATH --image FILE`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Sequence

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.images.load import split_frame
from llavamed_jax.utils import signals

HELP = ("/image FILE adds an image to the next message, /clear starts anew; Ctrl-C stops an answer, an empty line or Ctrl-D "
        "ends the chat")


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(lambda: program, argv, has="the chat had begun")


def program(argv: Sequence[str]) -> None:
    parser = common.Parser(prog="python -m llavamed_jax.chat", description="Chat with a checkpoint about images. Research use only.")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    common.add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image for the first message; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument("--temperature", type=float, default=0.2, metavar="T", help="0 is greedy (default 0.2)")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
        if not least <= getattr(args, name) < float("inf"):  # nan too
            raise UsageError(f"--{name} is {getattr(args, name)}; at least {least} was expected")
    for path in args.image:  # now, and not when minutes have gone by with loading
        if not os.path.exists(os.path.expanduser(split_frame(path)[0])):
            raise UsageError(f"--image is {short(path)}, which does not exist; an image's file was expected")
    model = common.load_assistant(args)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and the chat goes on
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        # Where the locale knows ASCII alone, people type UTF-8 nonetheless; bytes that are no characters are no error.
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # input() then edits lines, wide characters too, and remembers them
    chat = Chat(model, args)
    signals.enter(signals.Phase("ended by {name}", grace=0, raises=True))
    print(f"{model.name}, research use only, never for clinical decisions. {HELP}")
    with signals.interrupting():
        chat.run()


class Chat:
    """Messages of one conversation, and the images that wait for the next one."""

    def __init__(self, model, args: argparse.Namespace):
        self.model, self.args = model, args
        self.clear()
        # A model without a tokenizer, or with a template that holds no chat, is said now and not with the first question.
        model.processor.encode(model.processor.prompt([*self.messages, {"role": "user", "content": "?"}]))
        for path in args.image:
            self.add_image(path)

    def clear(self):
        self.messages: list[dict] = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.images: list[str] = []

    def run(self):
        while True:
            try:
                line = self.read()
                if not line:
                    return
                self.obey(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # to throw a line away, or once more than an answer needed
                print()
                if not sys.stdin.isatty():
                    return

    def read(self) -> str:
        """The next line, stripped; empty at the end."""
        try:
            line = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return ""
        return line.encode(errors="replace").decode()  # bytes that are no UTF-8 reach here as half characters

    def obey(self, line: str):
        command, _, rest = line.partition(" ")
        if command == "/clear":
            self.clear()
            print("a new conversation")
        elif command == "/image" and rest.strip():
            self.add_image(rest.strip())
            print(f"{len(self.images)} image{'s' * (len(self.images) > 1)} for the next message")
        elif command.startswith("/"):
            print(HELP)
        else:
            self.ask(line)

    def add_image(self, path: str):
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":  # as a terminal pastes a file that was dropped on it
            path = path[1:-1]
        path = os.path.expanduser(path)
        self.model.processor.images([path])  # a file that cannot be read is said now and not with the question
        self.images.append(path)

    def ask(self, question: str):
        """Prints the answer while it is made. Stopped before its first word, it leaves the conversation as it was."""
        content = [{"type": "image", "image": path} for path in self.images] + [{"type": "text", "text": question}]
        messages = self.messages + [{"role": "user", "content": content}]
        answer, is_whole = "", False
        signals.forget()
        try:
            for piece in self.model.stream(messages, max_new_tokens=self.args.max_new_tokens,
                                           temperature=self.args.temperature, seed=self.args.seed):
                answer += piece
                print(piece, end="", flush=True)
                signals.check()
            is_whole = True
        except KeyboardInterrupt:  # stops the answer, not the program; what was said stays said
            pass
        if not answer:
            print("(an empty answer)" if is_whole else "(stopped; the question is taken back)", end="")
        print()
        if answer or is_whole:
            self.messages, self.images = messages + [{"role": "assistant", "content": answer}], []


if __name__ == "__main__":
    sys.exit(main())
