"""What clients send beside messages: obeyed, ignored, or refused with a sentence."""

import io
import json

import pytest

from llavamed_jax.checkpoints.generation_file import FILE, sampling_of
from llavamed_jax.errors import UserError
from llavamed_jax.serving import responses
from llavamed_jax.serving.content import ImageUrl, read_messages
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.images import data_of
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.schema import read_chat

MESSAGES = [{"role": "user", "content": "why?"}]


def read(defaults=None, limit=None, **body):
    return read_chat({"messages": MESSAGES, **body}, defaults or {}, limit)


@pytest.mark.parametrize("more", [
    {"n": 2}, {"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}}, {"min_p": 0.1},
    {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"function_call": {"name": "f"}},
    {"response_format": {"type": "json_schema", "json_schema": {}}}, {"response_format": {"type": "json_object"}}, {"modalities": ["text", "audio"]},
    {"audio": {"voice": "alloy"}}, {"best_of": 2}, {"use_beam_search": True}, {"echo": True}, {"prompt_logprobs": 1}, {"guided_json": {}},
    {"structured_outputs": {"choice": ["a"]}}, {"continue_final_message": True}, {"add_generation_prompt": False}, {"ignore_eos": True},
    {"regex": "[AB]"}, {"json_schema": "{}"}, {"ebnf": "x"}, {"grammar": "x"}, {"structural_tag": "{}"}, {"stop_regex": "x"}, {"length_penalty": 1.2},
    {"add_special_tokens": True}, {"documents": [{"text": "x"}]}, {"no_stop_trim": True}, {"repeat_penalty": 1.1}, {"num_beams": 2},
    {"stop_token_ids": [5]}, {"min_tokens": 3}, {"chat_template": "{{ x }}"}, {"skip_special_tokens": False}])
def test_what_changes_the_answer_and_is_not_there_is_refused(more):
    with pytest.raises(ApiError) as caught:
        read(**more)
    (key,) = more
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, key, "unsupported_parameter")
    assert caught.value.message.startswith(f"{key} is ")
    with pytest.raises(ApiError, match=f"^{key} is "):
        responses.read({"input": "why?", **more}, None)


def test_what_changes_nothing_is_accepted_and_named_as_ignored():
    chat = read(n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tool_choice="auto", tools=[{"type": "function"}],
                response_format={"type": "text"}, modalities=["text"], min_p=0, repetition_penalty=1.0, use_beam_search=False, user="u",
                store=True, metadata={}, service_tier="auto", reasoning_effort="low", prompt_cache_key="k", safety_identifier="s",
                length_penalty=1.0, stop_regex=[], no_stop_trim=False, documents=[], add_special_tokens=False,
                web_search_options={}, verbosity="low", chat_template_kwargs={}, priority=0, moderation={}, n_unknown=None)
    assert chat.settings == read(seed=chat.settings.seed).settings
    assert {"user", "store", "tools", "n_unknown"} <= set(chat.ignored) and not {"n", "messages", "min_p"} & set(chat.ignored)


