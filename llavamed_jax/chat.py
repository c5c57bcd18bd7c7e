"""A terminal chat: `python -m llavamed_jax.chat --checkpoint PATH --image FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, UserError

HELP = "/image FILE adds an image to the next message, /clear starts anew, an empty line or Ctrl-D ends"


def main(argv: Sequence[str] | None = None) -> int:
    return common.run(program, argv)


def program(argv: Sequence[str]) -> None:
    parser = common.Parser(prog="python -m llavamed_jax.chat", description="Chat with a checkpoint about images. Research use only.")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint in any layout, or a run's workdir")
    common.add_model_flags(parser)
    parser.add_argument("--image", metavar="FILE", help="an image for the first message")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default 0.2)")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
        if not getattr(args, name) >= least:  # nan too
            raise UsageError(f"--{name} is {getattr(args, name)}; at least {least} was expected")
    model = common.load_assistant(args)
    print(f"{model.name}, research use only, never for clinical decisions. {HELP}")
    Chat(model, args).run()


class Chat:
    """Messages of one conversation, and the images that wait for the next one."""

    def __init__(self, model, args: argparse.Namespace):
        self.model, self.args = model, args
        self.messages: list[dict] = []
        self.images: list[str] = []
        if args.image:
            self.add_image(args.image)

    def run(self):
        for line in iter(self.read, ""):
            command, _, rest = line.partition(" ")
            try:
                if command == "/clear":
                    self.messages, self.images = [], []
                elif command == "/image" and rest:
                    self.add_image(rest.strip())
                elif command.startswith("/"):
                    print(HELP)
                else:
                    self.ask(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def read(self) -> str:
        try:
            return input("you: " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def add_image(self, path: str):
        self.model.processor.images([path])  # a file that cannot be read is said now and not with the question
        self.images.append(path)

    def ask(self, question: str):
        content = [{"type": "image", "image": path} for path in self.images] + [{"type": "text", "text": question}]
        messages = self.messages + [{"role": "user", "content": content}]
        answer = ""
        try:
            for piece in self.model.stream(messages, max_new_tokens=self.args.max_new_tokens,
                                           temperature=self.args.temperature, seed=self.args.seed):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # stops the answer, not the program; what was said stays said
            pass
        print()
        self.messages, self.images = messages + [{"role": "assistant", "content": answer}], []


if __name__ == "__main__":
    sys.exit(main())
