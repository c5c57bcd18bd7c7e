"""`llavamed_jax.load` and what it returns, on a tiny checkpoint on disk in transformers' layout, against transformers."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

import llavamed_jax as lm
from llavamed_jax import chat
from llavamed_jax.assistant import completion
from llavamed_jax.errors import UserError
from llavamed_jax.generation.text_stream import TextStream
from tests.support import hf, programs

torch = hf.torch

P = 16
VOCAB = 1024
TOKENIZER = Path(__file__).parent.parent / "samples" / "vqa_rad" / "tokenizer.model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A transformers model on disk with a tokenizer of 1,024 pieces, and the model."""
    path = tmp_path_factory.mktemp("assistant") / "tiny"
    model, _ = hf.llava(text=dict(vocab_size=VOCAB), seed=11)
    model.save_pretrained(path)
    shutil.copy(TOKENIZER, path / "tokenizer.model")
    return path, model


@pytest.fixture(scope="module")
def assistant(saved):
    with programs.shared():
        yield lm.load(saved[0], template="v1.5:mistral_instruct")


TWO_IMAGES = [1] + [-200] * P + [9, 8, 7] + [-200] * P + [5]
LENGTH = len(TWO_IMAGES)
ROW = [1] + [-200] * P + [4, 5] + list(range(3, LENGTH - P - 2))
ROWS = np.array([[-1, -1] + ROW, ROW + [-1, -1], TWO_IMAGES])  # one shape for four tests, compiled once


def test_logits_equal_transformers(saved, assistant):
    """A padded row, a text-only row, and two images in a row."""
    ids = np.array([TWO_IMAGES, [1, 20, 30] + [-1] * (LENGTH - 3), [1] + [-200] * P + [4] + [-1] * (LENGTH - P - 2)])
    pixels = hf.images(3)
    mask = (ids != -1).astype(np.int64)
    expected = hf.torch_logits(saved[1], np.where(ids == -1, 0, ids), pixels, mask)
    got = assistant.logits(ids, pixels)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected)[mask == 1].max() <= 2e-5 * max(1, expected[mask == 1].std())
    text_only = assistant.logits([[1, 20, 30]], None)
    np.testing.assert_allclose(text_only[0], expected[1, :3], atol=2e-5)


def test_logits_on_a_mesh(saved, assistant):
    sharded = lm.load(saved[0], mesh="data=4,tp=2", template="v1.5:mistral_instruct")
    found, wanted = (each.logits(ROWS, hf.images(4)) for each in (sharded, assistant))
    np.testing.assert_allclose(found[ROWS != -1], wanted[ROWS != -1], atol=2e-5)


def test_a_mesh_of_fewer_devices_takes_the_first_ones(saved, assistant):
    """As text, with one axis or two, on a machine of eight; the logits are those of one device."""
    sharded, alike = (lm.load(saved[0], mesh=spec, template="v1.5:mistral_instruct") for spec in ("data=1,tp=2", "tp=2"))
    assert list(sharded.mesh.devices.flat) == jax.devices()[:2] and alike.mesh == sharded.mesh
    found, wanted = (each.logits(ROWS, hf.images(4)) for each in (sharded, assistant))
    np.testing.assert_allclose(found[ROWS != -1], wanted[ROWS != -1], atol=2e-5)


@pytest.mark.parametrize("ids,images,sentence", [
    ([[1, 5]], 1, r"\[0\] image positions for 1 images; 16"),
    ([[1] + [-200] * P], 2, r"\[16\] image positions for 2 images"),
    ([[1] + [-200] * (P - 1)], 1, r"\[15\] image positions"),
    ([[1, VOCAB]], 0, f"holds {VOCAB}; ids below {VOCAB}"),
    ([1, 2], 0, r"shape \(2,\)"),
    ([[1, 5, -1], [1, -1, 5]], 0, r"row 1 of input_ids has -1 between its tokens; padding was expected only on the right"),
])
def test_bad_logits_calls_are_one_sentence(assistant, ids, images, sentence):
    with pytest.raises(ValueError, match=sentence):
        assistant.logits(ids, hf.images(images) if images else None)


