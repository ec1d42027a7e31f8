"""The server gives the answers of `predict`, in the formats of OpenAI, vLLM and Text Embeddings Inference."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import FAR, knows, make_model, make_tokenizer, mixed, mixed_texts, random_task, sentence
from served import Client, serving, store_with

from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.errors import InputError
from slm_fast.options import PredictOptions
from slm_fast.predict import Prediction
from slm_fast.scheduler import row_seed
from slm_fast.server import run
from slm_fast.server.app import Served
from slm_fast.server.generation import generation_number
from slm_fast.server.options import ServeOptions
from slm_fast.server.rows import base_of, model_of
from slm_fast.tokenization import Tokenization

TEXTS = mixed_texts(24, seed=3)
LABELS = {"farm": ("no", "yes"), "sea": ("maybe", "no", "yes")}  # of an encoder's tasks


@pytest.fixture(scope="module", params=["trunk", "sentence"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("encoder") / "store"
    config = {} if request.param == "trunk" else {"query": "sentence", "encoder": str(path.parent / "backbone")}
    if config:
        pytest.importorskip("sentence_transformers")
        store_with(path.parent / "other")
    slm = store_with(path, **config)
    with serving(slm) as (client, served):
        yield client, slm, served


@pytest.fixture(scope="module", params=["t5", "llama"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    slm = store_with(tmp_path_factory.mktemp("writer") / "store", request.param)
    with serving(slm, batch_rows=5) as (client, served):
        yield client, slm, served


def agrees(row: dict[str, Any], expected: Prediction, served: Served) -> None:
    assert (row["task"], row["label"], row["text"]) == (expected.task, expected.label, expected.text)
    assert row["score"] == pytest.approx(expected.score, abs=2e-4)
    assert [part["task"] for part in row["route"]] == list(expected.route.tasks)
    assert [part["slot"] for part in row["route"]] == list(expected.route.slots)
    assert [part["weight"] for part in row["route"]] == pytest.approx(expected.route.weights, abs=2e-4)
    assert row["truncated"] == expected.truncated
    assert row["distance"] == (None if expected.distance is None else pytest.approx(expected.distance, abs=1e-3))
    assert row["task_sha256"] == served.engine.generation.files[expected.task]


def test_rows_of_an_encoder_are_answered_as_predict_answers_them(encoder) -> None:
    client, slm, served = encoder
    found = client.classify(TEXTS)
    for row, expected in zip(found, slm.predict(TEXTS, top_k=None), strict=True):
        agrees(row, expected, served)
        assert dict(zip(row["labels"], row["probs"], strict=True)) == pytest.approx(
            dict(expected.probabilities), abs=2e-4
        )
        assert row["num_classes"] == len({label for task in expected.route.tasks for label in LABELS[task]})
    assert [row["index"] for row in found] == list(range(len(TEXTS)))


def test_a_single_text_a_named_task_and_fewer_labels(encoder) -> None:
    client, slm, served = encoder
    body = client.post("/v1/classify", {"input": TEXTS[0], "model": "sea", "labels": 1})
    agrees(body["data"][0], slm.predict([TEXTS[0]], task="sea")[0], served)
    assert len(body["data"][0]["probs"]) == 1
    assert body["model"] == "sea"
    assert body["usage"]["prompt_tokens"] == len(slm.model.tokenize([Row(TEXTS[0])])[0].ids)


def test_text_embeddings_inferences_shapes(encoder) -> None:
    client, slm, _ = encoder
    expected = slm.predict(TEXTS[:2], top_k=None)
    single = client.post("/predict", {"inputs": TEXTS[0]})
    several = client.post("/predict", {"inputs": [[text] for text in TEXTS[:2]]})
    for found, answer in zip([single, *several], [expected[0], *expected], strict=True):
        assert [row["label"] for row in found] == list(answer.probabilities)
        assert [row["score"] for row in found] == pytest.approx(list(answer.probabilities.values()), abs=2e-4)


def weights_agree(client: Client, slm: ScalableLM, served: Served) -> None:
    found = client.post("/v1/route", {"input": TEXTS})["data"]
    for row, expected in zip(found, slm.predict(TEXTS, max_new_tokens=1), strict=True):
        assert row["task"] == expected.task
        assert row["task_sha256"] == served.engine.generation.files[expected.task]
        assert [part["weight"] for part in row["route"]] == pytest.approx(expected.route.weights, abs=2e-4)


def test_weights_without_an_answer_from_an_encoder(encoder) -> None:
    weights_agree(*encoder)


def test_weights_without_an_answer_from_a_writer(writer) -> None:
    weights_agree(*writer)


def test_texts_are_written_as_predict_writes_them(writer) -> None:
    client, slm, served = writer
    body = client.post("/v1/completions", {"prompt": TEXTS[:9], "max_tokens": 7})
    for choice, expected in zip(body["choices"], slm.predict(TEXTS[:9], max_new_tokens=7), strict=True):
        agrees(choice, expected, served)
        assert choice["finish_reason"] == expected.finish_reason
    assert [choice["index"] for choice in body["choices"]] == list(range(9))
    for row, expected in zip(client.classify(TEXTS[:9]), slm.predict(TEXTS[:9], max_new_tokens=24), strict=True):
        agrees(row, expected, served)


def test_a_named_task_and_the_bare_backbone_write(writer) -> None:
    client, slm, _ = writer
    for model, options in (("sea", {"task": "sea"}), ("base", {"bare": True})):
        (choice,) = client.post("/v1/completions", {"prompt": TEXTS[0], "max_tokens": 9, "model": model})["choices"]
        (expected,) = slm.predict([TEXTS[0]], max_new_tokens=9, **options)
        assert (choice["text"], choice["task"]) == (expected.text, expected.task)


def test_a_task_named_like_the_backbone_goes_before_it(tmp_path) -> None:
    slm = store_with(tmp_path / "store", "llama")
    (bare,) = slm.predict([TEXTS[0]], max_new_tokens=9, bare=True)
    knows(slm, *(random_task(slm, name, labels=None) for name in ("base", "sea")))
    slm.save_pretrained(tmp_path / "base")
    with serving(slm) as (client, served):
        found = {model["id"]: model["parent"] for model in client.get("/v1/models")["data"]}
        assert found == {"auto": None, served.backbone: None, "base": served.backbone, "sea": served.backbone}
        for model, task in (("base", "base"), (served.backbone, None)):
            body = {"prompt": TEXTS[0], "max_tokens": 9, "model": model}
            (choice,) = client.post("/v1/completions", body)["choices"]
            assert (choice["task"], choice["text"] == bare.text) == (task, task is None)


@pytest.mark.parametrize(
    ("tasks", "forced", "base"),
    [((), (None, None), "base"), (("base",), ("base", None), "gpt2"), (("base", "gpt2"), ("base", "gpt2"), None)],
)
def test_the_names_of_the_backbone_are_those_that_no_task_has(tasks, forced, base) -> None:
    found = [model_of(name, "gpt2", tasks) for name in ("base", "gpt2")]
    assert found == [(task, task is None) for task in forced]
    assert base_of("gpt2", tasks) == base
    assert model_of("auto", "gpt2", ("auto",)) == (None, False)


def test_a_text_of_no_task_has_none_even_where_one_is_named(tmp_path) -> None:
    with serving(store_with(tmp_path / "store"), options=PredictOptions(abstain=True)) as (client, _):
        (row,) = client.classify([FAR], model="sea")
        assert (row["task"], row["label"], row["probs"]) == (None, None, [])
        assert client.post("/predict", {"inputs": FAR}) == []
        assert client.post("/predict", {"inputs": [[FAR]]}) == [[]]


def test_sampled_texts_follow_from_their_seed(writer) -> None:
    client, slm, _ = writer
    body = {"prompt": TEXTS[:3], "max_tokens": 9, "temperature": 0.9, "top_p": 0.8, "seed": 11}
    expected = slm.predict(TEXTS[:3], max_new_tokens=9, sample=True, temperature=0.9, top_p=0.8, seed=11)
    assert [c["text"] for c in client.post("/v1/completions", body)["choices"]] == [p.text for p in expected]


def test_an_instruction_and_a_chat_are_read_as_the_rows_they_are(writer) -> None:
    client, slm, served = writer
    row = {"instruction": "the question", "input": TEXTS[1]}
    (expected,) = slm.predict([row], max_new_tokens=6)
    turns = [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]}]
    (choice,) = client.post("/v1/chat/completions", {"messages": turns, "max_tokens": 6})["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["task"] == expected.task
    (expected,) = slm.predict([row], max_new_tokens=24)
    for given in ([row], row):  # a row alone, too
        (found,) = client.post("/v1/classify", {"input": given})["data"]
        agrees(found, expected, served)
        assert client.post("/v1/route", {"input": given})["data"][0]["task"] == expected.task


def test_a_stop_text_ends_a_text_before_it(writer) -> None:
    client, slm, _ = writer
    drawn = {"temperature": 1.5, "seed": 3}
    texts = slm.predict(TEXTS, max_new_tokens=12, sample=True, **drawn)
    place, answer = next((i, a) for i, a in enumerate(texts) if len(set((a.text or "").split())) >= 3)
    stop, drawn["seed"] = (answer.text or "").split()[1], row_seed(3, place)
    body = {"prompt": TEXTS[place], "max_tokens": 12, "stop": [stop], **drawn}
    (choice,) = client.post("/v1/completions", body)["choices"]
    assert choice["text"] == (answer.text or "").partition(stop)[0].strip()
    assert choice["finish_reason"] == "stop"


def test_the_list_of_models_has_each_task_with_its_parent_and_digest(writer) -> None:
    client, _, served = writer
    found = client.get("/v1/models")
    files = {model["id"]: model["task_sha256"] for model in found["data"] if model["parent"] == "base"}
    assert files == dict(served.engine.generation.files)
    assert found["generation"] == generation_number(files)
    assert client.get("/v1/models/sea")["parent"] == "base"


def test_the_state_of_a_server(encoder) -> None:
    client, slm, served = encoder
    assert client.get("/health") == {"status": "ok"}
    number = served.engine.generation.number
    assert client.get("/ready") == {"status": "ready", "generation": number, "tasks": 2, "store": "ok"}
    info = client.get("/info")
    assert info["model_sha"] == slm.model.backbone.fingerprint
    assert info["max_client_batch_size"] == 32
    assert client.call("GET", "/nothing")[0] == 404
    assert client.call("GET", "/v1/classify")[0] == 405
    assert client.call("POST", "/v1/classify", {"input": "a"})[2]["x-store-generation"] == number


def test_what_is_counted(encoder) -> None:
    client, _, _ = encoder

    def figure(name: str) -> float:
        lines = client.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = figure("slm_fast_rows_total{")
    client.classify(mixed())
    assert figure("slm_fast_rows_total{") == before + len(mixed())
    assert figure('slm_fast_requests_total{path="/v1/classify",status="200"}') >= 1
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "lora_requests_info"):
        assert f"vllm:{name}" in client.get("/metrics")
    assert figure("slm_fast_queue_rows") == figure("slm_fast_queue_tokens") == 0


def test_many_clients_at_once_each_get_their_own_answers(encoder, request: pytest.FixtureRequest) -> None:
    client, slm, served = encoder
    rng = random.Random(5)
    asks = []
    for _ in range(40):
        texts = [sentence(rng.choice(("sea", "farm")), rng) for _ in range(rng.randint(1, 6))]
        asks.append((texts, rng.choice(("auto", "auto", "sea", "farm"))))
    expected = [slm.predict(texts, task=None if model == "auto" else model) for texts, model in asks]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda ask: Client(client.port).classify(ask[0], model=ask[1]), asks))
    for rows, answers in zip(found, expected, strict=True):
        for row, answer in zip(rows, answers, strict=True):
            agrees(row, answer, served)


def test_a_server_of_no_store_is_a_wrong_call(encoder) -> None:
    _, slm, _ = encoder
    other = ScalableLM(slm.model.backbone, slm.model.config)
    with pytest.raises(InputError, match="store"):
        run.made(other, PredictOptions(), ServeOptions())


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.3, "seed": 4}])
def test_a_checkpoint_with_settings_of_its_own_writes_as_transformers_does(drawn: dict[str, float], tmp_path) -> None:
    slm = store_with(tmp_path / "store", "llama")
    slm.model.backbone.model.generation_config.repetition_penalty = 1.6
    with serving(slm) as (client, _):
        body = {"prompt": TEXTS[:5], "max_tokens": 8, **drawn}
        expected = slm.predict(TEXTS[:5], max_new_tokens=8, sample=bool(drawn), **drawn)
        choices = client.post("/v1/completions", body)["choices"]
        assert [choice["text"] for choice in choices] == [answer.text for answer in expected]
        said = [choice["finish_reason"] for choice in choices]
        assert said == [answer.finish_reason for answer in expected]


def test_the_bare_backbone_reads_a_chat_through_its_own_template(tmp_path) -> None:
    slm = store_with(tmp_path / "store", "llama")
    template = (
        "{% for turn in messages %}{% if turn.role == 'wizard' or loop.index > 3 %}{{ raise_exception('no more') }}"
        "{% endif %}{{ turn.role }} : {{ turn.content }} the {% endfor %}answer :"
    )
    slm.model.backbone.tokenization = Tokenization(_with_template(template), "causal", slm.model.backbone.device)
    turns = [{"role": "user", "content": [{"type": "text", "text": "sea1 sea2"}]}]
    with serving(slm) as (client, _):
        body = {"messages": turns, "max_tokens": 9, "model": "base"}
        whole = client.post("/v1/chat/completions", body)
        words = "user : sea1 sea2 the answer :"
        model, tokenizer = make_model("llama"), make_tokenizer("llama")
        ids = torch.tensor([tokenizer(words, add_special_tokens=False)["input_ids"]])
        plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, pad_token_id=0)
        expected = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert whole["choices"][0]["message"]["content"] == expected
        assert whole["usage"]["prompt_tokens"] == ids.shape[1]
        (auto,) = slm.predict(["sea1 sea2"], max_new_tokens=9)
        found = client.post("/v1/chat/completions", {**body, "model": "auto"})
        assert found["choices"][0]["message"]["content"] == auto.text
        status, error, _ = client.call("POST", "/v1/chat/completions", {**body, "messages": turns * 4})
        assert (status, "no more" in error["error"]["message"]) == (400, True)
    slm.model.backbone.tokenization = Tokenization(_with_template("{# #}"), "causal", slm.model.backbone.device)
    with serving(slm) as (client, _):
        status, error, _ = client.call("POST", "/v1/chat/completions", body)
        assert (status, "writes nothing" in error["error"]["message"]) == (400, True)


def _with_template(template: str):
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = template
    return tokenizer
