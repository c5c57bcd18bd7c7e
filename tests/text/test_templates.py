"""Every template beside the procedures of the originals (`support/original_text.py`): prompts, ids and labels of training text."""

import functools
import hashlib
import random
from pathlib import Path

import pytest

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.errors import UserError
from llavamed_jax.pipeline.examples import tokenize
from llavamed_jax.processor import Processor
from llavamed_jax.text.conversation import render
from llavamed_jax.text.templates import TEMPLATES as EVERY
from llavamed_jax.text.templates import get_template
from llavamed_jax.text.tokenizer import Tokenizer
from tests.support import byte_level, original_text
from tests.text.test_conversation import BACK, FRONT, spans, talk

TEMPLATES = {name: each for name, each in EVERY.items() if name not in byte_level.TEMPLATES}  # of the originals
SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
V1 = [name for name in TEMPLATES if name.startswith("v1.0:")]
PLAIN = [name for name in TEMPLATES if name.endswith("plain")]
ASKING = [name for name in TEMPLATES if not TEMPLATES[name].is_for_training_only]
TRAINING = [name for name in TEMPLATES if name not in PLAIN]
CASES = {
    "image first": FRONT, "image last": BACK,
    "image inside": talk("Is <image> normal?", "Yes."), "image alone": talk("<image>", "A chest."), "image twice over": talk(
        "<image>\nWhat?", "A chest.", "And\n<image>", "A hand.", "The same?", "No."),
    "two images in a turn": talk("<image>\n<image>\nCompare.", "They differ."), "two apart": talk("Is <image> like <image>?", "Yes."),
    "images last, five turns": talk(*[text for n in range(5) for text in (f"Number {n}?\n<image>", f"It is {n}.")]),
    "no image": talk("What is a CT?", "A scan.", "Of what?", "The body."),
    "five turns": talk("<image>\nWhere?", "In the chest.", "Which side?", "Left.", "Sure?", "Yes.", "Why?", "It is seen.", "So?", "So."),
    "empty answer": talk("<image>\nIs it?", ""), "empty answer, then another": talk("Is it?\n<image>", "", "Sure?", "Yes."),
    "empty question": talk("<image>", "Yes.", "", "No."), "blank answer": talk("Is it?\n<image>", "   ", "Sure?", " Yes. "),
    "end of sequence in a question": talk("<image>\nWhat does </s> mean?", "An end.", "Sure?", "Yes."),
    "end of sequence in an answer": talk("Is it?\n<image>", "Yes </s> no.", "Sure?", "Yes."),
    "begin and unknown in a text": talk("<image>\n<s>Is it <unk>?", "A <unk> word."),
    "image in an answer": talk("Show one.", "Here: <image>\nas asked.", "And?", "<image>"),
    "not Latin": talk("这张胸部X光片显示什么？\n<image>", "右肺有阴影。", "Где это?", "В лёгком — 5 µm.", "أين؟", "هنا 🫁."),
    "white space": talk("  two  blanks \n\n<image>\n\n", "\ta tab\nand\n\nlines \n", " \n", "end\u00a0"),
    "a speaker's name in a text": talk("<image>\nDid USER: or ASSISTANT: say so?", "ASSISTANT: did. ### Human: no", "[/INST] ?",
                                       "[INST] x"),
    "a number": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": 5}],
    "an answer first": [{"from": "gpt", "value": "Hello."}, *FRONT], "a question last": talk("<image>\nIs it?", "Yes.", "Sure?"),
}
CAPTIONS = {
    "image last": talk("Describe.\n<image>", "Chest X-ray."), "no words": talk("<image>", ""), "white space": talk("<image>", " two\n"),
    "two images": talk("<image>\n<image>", "A pair."), "end of sequence": talk("<image>", "右肺</s>."),
    "image in a caption": talk("<image>", "Here <image> too"),
}