@pytest.mark.parametrize("row, images, sentence", [
    ([1] + [-200] * (P - 1) + [5], 1, f"the prompt has {P - 1} image tokens and 1 images; one token, or {P} in a run"),
    ([1, -200] + [5] + [-200] * P, 3, f"the prompt has {P + 1} image tokens and 3 images"),
    ([1, -200, 5], 2, "the prompt has 1 image tokens and 2 images"), ([1, 5], 1, "the prompt has 0 image tokens and 1 images"),
    ([1] + [-200] * (P + 1), 1, f"position 1 begins a run of {P + 1} image tokens")])
def test_image_tokens_are_counted_as_they_were_given(assistant, row, images, sentence):
    """A prompt cut inside an image, as in transformers' issue 36002, where 575 of 576 tokens were left."""
    with pytest.raises(ValueError, match=sentence):
        assistant.generate_tokens([row], [list(hf.images(images))])


def test_rows_padded_on_the_left_have_the_logits_of_rows_padded_on_the_right(assistant):
    """What counts is how far tokens are apart (transformers' issue 28184)."""
    left, right, _ = assistant.logits(ROWS, hf.images(3)[[0, 0, 1, 2]])
    np.testing.assert_allclose(left[2:], right[:-2], atol=2e-5)


def test_pixels_in_another_layout_or_size_are_refused(assistant):
    ids = [[1] + [-200] * P]
    for shape in ((1, 3, 28, 28), (1, 14, 14, 3), (1, 35, 28, 3)):
        with pytest.raises(ValueError, match=r"image of shape .* \(28, 28, 3\) was expected"):
            assistant.logits(ids, np.zeros(shape, np.float32))


