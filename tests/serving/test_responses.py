"""`/v1/responses` through the unmodified client: the same answers as chat, in the other form."""

import openai
import pytest

from tests.support.server import CONVERSATIONS, MOST, data_url, picture, plainly


def test_a_text_and_an_image_are_answered_as_in_a_chat(client, alone):
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "What is shown?"},
                                          {"type": "input_image", "image_url": data_url(picture(1)), "detail": "auto"}]}]
    (wanted,) = alone.generate([plainly(CONVERSATIONS["image"])], max_new_tokens=MOST)
    answer = client.responses.create(model="served", input=asked, max_output_tokens=MOST, temperature=0)
    assert answer.output_text == wanted.text and answer.usage.output_tokens == len(wanted.token_ids)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    told = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Why?"}]
    (wanted,) = alone.generate([told], max_new_tokens=MOST)
    assert client.responses.create(model="served", instructions="Be terse.", input="Why?", max_output_tokens=MOST,
                                   temperature=0).output_text == wanted.text
    turns = [{"role": "user", "content": "Why?"}, {"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "Because.", "annotations": []}]}, {"role": "user", "content": "Sure?"}]
    (wanted,) = alone.generate([[turns[0], {"role": "assistant", "content": "Because."}, turns[2]]], max_new_tokens=MOST)
    assert client.responses.create(model="served", input=turns, max_output_tokens=MOST, temperature=0).output_text == wanted.text


def test_a_stream_has_openais_events_in_order(client, alone):
    (wanted,) = alone.generate([CONVERSATIONS["text"]], max_new_tokens=MOST)
    events = list(client.responses.create(model="served", input="What is shown?", max_output_tokens=MOST, temperature=0, stream=True,
                                          include=["message.output_text.logprobs"], top_logprobs=2))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [f"response.{name}" for name in (
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "incomplete")]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == wanted.text == events[-1].response.output_text
    tokens = events[-1].response.output[0].content[0].logprobs
    assert len(tokens) == MOST and all(len(token.top_logprobs) == 2 for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace").strip() == wanted.text


@pytest.mark.parametrize("more, sentence", [
    ({"store": True}, "keeps nothing between requests"), ({"previous_response_id": "resp_1"}, "send the whole conversation"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format is 'json_object'"), ({"background": True}, "background is True"),
    ({"tool_choice": "required"}, "tool_choice is 'required'"), ({"truncation": "auto"}, "truncation is 'auto'"),
    ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "function_call_output"),
    ({"input": []}, "a text or a list of messages was expected"), ({"input": [{"role": "user", "content": [
        {"type": "input_image", "file_id": "f"}]}]}, "an object with a url, or a url")])
def test_what_needs_a_memory_or_is_not_there_is_refused(client, more, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.responses.create(**{"model": "served", "input": "Why?", **more})
