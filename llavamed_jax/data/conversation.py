"""Prompt templates as data, one renderer a style, and the label masks of training text (spec 3.4 to 3.7).

A template is a row of `TEMPLATES`, named `ORIGIN:NAME`: `v1.5` for LLaVA-Med v1.5's code, `up` for upstream LLaVA's. The
two differ where the same name gives other text (`is_stripped`). A conversation is a list of turns, texts in alternation
beginning with the user's; a last turn of None leaves the assistant's place open. `<image>` in a text marks an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llavamed_jax.config import IGNORE
from llavamed_jax.errors import UserError

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Template:
    """How turns become one string; fields as in the originals' `Conversation`."""

    name: str
    style: str
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str | None
    is_stripped: bool = False  # v1.5's TWO strips messages and result, and adds a blank after `sep2` (quirk Q5)

    @property
    def renderer(self) -> Callable[["Template", Sequence[str | None]], str]:
        return _RENDERERS[self.style]


_POLITE = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions.")
_ROWS = [  # origin, name, style, system, roles, sep, sep2, is_stripped
    ("v1.5", "vicuna_v1", "TWO", _POLITE, ("USER", "ASSISTANT"), " ", "</s>", True),
    ("up", "vicuna_v1", "TWO", _POLITE, ("USER", "ASSISTANT"), " ", "</s>", False),
    *((origin, "mistral_instruct", "LLAMA_2", "", ("USER", "ASSISTANT"), "", "</s>", False) for origin in ("v1.5", "up")),
    *((origin, "plain", "PLAIN", "", ("", ""), "\n", None, False) for origin in ("v1.5", "up")),
]
TEMPLATES = {f"{origin}:{row[0]}": Template(f"{origin}:{row[0]}", *row[1:]) for origin, *row in _ROWS}
_ALIASES = {"v1": "vicuna_v1"}  # both origins register the template under either name


def get_template(name: str) -> Template:
    """The template `ORIGIN:NAME`; a bare name means v1.5's, else upstream's. Raises UserError with the names there are."""
    origin, _, bare = name.rpartition(":")
    bare = _ALIASES.get(bare, bare)
    for candidate in (origin,) if origin else ("v1.5", "up"):
        if f"{candidate}:{bare}" in TEMPLATES:
            return TEMPLATES[f"{candidate}:{bare}"]
    raise UserError(f"the template {name!r} does not exist; one of {', '.join(TEMPLATES)} was expected")


def render(template: Template, turns: Sequence[str | None], system: str | None = None) -> str:
    """The prompt of `turns`; `system` replaces the template's own.

    Raises:
      UserError: no turns, or a template that cannot hold them.
    """
    if not turns:
        raise UserError("a prompt of no turns was asked for; at least one was expected")
    if system is not None:
        template = replace(template, system=system)
    return template.renderer(template, turns)


def _two(template: Template, turns) -> str:
    after_answer = template.sep2 + " " if template.is_stripped else template.sep2
    separators = (template.sep, after_answer)
    text = template.system + template.sep
    for i, turn in enumerate(turns):
        role = template.roles[i % 2]
        if not turn:
            text += role + ":"
            continue
        turn = turn.strip() if template.is_stripped else turn
        text += role + ": " + turn + separators[i % 2]
    return text.strip() if template.is_stripped else text


def _llama_2(template: Template, turns) -> str:
    if not turns[0]:
        raise UserError(f"the template {template.name} needs a first message of the user that is not empty")
    text = ""
    for i, turn in enumerate(turns):
        if not turn:
            continue
        if i == 0 and template.system:
            turn = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n{turn}"
        text += f" {turn} {template.sep2}" if i % 2 else f"{template.sep}[INST] {turn} [/INST]"
    return text.lstrip(template.sep)  # by characters, as the original does


def _plain(template: Template, turns) -> str:
    if any(turns[1:]):
        raise UserError(f"the template {template.name} is for captions: it holds one message, {len(turns)} were given")
    return template.system + (turns[0] + template.sep if turns[0] else "")