@pytest.mark.parametrize("more", [
    {"temperature": -0.1}, {"temperature": True}, {"temperature": "0"}, {"temperature": 101}, {"temperature": 10**400}, {"top_p": -(10**400)},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": 10**400}, {"top_p": -0.01}, {"top_p": 1.01}, {"top_k": -2},
    {"top_k": 1.5}, {"max_tokens": 0}, {"max_tokens": "9"}, {"max_completion_tokens": -1}, {"seed": 2**63}, {"seed": 0.5}, {"stop": 5},
    {"stop": ["a", 1]}, {"stop": ["a"] * 17}, {"logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}, {"stream": "yes"},
    {"stream": True, "stream_options": {"include_usage": 1}}, {"stream_options": []}, {"model": 5}])
def test_values_out_of_range_are_refused_with_their_key(more):
    if more.get("stream_options") == []:  # an empty list of an old client is no option
        assert not read(**more).include_usage
        return
    with pytest.raises(ApiError) as caught:
        read(**more)
    assert caught.value.status == 400 and caught.value.param in (*more, "include_usage")


def test_values_are_read():
    chat = read(max_tokens=9.0, temperature=1, top_p=1, top_k=-1, seed=-5, stop="\n", logprobs=True, stream=True, stream_options={"include_usage": True})
    s = chat.settings
    assert (s.max_new_tokens, s.temperature, s.top_p, s.top_k, s.seed, s.stop, s.alternatives) == (9, 1.0, 1.0, 0, 2**64 - 5, ("\n",), 0)
    assert chat.is_streamed and chat.include_usage
    assert read(top_p=0).settings.top_p == 0 and read(top_p=0.0).settings.top_p == 0
    assert read(max_tokens=50, max_completion_tokens=7).settings.max_new_tokens == 7
    assert read(max_tokens=50, limit=20).settings.max_new_tokens == 20 and read(limit=20).settings.max_new_tokens == 20
    assert read(stop=["", "a"]).settings.stop == ("a",) and read(top_logprobs=0).settings.alternatives is None
    assert read(temperature=1).settings.seed != read(temperature=1).settings.seed  # no seed: another draw each time


@pytest.mark.parametrize("found, wanted", [
    ({}, {"temperature": 0.0}), ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
    ({"do_sample": True}, {"temperature": 1.0}), ({"do_sample": True, "temperature": 0.2, "top_k": 50, "max_new_tokens": 64},
                                                   {"temperature": 0.2, "top_k": 50, "max_new_tokens": 64}), ({"temperature": None, "top_k": None}, {"temperature": 0.0})])
def test_absent_settings_are_the_checkpoints(tmp_path, found, wanted):
    (tmp_path / FILE).write_text(json.dumps(found), encoding="utf-8")
    defaults = sampling_of({FILE: tmp_path / FILE})
    assert defaults == wanted and sampling_of({}) == {"temperature": 0.0}
    s = read(defaults).settings
    assert (s.temperature, s.top_p, s.top_k) == (wanted["temperature"], wanted.get("top_p", 1.0), wanted.get("top_k", 0))
    assert s.max_new_tokens == wanted.get("max_new_tokens", 2**31 - 1) and read(defaults, temperature=0.5, max_tokens=3).settings.max_new_tokens == 3


@pytest.mark.parametrize("wrong", [{"do_sample": True, "temperature": "hot"}, {"top_p": 0}, {"top_p": 2.0}, {"top_k": -1}, {"max_new_tokens": 0},
                                   {"do_sample": True, "temperature": -1}, {"top_k": True}])
def test_a_wrong_setting_of_the_checkpoint_is_one_sentence(tmp_path, wrong):
    (tmp_path / FILE).write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(UserError, match=f"{FILE}: .* is .*, which is no setting of sampling"):
        sampling_of({FILE: tmp_path / FILE})


@pytest.mark.parametrize("key, value", [("stop", "x"), ("max_tokens", 5), ("max_completion_tokens", 5)])
def test_keys_of_chat_that_responses_do_not_have_are_refused_there(key, value):
    with pytest.raises(ApiError, match=f"^{key} is ") as caught:
        responses.read({"input": "why?", key: value}, None)
    assert (caught.value.param, caught.value.code) == (key, "unsupported_parameter")


def test_the_log_names_ignored_keys_and_never_writes_a_text_that_is_one():
    file = io.StringIO()
    log = Log(file=file)
    for keys in (["user", "Mrs. Smith has a cough " * 1000, "x" * 41, "müller", ""], ["user", "another text"], ["store"]) * 2:
        log.ignored("/v1/chat/completions", keys)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [(line["event"], line["keys"], line["others"]) for line in lines] == [("ignored", ["user"], 4), ("ignored", ["user"], 1), ("ignored", ["store"], 0)]
    for i in range(3000):
        log.ignored("/v1/chat/completions", [f"k{i}_{j}" for j in range(30)])
    assert len(file.getvalue().splitlines()) == 3003 and json.loads(file.getvalue().splitlines()[-1])["others"] == 10
    assert len(log._said) == 1000 and max(map(len, log._said)) == 16  # digests, and no more of them


URL = "data:image/png;base64,AAAA"


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": URL}}, {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, {"image_url": URL},
    {"type": "image_url", "image_url": URL, "uuid": "x"}, {"type": "input_image", "image_url": URL}, {"type": "input_image", "image_url": {"url": URL}},
    {"type": "image", "image": URL}])
def test_every_form_of_an_image_is_read(part):
    (message,) = read_messages([{"role": "user", "content": ["first", part, {"type": "input_text", "text": "then"}, {"text": "last"}]}])
    assert message.parts == ["first", ImageUrl(URL), "then", "last"]


def test_roles_and_empty_answers():
    messages = read_messages([{"role": "developer", "content": "be terse"}, {"role": "user", "content": "a", "name": "x"},
                              {"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": {"type": "text", "text": "b"}}])
    assert [(m.role, m.parts) for m in messages] == [("system", ["be terse"]), ("user", ["a"]), ("assistant", []), ("user", ["b"])]


@pytest.mark.parametrize("message, param", [
    ({"role": "user"}, "messages[0].content"), ({"role": "system", "content": [{"type": "image_url", "image_url": URL}]}, "messages[0].content"),
    ({"role": "assistant", "content": [{"image_url": URL}]}, "messages[0].content"), ({"role": "user", "content": 5}, "messages[0].content"),
    ({"role": "user", "content": [5]}, "messages[0].content[0]"), ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0]"),
    ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}, "messages[0].content[0]"),
    ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0]"),
    *(({"role": "user", "content": [{"type": kind, "text": "x"}]}, "messages[0].content[0]") for kind in (["text"], {}, [], 5, True)),
    *(({"role": role, "content": "x"}, "messages[0].role") for role in (["user"], {}, 5)), ({"role": "user", "content": ["x"] * 4001}, "messages"),
    ({"role": "tool", "content": "x"}, "messages[0].role"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}, "messages[0].content[0].image_url"), ("x", "messages[0]")])
def test_the_place_of_a_wrong_part_is_named(message, param):
    with pytest.raises(ApiError) as caught:
        read_messages([message])
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("url", ["data:image/png;base64,\ud800AAA", "data:image/png;base64,%41\ud800", "data:image/png,\ud800", "data:image/png,é"])
def test_a_data_url_that_is_not_ascii_is_refused(url):
    with pytest.raises(ApiError, match="image 1 is a data URL with characters that are not ASCII"):
        data_of(url, "image 1", Limits())
