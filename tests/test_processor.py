"""Processor: every kind of directory, prompts from chat messages, expansion of images, and what it refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.image_positions import expand_images
from llavamed_jax.text.templates import TEMPLATES, get_template
from llavamed_jax.text.tokenizer import Tokenizer

DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs" / "prompts.md"
ASK = [{"role": "user", "content": [{"type": "text", "text": "What is shown in this image?"}, {"type": "image", "image": "x.png"}]}]
LLAVA_HF_TEMPLATE = (  # as llava-hf/llava-1.5-7b-hf ships it
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}").replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def mistral(mistral_tokenizer):
    return Processor.load(mistral_tokenizer, image_size=336)


def directory(path, config, tokenizer):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if tokenizer:
        shutil.copyfile(tokenizer, path / "tokenizer.model")
    return path


def test_known_prompt_and_ids(mistral):
    text = mistral.prompt(ASK)
    assert text == "[INST] <image>\nWhat is shown in this image? [/INST]"
    ids = mistral.encode(text)
    assert ids == [1, 733, 16289, 28793, 28705, -200, 28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]
    assert len(mistral.expand(ids)) == len(ids) + 575
    assert mistral.decode([*mistral.encode("Yes."), 2]) == "Yes."


def test_prompt_of_a_longer_talk_with_a_system_text(mistral):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nQ1"},
                {"role": "assistant", "content": "A1"}, {"role": "user", "content": [{"type": "text", "text": "Q2"}]}]
    assert mistral.prompt(messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]"


def test_markers_in_a_text_keep_their_place(mistral):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    content = [image, image, {"type": "text", "text": "Compare <image> and <image>."}]
    assert mistral.prompt([{"role": "user", "content": content}]) == "[INST] Compare <image> and <image>. [/INST]"
    two = [image, {"type": "text", "text": " Same? "}, image]
    assert mistral.prompt([{"role": "user", "content": two}]) == "[INST] <image>\n<image>\nSame? [/INST]"


@pytest.mark.parametrize("messages, sentence", [
    ([{"role": "user", "content": [*ASK[0]["content"], {"type": "text", "text": "<image> <image>"}]}],
     "1 images for 2 <image> markers"),
    ([{"role": "user", "content": "<image> Q"}, {"role": "assistant", "content": "A"}, *ASK], "1 images for 2 <image> markers"),
    ([{"role": "assistant", "content": "A"}], "message 0 has the role assistant; user and"),
    ([*ASK, {"role": "assistant", "content": "A"}], "a user message to answer was expected last"),
    ([{"role": "tool", "content": "A"}], "has the role 'tool'"), ([*ASK, {"role": "system", "content": "S"}], "has the role system; it must be the first"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type 'audio'"), ([], "a user message to answer was expected last"),
    ([{"role": "user", "content": None}], "the content None"), ("hello", "a list of objects"),
    ([{"role": "system", "content": "<image>"}, *ASK], "1 images for 2 <image> markers"),
    ([{"role": "user", "content": [{"type": "image", "image": None}]}], "a part of type 'image'; text, image or image_url with its"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}], "a part of type 'image_url'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], "a part of type 'image_url'"),
    ([{"role": "user", "content": {"x": "y" * 10**6}}], "the content {'x': 'y{73}…; a text or"),
    ([{"role": "r" * 10**6, "content": "x"}], "has the role 'r{79}…; system")])
def test_bad_messages(mistral, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistral.prompt(messages)


def test_what_is_no_text_is_not_encoded(mistral):
    for text, sentence in ((None, "the text to encode is None; a str was expected"), (b"x", "is b'x'; a str"), (["x"], "is \\['x'\\]"),
                           ("ab\ud800", "half a surrogate pair at character 2; whole characters")):
        with pytest.raises(UserError, match=sentence):
            mistral.encode(text)


@pytest.mark.parametrize("sources", [None, 5, "x.png", b"x", Path("x.png"), Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8),
                                     np.zeros((4, 4), np.uint8)])
def test_one_image_is_a_list_of_one(mistral, sources):
    with pytest.raises(UserError, match=f"given as a {type(sources).__name__}; a list of images was expected"):
        mistral.images(sources)


def test_expand():
    assert expand_images([1, IMAGE_TOKEN, 5], 3) == [1, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 5]
    expanded = [1, *[IMAGE_TOKEN] * 3, 5, *[IMAGE_TOKEN] * 6]
    assert expand_images(expanded, 3) == expanded
    assert expand_images([IMAGE_TOKEN, IMAGE_TOKEN], 3) == [IMAGE_TOKEN] * 6
    assert expand_images([1, IMAGE_TOKEN, 5], 2, [IGNORE, IGNORE, 5]) == ([1, IMAGE_TOKEN, IMAGE_TOKEN, 5], [IGNORE] * 3 + [5])
    with pytest.raises(ValueError, match="position 1 begins a run of 4 image tokens; 1 or 3 per image"):
        expand_images([1, *[IMAGE_TOKEN] * 4], 3)
    with pytest.raises(ValueError, match="2 labels were given for 1 ids"):
        expand_images([1], 3, [1, 2])


def test_training_example_counts_images(mistral):
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]
    assert mistral.training_example(turns)[0].count(IMAGE_TOKEN) == 1  # as upstream collapses it
    assert mistral.training_example(turns, num_images=2)[0].count(IMAGE_TOKEN) == 2
    with pytest.raises(ValueError, match="has 3 images for 2 <image> markers"):
        mistral.training_example(turns, num_images=3)


def test_several_images_of_a_turn_stay_behind_their_labels_as_when_they_are_asked(mistral):
    text = "A: <image>\nB: <image>\nWhich?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]
    asked = mistral.encode(mistral.question(text, ["a.png", "b.png"]))
    assert mistral.training_example(turns, num_images=2)[0][:len(asked)] == asked
    parts = [len(mistral.encode(mistral.prompt([{"role": "user", "content": each}]))) for each in ("A: ", "A: \nB: ")]
    first, second = (i for i, each in enumerate(asked) if each == IMAGE_TOKEN)
    assert second - first > parts[1] - parts[0] > 0, "the label of the second image stands between the images"


def test_start_and_end_tokens_wrap_images(mistral_tokenizer, tmp_path):
    config = preset("v15-7b").replace(use_start_end=True)
    path = directory(tmp_path / "model", config.to_dict(), mistral_tokenizer)
    (path / "added_tokens.json").write_text('{"<im_start>": 32000, "<im_end>": 32001}')
    processor = Processor.load(path)
    ids = processor.encode(processor.prompt(ASK))
    at = ids.index(IMAGE_TOKEN)
    assert ids[at - 1:at + 2] == [32000, IMAGE_TOKEN, 32001]
    ids, _ = processor.training_example([{"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "A"}])
    at = ids.index(IMAGE_TOKEN)
    assert ids[at - 1:at + 2] == [32000, IMAGE_TOKEN, 32001]


def test_images(mistral, tmp_path):
    Image.new("RGB", (20, 10), (122, 116, 104)).save(tmp_path / "x.png")
    array = mistral.images([tmp_path / "x.png", np.zeros((4, 4, 3), np.uint8)])
    assert array.shape == (2, 336, 336, 3) and array.dtype == np.float32
    assert np.abs(array[0]).max() < 0.02  # the mean colour throughout, padding included
    assert mistral.images([]).shape == (0, 336, 336, 3)
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    assert np.abs(mistral.images([wide], mode="square") - mistral.images([wide])).max() > 1


@pytest.mark.parametrize("name", ["small", "v15-7b", "llava15-7b"])
@pytest.mark.parametrize("kind", ["tree", "step", "llava", "transformers"])
def test_every_kind_of_directory(mistral_tokenizer, tmp_path, name, kind):
    config = preset(name)
    if kind in ("tree", "step"):
        directory(tmp_path / "model", config.to_dict(), mistral_tokenizer)
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
        path = tmp_path if kind == "tree" else tmp_path / "checkpoints" / "3"
    else:
        path = directory(tmp_path / "m", llava_to_hf(config, kind), mistral_tokenizer)
    processor = Processor.load(path)
    assert processor.template.name == config.template
    assert (processor.tokens_per_image, processor.image_size, processor.image_mode, processor.max_length) == (
        config.tokens_per_image, config.vision.image_size, config.image_aspect_ratio, config.max_length)
    assert len(processor.encode(processor.prompt(ASK))) > 10


@pytest.mark.parametrize("name, source, expected", [
    ("v15-7b", "llava_mistral", "v1.5:mistral_instruct"), ("llava15-7b", "llava_llama", "up:vicuna_v1"),
    ("v15-7b", "transformers", "v1.5:mistral_instruct"), ("llava15-7b", "transformers", "up:vicuna_v1"),
    ("v1-7b", "llava", "v1.0:multimodal")])
def test_template_by_model_type(name, source, expected):
    assert Processor(preset(name).replace(template=None, source=source)).template_name == expected


@pytest.mark.parametrize("name, changes, template, wanted", [
    ("v1-7b", {}, None, (32001, 32002)), ("v1-7b", {}, "v1.0:v0", (32001, 32002)), ("v1-7b", {"vocab_size": 32004}, None, (32002, 32003))])
def test_the_ids_of_v1s_image_tokens_follow_from_the_models_rows(name, changes, template, wanted, llama_tokenizer):
    cfg = preset(name)
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, **changes))
    ids = Processor(cfg, Tokenizer.load(llama_tokenizer), template).encode("Q\n<image>")
    assert ids[-3:] == [wanted[0], IMAGE_TOKEN, wanted[1]]


def test_v1s_image_tokens_come_from_the_checkpoints_files(llama_tokenizer, tmp_path):
    path = directory(tmp_path / "model", preset("v1-7b").to_dict(), llama_tokenizer)
    (path / "added_tokens.json").write_text('{"<im_patch>": 32002, "<im_start>": 32000, "<im_end>": 32001}')
    processor = Processor.load(path)
    ids = processor.encode(processor.prompt(ASK))
    at = ids.index(IMAGE_TOKEN)
    assert (ids[at - 1], ids[at + 1]) == (32000, 32001) and len(processor.expand(ids)) == len(ids) + 255
    assert processor.decode([*ids, 32000]).startswith("A chat" if "simple" in processor.template_name else "You are LLaVA-Med")


def test_a_vocabulary_without_rows_for_v1s_image_tokens_is_said(llama_tokenizer):
    cfg = preset("v1-7b")
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, vocab_size=32000))
    with pytest.raises(UserError, match="the embedding table of 32000 rows has no free rows for them; `python -m convert build --add_image_tokens`"):
        Processor(cfg, Tokenizer.load(llama_tokenizer)).encode("x")


def test_v1_is_evaluated_with_another_template_where_none_is_named(llama_tokenizer):
    tokenizer = Tokenizer.load(llama_tokenizer)
    chat = Processor(preset("v1-7b"), tokenizer)
    asked = chat.for_evaluation()
    assert (chat.template_name, asked.template_name) == ("v1.0:multimodal", "v1.0:simple")
    assert asked.prompt(ASK).endswith("###Human: What is shown in this image?\n<image>###Assistant:")
    assert asked.prompt(ASK).startswith("A chat") and chat.prompt(ASK).startswith("You are LLaVA-Med")
    for processor in (Processor(preset("v1-7b"), tokenizer, "v1.0:multimodal"), Processor(preset("v15-7b"), tokenizer)):
        assert processor.for_evaluation() is processor


@pytest.mark.parametrize("template, stop", [("v1.0:multimodal", ("###",)), ("v1.0:v0", ("###",)), ("up:llava_v0", ("###",)),
                                            ("v1.0:v1", ()), ("v1.5:mistral_instruct", ())])
def test_answers_end_where_the_template_ends_them(template, stop, mistral_tokenizer):
    from llavamed_jax.assistant import LlavaMed
    model = object.__new__(LlavaMed)  # the stream of text needs the processor alone
    model.processor = Processor.load(mistral_tokenizer, template)
    assert model.processor.stop == stop
    stream = model._text_streams("stop here")()
    stream.push(model.processor.tokenizer.encode("Yes, it is.\n### Human: And?", bos=False))
    assert stream.is_stopped == bool(stop) and stream.text == ("Yes, it is." if stop else "Yes, it is.\n### Human: And?")
    stream = model._text_streams(["stop here"])()
    stream.push(model.processor.tokenizer.encode("Do stop here.", bos=False))
    assert stream.text == "Do"


def test_template_argument_and_config_come_first(mistral_tokenizer, tmp_path):
    path = directory(tmp_path / "model", preset("v15-7b").replace(template="up:plain").to_dict(), mistral_tokenizer)
    assert Processor.load(path).template.name == "up:plain"
    assert Processor.load(path, template="vicuna_v1").template.name == "v1.5:vicuna_v1"
    with pytest.raises(UserError, match="the template 'nonsense' does not exist"):
        Processor.load(path, template="nonsense")


def test_chat_template_of_a_transformers_checkpoint(mistral_tokenizer, tmp_path):
    config = llava_to_hf(preset("llava15-7b"), "transformers")
    del config["llavamed_jax"]
    path = directory(tmp_path / "m", config, mistral_tokenizer)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_HF_TEMPLATE}))
    pytest.importorskip("jinja2")
    processor = Processor.load(path)
    assert processor.image_mode == "square"  # transformers' processor cuts the centre out
    assert processor.prompt(ASK) == "USER: <image>\nWhat is shown in this image? ASSISTANT:"
    with pytest.raises(UserError, match="its own chat template, which does not define labels"):
        processor.training_example([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])
    assert Processor.load(path, template="up:vicuna_v1").prompt(ASK).startswith("A chat between a curious user")
    begun = {"chat_template": "{{ bos_token }}" + LLAVA_HF_TEMPLATE, "bos_token": "<s>"}
    (path / "chat_template.json").write_text(json.dumps(begun))  # as many write it: a sequence still begins once
    ids = Processor.load(path).encode(Processor.load(path).prompt(ASK))
    assert ids.count(1) == 1 and ids == processor.encode(processor.prompt(ASK))


def test_an_original_directory_ignores_the_language_models_chat_template(mistral_tokenizer, tmp_path):
    path = directory(tmp_path / "m", llava_to_hf(preset("v15-7b"), "llava"), mistral_tokenizer)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'text only' }}", "legacy": True}))
    assert Processor.load(path).prompt(ASK).startswith("[INST] <image>")


def test_statistics_come_from_the_preprocessor(mistral_tokenizer, tmp_path):
    path = directory(tmp_path / "model", preset("small").to_dict(), mistral_tokenizer)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    np.testing.assert_allclose(Processor.load(path, image_mode="square").images([np.full((4, 4, 3), 255, np.uint8)]), 1)


def test_without_tokenizer_files_only_text_calls_fail(tmp_path):
    processor = Processor.load(directory(tmp_path / "model", preset("small").to_dict(), None))
    assert processor.expand([1, IMAGE_TOKEN]) == [1] + [IMAGE_TOKEN] * 36
    assert processor.images([np.zeros((4, 4, 3), np.uint8)]).shape == (1, 96, 96, 3)
    for call in (lambda: processor.encode("x"), lambda: processor.decode([1]),
                 lambda: processor.training_example([{"from": "human", "value": "Q"}])):
        with pytest.raises(UserError, match="no tokenizer files; give one with tokenizer=PATH"):
            call()


def test_another_tokenizer_and_presets(mistral_tokenizer, tmp_path):
    path = directory(tmp_path / "model", preset("small").to_dict(), None)
    assert Processor.load(path, tokenizer=mistral_tokenizer).encode("x")[0] == 1
    assert Processor.load("preset:v15-7b", tokenizer=mistral_tokenizer).tokens_per_image == 576


def test_bare_tokenizer_says_what_it_does_not_know(mistral_tokenizer, tmp_path):
    processor = Processor.load(mistral_tokenizer)
    with pytest.raises(ValueError, match="give image_size"):
        processor.images([])
    with pytest.raises(ValueError, match="give image_size"):
        processor.expand([IMAGE_TOKEN])
    for size in (0, -336, 13, 336.0, "336", True):
        with pytest.raises(UserError, match=f"the image size is {size!r}; a whole number of at least 14 was expected"):
            Processor.load(mistral_tokenizer, image_size=size)
    for mode in ("", "keep"):
        with pytest.raises(UserError, match=f"the image mode is '{mode}'; pad or square"):
            Processor.load(mistral_tokenizer, image_size=336).images([Image.new("L", (4, 4))], mode=mode)
    with pytest.raises(UserError, match="the image mode is 'tiles'; pad or square was expected"):
        Processor.load(mistral_tokenizer, image_mode="tiles")
    with pytest.raises(UserError, match="does not exist; a checkpoint's directory or a tokenizer was expected"):
        Processor.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="the image size is 100; 96, the size of this model's tower"):
        Processor(preset("small"), image_size=100)


def test_a_bare_tokenizer_has_every_public_attribute():
    """`eos_ids` asked a config that is not there."""
    processor = Processor.load(DOCUMENTATION.parent.parent / "samples" / "vqa_rad" / "tokenizer.model")
    for name in dir(processor):
        if not name.startswith("_") and name != "template":  # none was named, which is said
            getattr(processor, name)
    assert processor.eos_ids == (processor.tokenizer.eos_id,) == (2,)


def test_the_example_of_the_documentation(mistral_tokenizer, tmp_path, monkeypatch):
    code = DOCUMENTATION.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    shutil.copyfile(mistral_tokenizer, tmp_path / "tokenizer.model")
    Image.new("L", (30, 20)).save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["text"] == "[INST] <image>\nIs it normal? [/INST]" and found["pixels"].shape == (1, 336, 336, 3)
    assert len(found["positions"]) == len(found["labels"]) == len(found["ids"]) + 575
    assert found["p"].decode(label for label in found["labels"] if label != IGNORE) == "Yes. "


def test_every_template_of_the_documentation():
    rows = [line.split("|")[1] for line in DOCUMENTATION.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {get_template(name).name for row in rows for name in re.findall("`([^`]+)`", row)}
    named |= {name.replace("v1.5:", "up:") for name in named}
    assert named == set(TEMPLATES)