_RENDERERS = {"TWO": _two, "LLAMA_2": _llama_2, "PLAIN": _plain}

# ---- training text -------------------------------------------------------------------------------------------------


def image_first(text: str, marker: str = IMAGE_MARKER, count: int = 1) -> str:
    """Upstream's `preprocess_multimodal`: the image's marker before the text, several in one turn collapsed to `count`.

    `marker` is what stands for one image; with start and end tokens it is wrapped in them. Text without a marker stays.
    """
    if IMAGE_MARKER not in text:
        return text
    text = text.replace(IMAGE_MARKER, "").strip()
    return ((IMAGE_MARKER + "\n") * count + text).strip().replace(IMAGE_MARKER, marker)


def training_turns(template: Template, conversation: Sequence[dict]) -> list[str]:
    """Texts of a LLaVA conversation in alternation; a leading answer is dropped, as in the original.

    Raises:
      UserError: a speaker other than human and gpt, two in a row, or nothing left.
    """
    speakers = [turn["from"] for turn in conversation]
    unknown = sorted({str(s) for s in speakers} - {"human", "gpt"})
    if unknown:
        raise UserError(f"the conversation has a turn from {unknown[0]!r}; human or gpt was expected")
    start = 1 if speakers and speakers[0] == "gpt" else 0
    for i, speaker in enumerate(speakers[start:]):
        if speaker != ("human", "gpt")[i % 2]:
            raise UserError(f"turn {start + i} of the conversation is from {speaker}; human and gpt in alternation were expected")
    texts = [str(turn["value"]) for turn in conversation[start:]]
    if not texts:
        raise UserError("the conversation is empty; at least one question and its answer were expected")
    if template.style == "PLAIN" and (len(texts) != 2 or IMAGE_MARKER not in texts[0]):
        raise UserError(f"the template {template.name} needs a conversation of <image> and its caption, one turn each")
    return texts


def supervise(template: Template, turns: Sequence[str], encode: Callable[[str], list[int]], *, pad_id: int | None,
              is_legacy: bool = True, max_length: int | None = None) -> tuple[list[int], list[int]]:
    """Ids and labels (not shifted) of a conversation, with upstream's own arithmetic (spec 3.7).

    Answers are found by re-encoding each round alone and counting ids, so labels are exactly those that the released
    models were trained with, its one defect included: where the counts do not add up, nothing of the sample is
    supervised. Callers count such samples.

    Args:
      encode: text to ids, beginning-of-sequence first, an image one IMAGE_TOKEN.
      pad_id: what the original pads with; it is unk, so a real unk makes the counts differ.
      max_length: samples of this length or longer are not checked for a mismatch.
    """
    if template.style == "PLAIN":
        text = IMAGE_MARKER + turns[1] + template.sep
        ids, masked = encode(text), len(encode(IMAGE_MARKER))
        return ids, [IGNORE] * masked + ids[masked:]
    before_answer = {"TWO": f"{template.sep}{template.roles[1]}: ", "LLAMA_2": "[/INST] "}[template.style]
    text = template.renderer(template, turns)
    ids = encode(text)
    labels = [IGNORE] * len(ids)
    cursor = 1  # past the beginning-of-sequence id
    # Not in LLAMA_2: upstream never gave that style the correction for tokenizers that are not legacy.
    correction = 1 if template.style == "TWO" and not is_legacy else 0
    for i, round_text in enumerate(text.split(template.sep2)):
        parts = round_text.split(before_answer)
        if not round_text or len(parts) != 2:
            break
        shift = correction if i else 0
        question = len(encode(parts[0] + before_answer)) - 2 - shift
        length = len(encode(round_text)) - shift
        labels[cursor + question:cursor + length] = ids[cursor + question:cursor + length]
        cursor += length
    is_mismatch = cursor != sum(i != pad_id for i in ids)
    if is_mismatch and (max_length is None or cursor < max_length):
        labels = [IGNORE] * len(ids)
    return ids, labels