@pytest.fixture(scope="module", params=["mistral", "llama"])
def model(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


tokenizer_of = functools.cache(Tokenizer.load)  # 32,000 pieces are read once


def load(model, name, image_size=None):
    """`Processor.load`."""
    return Processor(None, tokenizer_of(model), name, image_size)


def compare(processor, model, name, conversation, patches=16, **changes):
    """Ids and labels here and the original's; v1.0's with each patch token an IMAGE_TOKEN that no label stands on."""
    wanted = original_text.example(name, model, conversation, patches=patches, **{"max_length": 10**9, **changes})
    found = processor.training_example(conversation)
    if name in V1:
        patch = original_text.v1_tokenizer(name, model, changes.get("start_end", True)).added[original_text.PATCH]
        ids, labels = ([other if i == patch else i for i in row] for row, other in zip(wanted, (IMAGE_TOKEN, IGNORE), strict=True))
        wanted, found = (ids, labels), processor.expand(*found)
    assert found == (list(wanted[0]), list(wanted[1]))
    return found


# ---- prompts --------------------------------------------------------------------------------------------------------


def fingerprint(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16], len(text)


@pytest.mark.parametrize("name, wanted", [
    ("v1.0:simple", ("9635bb7b474e49f9", 281)), ("v1.0:vicuna_v1_1", ("080b3549d584eff2", 208)),
    ("v1.0:v1", ("080b3549d584eff2", 208)), ("v1.5:llava_v0", ("129350366331ff2b", 217)), ("up:llava_v0", ("129350366331ff2b", 217))])
def test_fingerprints(name, wanted):
    turns = ["<image>\nQ1", "A1", "Q2", None]
    assert fingerprint(render(get_template(name), turns)) == wanted
    if ":v1" not in name:
        assert fingerprint(original_text.CONVERSATIONS[get_template(name).name].prompt(turns)) == wanted


@pytest.mark.parametrize("name", ASKING)
def test_prompts_are_the_originals(name, model):
    processor, theirs = load(model, name), original_text.CONVERSATIONS[name]
    for conversation in CASES.values():
        turns = [str(turn["value"]) for turn in conversation if turn["from"] == "human" or conversation.index(turn)]
        turns = turns[:-1] if len(turns) % 2 == 0 else turns
        if not turns[0]:
            continue
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        # v1.0's model_vqa.py appends this to a question, behind its image, before the conversation takes it.
        behind = "\n\n### Response:" if name == "v1.0:simple_legacy" else ""
        turns = [turn if i % 2 else turn + behind for i, turn in enumerate(turns)]
        assert processor.prompt(messages) == theirs.prompt([*turns, None])


def test_the_prompts_of_v1_as_text():
    simple = original_text.HUMANS + "###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###"
    assert render(get_template("v1.0:simple"), ["Q", None]) == simple + "Human: Q###Assistant:"
    assert render(get_template("v1.0:simple"), ["Q"]) == simple + "Human: Q###"  # as v1.0's evaluation leaves it
    legacy = render(get_template("v1.0:simple_legacy"), ["Q", None])
    assert "architecture.You are designed" in legacy and "###Human: Hi!\n\n### Response:###Assistant: Hi there!" in legacy
    assert render(get_template("v1.0:multimodal"), ["Q"], "S").startswith("S###Human: Hi!###")
    assert render(get_template("v1.0:v0"), ["Q", None]) == original_text.HUMANS + "\n\n### Human: Q\n### Assistant:"
    longer = render(get_template("v1.0:v0"), ["Q", "A", "R", None], "S")
    assert longer == "S\n\n### Human: Q\n### Assistant: A\n### Human: R\n### Assistant:"


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_image_in_a_message_goes_where_the_origin_puts_it(name, llama_tokenizer):
    processor = load(llama_tokenizer, name, image_size=56)
    messages = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": " Is it? "}]}]
    text = processor.prompt(messages)
    assert ("Is it?\n<image>" if name in V1 else "<image>\nIs it?") in text
    ids = processor.encode(text)
    at = ids.index(IMAGE_TOKEN)
    assert ids.count(IMAGE_TOKEN) == 1 and len(processor.expand(ids)) == len(ids) + 15
    pair = [32002, 32003] if name == "v1.0:v0" else [32001, 32002]
    assert (ids[at - 1:at + 2:2] == pair) == (name in V1)


QUESTIONS = ["Is it?", " Is it? \n", "", "\n", "这张胸部X光片显示什么？", "Two\nlines.", "Compare <image> and <image>.", "<image>\nIs it?",
             "### Human: [INST] </s> {{ x }}"]


def outcome(make):
    try:
        return make()
    except UserError as error:
        return str(error).replace("the question has", "message 0 has")


def check_questions(processor):
    """A question about images is written, or refused, as a user's message of these images and this text."""
    for text in QUESTIONS:
        for images in ([], ["x.png"], ["x.png", "y.png"]):
            parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
            wanted = outcome(lambda parts=parts: processor.prompt([{"role": "user", "content": parts}]))
            assert outcome(lambda text=text, images=images: processor.question(text, images)) == wanted


@pytest.mark.parametrize("name", EVERY)
def test_a_question_is_the_prompt_of_its_message(name):
    check_questions(load(SAMPLE, name, image_size=56))


def test_simple_legacy_asks_as_model_vqa_does(llama_tokenizer):
    processor = load(llama_tokenizer, "v1.0:simple_legacy", image_size=56)
    messages = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "Is it?"}]}]
    prompt = processor.prompt(messages)
    assert prompt.endswith("###Human: Is it?\n<image>\n\n### Response:###Assistant:")
    followed = [*messages, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    assert processor.prompt(followed) == prompt + " No.###Human: Why?\n\n### Response:###Assistant:"
    ids = processor.encode(prompt)  # white space beside an image goes, as the rest of v1.0's ids does
    assert ids == processor.encode(prompt.replace("<image>\n\n", "<image>"))
    assert processor.encode("\n\n### Response:###")[1:] == processor.tokenizer.encode("\n\n### Response:###", bos=False)


def test_names_that_originals_use():
    same = {"v1.0:v1": "v1.0:vicuna_v1_1", "v1": "v1.5:vicuna_v1", "up:v1": "up:vicuna_v1", "v0_plain": "v1.5:plain",
            "llava_v0": "v1.5:llava_v0"}
    assert {name: get_template(name).name for name in same} == same
    for name in ("simple", "v1.5:simple", "up:multimodal", "v1.0:plain", "v2:plain", ""):  # a bare name is never v1.0's
        with pytest.raises(UserError, match="does not exist; one of v1.5:vicuna_v1, .*v1.0:simple, "):
            get_template(name)


# ---- ids and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation, wanted", [
    (FRONT, (340, 28, [(33, 35), (304, 319), (329, 340)])), (BACK, (338, 27, [(33, 35), (303, 318), (328, 338)]))])
