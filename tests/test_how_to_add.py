"""The worked examples of docs/architecture.md do what the page says: each is read from the page and registered."""

import ast
import re
from pathlib import Path

import pytest

from llavamed_jax.config import IGNORE
from llavamed_jax.processor import Processor
from llavamed_jax.text import templates

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TOKENIZER = ROOT / "samples" / "vqa_rad" / "tokenizer.model"


def example(title: str) -> str:
    """The first block of code under a heading of the page."""
    return re.search(rf"^### {re.escape(title)}\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def template(monkeypatch):
    (row,) = ast.literal_eval(example("A template").strip().rstrip(",") + ",")
    monkeypatch.setitem(templates.TEMPLATES, row[0], templates.Template(*row))
    return row[0]


def test_a_template_is_one_row(template):
    processor = Processor.load(TOKENIZER, template=template, image_size=96, image_mode="pad")
    text = processor.prompt([{"role": "user", "content": "Which organ?"}])
    assert text == "Answer in one word. USER: Which organ? ASSISTANT:"
    ids, labels = processor.training_example(
        [{"from": "human", "value": "Which organ?"}, {"from": "gpt", "value": "Lung."}]
    )
    supervised = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE]
    assert [label for label in labels if label != IGNORE] == supervised
    assert processor.decode(supervised).strip() == "Lung." and supervised[-1] == processor.tokenizer.eos_id


def test_a_template_that_is_not_registered_is_refused_with_those_that_are(template, monkeypatch):
    assert templates.get_template(template).system == "Answer in one word."
    monkeypatch.delitem(templates.TEMPLATES, template)
    with pytest.raises(templates.UserError, match="'mine:one_word' does not exist; one of v1.5:vicuna_v1"):
        templates.get_template(template)
