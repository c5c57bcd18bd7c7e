"""Reads LLaVA-Med's chat questions about figures of articles.

Each question comes with GPT-4's answer, the caption, and the sentences of the article that mention the figure. The
published file, `llava_med_eval_qa50_qa.jsonl`, has 193 questions about 50 figures: 143 are turns of a conversation, 50
ask for a detailed description. A line is an object with `question_id, image, pair_id, text, gpt4_answer, fig_caption,
in_text_mention, domain, type, fig_label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.datasets.sample import OPEN, VqaSample
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import parse_jsonl, read_bytes
from llavamed_jax.utils.hashes import sha256

FILE = "llava_med_eval_qa50_qa.jsonl"
PUBLISHED_SHA256 = "48c6b680a962dbf8caf63e3ded2bef7770dccf9c2602f32e5f05f4b907266f25"
TYPES = ("conversation", "detailed_description")
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
"""In the original's order: a question counts in the first that is true (8 of the 193 have two)."""

_MARKER = "\n<image>"


@dataclass(frozen=True)
class ChatQuestion:
    """One question about a figure.

    Attributes:
      question_id: the id.
      image: the path of the figure.
      text: the published question, with an image marker on its last line.
      reference: GPT-4's answer; GPT-4 saw the caption and the mentions but not the figure.
      label: the label of the figure in the article.
      caption: the caption of the figure.
      mentions: the published sentences of the article that mention the figure; None if there are none.
      kind: one of `TYPES`.
      domain: one of `DOMAINS`.
    """

    question_id: int | str
    image: Path
    text: str
    reference: str
    label: str
    caption: str
    mentions: list | None
    kind: str
    domain: str

    @property
    def question(self) -> str:
        """The question without the image marker."""
        return self.text.removesuffix(_MARKER)

    def sample(self) -> VqaSample:
        """Returns the question as a sample: an open question with the reference as its gold answer."""
        return VqaSample(self.question_id, self.image, self.question, self.reference, OPEN, question_type=self.kind,
                         modality=self.domain)


@dataclass(frozen=True)
class ChatSet:
    """The questions of a file.

    Attributes:
      file: the file.
      questions: the questions.
      sha256: the hash of the file.
    """

    file: Path
    questions: list[ChatQuestion]
    sha256: str

    @property
    def is_published(self) -> bool:
        """Whether the file is the published one."""
        return self.sha256 == PUBLISHED_SHA256


def read_chat_questions(root: str | Path, images: str | Path = "") -> ChatSet:
    """Reads the questions.

    Args:
      root: the file, or the folder that contains it under its published name.
      images: the folder of the figures; "" means `images/` beside the file. The figures need not exist, because a judge
        does not see them.

    Raises:
      UserError: the file is missing, is not UTF-8 or has no questions; a line is malformed; or an id occurs twice.
    """
    file = Path(root) / FILE if Path(root).is_dir() else Path(root)
    try:
        data = read_bytes(file, f"the file of questions {file}")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"the questions {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; JSON lines with chat questions were expected") from None
    folder = Path(images) if images is not None and str(images) else file.parent / "images"
    lines = parse_jsonl(text, lambda number: f"{file}, line {number}")
    questions = [_question(record, where, folder) for where, record in lines]
    if not questions:
        raise UserError(f"{file} holds no questions")
    seen: dict[str, str] = {}
    for (where, _), question in zip(lines, questions, strict=True):
        earlier = seen.setdefault(str(question.question_id), where)
        if earlier != where:
            raise UserError(f"{where} repeats the question_id {question.question_id!r} of "
                            f"{earlier.rpartition(', ')[2]}")
    return ChatSet(file, questions, sha256(data))


def _question(record: Any, where: str, images: Path) -> ChatQuestion:
    """Returns the question of a record. Raises UserError, which names the invalid field and what was expected."""
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a JSON {type(record).__name__}; an object with a chat question was expected")

    def get(key: str, is_right, expected: str):
        if key not in record:
            raise UserError(f"{where} has no {key!r}; {expected} was expected")
        if not is_right(record[key]):
            raise UserError(f"{where} has the {key} {short(record[key])}; {expected} was expected")
        return record[key]

    def is_text(value) -> bool:
        return isinstance(value, str) and bool(value.strip())

    get("pair_id", is_text, "text")
    domain = get("domain", _is_domain, f"an object of {', '.join(DOMAINS)}, true or false, one of them true,")
    return ChatQuestion(
        question_id=get("question_id", lambda v: type(v) is int or is_text(v), "a number or text"),
        image=images / get("image", is_text, "the name of a file"),
        text=get("text", lambda v: is_text(v) and v.endswith(_MARKER), 'a question that ends with "\\n<image>"'),
        reference=get("gpt4_answer", is_text, "text"),
        label=get("fig_label", lambda v: isinstance(v, str), "text"),
        caption=get("fig_caption", lambda v: isinstance(v, str), "text"),
        mentions=get("in_text_mention", lambda v: v is None or isinstance(v, list), "a list or null"),
        kind=get("type", lambda v: v in TYPES, " or ".join(TYPES)),
        domain=next(name for name in DOMAINS if domain[name]),
    )


def _is_domain(value: Any) -> bool:
    is_whole = isinstance(value, dict) and set(value) == set(DOMAINS) and all(type(v) is bool for v in value.values())
    return is_whole and any(value.values())