def test_v0_labels_as_printed(conversation, wanted, llama_tokenizer):
    processor = load(llama_tokenizer, "v1.0:v0", image_size=224)
    ids, labels = processor.expand(*processor.training_example(conversation))
    assert (len(ids), sum(label != IGNORE for label in labels), spans(labels)) == wanted
    assert ids[:4] == [1, 319, 13563, 1546] and ids[-4:] == [13, 2277, 29937, 29871]
    if conversation is FRONT:
        assert ids[30:38] == [29889, 13, 13, 2277, 29937, 12968, 29901, 32002] and ids[294:297] == [32003, 1317, 727]
        assert [processor.decode(ids[a:b]) for a, b in spans(labels)] == [
            "###", "### Assistant: Yes, on the right side.\n###", "### Assistant: No.\n### "]
    else:  # quirk Q11: three tokens of the next question, not the first of the next answer
        assert [processor.decode(ids[a:b]) for a, b in spans(labels)] == [
            "###", "### Assistant: Yes, on the right side.\n### Human", "# Assistant: No.\n### "]


@pytest.mark.parametrize("conversation", [FRONT, BACK])
def test_v1_labels_as_printed(conversation, llama_tokenizer):
    processor = load(llama_tokenizer, "v1.0:v1", image_size=224)
    ids, labels = processor.expand(*processor.training_example(conversation))
    assert (len(ids), spans(labels)) == (331, [(305, 313), (328, 331)])


def test_white_space_beside_v1s_images_is_dropped(llama_tokenizer):
    text = "Is it?\n<image>\n### Assistant: A"
    ids = load(llama_tokenizer, "v1.0:simple").encode(text)
    assert ids == [1, 1317, 372, 29973, 32001, IMAGE_TOKEN, 32002, 835, 4007, 22137, 29901, 319]
    kept = load(llama_tokenizer, "up:vicuna_v1").encode(text)
    assert kept == [1, 1317, 372, 29973, 13, IMAGE_TOKEN, 29871, 13, 2277, 29937, 4007, 22137, 29901, 319]


