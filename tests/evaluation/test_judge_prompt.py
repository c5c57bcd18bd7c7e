"""What a judge is told, to the letter, and what is read from its replies."""

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llavamed_jax.datasets.qa50 import ChatQuestion
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation.judging import prompts
from llavamed_jax.evaluation.judging.prompts import (
    CHAT_PROMPT,
    OPEN_PROMPT,
    chat_prompt,
    open_prompt,
    read_original_scores,
    read_prompt,
    read_right,
    read_scores,
)

ROOT = Path(__file__).resolve().parents[2]
QUESTION = ChatQuestion(7, Path("f.jpg"), "Where is it?\n<image>", "In the lung.", "Fig. 2", "A chest X-ray.",
                        [{"tokens": "It's seen ( Fig. 2 ) .", "entities": []}], "conversation", "chest_xray")  # fmt: skip


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("[[system]]\n'You grade.\n\n[[instruction]]\nGrade both.\n  Then say why.\n")
    return read_prompt(str(path), CHAT_PROMPT)


def test_the_frame_of_two_answers_is_the_originals(prompt):
    assert chat_prompt(prompt, QUESTION, "In the liver.\n") == (
        "[Context]\nFigure Caption:\nFig. 2: A chest X-ray.\n\n"
        "Figure Context:\n\t- [{'tokens': \"It's seen ( Fig. 2 ) .\", 'entities': []}]\n\n"
        "[Question]\nWhere is it?\n\n"
        "[Assistant 1]\nIn the lung.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nIn the liver.\n\n\n[End of Assistant 2]\n\n"
        "[System]\nGrade both.\n  Then say why.\n\n"
    )


def test_the_marker_stays_where_v15_is_followed(prompt):
    without, with_it = chat_prompt(prompt, QUESTION, "x"), chat_prompt(prompt, QUESTION, "x", has_marker=True)
    assert "[Question]\nWhere is it?\n\n[Assistant 1]" in without and "<image>" not in without
    assert "[Question]\nWhere is it?\n<image>\n\n[Assistant 1]" in with_it and with_it.replace("\n<image>", "") == without


def test_mentions_that_are_null_read_none(prompt):
    text = chat_prompt(prompt, replace(QUESTION, mentions=None), "x")
    assert "Figure Context:\n\t- None\n\n[Question]" in text


def test_the_frame_of_one_answer(prompt):
    assert open_prompt(prompt, "Where?", "left lung", "The left one.") == (
        "[Question]\nWhere?\n\n[Gold Answer]\nleft lung\n\n[Answer]\nThe left one.\n\n[End of Answer]\n\n"
        "[System]\nGrade both.\n  Then say why.\n\n"
    )


def test_messages_are_a_system_message_and_the_text(prompt):
    assert prompt.messages("the text\n\n") == [{"role": "system", "content": "'You grade."}, {"role": "user", "content": "the text\n\n"}]
    reminded = prompt.messages("the text\n\n", is_reminded=True)
    assert reminded[1]["content"] == f"the text\n\n{read_prompt('', CHAT_PROMPT).reminder}\n", "the project's own, where a file has none"


def test_the_projects_own_files_have_all_sections_and_are_shipped():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["llavamed_jax"]
    shipped = {path for pattern in patterns for path in (ROOT / "llavamed_jax").glob(pattern)}
    for file in (CHAT_PROMPT, OPEN_PROMPT):
        found = read_prompt("", file)
        assert found.system and found.instruction and found.reminder and file in shipped
        assert found.wording != prompts.ORIGINAL_WORDING
    assert "right or wrong" in read_prompt("", OPEN_PROMPT).instruction


