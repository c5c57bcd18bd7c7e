"""Multiple choice in the text of a turn: what is asked, the options, the named option, markers at their places."""

from dataclasses import replace
from pathlib import Path

import pytest

from llavamed_jax.datasets import choices, mmmu_med, published_choices
from llavamed_jax.datasets.listed import Listed, read_listed
from llavamed_jax.datasets.sample import CHOICE, VqaSample, to_llava

OPTIONS = ("CT, plain", "MRI", "a: b")


@pytest.mark.parametrize("text", [
    choices.prompt("What is shown?", OPTIONS),
    "<image>\n" + published_choices.prompt("What is shown?", [" A:CT, plain", " B:MRI ", " C: a: b"]),
    "<image_1>: <image>\n<image_2>: <image>\n" + published_choices.prompt("What is shown?", ["A.CT, plain", "B.MRI", "C.a: b"]),
    mmmu_med.choice_prompt("What is shown?", ["(A) CT, plain", "(B) MRI", "(C) a: b"]),
    "What is shown?\nAnswer choices:\n\nA) CT, plain\n\nB) MRI\nC) a: b",
])
def test_every_list_of_options_is_read(text):
    assert read_listed(text) == Listed("What is shown?", OPTIONS)


@pytest.mark.parametrize("text", ["What is shown?", "A. fumigatus is shown?", "B. MRI\nC. CT", "Options:", "Question: Is it?", "",
                                  "A. one\nBut\nB. two", "Is it hepatitis A. or B. ?"])
def test_a_question_without_options_is_itself(text):
    assert read_listed(text) == Listed(text, ())


@pytest.mark.parametrize("answer, wanted", [
    ("B", "MRI"), ("b", "MRI"), ("(B)", "MRI"), (" B. ", "MRI"), ("B: MRI.", "MRI"), ("C) a: b", "a: b"), ("B. CT", "B. CT"), ("D", "D"),
    ("MRI", "MRI"), ("A MRI", "A MRI"), ("", "")])
def test_the_option_that_an_answer_names(answer, wanted):
    assert Listed("Q", OPTIONS).named(answer) == wanted
    assert Listed("Q").named(answer) == answer


@pytest.mark.parametrize("question, wanted", [
    ("Image A: <image>\nImage B: <image>\nWhich?", "Image A: <image>\nImage B: <image>\nWhich?"), (" <image> or <image>?\n", " <image> or <image>?\n")])
def test_a_training_record_has_markers_where_the_question_has_them(question, wanted):
    sample = VqaSample(1, Path("a.png"), question, "x", CHOICE, options=("y", "x"), more_images=(Path("b.png"),), is_placed=True)
    turns = to_llava(sample)["conversations"]
    assert (turns[0]["value"], turns[1]["value"]) == (wanted, "B")
    loose = to_llava(replace(sample, question="Which?\n<image>", is_placed=False))["conversations"][0]["value"]
    assert loose == "<image>\n<image>\nWhich?"
