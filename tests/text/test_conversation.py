"""Prompts against fingerprints of the original's, ids and label spans against the original's."""

import hashlib

import pytest

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.conversation import image_first, render
from llavamed_jax.text.templates import TEMPLATES, get_template
from llavamed_jax.text.tokenizer import Tokenizer

TURNS = ["<image>\nQ1", "A1", "Q2", None]


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


FRONT = talk("<image>\nIs there a pleural effusion?", "Yes, on the right side.", "Is the heart enlarged?", "No.")
BACK = talk("Is there a pleural effusion?\n<image>", "Yes, on the right side.", "Is the heart enlarged?", "No.")


def spans(labels):
    """Half-open spans of positions that are supervised."""
    edges = [i for i in range(len(labels) + 1)
             if (i < len(labels) and labels[i] != IGNORE) != (i > 0 and labels[i - 1] != IGNORE)]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("name, digest, length", [
    ("v1.5:vicuna_v1", "8a32e91f084daab1", 209), ("v1.5:v1", "8a32e91f084daab1", 209),
    ("up:vicuna_v1", "080b3549d584eff2", 208), ("v1.5:mistral_instruct", "b89525f983145741", 50),
    ("up:mistral_instruct", "b89525f983145741", 50)])
def test_fingerprints(name, digest, length):
    text = render(get_template(name), TURNS)
    assert (hashlib.sha256(text.encode()).hexdigest()[:16], len(text)) == (digest, length)


def test_mistral_text():
    assert render(get_template("mistral_instruct"), TURNS) == "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]"


def test_v15_strips_messages_and_result_and_upstream_does_not():
    turns = [" Q1 ", " A1 "]
    assert render(get_template("v1.5:vicuna_v1"), turns, "S").endswith("S USER: Q1 ASSISTANT: A1</s>")
    assert render(get_template("up:vicuna_v1"), turns, "S") == "S USER:  Q1  ASSISTANT:  A1 </s>"


def test_system_text_goes_where_the_style_puts_it():
    assert render(get_template("mistral_instruct"), ["Q"], "S") == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    assert render(get_template("up:vicuna_v1"), ["Q", None], "S") == "S USER: Q ASSISTANT:"


def test_names():
    assert get_template("vicuna_v1") is TEMPLATES["v1.5:vicuna_v1"]
    with pytest.raises(UserError, match="'up:vicuna_v9' does not exist; one of v1.5:vicuna_v1, "):
        get_template("up:vicuna_v9")


def test_what_a_template_cannot_hold():
    with pytest.raises(ValueError, match="at least one was expected"):
        render(get_template("plain"), [])
    with pytest.raises(ValueError, match="holds one message, 3 were given"):
        render(get_template("plain"), ["<image>", "caption", "more"])
    with pytest.raises(ValueError, match="first message of the user that is not empty"):
        render(get_template("mistral_instruct"), ["", "A"])


def test_image_goes_first():
    assert image_first("Is it?\n<image>") == "<image>\nIs it?"
    assert image_first("<image> a <image> b") == "<image>\na  b"
    assert image_first("<image>\n") == "<image>"
    assert image_first(" text alone ") == " text alone "
    assert image_first("a<image>", "<s><image><e>") == "<s><image><e>\na"


@pytest.mark.parametrize("conversation", [FRONT, BACK])
@pytest.mark.parametrize("template, length, expected", [
    ("up:vicuna_v1", 77, [(51, 59), (74, 77)]), ("v1.5:vicuna_v1", 78, [(51, 59), (75, 78)])])
def test_vicuna_labels(llama_tokenizer, template, length, expected, conversation):
    ids, labels = Processor.load(llama_tokenizer, template).training_example(conversation)
    assert (len(ids), spans(labels)) == (length, expected)
    assert ids.count(IMAGE_TOKEN) == 1
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("conversation", [FRONT, BACK])
@pytest.mark.parametrize("template", ["v1.5:mistral_instruct", "up:mistral_instruct"])
def test_mistral_ids_and_labels(mistral_tokenizer, template, conversation):
    ids, labels = Processor.load(mistral_tokenizer, template).training_example(conversation)
    assert ids == [
        1, 733, 16289, 28793, 28705, -200, 28705, 13, 2301, 736, 264, 4031, 1890, 1397, 3623, 28804, 733, 28748, 16289,
        28793, 5592, 28725, 356, 272, 1103, 2081, 28723, 28705, 2, 733, 16289, 28793, 1691, 272, 3031, 481, 20832, 286,
        28804, 733, 28748, 16289, 28793, 1770, 28723, 28705, 2]
    assert spans(labels) == [(20, 29), (43, 47)]


