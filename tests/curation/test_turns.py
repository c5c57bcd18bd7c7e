"""A model's reply becomes questions and answers: by this project's rules, and by those of LLaVA-Med's code."""

import random
import time
from collections import Counter

import pytest

from llavamed_jax.curation import original_rules, turns
from llavamed_jax.curation.original_rules import clean_answer, read_original
from llavamed_jax.curation.turns import read_turns, without_lead_in
from llavamed_jax.utils.hashes import sha256


def reply(*answers, question="What is shown"):
    return "\n\n".join(f"User: {question} {n}?\n\nAssistant: {answer}" for n, answer in enumerate(answers))


# ---- the original's rules: known answers -----------------------------------------------------------------------------


def test_the_originals_phrases_are_complete():
    dropped, cut, removed = original_rules.phrases()
    assert [len(set(each)) for each in (dropped, cut, removed)] == [20, 63, 61]
    hashes = [sha256("\n".join(sorted(each)))[:16] for each in (dropped, cut, removed)]  # of the lists in the original's code
    assert hashes == ["df018446df3e364c", "2f51a6e8d3c8e442", "3ea737f942936582"]


@pytest.mark.parametrize(("answer", "wanted"), [
    ("According to the figure caption, the scan shows a nodule.", "The scan shows a nodule."),
    ("It is benign, as mentioned in the context provided.", "It is benign."),
    ("Sorry, nothing can be said.", None),
    ("This is a description of the lesion.", None),
    ("In the context of the image provided, the mass is bright.", "the mass is bright."),
    ("According to the figure caption, MRI and CT agree.", "Mri and ct agree."),  # quirk Q26
    ("Yes, according to the figure caption, CT shows it.", "Ct shows it."),
    ("Based on the description, the caption names it.", None),
    ("Based on the description, ", ""),
    ("The Description says so.", "The Description says so."),  # only lower case is looked for
    ("I have access to much.", None),
    ("the context provided mentions that CT is best, as mentioned in the context provided.",
     "Ct is best, as mentioned in the context provided."),  # a beginning is cut, and then nothing else is removed
    ("The lesion, as mentioned in the figure caption, is big as mentioned in the caption.", "The lesion, is big."),
    ("While I cannot see the actual image, based on the description, it is a CT.", None),  # its beginning never matches
    ("Nothing to mend.", "Nothing to mend."),
])
def test_an_answer_is_cleaned_as_the_original_does(answer, wanted):
    cleaned, reason = clean_answer(answer)
    assert (None if reason else cleaned) == wanted


def test_the_image_is_drawn_to_a_side_and_may_be_lost_with_its_pair():
    sides = Counter()
    for seed in range(40):
        found = read_original(reply("A nodule.", "Sorry."), random.Random(seed))
        (question, answer), = found.pairs
        assert answer == "A nodule." and [lost[2] for lost in found.lost] == [original_rules.DROPPED]
        sides[question] += 1
        after = random.Random(seed).getrandbits(1)
        assert question == ("What is shown 0?\n<image>" if after else "<image>\nWhat is shown 0?")
    assert len(sides) == 2
    found = read_original(reply("Sorry.", "A nodule."), random.Random(0))
    assert found.pairs == [("What is shown 1?", "A nodule.")]


def test_the_original_splits_at_every_role():
    found = read_original("Hello User: a Assistant: b User: c User: d Assistant: e Assistant: f User: g Assistant: h", random.Random(1))
    assert [question.replace("<image>", "").strip() for question, _ in found.pairs] == ["a", "g"]
    assert [lost[2] for lost in found.lost] == [original_rules.UNREADABLE] * 2
    assert not read_original("no turns", random.Random(0)).pairs


# ---- this project's rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [
    "The scan shows a nodule.", "I do not see any fracture.", "You cannot see the left kidney in this slice.",
    "A biopsy may give additional information.", "In the context of sepsis, this is likely.", "It can be described as round.",
    "Based on the image, it is a CT scan.", "The legend shows the colors.", "A description of the lesion: round and dark.",
    "The posterior segment cannot be seen.", "The arrow indicates the lesion.", "Panel A:\nB: text labels are visible.",
    "The patient said \"User: stop\" in the drawing.", "It has information provided by no other scan.", "The slice gives information supplied by the T2 signal.",
])
def test_answers_about_the_image_stay_as_they_are(answer):
    assert read_turns(reply(answer)) == turns.Turns([("What is shown 0?", answer)], [])