def test_generate_tokens_takes_one_marker_or_a_run(saved, assistant):
    images = [[x] for x in hf.images(2)]
    single = assistant.generate_tokens([[1, -200, 5, 6], [1, 9, -200]], images, max_new_tokens=6)
    run = assistant.generate_tokens([[1] + [-200] * P + [5, 6], [1, 9] + [-200] * P], images, max_new_tokens=6)
    ids = torch.tensor([[1] + [hf.IMAGE_ID] * P + [5, 6]])
    expected = saved[1].generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                                 pixel_values=torch.tensor(images[0][0])[None].permute(0, 3, 1, 2))
    assert single == run and single[0] == expected[0, ids.shape[1]:].tolist()
    with pytest.raises(ValueError, match="2 lists of images were given for 1 rows"):
        assistant.generate_tokens([[1, -200]], images)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def ask(question, *images):
    content = [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_generate_stream_and_tokens_agree(assistant):
    messages = ask("is there a fracture ?", picture())
    answer, = assistant.generate([messages], max_new_tokens=24)
    assert "".join(assistant.stream(messages, max_new_tokens=24)).strip() == answer.text
    p = assistant.processor
    ids = p.encode(p.prompt(messages))
    assert [answer.token_ids] == assistant.generate_tokens([ids], [list(p.images([picture()]))], max_new_tokens=24)
    assert answer.text == p.decode(answer.token_ids).strip() and answer.finish_reason in ("stop", "length")
    both = assistant.generate([messages, ask("where ?")], max_new_tokens=24)
    assert both[0] == answer and both[1] == assistant.generate([ask("where ?")], max_new_tokens=24)[0]


def test_stop_strings_end_the_text_and_an_empty_one_does_nothing(assistant):
    messages = ask("what is shown ?", picture())
    free, = assistant.generate([messages], max_new_tokens=24)
    assert assistant.generate([messages], max_new_tokens=24, stop=("",)) == [free]
    stop = free.text[4:6]
    stopped, = assistant.generate([messages], max_new_tokens=24, stop=(stop,))
    assert stopped.text == free.text[: free.text.index(stop)].strip() and stopped.finish_reason == "stop"
    assert "".join(assistant.stream(messages, max_new_tokens=24, stop=(stop,))).strip() == stopped.text


def test_settings_reach_the_engine(assistant):
    def tokens(**settings):
        return assistant.generate_tokens([[1, -200, 5, 6]] * 2, [[hf.images(1)[0]]] * 2, max_new_tokens=8, **settings)
    greedy, hot = tokens(), tokens(temperature=2.0)
    assert tokens(temperature=2.0, top_k=1) == greedy
    assert tokens(temperature=2.0, top_p=1e-6) == greedy
    assert hot[0] != hot[1] and hot != greedy  # equal rows of one call draw apart
    assert tokens(temperature=2.0) == hot
    assert tokens(temperature=2.0, seed=1) != hot


def test_turn_two_is_the_whole_prompt_anew(assistant, monkeypatch, capsys, tmp_path):
    """The terminal chat over three turns, images in the first and third and a system text: the ids of each turn and the
    tokens of the last are those of the prompt written out by hand."""
    p, asked, answers = assistant.processor, [], []
    engine_stream = assistant.engine.stream

    def spy(requests):
        asked.append(requests[0])
        tokens = []
        for index, new in engine_stream(requests):
            tokens += new
            yield index, new
        answers.append(tokens)

    monkeypatch.setattr(assistant.engine, "stream", spy)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        picture(i).save(file)
    lines = iter(["which is it ?", "where ?", f"/image {files[1]}", "?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat.common, "load_assistant", lambda args: assistant)
    flags = ["--image", files[0], "--system", "be brief", "--temperature", "0", "--max_new_tokens", "2"]
    assert chat.main(["--checkpoint", "x", *flags]) == 0
    monkeypatch.undo()

    said = [p.decode(tokens).strip() for tokens in answers]
    prompt = "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n<image>\nwhich is it ? [/INST]"
    prompts = [prompt]
    for answer, question in zip(said, ["where ?", "<image>\n?"]):
        prompts.append(f"{prompts[-1]} {answer} </s>[INST] {question} [/INST]")
    for n, text in enumerate(prompts):
        ids = p.encode(text)
        assert list(asked[n].ids) == p.expand(ids)
    assert assistant.generate_tokens([ids], [list(p.images(files))], max_new_tokens=2) == answers[2:]
    assert len(answers) == 3 and all(said)
    out = capsys.readouterr().out
    assert all(answer in out for answer in said)


def test_finish_reasons():
    for ids, stop, reason in (([65, 66], (), "length"), ([65, 2], (), "stop"), ([65, 66], ("B",), "stop"), ([2, 65], (), "length")):
        text = TextStream(decode, stop)
        text.push(ids)
        assert completion(text, eos=(2,)).finish_reason == reason


def test_a_stop_string_ends_the_work_too(assistant, monkeypatch):
    messages, looks = ask("what is shown ?", picture()), []
    free, = assistant.generate([messages], max_new_tokens=60)
    decode = assistant.engine.programs._programs["decode"]
    monkeypatch.setitem(assistant.engine.programs._programs, "decode", lambda *args: looks.append(0) or decode(*args))
    assistant.generate([messages], max_new_tokens=60, stop=(free.text[:2],))
    assert len(looks) <= 2 < len(free.token_ids) / assistant.engine.steps


def test_every_argument_of_load_counts(saved, tmp_path):
    path, _ = saved
    assert lm.load(path, dtype="bfloat16").engine.params["projector"]["linear_0"]["kernel"].dtype == "bfloat16"
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**hf.VISION))
    hf.randomise(tower, seed=12)
    tower.save_pretrained(tmp_path / "tower")
    swapped = lm.load(path, vision_tower=tmp_path / "tower")
    expected = next(x for name, x in tower.state_dict().items() if name.endswith("class_embedding"))
    np.testing.assert_array_equal(swapped.engine.params["vision_tower"]["embeddings"]["class_embedding"], expected.numpy())
    assert str(tmp_path / "tower") in swapped.tower and "in the checkpoint" in lm.load(path).tower
    bare = shutil.copytree(path, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert lm.load(bare, tokenizer=TOKENIZER).processor.encode("a") == lm.load(path).processor.encode("a")
    for bad in (dict(dtype="int8"), dict(dtype=np.float64), dict(quantize="int2"), dict(quantize=8), dict(kv_cache="int4"), dict(adapter="x"), dict(mesh="tp=9"),
                dict(mesh="tp=3,data=-1")):
        with pytest.raises(ValueError, match="expected"):
            lm.load(path, **bad)


@pytest.mark.parametrize("settings, sentence", [
    (dict(seed=-1), "seed is -1"), (dict(seed=0.5), "seed is 0.5"), (dict(top_k=-1), "top_k is -1"), (dict(top_k=2.5), "top_k is 2.5"),
    (dict(num_beams=0), "num_beams is 0"), (dict(num_beams=100000), "num_beams is 100000; at most 128 was"),
    (dict(temperature=-1.0), "temperature is -1.0"), (dict(temperature=float("nan")), "nan"),
    (dict(temperature=float("inf")), "inf"), (dict(top_p=0.0), "top_p is 0.0"), (dict(top_p=1.5), "top_p is 1.5"),
    (dict(top_p=float("nan")), "nan"), (dict(temperature=None), "temperature is None"), (dict(top_p="1"), "top_p is '1'"),
    (dict(max_new_tokens=1.5), "max_new_tokens is 1.5"), (dict(max_new_tokens=None), "max_new_tokens is None"),
    (dict(num_beams=2, temperature=0.5), "num_beams is 2 and temperature is 0.5, but")])
def test_bad_settings_are_one_sentence(assistant, settings, sentence):
    with pytest.raises(UserError, match=sentence + ".* expected"):
        assistant.generate_tokens([[1, 5]], **settings)


def test_beams_are_reached_by_every_call(saved, assistant):
    """The public calls give transformers' beams, one beam is greedy, and a stop string cuts what was found."""
    messages = ask("is there a fracture ?", picture())
    p = assistant.processor
    ids, images = p.encode(p.prompt(messages)), p.images([picture()])
    tokens, = assistant.generate_tokens([ids], [list(images)], max_new_tokens=12, num_beams=3)
    expanded = torch.tensor([[hf.IMAGE_ID if i == -200 else i for i in p.expand(ids)]])
    expected = saved[1].generate(input_ids=expanded, attention_mask=torch.ones_like(expanded), do_sample=False, max_new_tokens=12,
                                 num_beams=3, pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    assert tokens == expected[0, expanded.shape[1]:].tolist()
    answer, = assistant.generate([messages], max_new_tokens=12, num_beams=3)
    assert answer.token_ids == tokens and answer.text == p.decode(tokens).strip()
    greedy = assistant.generate_tokens([ids], [list(images)], max_new_tokens=12)
    assert greedy == assistant.generate_tokens([ids], [list(images)], max_new_tokens=12, num_beams=1) != [tokens]
    stop = answer.text[3:6]
    cut, = assistant.generate([messages], max_new_tokens=12, num_beams=3, stop=stop)
    assert cut.text == answer.text[: answer.text.index(stop)].strip() and cut.finish_reason == "stop"


def test_a_conversation_draws_the_same_whatever_is_asked_beside_it(assistant, monkeypatch):
    monkeypatch.setattr(assistant.engine, "batch_size", 2)  # the third waits for one of the others to end
    hot = dict(max_new_tokens=8, temperature=1.5, seed=3)
    one, two = ask("is there a fracture ?", picture()), ask("where ?", picture(1))
    together = assistant.generate([one, two, two], **hot)
    assert together[:2] == [assistant.generate([each], **hot)[0] for each in (one, two)]
    assert together[2] != together[1]  # the same question again is another draw
    assert assistant.generate([two, two, one], **hot) == [together[1], together[2], together[0]]
    assert "".join(assistant.stream(two, **hot)) == together[1].text


def test_the_count_of_images_must_fit_the_markers(assistant):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "<image> and <image> ?"}]}]
    with pytest.raises(ValueError, match="1 images for 2"):
        assistant.generate([messages])
    system = {"role": "system", "content": "<image> is what you see."}
    for typed in (ask("What is <image> ?"), [system, *ask("why ?")]):
        with pytest.raises(ValueError, match="the messages have 0 images for 1 <image> markers"):
            assistant.generate([typed])