def test_plain_ids_and_labels(llama_tokenizer):
    conversation = talk("Describe the image.\n<image>", "Chest X-ray. Cardiomegaly.")
    ids, labels = Processor.load(llama_tokenizer, "up:plain").training_example(conversation)
    assert ids == [1, -200, 678, 342, 1060, 29899, 764, 29889, 9160, 14910, 387, 14997, 29889, 13]
    assert spans(labels) == [(2, 14)]


def test_a_leading_answer_is_dropped_and_numbers_are_text(mistral_tokenizer):
    processor = Processor.load(mistral_tokenizer)
    with_lead = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "How many?"}, {"from": "gpt", "value": 5}]
    assert processor.training_example(with_lead) == processor.training_example(talk("How many?", "5"))


def test_vicuna_without_legacy_prefix_supervises_the_answers(llama_tokenizer, tmp_path):
    import shutil
    shutil.copyfile(llama_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    processor = Processor.load(tmp_path, "up:vicuna_v1")
    ids, labels = processor.training_example(FRONT)
    assert [processor.decode(ids[a:b]) for a, b in spans(labels)] == ["Yes, on the right side.", "No."]
    assert [ids[b - 1] for _, b in spans(labels)] == [2, 2]


def test_counts_that_do_not_add_up_leave_nothing_supervised(llama_tokenizer):
    processor = Processor.load(llama_tokenizer, "up:vicuna_v1")
    _, labels = processor.training_example(talk("What does </s> mean?", "An end."))
    assert set(labels) == {IGNORE}
    _, labels = processor.training_example(talk("Is it <unk>?", "No."))  # unk is what the original pads with
    assert set(labels) == {IGNORE}
    _, labels = processor.training_example(talk("Is it?", "No.", "Sure?"))  # a question that nobody answers
    assert set(labels) == {IGNORE}


def test_samples_at_max_length_are_not_checked(llama_tokenizer):
    conversation = talk("Is it <unk>?", "No.")
    processor = Processor(preset("llava15-7b").replace(max_length=8), Tokenizer.load(llama_tokenizer))
    assert len(spans(processor.training_example(conversation)[1])) == 1


@pytest.mark.parametrize("conversation, template, sentence", [
    ([{"from": "doctor", "value": "x"}], "v1.5:mistral_instruct", "a turn from 'doctor'; human or gpt was expected"),
    ([{"from": "human", "value": "x"}] * 2, "v1.5:mistral_instruct", "turn 1 of the conversation is from human"),
    ([], "v1.5:mistral_instruct", "the conversation is empty"),
    (None, "v1.0:v0", "the conversation is None; a list of {from, value}"), ("ab", "plain", "the conversation is 'ab'; a list"),
    (["ab"], "plain", "turn 0 of the conversation is 'ab'; {from: human or gpt, value: text}"),
    ([{"value": "x"}], "up:vicuna_v1", "turn 0 of the conversation is {'value': 'x'}"),
    ([{"role": "user", "content": "x"}], "v1.0:v0", "turn 0 of the conversation is {'role': 'user', "),
    ([*talk("x"), {"from": "gpt"}], "v1.0:v1", "turn 1 of the conversation is {'from': 'gpt'}"),
    (talk("x", None), "v1.0:v0", "turn 1 of the conversation is {'from': 'gpt', 'value': None}"),
    (talk(["x"], "y"), "v1.0:v0", "turn 0 .*'value': \\['x'\\]"), ([{"from": 5, "value": "x"}], "v1.0:v0", "turn 0 .*'from': 5"),
    ([{"from": "d" * 10**6, "value": "x"}], "v1.0:v1", "a turn from 'd{79}…; human or gpt"),
    (talk("x\ud800", "y"), "up:vicuna_v1", "half a surrogate pair at character"),
    (talk("", ""), "v1.5:mistral_instruct", "a first message of the user that is not empty"),
    (talk("no image", "caption"), "up:plain", "<image>, then its caption"),
    ([{"from": "gpt", "value": "x"}, *talk("<image>", "caption")], "up:plain", "<image>, then its caption")])
def test_bad_conversations(mistral_tokenizer, conversation, template, sentence):
    with pytest.raises(ValueError, match=sentence):
        Processor.load(mistral_tokenizer, template).training_example(conversation)
