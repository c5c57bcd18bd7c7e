"""The templates that language models are released with: prompts, ids, labels, stop ids and exports, beside their own chat templates.

The chat templates are written out in `support/byte_level.py`; transformers renders and encodes them there.
"""

import itertools
import json
import random
from dataclasses import replace

import pytest

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.templates import get_template
from llavamed_jax.text.tokenizer import Tokenizer
from tests.support import byte_level

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TALKS = {
    "one question": ["Is it normal?", "Yes."],
    "five turns": ["Is it?", "No.", "Where is it?", "In the left lung.", "How large?", "2.5 cm, or 25 mm."],
    "blanks": ["  Is it \n", "\n\n Yes \n", "\n", " \n \n x", "Q\n\n", "\n"],
    "empty texts": ["", "", "Q", "", "", "A"],
    "special tokens in a text": ["What is <|im_end|> or <|eot_id|>?", "An end: <|im_end|>, <|eot_id|>.", "<|im_start|>user\n", "A<|im_start|>"],
    "not Latin": ["胸部X光片显示什么？", "右肺有阴影。", "Где это? e\u0301", "В лёгком — 5 µm 🫁."],
    "header words": ["user\nassistant\n", "assistant\n\nsystem"],
}
ANSWERS_END = {"hf:chatml": "<|im_end|>", "hf:qwen": "<|im_end|>", "hf:qwen3": "<|im_end|>", "hf:llama3": "<|eot_id|>",
               "hf:llama3.1": "<|eot_id|>", "up:qwen_1_5": "<|im_end|>", "hf:chatml_no_system": "<|im_end|>",
               "hf:olmo2": "<|endoftext|>"}


@pytest.fixture(scope="module", params=byte_level.TEMPLATES)
def pair(request, tmp_path_factory):
    """A processor, and transformers' tokenizer of the same files with the model's own chat template."""
    kind = byte_level.TEMPLATES[request.param]
    directory = byte_level.save(tmp_path_factory.mktemp(kind), kind)
    return Processor.load(directory, request.param, image_size=56), byte_level.theirs(directory, kind)


def messages_of(texts, system=None):
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


def conversation_of(texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def rendered(theirs, messages, is_question):
    """The text and ids of the model's own chat template; the begin of a sequence is the tokenizer's here."""
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_question, enable_thinking=False)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=is_question, enable_thinking=False, return_dict=False)
    return text.removeprefix("<|begin_of_text|>"), ids


@pytest.mark.parametrize("system", [None, "Answer in one word.", " Be brief.\n", ""])
@pytest.mark.parametrize("talk", TALKS)
def test_prompts_and_ids_are_those_of_the_models_own_template(pair, talk, system):
    processor, theirs = pair
    for length in range(1, len(TALKS[talk]) + 1, 2):
        messages = messages_of(TALKS[talk][:length], system)
        text, ids = rendered(theirs, messages, is_question=True)
        assert processor.prompt(messages) == text
        assert processor.encode(text) == ids


@pytest.mark.parametrize("talk", TALKS)
def test_training_ids_are_those_of_the_models_own_template(pair, talk):
    processor, theirs = pair
    for length in range(2, len(TALKS[talk]) + 1, 2):
        ids, labels = processor.training_example(conversation_of(TALKS[talk][:length]))
        assert ids == rendered(theirs, messages_of(TALKS[talk][:length]), is_question=False)[1]
        assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


WORDS = ["Yes", "no.", " the", "effusion,", "μm", "胸部", "🫁", "10%", " \n", "\n\n", "assistant", "2.5", "<think>", "user\n"]


def labelled(tokenizer, texts, is_trimmed, thinks):
    """Ids and labels from the offsets of transformers' tokens: an answer's text and the token behind it, and nothing else."""
    talk, end = messages_of(texts), None
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans, at = encoded["input_ids"], encoded["offset_mapping"], 0
    wanted = [IGNORE] * len(ids)
    ends = {"<|im_start|>assistant\n": "<|im_end|>", "<|start_header_id|>assistant<|end_header_id|>\n\n": "<|eot_id|>",
            "<|assistant|>\n": "<|endoftext|>"}
    for n, answer in enumerate(texts[1::2]):
        header, end = next(pair for pair in ends.items() if pair[0] in text)
        at = text.index(header, text.index(texts[2 * n].strip() if is_trimmed else texts[2 * n], at)) + len(header)
        is_last = 2 * n + 2 == len(texts)
        if thinks and is_last:
            at += len("<think>\n\n</think>\n\n")
            answer = answer.lstrip("\n")
        answer = answer.strip() if is_trimmed else answer
        assert text[at:].startswith(answer + end)
        stop = at + len(answer + end)
        for k, (left, right) in enumerate(spans):
            if right > at and left < stop:
                wanted[k] = ids[k]
        at = stop
    return ids, wanted


