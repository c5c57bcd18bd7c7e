"""Records of figures in LLaVA-Med's format, and a model that writes conversations about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.openai_server import OpenAiServer

DOMAINS = ("chest_xray", "mri", "ct_scan", "histology", "gross")


def figure(number: int, **more) -> dict:
    domain = DOMAINS[number % 5]
    return {"pair_id": f"{10_000 + number}_F{number % 7}", "fig_label": f"Figure {number % 7}",
            "fig_caption": f"Caption number {number} of a {domain} image.",
            "in_text_mention": [{"tokens": f"Finding {number} is shown.", "entities": []}] if number % 3 else None,
            "domain": {name: name == domain for name in DOMAINS}} | more


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def number_of(body: dict) -> int:
    return int(re.search(r"Caption number (\d+)", body["messages"][-1]["content"])[1])


def conversation(body: dict):
    """What a model says about a figure: mostly three good pairs; of each 20 figures some that must be dropped in part or whole."""
    number = number_of(body)
    pairs = [("What is this?", f"It is image {number} with mRNA."), ("Where is it?", "On the left."), ("How big?", "Small.")]
    kind = number % 20
    if kind == 3:
        pairs[0] = ("What is this?", "According to the figure caption, CT shows it.")
    elif kind == 5:
        return "I'm sorry, but I can't assist with that."
    elif kind == 7:
        pairs = [(question, "I'm sorry, I cannot see the image.") for question, _ in pairs]
    elif kind == 11:
        return ""
    elif kind == 13:
        pairs[1] = ("Where is <image> it?", "In the \ud83d left.")
    text = "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs)
    if kind == 17:  # the token limit cuts the last pair
        usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        choice = {"index": 0, "message": {"role": "assistant", "content": text[:-3]}, "finish_reason": "length"}
        return {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}
    return text


def server(**more) -> OpenAiServer:
    return OpenAiServer(conversation, **more)