@pytest.mark.parametrize(("answer", "reason"), [
    *((answer, turns.QUOTES) for answer in (
        "According to the figure caption, the scan shows a nodule.", "The description mentions a nodule.",
        "It is benign, as mentioned in the context provided.", "The authors reported it.", "It is not specified in the text.",
        "Based on the provided context, it is CT.", "The information provided indicates edema.", "The article states so.",
        "The figure legend says A.", "This is not explicitly mentioned.")),
    *((answer, turns.REFUSES) for answer in (
        "I'm sorry, but I can't assist with that.", "As an AI language model, I see nothing.", "I cannot view the image.",
        "The image itself is not available.", "Without access to the actual image, this is hard.", "I don't have the picture.",
        "I am unable to provide more details.", "I can’t see the scan.", "I'm afraid I can't see it.",
        "I cannot interpret medical images.")),
    ("", turns.EMPTY_ANSWER), ("…", turns.EMPTY_ANSWER),
])
def test_what_must_not_be_trained_on_is_dropped_with_its_reason(answer, reason):
    found = read_turns(reply("A nodule.", answer, "It is round."))
    assert [pair[1] for pair in found.pairs] == ["A nodule.", "It is round."]
    assert found.dropped == {reason: 1}


def test_turns_in_odd_forms():
    text = "Sure! Here it is:\n```text\n**User:** What <image> is\x00 it?\r\n\r\n**Assistant:** A CT.\n\n### Human: Where?\nAssistant : Left.\n---\n```"
    assert read_turns(text).pairs == [("What  is it?", "A CT."), ("Where?", "Left.")]
    assert read_turns("Assistant: b\n\nUser: c\n\nUser: d\n\nAssistant: e\n\nAssistant: f\n\nUser: g").dropped == {
        turns.NO_QUESTION: 2, turns.NO_ANSWER: 2}
    assert read_turns(reply("A.", "B.") + "\n\nUser: what is shown  0?\n\nAssistant: C.").dropped == {turns.REPEATED: 1}
    assert read_turns("User: What does the caption say?\n\nAssistant: A CT.").dropped == {turns.QUOTES: 1}
    assert read_turns("User: ?\n\nAssistant: A CT.").dropped == {turns.EMPTY_QUESTION: 1}
    assert read_turns(reply("A CT.", "It lies in the le"), is_cut=True).dropped == {turns.CUT: 1}
    assert read_turns('{"conversation": [') == turns.Turns()


@pytest.mark.parametrize("form", ["1. {}: ", "2) {}: ", "<{}>: ", "[{}]: ", "1. **{}:** ", "({}): ", "**<{}>**: ", "3: {}: ", "- {} 1: ", "**[{}]:** "])
def test_turns_with_numbers_and_brackets(form):
    text = "\n\n".join(form.format(role) + said for role, said in (("User", "What is it?"), ("Assistant", "1. A CT.\n2. Of the head."), ("User", "Where?"), ("Assistant", "Left.")))
    assert read_turns(text) == turns.Turns([("What is it?", "1. A CT.\n2. Of the head."), ("Where?", "Left.")], [])


@pytest.mark.parametrize(("words", "is_kept"), [(11, True), (12, False), (20, False)])
def test_an_answer_that_copies_the_caption_is_dropped(words, is_kept):
    caption = "Axial CT (a, arrow) of a 45-year-old man: a large mass in the left lobe of the liver, with calcification and without fat."
    copied = " ".join(caption.upper().replace("(", "").split()[3:3 + words - 2])  # 45-year-old is three words
    found = read_turns(reply("A nodule.", f"It shows {copied}; nothing else."), caption=caption)
    assert len(found.pairs) == 1 + is_kept and found.dropped == ({} if is_kept else {turns.COPIES: 1})
    assert read_turns(reply(f"It shows {copied}.")).pairs and not turns._runs("one two")


def test_a_lead_in_is_removed_and_abbreviations_keep_their_case():
    for text, wanted in {
        "In the context of the image provided, mRNA is stained.": "mRNA is stained.",
        "In the context of the chest X-ray provided, the CT agrees.": "The CT agrees.",
        "In the context of the provided MRI image, T2 is bright.": "T2 is bright.",
        "In the context of sepsis, it is likely.": "In the context of sepsis, it is likely.",
    }.items():
        assert without_lead_in(text) == wanted


@pytest.mark.parametrize("text", ["-" * 100_000, "\n" * 100_000 + "x", "#" * 50_000 + "User", "User:" * 20_000, "the " * 30_000,
                                  "User: a\n\nAssistant: " + "description " * 20_000, "User:\n" * 20_000, " " * 100_000 + "\nx",
                                  "*" * 100_000 + "1. " + "<" * 100_000])
def test_hostile_replies_take_no_time(text):
    begun = time.process_time()
    read_turns(text)
    read_original(text, random.Random(0))
    assert time.process_time() - begun < 1.5