def test_labels_are_the_answers_and_their_end_tokens(pair):
    processor, theirs = pair
    form, rng, supervised = processor.template.form, random.Random(7), 0
    for _ in range(150):
        texts = ["".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 7))) for _ in range(2 * rng.randrange(1, 4))]
        texts = [text if i % 2 else f"{i}:{text}?" for i, text in enumerate(texts)]  # each question can be found
        wanted = labelled(theirs, texts, form.is_trimmed, form.thought_end is not None)
        found = processor.training_example(conversation_of(texts))
        assert found == wanted, texts
        supervised += sum(label != IGNORE for label in found[1])
    assert supervised > 1000


def test_what_is_learnt_as_text(pair):
    processor, _ = pair
    end = ANSWERS_END[processor.template_name]
    ids, labels = processor.training_example(conversation_of(["<image>\nIs it?", "No.", "Where?", "In the left lung."]), 1)
    runs = [[label for _, label in run] for is_out, run in
            itertools.groupby(enumerate(labels), lambda pair: pair[1] == IGNORE) if not is_out]
    assert [processor.decode(run) for run in runs] == ["No.", "In the left lung."]
    assert [run[-1] for run in runs] == [processor.tokenizer.id_of(end)] * 2
    assert ids.count(IMAGE_TOKEN) == 1
    positions, expanded = processor.expand(ids, labels)
    assert len(positions) == len(ids) + 15 and [i for i in expanded if i != IGNORE] == [i for run in runs for i in run]


def test_a_mask_that_is_off_by_one_is_found(pair, monkeypatch):
    """The check above sees a label that is missing, one too many, and an end that is not learnt."""
    from llavamed_jax.text import conversation
    processor, theirs = pair
    texts = TALKS["five turns"]
    wanted = labelled(theirs, texts, processor.template.form.is_trimmed, processor.template.form.thought_end is not None)
    assert processor.training_example(conversation_of(texts)) == wanted
    right = conversation._outside_of_answers
    for shift in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        monkeypatch.setattr(conversation, "_outside_of_answers", lambda *args, shift=shift: (
            slice(span.start and span.start + shift[0], span.stop and span.stop + shift[1]) for span in right(*args)))
        assert processor.training_example(conversation_of(texts)) != wanted


def test_the_prompts_as_text():
    asked = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": " Is it? "}]}]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    smol = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    qwen = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    chatml = "<|im_start|>user\n<image>\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    llama = header("user") + "<image>\nIs it?<|eot_id|>" + header("assistant")
    day = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    olmo = "<|endoftext|><|user|>\n<image>\nIs it?\n<|assistant|>\n"
    wanted = {"olmo2": olmo, "chatml": f"<|im_start|>system\n{smol}<|im_end|>\n{chatml}", "qwen": f"<|im_start|>system\n{qwen}<|im_end|>\n{chatml}",
              "qwen3": chatml + "<think>\n\n</think>\n\n", "llama3": llama, "llama3.1": f"{header('system')}{day}<|eot_id|>{llama}"}
    for name, text in wanted.items():
        assert get_template(name).name == f"hf:{name}"
        assert Processor(None, None, name, image_size=56).prompt(asked) == text


def test_qwen3s_answers_lose_their_reasoning_as_in_its_own_template(tmp_path):
    directory = byte_level.save(tmp_path, "qwen3")
    processor, theirs = Processor.load(directory, "qwen3"), byte_level.theirs(directory, "qwen3")
    thoughtful = messages_of(["Q", "<think>\nSee.\n\n</think>\n\nYes."])
    assert "<think>\nSee.\n</think>\n\nYes.<|im_end|>" in rendered(theirs, thoughtful, is_question=False)[0]  # its last answer keeps it
    for answer in ("<think>\nLet me see.\n</think>\n\nYes.", "<think>a</think>b</think>\n\n\nYes.", "a </think>", "<think> open"):
        messages = messages_of(["Q", answer, "R"])
        assert processor.prompt(messages) == rendered(theirs, messages, is_question=True)[0]
    for texts in (["Q", "<think>\nSee.\n</think>\n\nYes."], ["Q", "</think>", "R", "A"]):
        with pytest.raises(UserError, match="an answer of the conversation has </think>, and the template hf:qwen3 writes an empty think "
                                            "block before an answer; answers without reasoning were expected"):
            processor.training_example(conversation_of(texts))


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_the_templates_tokens_is_refused(pair, tmp_path):
    processor, _ = pair
    other = "smollm2" if "header" in processor.template.form.tokens[0] else "llama3"
    wrong = Processor.load(byte_level.save(tmp_path, other), processor.template_name, image_size=56)
    for use in (lambda: wrong.encode("Q"), lambda: wrong.training_example(conversation_of(["Q", "A"]))):
        with pytest.raises(UserError, match=f"the template {processor.template_name} is written with .*, and the tokenizer .*tokenizer.json "
                                            "has no .*; the tokenizer that the language model was trained with, or another template") as error:
            use()
        assert "\n" not in str(error.value)


