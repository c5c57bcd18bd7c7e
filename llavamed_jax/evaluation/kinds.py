"""The kinds of question, each with metrics of its own."""

from llavamed_jax.data.questions import CAPTION, CHOICE, CLOSED, OPEN, VqaSample
from llavamed_jax.errors import UserError

KINDS = (CLOSED, OPEN, CHOICE, CAPTION)


def kind(sample: VqaSample) -> str:
    """One of `KINDS`. Raises UserError for an answer type that is none of them."""
    name = sample.answer_type.strip().upper()
    if name not in KINDS:
        raise UserError(f"question {sample.question_id} has the answer type {sample.answer_type!r}; CLOSED, OPEN, CHOICE or CAPTION"
                        " was expected")
    return name
