"""OpenAI's own Python client against a server."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from models import mixed_texts
from served import serving, store_with

from slm_fast.data import Row

TEXTS = mixed_texts(6, seed=8)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    slm = store_with(tmp_path_factory.mktemp("openai") / "store", "llama")
    slm.model.backbone.name = "owner/tiny"
    with serving(slm, key="secret") as (client, _):
        yield openai.OpenAI(base_url=f"{client.url}/v1", api_key="secret", max_retries=0), slm


def test_completions(served) -> None:
    client, slm = served
    found = client.completions.create(model="auto", prompt=TEXTS, max_tokens=6)
    expected = slm.predict(TEXTS, max_new_tokens=6)
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    assert [choice.task for choice in found.choices] == [answer.task for answer in expected]
    assert found.usage.prompt_tokens == sum(len(row.ids) for row in slm.model.tokenize([Row(text) for text in TEXTS]))
    assert len(TEXTS) <= found.usage.completion_tokens <= 6 * len(TEXTS)
    with_raw = client.completions.with_raw_response.create(model="sea", prompt=TEXTS[0], max_tokens=2)
    assert with_raw.headers["x-store-generation"]
    assert with_raw.parse().choices[0].route[0]["task"] == "sea"


def test_chat(served) -> None:
    client, slm = served
    turns = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]
    found = client.chat.completions.create(model="auto", messages=turns, max_completion_tokens=6)
    (expected,) = slm.predict([TEXTS[0]], max_new_tokens=6)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.choices[0].task == expected.task


def test_a_chat_goes_on_with_the_answer_as_it_came(served) -> None:
    client, _ = served
    turns: list[Any] = [{"role": "user", "content": TEXTS[0]}]
    answer = client.chat.completions.create(model="auto", messages=turns, max_tokens=6).choices[0].message
    assert answer.content
    turns += [answer, {"role": "user", "content": TEXTS[1]}]
    assert client.chat.completions.create(model="auto", messages=turns, max_tokens=6).choices[0].message.content


def test_a_chat_goes_on_after_an_empty_answer_and_with_other_names_of_the_roles(served) -> None:
    client, slm = served
    turns: list[Any] = [{"role": "developer", "content": "name it"}, {"role": "user", "content": TEXTS[0]}]
    turns += [{"role": "assistant", "content": ""}, {"role": "user", "content": TEXTS[1]}]
    row = {"messages": turns}
    (expected,) = slm.predict([row], max_new_tokens=6)
    found = client.chat.completions.create(model="auto", messages=turns, max_tokens=6).choices[0]
    assert (found.message.content, found.task) == (expected.text, expected.task)


def test_the_backbones_own_name_is_a_model(served) -> None:
    client, slm = served
    name = slm.model.backbone.name
    found = client.models.retrieve(name)
    assert (found.id, found.parent) == (name, None)
    asked: dict[str, Any] = {"prompt": TEXTS[0], "max_tokens": 4}
    assert (
        client.completions.create(model=name, **asked).choices[0].text
        == client.completions.create(model="base", **asked).choices[0].text
    )
    with pytest.raises(openai.NotFoundError, match="model 'land': not here"):
        client.models.retrieve("land")


def test_values_that_mean_a_default_are_accepted(served) -> None:
    client, _ = served
    both: dict[str, Any] = {"model": "auto", "max_tokens": 2, "stream": None, "logit_bias": None}
    none = {"logprobs": None, "suffix": None}
    plain = client.completions.create(prompt=TEXTS[0], model="auto", max_tokens=2).choices[0].text
    assert client.completions.create(prompt=TEXTS[0], **both, **none).choices[0].text == plain
    none = {
        "store": False,
        "top_logprobs": None,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    turns: list[Any] = [{"role": "user", "content": TEXTS[0]}]
    assert client.chat.completions.create(messages=turns, **both, **none).choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(messages=turns, **both, response_format={"type": "json_object"})


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "seed": 5}])
def test_a_chat_that_is_streamed(served, sampled: dict[str, float]) -> None:
    client, slm = served
    more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 11, **sampled}
    turns = [{"role": "user", "content": TEXTS[1]}]
    parts = list(client.chat.completions.create(model="auto", messages=turns, **more))
    (expected,) = slm.predict([TEXTS[1]], max_new_tokens=11, sample=bool(sampled), **sampled)
    *chunks, last = parts
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [expected.finish_reason]
    assert chunks[0].choices[0].delta.role == "assistant"
    for chunk in (chunks[0], chunks[-1]):  # the first and the last chunk name the route
        assert [part["task"] for part in chunk.choices[0].route] == list(expected.route.tasks)
        assert chunk.choices[0].task == expected.task
    assert chunks[-1].choices[0].score == pytest.approx(expected.score, abs=1e-4)
    assert len(chunks) > 3
    assert last.choices == []
    assert 3 < last.usage.completion_tokens <= 11


def test_completions_of_several_prompts_that_are_streamed(served) -> None:
    client, slm = served
    texts = dict.fromkeys(range(len(TEXTS)), "")
    reasons = {}
    for chunk in client.completions.create(model="auto", prompt=TEXTS, max_tokens=9, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    for place, answer in enumerate(slm.predict(TEXTS, max_new_tokens=9)):
        assert (texts[place], reasons[place]) == (answer.text, answer.finish_reason)


def test_a_stop_text_never_shows_in_a_stream(served) -> None:
    client, slm = served
    drawn = {"temperature": 1.5, "seed": 2}
    (whole,) = slm.predict([TEXTS[2]], max_new_tokens=12, sample=True, **drawn)
    stop = f"{whole.text.split()[2]}"
    parts = client.completions.create(model="auto", prompt=TEXTS[2], max_tokens=12, stop=stop, stream=True, **drawn)
    parts = list(parts)
    assert "".join(part.choices[0].text for part in parts) == whole.text.partition(stop)[0].strip()
    assert parts[-1].choices[0].finish_reason == "stop"


def test_models(served) -> None:
    client, slm = served
    assert [model.id for model in client.models.list()] == ["auto", "base", *slm.tasks]
    assert client.models.retrieve("sea").parent == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("land")


def test_errors_are_those_the_client_knows(served) -> None:
    client, _ = served
    with pytest.raises(openai.NotFoundError, match="land") as found:
        client.completions.create(model="land", prompt="a")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="auto", prompt="a", max_tokens=10**6)
    with pytest.raises(openai.BadRequestError, match="colour: unknown field"):
        client.completions.create(model="auto", prompt="a", extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="auto", messages=[{"role": "user", "content": ""}])
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "a"}], tools=[{"type": "function"}]
        )
    with pytest.raises(openai.AuthenticationError, match="wrong key"):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.APIStatusError, match="expected at most 32"):
        client.completions.create(model="auto", prompt=["a"] * 33, stream=True)


def test_an_encoder_says_what_it_can_do_instead(tmp_path) -> None:
    with serving(store_with(tmp_path / "store")) as (client, _):
        openai_client = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="/v1/classify"):
            openai_client.completions.create(model="auto", prompt="a")
        assert client.call("POST", "/v1/classify", {"input": "a", "model": "base"})[0] == 400
        parents = {model.id: model.parent for model in openai_client.models.list()}
        assert parents == {"auto": None, "farm": None, "sea": None}
        with pytest.raises(openai.NotFoundError, match="expected auto or a task"):
            openai_client.post("/classify", cast_to=object, body={"input": "a", "model": "land"})
