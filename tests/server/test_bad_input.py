"""Invalid requests are refused with a one-line error that names the field, never with a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from models import WORDS
from served import Client, serving, store_with

CLASSIFY, CHAT = "/v1/classify", "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    with serving(store_with(tmp_path_factory.mktemp("bad") / "store", "llama"), body=20_000) as (client, _):
        yield client


BAD: list[tuple[str, Any, int, str]] = [
    (CLASSIFY, b'{"input": ', 400, "expected JSON"),
    (CLASSIFY, b"\xff\xfe", 400, ""),
    (CLASSIFY, b'{"input": "\xff"}', 400, "the body: expected JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
    (CLASSIFY, b"", 400, "the body"),
    (CLASSIFY, b"[1]", 400, "the body"),
    (CLASSIFY, b"null", 400, "the body"),
    (CLASSIFY, b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, ""),
    (CLASSIFY, b'{"input": ' + b"1" * 5000 + b"}", 400, "the body: expected JSON"),
    (CLASSIFY, b'"abc"', 400, "the body: expected a JSON object"),
    (CLASSIFY, {}, 400, "input: "),
    (CLASSIFY, {"input": 5}, 400, "input: "),
    (CLASSIFY, {"input": []}, 400, "input: "),
    (CLASSIFY, {"input": ""}, 400, "input 0: empty text"),
    (CLASSIFY, {"input": ["a", " \n"]}, 400, "input 1: empty text"),
    (CLASSIFY, {"input": ["a", None]}, 400, "input.1: Input should be a valid string, or "),
    (CLASSIFY, {"input": "a", "colour": 1}, 400, "colour: unknown field"),
    (CLASSIFY, {"input": [{"text": "a"}]}, 400, "text: unknown field"),
    (CLASSIFY, {"input": {"text": "a"}}, 400, "text: unknown field"),
    (CLASSIFY, {"input": "a", "labels": 0}, 400, "labels: "),
    (CLASSIFY, {"input": "a", "labels": True}, 400, "labels: Input should be a valid integer"),
    (CLASSIFY, {"input": "a", "labels": "3"}, 400, "labels: Input should be a valid integer"),
    (CLASSIFY, {"input": "a", "labels": 1.0}, 400, "labels: Input should be a valid integer"),
    (CLASSIFY, {"input": "a", "truncate": "yes"}, 400, "truncate: Input should be a valid boolean"),
    (CLASSIFY, {"input": "a", "truncate": 1}, 400, "truncate: Input should be a valid boolean"),
    ("/v1/route", {"input": "a", "truncate": "on"}, 400, "truncate: Input should be a valid boolean"),
    ("/predict", {"inputs": "a", "truncate": 0}, 400, "truncate: Input should be a valid boolean"),
    ("/predict", {"inputs": "a", "raw_scores": 0}, 400, "raw_scores: Input should be a valid boolean"),
    (CLASSIFY, {"input": "a", "model": "land"}, 404, "model 'land': expected auto, base or a task; tasks: farm, sea"),
    (CLASSIFY, {"input": "a", "model": "../../etc/passwd"}, 404, "model"),
    (CLASSIFY, {"input": ["a"] * 33}, 413, "input: expected at most 32 texts, got 33"),
    (CLASSIFY, {"input": "a" * 20_000}, 413, "expected at most 20,000 bytes"),
    (CLASSIFY, {"input": " ".join(WORDS * 2), "truncate": False}, 413, "input 0: longer than"),
    (CLASSIFY, b'{"input": "\\ud800"}', 400, "input"),
    ("/predict", {"inputs": [["a", "b"]]}, 400, "pairs"),
    ("/predict", {"inputs": "a", "raw_scores": True}, 400, "raw_scores: Input should be false"),
    ("/v1/route", {"input": "a", "model": "sea"}, 400, "model: "),
    (CHAT, {"messages": []}, 400, "messages: "),
    (CHAT, {"messages": [{"content": "a"}]}, 400, "messages.0.role: Field required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages.0.content.0.text: "),
    (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
        400,
        "turn 1: 'content': holds half a character",
    ),
    (CHAT, {"messages": [{"role": "user", "content": " "}]}, 400, "turn 1: 'content': expected a text"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools: "),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_k": 5}, 400, "top_k: unknown field, or one that this"),
    (CLASSIFY, {"input": "a", "a\nb": 1}, 400, "'a\\nb': unknown field"),
    (CLASSIFY, {"input": "a", "b" * 5000: 1}, 400, "b" * 100 + "...: unknown field"),
    (CLASSIFY, b'{"input": "a", "\\ud800": 1}', 400, "name holds half a character: '\\ud800'"),
    (CLASSIFY, {"input": "a", "model": "m" * 500}, 404, "model 'mmm"),
    (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, 400, "wizard"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 400, "the user's"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "messages.0.content.0.type: Input should be 'text'",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "temperature": -1}, 400, "temperature: "),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_p": 0}, 400, "top_p: "),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 2}, 400, "n: "),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "stop": ""}, 400, "stop: "),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 25}, 400, "max_tokens: expected at most 24"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 25},
        400,
        "max_completion_tokens: expected at most 24, got 25",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, 400, "max_tokens: "),
    *(
        (path, {**given, field: value}, 400, f"{field}: Input should be {expected}")
        for path, given in (
            (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/completions", {"prompt": "a"}),
        )
        for field, value, expected in (
            ("max_tokens", True, "a valid integer"),
            ("max_tokens", "3", "a valid integer"),
            ("max_tokens", 3.0, "a valid integer"),
            ("stream", "on", "a valid boolean"),
            ("stream", 1, "a valid boolean"),
            ("stream_options", [], "a valid dictionary"),
            ("temperature", "0.5", "a valid number"),
            ("temperature", True, "a valid number"),
            ("top_p", "1", "a valid number"),
            ("seed", False, "a valid integer"),
            ("n", True, "a valid integer"),
            ("frequency_penalty", False, "a valid number"),
        )
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": "2"}, 400, "valid integer"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": 0}, 400, "logprobs: Input should be a valid"),
    *(
        (path, {**given, field: value}, 400, f"{field}: not supported by this server; leave it out")
        for path, given, unsupported in (
            (
                CHAT,
                {"messages": [{"role": "user", "content": "a"}]},
                {"tools": [{"type": "function"}], "top_logprobs": 2},
            ),
            ("/v1/completions", {"prompt": "a"}, {"logit_bias": {"50256": -100}, "suffix": "b", "logprobs": 0}),
        )
        for field, value in unsupported.items()
    ),
    ("/v1/completions", {"prompt": "a", "echo": 0}, 400, "echo: Input should be a valid boolean"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
def test_a_bad_request_is_refused_in_a_line_that_names_the_field(
    client: Client, path: str, body: Any, status: int, said: str
) -> None:
    got, found, _ = client.call("POST", path, body)
    assert (got, list(found)) == (status, ["error"])
    assert said in found["error"]["message"]
    assert "\n" not in found["error"]["message"]
    assert len(found["error"]["message"]) < 400
    assert len(found["error"]["param"] or "") < 120
    assert client.post(CLASSIFY, {"input": "sea1"})["data"][0]["task"] == "sea"  # the server still works


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "sea1", "suffix": "", "logit_bias": {}, "service_tier": "default"}),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": "sea1"},
                    {"role": "assistant", "content": "a", "tool_calls": []},
                    {"role": "user", "content": "sea2"},
                ],
                **{"tools": [], "modalities": ["text"], "service_tier": "auto", "logit_bias": {}},
            },
        ),
    ],
)
def test_fields_that_are_not_supported_may_say_that_they_are_not_set(client: Client, path: str, body: Any) -> None:
    assert client.post(path, {**body, "max_tokens": 2})["choices"]


def test_whole_numbers_may_be_given_where_floats_are_expected(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "sea1"}], "max_tokens": 2}
    whole = {"temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "seed": 3}
    floats = {**whole, "temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    first, second = (client.post(CHAT, {**body, **given})["choices"] for given in (whole, floats))
    assert first == second


def test_an_error_names_the_field_that_has_the_text(client: Client) -> None:
    for path, field in ((CLASSIFY, "input"), ("/v1/completions", "prompt"), ("/predict", "inputs")):
        status, found, _ = client.call("POST", path, {field: ""})
        assert (status, found["error"]["param"]) == (400, field)
        assert found["error"]["message"] == f"{field} 0: empty text"
    status, found, _ = client.call("POST", "/predict", {"inputs": " ".join(WORDS * 2), "truncate": False})
    assert (status, found["error"]["param"]) == (413, "inputs")
    assert found["error"]["message"].startswith("inputs 0: longer than")
    assert client.call("POST", "/predict", {"inputs": [["a", "b"]]})[1]["error"]["param"] == "inputs"


def test_what_is_not_http_is_refused_in_the_format_of_errors(client: Client) -> None:
    with client.raw() as raw:
        raw.sendall(b"GET / HTTP/9 9\r\n\r\n")
        head, _, body = b"".join(iter(lambda: raw.recv(4096), b"")).decode().partition("\r\n\r\n")
    assert head.splitlines()[0] == "HTTP/1.1 400 Bad Request"
    assert f"x-store-generation: {client.get('/ready')['generation']}" in head.splitlines()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_odd_texts_are_answered(client: Client) -> None:
    texts = ["a\x00b", "🐟" * 50, "שלום", "\u202e abc", "x" * 5000, "\n\na\t"]
    assert [row["index"] for row in client.classify(texts)] == list(range(len(texts)))


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_content_type_is_refused_with_the_header_to_send(client: Client, kind: str) -> None:
    body = json.dumps({"input": "sea1"}).encode()
    status, found, _ = client.call("POST", CLASSIFY, body, **{"content-type": kind})
    assert (status, found["error"]["message"]) == (
        400,
        "the body: expected the header content-type: application/json",
    )


@pytest.mark.parametrize("path", ["/v1/models/..%2f..%2fetc", "/v1/models/%00", "/v1/tasks/a", "//", "/v1/classify/"])
def test_odd_paths_are_not_found(client: Client, path: str) -> None:
    status, found, _ = client.call("GET", path)
    assert status in (404, 405, 307)
    assert "Traceback" not in json.dumps(found)
