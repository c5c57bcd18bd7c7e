"""The unmodified `openai` client against our server: every answer equals the one that the model gives alone."""

import asyncio
import threading

import numpy as np
import openai
import pytest

from tests.support.server import CONVERSATIONS, MOST, plainly


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_equals_the_models_own(client, alone, name):
    messages = CONVERSATIONS[name]
    (wanted,) = alone.generate([plainly(messages)], max_new_tokens=MOST)
    whole = client.chat.completions.create(model="served", messages=messages, max_tokens=MOST, temperature=0)
    assert whole.choices[0].message.content == wanted.text and whole.choices[0].finish_reason == wanted.finish_reason
    assert whole.model == "served" and whole.usage.completion_tokens == len(wanted.token_ids)
    pieces = list(client.chat.completions.create(model="alias", messages=messages, max_completion_tokens=MOST, temperature=0, stream=True,
                                                 stream_options={"include_usage": True}))
    *texts, last, counts = pieces
    assert "".join(piece.choices[0].delta.content for piece in texts) == wanted.text
    assert texts[0].choices[0].delta.role == "assistant" and all(piece.choices[0].finish_reason is None for piece in texts)
    assert last.choices[0].finish_reason == wanted.finish_reason and counts.choices == [] and counts.usage.total_tokens == whole.usage.total_tokens
    images = sum(isinstance(p, dict) and p["type"] == "image_url" for m in messages for p in m["content"] if isinstance(m["content"], list))
    assert whole.usage.prompt_tokens_details.image_tokens == images * alone.config.tokens_per_image


def test_the_async_client_gets_sampled_answers_of_its_seed_whatever_runs_beside(server, alone):
    """Twelve at once on four rows, half of them streams."""
    messages = [[{"role": "user", "content": f"Question {i}?"}] for i in range(6)]
    settings = dict(temperature=0.9, top_p=0.9, seed=7)
    wanted = [alone.generate([m], max_new_tokens=MOST, **settings)[0].text for m in messages]

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
            async def plain(m):
                return (await client.chat.completions.create(model="served", messages=m, max_tokens=MOST, **settings)).choices[0].message.content

            async def streamed(m):
                chunks = await client.chat.completions.create(model="served", messages=m, max_tokens=MOST, stream=True, **settings)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            return await asyncio.gather(*map(plain, messages), *map(streamed, messages))
    assert asyncio.run(ask()) == wanted * 2
    assert len(set(wanted)) > 3


def test_logprobs_are_those_of_the_model(client, alone):
    messages = CONVERSATIONS["text"]
    answer = client.chat.completions.create(model="served", messages=messages, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    request = alone.request(messages, 5)
    tokens = alone.engine.generate([request])[0]
    ids = np.array([[*request.ids, *tokens]])
    logits = alone.logits(ids)[0].astype(np.float64)
    exact = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    found = answer.choices[0].logprobs.content
    assert len(found) == 5
    for n, each in enumerate(found):
        row = exact[len(request.ids) - 1 + n]
        assert abs(each.logprob - row[tokens[n]]) < 1e-4
        assert [t.logprob for t in each.top_logprobs] == pytest.approx(sorted(row)[-3:][::-1], abs=1e-4)
        assert bytes(each.bytes) == alone.processor.tokenizer.bytes_of(tokens[n]) and each.top_logprobs[0].bytes == each.bytes
    assert b"".join(bytes(each.bytes) for each in found).decode(errors="replace").strip() == answer.choices[0].message.content


def test_models_are_listed_under_their_names(client, server):
    assert [each.id for each in client.models.list()] == ["served", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="'nobody' is not served here; 'served' or 'alias' was expected") as refused:
        client.chat.completions.create(model="nobody", messages=CONVERSATIONS["text"])
    assert "tiny" not in str(refused.value), "the checkpoint's directory is taken as a name, and told to nobody"
    assert client.chat.completions.create(model="tiny", messages=CONVERSATIONS["text"], max_tokens=1).model == "served"


def test_a_stop_text_ends_an_answer(client, alone):
    (whole,) = alone.generate([CONVERSATIONS["text"]], max_new_tokens=MOST)
    stop = whole.text[5:8]
    answer = client.chat.completions.create(model="served", messages=CONVERSATIONS["text"], max_tokens=MOST, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == whole.text.partition(stop)[0].strip() and answer.choices[0].finish_reason == "stop"


def test_threads_of_one_client_share_the_server(client, alone):
    found, wanted = {}, alone.generate([plainly(CONVERSATIONS["image"])], max_new_tokens=MOST)[0].text

    def ask(i):
        found[i] = client.chat.completions.create(model="served", messages=CONVERSATIONS["image"], max_tokens=MOST,
                                                  temperature=0).choices[0].message.content
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == dict.fromkeys(range(8), wanted)