def test_every_form_of_v1s_image_is_read(llama_tokenizer):
    processor = load(llama_tokenizer, "v1.0:simple", image_size=56)
    ids = processor.encode("Q\n<image>")
    assert processor.encode("Q\n<im_start><image><im_end>") == ids
    patches = processor.encode("Q\n<im_start>" + "<im_patch>" * 16 + "<im_end>")
    assert patches == processor.expand(ids) == processor.expand(patches) and patches.count(IMAGE_TOKEN) == 16


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_labels_are_the_originals(name, model):
    processor = load(model, name, image_size=56)
    for case, conversation in (CAPTIONS if name in PLAIN else CASES).items():
        print(case)  # what pytest shows of a failure
        compare(processor, model, name, conversation)


@pytest.mark.parametrize("name", [name for name in TRAINING if TEMPLATES[name].labels == "v0"])
def test_v0_takes_speakers_as_they_come(name, llama_tokenizer):
    """Two in a row, strangers, an answer first; and "Human", who is called so and whose words are learnt."""
    processor = load(llama_tokenizer, name, image_size=56)
    said = [("gpt", "Hello."), ("human", "Is it?\n<image>"), ("human", "Well?"), ("doctor", "No."), ("Human", "Sure?"), ("GPT", "Yes.")]
    ids, labels = compare(processor, llama_tokenizer, name, [{"from": speaker, "value": text} for speaker, text in said])
    text, (human, assistant) = processor.decode(ids), TEMPLATES[name].roles
    assert text.count(f"### {human}: ") == 3 and "### unknown: No." in text and text.count(f"### {assistant}: ") == 2
    assert "Sure?" in processor.decode(label for label in labels if label != IGNORE)


WORDS = ["Yes", "no.", "the", "effusion,", "μm", "胸部", "лёгкое", "🫁", "10%", "T2-weighted", "naïve", "X", "a", "(left)", "½"]
ODD = ["<image>", "</s>", "<s>", "<unk>", "###", "\n", "  ", "\t", " ", "USER:", "ASSISTANT: ", "[INST]", "[/INST] ", "### ", "Human:",
       "\u00a0", "▁", "<im_end", "\x00", "ｆｕｌｌ", "\u200d"]  # fmt: skip


def random_conversation(rng, odd):
    def text():
        return "".join(rng.choice(ODD) if rng.random() < odd else rng.choice(WORDS) + rng.choice([" ", "", "\n"])
                       for _ in range(rng.randrange(8)))
    first = rng.choice(["{}\n<image>", "<image>\n{}", "{}", "{} <image> {}"])
    turns = [first.format(text(), text()) or "Q", *(text() for _ in range(rng.randrange(1, 9)))]
    return talk(*turns)


@pytest.mark.parametrize("name", TRAINING)
def test_random_conversations_are_the_originals(name, model):
    rng, processor, supervised = random.Random(name), load(model, name, image_size=56), 0
    for n in range(30):
        _, labels = compare(processor, model, name, random_conversation(rng, odd=0.15 if n % 2 else 0.03))
        supervised += any(label != IGNORE for label in labels)
    assert supervised >= (30 if TEMPLATES[name].labels == "v0" else 5)


@pytest.mark.parametrize("name", ["v1.0:v0", "v1.0:simple", "v1.0:vicuna_v1_1"])
def test_v1_without_start_and_end_tokens(name, llama_tokenizer):
    config = preset("v1-7b").replace(use_start_end=False, template=name)
    processor, rng = Processor(config, tokenizer_of(llama_tokenizer)), random.Random(0)
    for conversation in [FRONT, BACK, *(random_conversation(rng, odd=0.1) for _ in range(20))]:
        compare(processor, llama_tokenizer, name, conversation, patches=256, start_end=False)