def test_stops_that_are_no_texts_and_pixels_that_are_whole_numbers(assistant):
    for stop in (None, 5, [None], ["a", 7]):
        with pytest.raises(ValueError, match="stop is .*; a text or a list of texts was expected"):
            assistant.generate([ask("why ?")], stop=stop)
    pixels = assistant.processor.images_uint8([picture()]).astype(int)
    with pytest.raises(ValueError, match="an image of int64; uint8 or normalised float32"):
        assistant.generate_tokens([[1, -200, 5]], [list(pixels)])


def test_without_tokenizer_files_arrays_work_and_text_is_one_sentence(saved, assistant, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "bare")
    (path / "tokenizer.model").unlink()
    model = lm.load(path)
    rows, images = [[1, -200, 5, 6], [1, 9, -200]], [[x] for x in hf.images(2)]
    assert model.generate_tokens(rows, images, max_new_tokens=2) == assistant.generate_tokens(rows, images, max_new_tokens=2)
    with pytest.raises(ValueError, match="no tokenizer files"):
        model.generate([ask("why ?")])


def test_another_architecture_is_one_sentence(saved, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "other")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "text_config": {**config["text_config"], "model_type": "gemma3_text"}}))
    with pytest.raises(ValueError, match="gemma3_text"):
        lm.load(path)


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_stop_string_ends_the_ids_too_however_they_come():
    """Several strings, across tokens, and ids behind the stop in the same look of the host."""
    ids, stops = list(b"one two\nthree four"), ["\nth", "four", "e "]
    for step in (1, 2, 5, len(ids)):
        text = TextStream(decode, stops)
        pieces = [text.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert (text.token_ids, text.text, "".join(pieces)) == (list(b"one "), "on", "on")
    text = TextStream(decode, ["\nthr", "four"])
    assert "".join(text.push([i]) for i in ids) == "one two" == text.text and bytes(text.token_ids) == b"one two\nthr"
    text = TextStream(lambda ids: "one two" * len(ids), ["two", "ne"])  # one token that holds two stops
    assert text.push([5]) == "o" == text.text


def test_a_stop_token_that_shows_in_no_text_ends_an_answer(saved, assistant):
    """`</s>` as a stop string, written out or as its own id, for a model whose config ends sequences otherwise."""
    text = TextStream(lambda ids: decode([i for i in ids if i != 2]), ["</s>"], stop_ids=[2])
    assert text.push([65, 66, 2, 67]) == "AB" == text.text and text.is_stopped and text.token_ids == [65, 66, 2]
    stream = assistant._text_streams(("</s>", "###"))()
    stream.push([*assistant.processor.tokenizer.encode("yes", bos=False), 2, 5])
    assert stream.is_stopped and stream.text == "yes"
    assert assistant._text_streams(("",))().push([2, 5]) != "" and not assistant._text_streams(())().is_stopped


def test_text_stream_holds_back_half_characters_and_half_stop_strings():
    text = TextStream(decode)
    assert [text.push([byte]) for byte in "日😀".encode()] == ["", "", "日", "", "", "", "😀"]
    text = TextStream(decode, stop=["</s>"])
    pieces = [text.push([byte]) for byte in "é <b</s>x".encode()]
    assert pieces[:4] == ["", "é", "", ""][:2] + pieces[2:4] and "".join(pieces) == "é <b"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and text.is_stopped and text.text == "é <b"
    for stops in (["b", "x"], ["x", "b"]):  # the one that comes first in the text, not in the list
        text = TextStream(decode, stop=stops)
        text.push(list(b"a x b"))
        assert text.text == "a"
    text = TextStream(decode, stop=["###"])
    assert "".join(text.push([b]) for b in b"yes \n###") + text.finish() == "yes" == text.text
    other = TextStream(decode, stop=["", "never"])
    assert "".join(other.push([b]) for b in b"one nev") + other.finish() == "one nev"


def test_answers_end_at_the_tokenizers_own_eos_token(saved, assistant, tmp_path, capsys):
    """vLLM and transformers' chats end there too; transformers' `generate` alone, which knows no tokenizer, does not."""
    import sentencepiece
    path = shutil.copytree(saved[0], tmp_path / "m")
    row = [1, 56, 42, 5, 49, 44]  # beams and the greedy answer end in different places
    free, = assistant.generate_tokens([row], max_new_tokens=12)
    end = next(i for k, i in enumerate(free) if k > 1 and free.index(i) == k)  # the third token or later, at its first place
    piece = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER)).id_to_piece(end)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": piece}))
    capsys.readouterr()
    model = lm.load(path, dtype="float32")
    assert f"{piece!r} ({end}) of the tokenizer or the template also end an answer; the configs name only [2]" in capsys.readouterr().err
    assert model.processor.eos_ids == (2, end) == model.engine.eos and model.config.decoder.eos_ids == (2,)
    assert model.generate_tokens([row], max_new_tokens=12) == [free[:free.index(end) + 1]]
    beams, = model.generate_tokens([row], max_new_tokens=12, num_beams=3)
    theirs = saved[1].generate(torch.tensor([row]), max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=[2, end], pad_token_id=0)
    assert beams == [i for i in theirs[0, len(row):].tolist() if i != 0 or 0 in beams] and beams[-1] == end and len(beams) < 12
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]"}))  # the next free id, which has no row
    assert lm.load(path, dtype="float32").processor.eos_ids == (2,)