def test_qwens_tokenizer_of_before_has_no_think_tokens(tmp_path):
    processor = Processor.load(byte_level.save(tmp_path, "qwen2.5"), "qwen3")
    with pytest.raises(UserError, match="has no <think>, no </think>; "):
        processor.encode("Q")
    assert Processor.load(tmp_path, "qwen").encode("Q")


@pytest.mark.parametrize("kind", byte_level.KINDS)
def test_directories_without_a_sentencepiece_model_are_read(kind, tmp_path):
    directory = byte_level.save(tmp_path, kind)
    ours, theirs = Tokenizer.load(directory), byte_level.theirs(directory, kind)
    begins = kind.startswith("llama3")
    assert (ours.has_bos, ours.vocab_size, ours.unk_id) == (begins, len(theirs), theirs.unk_token_id)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    rng = random.Random(kind)
    for _ in range(300):
        text = "".join(rng.choice([*WORDS, "<|im_end|>", "<|eot_id|>", "<tool_call>", "\t", "é", "e\u0301", "123456"]) for _ in range(9))
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def config_of(eos=(0,), rows=2048, **changes):
    cfg = preset("small")
    return cfg.replace(decoder=replace(cfg.decoder, vocab_size=rows, **cfg.decoder.ends_with(eos)), **changes)


def test_answers_end_at_the_templates_end_token(pair):
    """A base model's config and tokenizer name `<|endoftext|>`; the template's end token ends an answer too."""
    processor, _ = pair
    tokenizer, name = processor.tokenizer, processor.template_name
    end = tokenizer.id_of(ANSWERS_END[name])
    assert tokenizer.eos_id == end and processor.eos_ids == (end,)
    base = Processor(config_of((7, 9)), tokenizer, name)
    assert base.eos_ids == (7, 9, end)
    assert Processor(config_of((7, end)), tokenizer, name).eos_ids == (7, end)
    assert Processor(config_of((7,)), None, name).eos_ids == (7,)
    assert Processor(config_of((0,), rows=max(end, 1)), tokenizer, name).eos_ids == (0,)


# ---- exports ---------------------------------------------------------------------------------------------------------


def exported(name):
    from llavamed_jax.checkpoints.export.chat_template import chat_template
    return chat_template(replace(preset("v15-7b"), template=name))


@pytest.mark.parametrize("is_question", [True, False])
@pytest.mark.parametrize("system", [None, "Answer in one word.", " Be brief.\n", ""])
def test_exported_chat_templates_write_the_same(pair, system, is_question):
    from transformers.utils.chat_template_utils import render_jinja_template
    processor, theirs = pair
    source = exported(processor.template_name)
    talks = [*TALKS.values(), ["Q", "<think>\nSee.\n</think>\n\nYes.", "R", "\n\nA"]]
    for texts in talks:
        for length in range(1 if is_question else 2, len(texts) + 1, 2):
            messages = messages_of(texts[:length], system)
            found = render_jinja_template([messages], chat_template=source, add_generation_prompt=is_question)[0][0]
            assert found == rendered(theirs, messages, is_question)[0]


def test_exported_chat_templates_place_images(pair):
    from transformers.utils.chat_template_utils import render_jinja_template
    processor, _ = pair
    parts = [{"type": "text", "text": " Is it? "}, {"type": "image"}, {"type": "image"}]
    filled = [part | {"image": "x.png"} if part["type"] == "image" else part for part in parts]
    found = render_jinja_template([[{"role": "user", "content": parts}]], chat_template=exported(processor.template_name),
                                  add_generation_prompt=True)[0][0]
    assert found == processor.prompt([{"role": "user", "content": filled}]) and "<image>\n<image>\nIs it?" in found


def test_an_export_brings_tokenizer_and_template(pair, tmp_path):
    """The processor of an exported model gives transformers' users our prompt and our ids, with a token for images."""
    from llavamed_jax.checkpoints.export.directory import export
    from llavamed_jax.checkpoints.random import random_checkpoint
    processor, _ = pair
    rows = processor.tokenizer.vocab_size
    files = {name: processor.tokenizer.file.parent / name for name in ("tokenizer.json", "tokenizer_config.json")}
    checkpoint = random_checkpoint(config_of((0,), rows, template=processor.template_name)).replace(files=files)
    export(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    ours = Processor.load(tmp_path / "hf")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it normal, 25 mm?"}]}]
    filled = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, messages[0]["content"][1]]}]
    wanted = ours.prompt(filled)
    assert wanted == processor.prompt(filled) == theirs.apply_chat_template(messages, add_generation_prompt=True)
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"))
    assert [rows if i == IMAGE_TOKEN else i for i in ours.encode(wanted)] == backend(wanted)["input_ids"]
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == ANSWERS_END[processor.template_name]