def test_not_legacy_is_the_originals(llama_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(llama_tokenizer)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    rng = random.Random(1)
    for name in ("up:vicuna_v1", "up:llava_v0", "up:mistral_instruct", "v1.5:vicuna_v1"):
        processor = Processor.load(tmp_path, name)
        for conversation in [FRONT, BACK, *(random_conversation(rng, odd=0.05) for _ in range(20))]:
            compare(processor, llama_tokenizer, name, conversation, legacy=False)
    processor = Processor.load(tmp_path, "v1.0:v1", image_size=56)  # v1.0's class never heard of it
    compare(processor, llama_tokenizer, "v1.0:vicuna_v1_1", FRONT)


@pytest.mark.parametrize("name", ["v1.0:v0", "v1.0:vicuna_v1_1", "up:vicuna_v1", "up:llava_v0"])
@pytest.mark.parametrize("max_length", [20, 45, 60, 90, 300])
def test_samples_that_are_too_long_are_cut_as_the_originals(name, max_length, llama_tokenizer):
    """The original cuts what it has tokenized (v1.0) or leaves that to the model (upstream); nothing is unlearnt by a cut."""
    processor, rng = load(llama_tokenizer, name, image_size=56), random.Random(max_length)
    for conversation in [FRONT, BACK, *(random_conversation(rng, odd=0.1) for _ in range(20))]:
        ids, labels = original_text.example(name, llama_tokenizer, conversation, patches=16, max_length=max_length)
        found = processor.training_example(conversation, max_length=max_length)
        if name in V1:
            found = processor.expand(*found)
            patch = original_text.v1_tokenizer(name, llama_tokenizer).added[original_text.PATCH]
            ids, labels = [IMAGE_TOKEN if i == patch else i for i in ids], [IGNORE if i == patch else i for i in labels]
        assert [list(row[:max_length]) for row in found] == [ids[:max_length], labels[:max_length]]


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "vqa_rad", "slake", "pathvqa"])
def test_rows_of_v1s_recipes(recipe, llama_tokenizer):
    """From a record to a row of positions, with the template that the recipe of each stage names."""
    from llavamed_jax.cli.common import load_config
    template = load_config(f"configs/{recipe}.py:v1", []).template
    assert get_template(template).is_for_training_only  # such a run leaves the checkpoint's own template to ask with
    processor = Processor(preset("v1-7b"), tokenizer_of(llama_tokenizer), template)
    row = tokenize({"id": 1, "image": ["x.png"], "conversations": BACK}, processor, 2048)
    assert (len(row.ids), row.ids.count(IMAGE_TOKEN), spans(row.labels)) == (338, 256, [(33, 35), (303, 318), (328, 338)])
    cut = tokenize({"id": 1, "image": ["x.png"], "conversations": BACK}, processor, 200)  # the image begins at position 45
    assert cut.is_truncated and cut.images == [] and IMAGE_TOKEN not in cut.ids


# ---- what is learnt -------------------------------------------------------------------------------------------------


def plain_talk(rng):
    """Words alone, the image before the question: what every template can hold, and no count of ids goes wrong."""
    text = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
    turns = [text() for _ in range(2 * rng.randrange(1, 6))]
    return talk(*(["<image>\n" + turns[0], *turns[1:]] if rng.random() < 0.7 else turns))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_labelled_ids_are_the_assistants_words(name, model):
    """...and what the original labels besides: v0's "###" and "### Assistant: ", else the end-of-sequence id."""
    template = get_template(name)
    if template.labels == "v0" and "mistral" in str(model):
        pytest.skip("v0's procedure reckons with two pieces of \"###\", which Mistral has as one")
    rng, processor = random.Random(name), load(model, name, image_size=56)
    for _ in range(60):
        conversation = plain_talk(rng)
        if name in PLAIN:
            conversation = talk("<image>", conversation[1]["value"])
        ids, labels = processor.training_example(conversation)
        answers = [turn["value"] for turn in conversation[1::2]]
        learnt = [processor.decode(ids[a:b]) for a, b in spans(labels)]
        if template.labels == "v0":
            answered = [f"### {template.roles[1]}: {answer}\n###" for answer in answers]
            assert learnt == ["###", *answered[:-1], answered[-1] + " "]
        elif template.labels == "plain":
            assert learnt == [answers[0] + "\n"]
        else:  # llama_2 learns the blank before the end of a sequence too
            assert learnt == [answer + (" " if template.labels == "llama_2" else "") for answer in answers]
            assert all(ids[b - 1] == 2 for _, b in spans(labels))