def test_a_wording_is_known_whatever_its_indentation(prompt, tmp_path):
    text = "[[instruction]]\nGrade both.\n    Then say why.\n[[reminder]]\nAgain.\n[[system]]\n'You grade.\r\n"
    (tmp_path / "other.txt").write_text(text)
    other = read_prompt(str(tmp_path / "other.txt"), CHAT_PROMPT)
    assert other.wording == prompt.wording and other.reminder == "Again." and other.system == prompt.system
    assert replace(other, system="You grade.").wording != prompt.wording


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "has no text under [[system]]"),
        ("[[system]]\nYou grade.\n", "has no text under [[instruction]]"),
        ("[[system]]\n\n[[instruction]]\nGrade.\n", "has no text under [[system]]"),
        ("Grade.\n[[system]]\nx\n[[instruction]]\ny\n", "has text before its first section"),
        ("[[system]]\nx\n[[instruction]]\ny\n[[examples]]\nz\n", "has the section [[examples]], which is unknown or occurs twice"),
        ("[[system]]\nx\n[[system]]\nx\n[[instruction]]\ny\n", "has the section [[system]]"),
    ],
)
def test_a_prompt_file_that_is_none_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_prompt(str(path), CHAT_PROMPT)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"judge.prompt is .*absent.txt, which cannot be read: No such file"):
        read_prompt(str(tmp_path / "absent.txt"), CHAT_PROMPT)
    (tmp_path / "p.txt").write_bytes(b"[[system]]\n\xff")
    with pytest.raises(UserError, match="p.txt is not UTF-8 text"):
        read_prompt(str(tmp_path / "p.txt"), CHAT_PROMPT)


@pytest.mark.parametrize(
    "reply, scores",
    [
        ("8 9", (8, 9)),
        ("8 9\nBecause 3 4.", (8, 9)),
        ("\n 10  1 \r\nBecause.", (10, 1)),
        ("8,9", (8, 9)),
        ("8 , 9.5\n", (8, 9.5)),
        ("", None),
        ("Because.\n8 9", None),
        ("8", None),
        ("8 9 10", None),
        ("8 9 Both are good.", None),
        ("Assistant 1: 8 9", None),
        ("9/10 8/10", None),
        ("8/9", None),
        ("8;9", None),
        ("8\n9", None),
        ("0 5", None),
        ("5 0", None),
        ("11 5", None),
        ("5 10.1", None),
        ("-8 9", None),
        ("8 nan", None),
        ("8e0 9", None),
        ("８ ９", None),
        ("**8 9**", None),
    ],
)
def test_scores(reply, scores):
    assert read_scores(reply) == scores


ORIGINAL = [
    ("8 9", (8, 9)), ("8 9\nBecause.", (8, 9)), ("8 0", (8, 0)), ("8 11", (8, 11)), ("9 5.", (9, 5)), ("-1 .5", (-1, 0.5)),
    ("1e1 8", (10, 8)),
    ("8 9\r\nx", (8, 9)), ("8.5 100", (8.5, 100)), ("8,9", None), ("8, 9", None), ("8  9", None), (" 8 9", None), ("8 9 ", None),
    ("\n8 9", None), ("8 9 7", None), ("8", None), ("", None), ("8/10 9/10", None), ("**8 9**", None), ("0 8", None), ("-0 8", None),
    ("8 nan", None), ("inf 8", None), ("8\t9", None), ("8 9.", (8, 9)),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "scores"), ORIGINAL)
def test_scores_as_the_original_reads_them(reply, scores):
    assert read_original_scores(reply) == scores


@pytest.mark.parametrize(("reply", "scores"), ORIGINAL)
def test_the_original_s_own_statement(reply, scores):
    """`review.split("\\n")[0].split(" ")`, each of them a float: what it raises on is read as nothing."""
    try:
        first, second = (float(word) for word in reply.split("\n")[0].split(" "))
        second / first
        own = (first, second)
    except (ValueError, ZeroDivisionError):
        own = None
    assert own == scores or not np.isfinite(own).all()


@pytest.mark.parametrize(
    "reply, is_right",
    [("right", True), ("Right.\nIt says the same.", True), (" wrong \nno", False), ("Correct", True), ("incorrect", False), ("", None),
     ("The answer is right", None), ("right or wrong", None), ("yes", None), ("why?\nright", None),
     ("**Right**", True), ("Right!", True), ("Verdict: right", True), ("**Verdict:**\nwrong", False), ("<think>wrong?</think>\nright", True),
     ("<think>right", None), ("Wrong: the answer names the other side", False), ("Wrong: the right answer is left", False), ("“Correct.”", True),
     ("Incorrect - other side", False), ("(right)", True), ("Answer: right", True), ("not right", None), ("partially right", None),
     ("partially", None), ("right/wrong", None), ("Right, but incomplete", None), ("right, wrong", None), ("Right lung", None), ("wrong, partly", None)])  # fmt: skip
def test_right_and_wrong(reply, is_right):
    assert read_right(reply) is is_right
