"""A terminal chat: `python -m llavamed_jax.chat --checkpoint PATH --image FILE`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Sequence

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, UserError, count_of, short
from llavamed_jax.images.load import split_frame
from llavamed_jax.utils import signals

HELP = ("/image FILE adds an image to the next message, /clear starts a new conversation; Ctrl-C stops an answer, an "
        "empty line or Ctrl-D ends the chat")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chat and returns its exit status; `argv` defaults to the arguments of the process."""
    return common.command(lambda: program, argv, has="the chat had begun")


def program(argv: Sequence[str]) -> None:
    """Parses the arguments, loads the model and chats until the input ends.

    Args:
      argv: the arguments, without the program's name.

    Raises:
      UserError: an argument is wrong, or the model cannot be loaded.
    """
    parser = common.Parser(prog="python -m llavamed_jax.chat",
                           description="Chat with a checkpoint about images. Research use only.",
                           epilog=common.MODEL_FLAGS)
    parser.add_argument("--checkpoint", required=True, metavar="PATH",
                        help="a checkpoint in any layout, or a run's workdir")
    common.add_model_flags(parser, is_listed=False)
    parser.add_argument("--image", action="append", default=[], metavar="FILE",
                        help="an image for the first message; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="the system text")
    parser.add_argument("--temperature", type=float, default=0.2, metavar="T", help="0 is greedy (default 0.2)")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
        if not least <= getattr(args, name) < float("inf"):  # NaN too
            raise UsageError(f"--{name} is {getattr(args, name)}; at least {least} was expected")
    for path in args.image:  # before the model is loaded, which can take minutes
        if not os.path.exists(os.path.expanduser(split_frame(path)[0])):
            raise UsageError(f"--image is {short(path)}, which does not exist; an image's file was expected")
    model = common.load_assistant(args)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and the chat continues
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        # People type UTF-8 even if the locale is ASCII; invalid bytes do not raise.
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  # input() then edits lines, wide characters included, and keeps a history
    chat = Chat(model, args)
    signals.enter(signals.Phase("ended by {name}", grace=0, raises=True))
    print(f"{model.name}, research use only, never for clinical decisions. {HELP}")
    with signals.interrupting():
        chat.run()


class Chat:
    """A terminal conversation: its messages, and the images that the next message will carry.

    Args:
      model: a `LlavaMed`.
      args: the parsed arguments `system`, `image`, `max_new_tokens`, `temperature` and `seed`.
    """

    def __init__(self, model, args: argparse.Namespace):
        self.model, self.args = model, args
        self.clear()
        # Raises now, not at the first question, if the model has no tokenizer or its template cannot hold a chat.
        model.processor.encode(model.processor.prompt([*self.messages, {"role": "user", "content": "?"}]))
        for path in args.image:
            self.add_image(path)

    def clear(self):
        """Starts a new conversation: only the system message stays."""
        self.messages: list[dict] = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.images: list[str] = []

    def run(self):
        """Reads and executes lines until an empty line or the end of the input; prints errors and continues."""
        while True:
            try:
                line = self.read()
                if not line:
                    return
                self.obey(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # pressed while a line was typed, or after the answer had stopped already
                print()
                if not sys.stdin.isatty():
                    return

    def read(self) -> str:
        """Reads the next line, stripped; returns an empty string at the end of the input."""
        try:
            line = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return ""
        return line.encode(errors="replace").decode()  # invalid UTF-8 arrives here as lone surrogates

    def obey(self, line: str):
        """Executes one line: a command that begins with `/`, or a question."""
        command, _, rest = line.partition(" ")
        if command == "/clear":
            self.clear()
            print("a new conversation")
        elif command == "/image" and rest.strip():
            self.add_image(rest.strip())
            print(f"{count_of(len(self.images), 'image')} for the next message")
        elif command.startswith("/"):
            print(HELP)
        else:
            self.ask(line)

    def add_image(self, path: str):
        """Adds an image file to the next message. Raises UserError if the file cannot be read as an image."""
        # Terminals paste a file that is dropped on them in quotes.
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        path = os.path.expanduser(path)
        self.model.processor.images([path])  # raises now, not with the question
        self.images.append(path)

    def ask(self, question: str):
        """Prints the answer as it is generated.

        If the user stops the answer before its first word, the conversation does not change.
        """
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
        except KeyboardInterrupt:  # stops the answer, not the program; the text so far stays in the conversation
            pass
        if not answer:
            print("(an empty answer)" if is_whole else "(stopped; the question was removed)", end="")
        print()
        if answer or is_whole:
            self.messages, self.images = messages + [{"role": "assistant", "content": answer}], []


if __name__ == "__main__":
    sys.exit(main())
