"""StoreLM scores as lm-eval's `hf` class does on the bare model, or on the route's merged weights when routed."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import random

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slm_fast import InputError, WorkError
from slm_fast.integrations.lm_eval import BARE, StoreLM
from tests.models import (  # noqa: F401
    FAR,
    POSITIONS,
    farm_and_sea,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    one_thread,
    sentence,
)

TEMPLATE = (
    "{% for m in messages %}question : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # for float32 log-probabilities summed over up to about 100 tokens


def asked(kind: str, *arguments: tuple, task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, one, i, (task, i, 1)) for i, one in enumerate(arguments)]


def words(count: int, rng: random.Random) -> str:
    return sentence(rng.choice(("sea", "farm", "city")), rng, words=count)


def pairs(seed: int = 0) -> list[tuple[str, str]]:
    """(context, continuation) pairs: empty, one token, several for one context, longer than the model can read."""
    rng = random.Random(seed)
    found = [(words(rng.choice((1, 2, 5, 13, 40)), rng), f" {words(rng.choice((1, 1, 3, 9)), rng)}") for _ in range(24)]
    context = words(7, rng)
    found += [(context, f" {word}") for word in ("yes", "no", "maybe", "answer yes", "answer no")]
    found += [("", "yes"), ("", "the sea1 answer"), ("<s> the sea2", " farm3"), ("the ", "question"), ("word1\n", "no")]
    found += [(words(POSITIONS + 9, rng), f" {words(4, rng)}"), (words(3, rng), f" {words(POSITIONS - 1, rng)}")]
    return found


def hf(name: str = "llama", model: torch.nn.Module | None = None, batch_size: int = 4) -> HFLM:
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = TEMPLATE
    return HFLM(pretrained=model or make_model(name), tokenizer=tokenizer, batch_size=batch_size, max_length=POSITIONS)


def ours(name: str = "llama", **options) -> StoreLM:
    slm = make_slm(name)
    slm.model.backbone.tokenizer.chat_template = TEMPLATE
    return StoreLM(slm=slm, **options)


def routed(**options) -> StoreLM:
    slm = make_slm("llama")
    farm_and_sea(slm)
    return StoreLM(slm=slm, **options)


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [best for _, best in found] == [best for _, best in expected]
    scores = [torch.tensor([score for score, _ in each], dtype=torch.float64) for each in (found, expected)]
    torch.testing.assert_close(*scores, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "gemma2", "granite"])
def test_a_model_that_knows_no_task_scores_as_lm_evals_own_class(name):
    # None of these contexts begins another request, whose scores lm-eval 0.4.13 may take for this one's.
    theirs, contexts = hf(name), ["question sea3", "farm2 answer", "sky5", "city7 the"]
    likeliest = theirs.generate_until(asked("generate_until", *((text, {"max_gen_toks": 2}) for text in contexts)))
    more = [(context, f" {text}") for context, text in zip(contexts, likeliest, strict=True) if text]
    requests = asked("loglikelihood", *pairs(), *more)
    found = ours(name, batch_size=5).loglikelihood(requests)
    assert_same(found, theirs.loglikelihood(requests))
    assert sum(best for _, best in found[-len(more) :]) >= 2  # a text with a special token before a word is another


def test_rolling_scores_are_those_of_lm_evals_own_class():
    rng = random.Random(3)
    texts = [(words(count, rng),) for count in (1, 2, 30, POSITIONS - 1, POSITIONS, POSITIONS + 1, 3 * POSITIONS + 7)]
    requests = asked("loglikelihood_rolling", *texts)
    found, expected = ours(batch_size=3).loglikelihood_rolling(requests), hf().loglikelihood_rolling(requests)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-3)


def test_texts_are_continued_as_by_lm_evals_own_class():
    rng = random.Random(4)
    contexts = [words(count, rng) for count in (1, 3, 8, 20, 60, POSITIONS + 5)]
    ways = [
        {"until": ["sea1", "farm2"], "max_gen_toks": 24},
        {"until": "\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_new_tokens": 17, "top_k": 1},
    ]
    requests = asked("generate_until", *((context, way) for way in ways for context in contexts))
    found = ours(batch_size=4).generate_until(requests)
    assert found == hf().generate_until(requests)
    assert len(set(found)) > len(contexts)


def test_a_word_that_ends_a_text_is_cut_off_and_no_more_is_written():
    lm = ours(batch_size=2)
    contexts = ["the sea1 question", "farm3", "answer the"]
    whole = lm.generate_until(asked("generate_until", *((text, {"max_gen_toks": 30}) for text in contexts)))
    ends = whole[0].split()[2]
    requests = asked("generate_until", *((text, {"until": [f" {ends} "], "max_gen_toks": 30}) for text in contexts))
    found = lm.generate_until(requests)
    assert found == [text.split(f" {ends} ")[0] for text in whole]
    assert found == hf().generate_until(requests)


def test_sampling_does_not_depend_on_the_batch():
    way = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 12}
    requests = asked("generate_until", *((f"sea{i} question", way) for i in range(6)))
    found = ours(batch_size=1, seed=1).generate_until(requests)
    assert found == ours(batch_size=6, seed=1).generate_until(requests)
    assert len(set(found)) > 1
    other = ours(seed=2).generate_until(requests)
    assert all(map(str.__ne__, found, other))
    assert not set(found) & set(other)  # no request draws what another one draws with the next seed


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"do_sample": True, "top_k": 5}, "'top_k' is not understood"),
        ({"repetition_penalty": 1.3}, "'repetition_penalty' is not understood"),
        ({"max_gen_toks": POSITIONS}, f"expected fewer than max_length .{POSITIONS}., got {POSITIONS}"),
    ],
)
def test_what_cannot_be_asked_of_a_text_is_named(way, said):
    with pytest.raises(InputError, match=said):
        ours().generate_until(asked("generate_until", ("the", way)))


def test_a_batch_size_changes_no_decision_and_no_number_beyond_rounding():
    scores, rolling, texts = [], [], []
    for size in (1, 16, "auto"):
        lm = routed(batch_size=size)
        scores.append(lm.loglikelihood(asked("loglikelihood", *pairs())))
        rolling.append(lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((c,) for c, _ in pairs()[9:] if c))))
        way = {"max_gen_toks": 6, "until": ["sea1"]}
        texts.append(lm.generate_until(asked("generate_until", *((context, way) for context, _ in pairs()[:9]))))
    for other in (1, 2):
        assert_same(scores[0], scores[other])
        torch.testing.assert_close(torch.tensor(rolling[0]), torch.tensor(rolling[other]), rtol=1e-5, atol=1e-3)
        assert texts[0] == texts[other]


def test_a_request_is_answered_on_the_route_that_predict_finds_for_its_context():
    """The reference is lm-eval's own class on a model with the route's increments merged into its weights."""
    lm = routed(batch_size=3)
    tasks = list(lm.slm.learned.values())
    rng = random.Random(9)
    contexts = [sentence(topic, rng, words=8) for topic in ("sea", "farm", "sea", "farm")]
    chosen = asked("loglikelihood", *((context, f" {word}") for context in contexts for word in ("yes", "maybe no")))
    way = {"max_gen_toks": 9}
    found = lm.loglikelihood(chosen)
    texts = lm.generate_until(asked("generate_until", *((context, way) for context in contexts)))
    for i, answer in enumerate(lm.slm.predict(contexts)):
        merged = hf(model=merge(make_model("llama"), tasks, answer.route))
        assert_same(found[2 * i : 2 * i + 2], merged.loglikelihood(chosen[2 * i : 2 * i + 2]))
        assert texts[i] == merged.generate_until(asked("generate_until", (contexts[i], way)))[0]
    bare = ours().loglikelihood(chosen)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, bare, strict=True)) > 0.1


def test_the_shares_of_requests_are_counted_for_each_of_lm_evals_tasks():
    lm = routed()
    rng = random.Random(5)
    sea, farm = sentence("sea", rng, words=9), sentence("farm", rng, words=9)
    lm.loglikelihood(asked("loglikelihood", (sea, " yes"), (sea, " no"), (farm, " yes"), (sea, " the"), task="one"))
    lm.loglikelihood_rolling(asked("loglikelihood_rolling", (farm,), task="two"))
    assert lm.shares() == {"one": {"sea": 0.75, "farm": 0.25}, "two": {"farm": 1.0}}
    assert lm.get_model_info()["routed"] == lm.shares()
    assert lm.get_model_info()["store_tasks"] == ["farm", "sea"]


def test_a_given_task_the_bare_model_and_abstention():
    requests = asked("loglikelihood", ("sea1 sea2 sea3 sea4", " yes"), (FAR, " yes"))
    told = routed(task="farm")
    told.loglikelihood(requests)
    assert told.shares() == {"task": {"farm": 1.0}}
    bare = routed(bare=True)
    expected = ours().loglikelihood(requests)
    assert_same(bare.loglikelihood(requests), expected)
    assert bare.shares() == {"task": {BARE: 1.0}}
    unsure = routed(abstain=0.9)
    found = unsure.loglikelihood(requests)
    assert unsure.shares() == {"task": {BARE: 0.5, "sea": 0.5}}
    assert_same(found[1:], expected[1:])
    assert found[0][0] != pytest.approx(expected[0][0], abs=1e-3)


def test_chats_are_written_by_the_backbones_template():
    chat = [{"role": "user", "content": "the sea1"}]
    assert ours().apply_chat_template(chat) == hf().apply_chat_template(chat) == "question : the sea1 answer :"
    assert ours().chat_template(True) == TEMPLATE
    without = StoreLM(slm=make_slm("llama"))
    with pytest.raises(InputError, match="the backbone's tokenizer has none"):
        without.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"slm": "bert"}, "expected a decoder-only backbone such as LLaMA, this one is encoder"),
        ({"slm": "t5"}, "this one is seq2seq"),
        ({"slm": "llama", "task": "sky"}, "task 'sky': not learned; tasks: none"),
        ({"slm": "llama", "max_length": 1}, "max_length: expected at least 2, got 1"),
        ({"slm": "llama", "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({}, "store: expected the path of a store, or an open model as slm"),
    ],
)
def test_what_cannot_be_evaluated_is_named(arguments, said):
    if "slm" in arguments:
        arguments = {**arguments, "slm": make_slm(arguments["slm"])}
    with pytest.raises(InputError, match=said):
        StoreLM(**arguments)


def test_a_continuation_longer_than_the_model_reads_is_named():
    requests = asked("loglikelihood", ("the", " yes"), ("the", " yes" * (POSITIONS + 1)))
    with pytest.raises(WorkError, match=f"request 2: its continuation has {POSITIONS + 1} tokens, max_length is"):
        ours().loglikelihood(requests)
    assert ours().loglikelihood(asked("loglikelihood", ("the", ""))) == [(0.0, True)]


def test_lm_eval_is_told_of_it_by_the_installed_package():
    [entry] = importlib.metadata.entry_points(group="lm_eval.models", name="slm-fast")
    assert entry.dist.name == "slm-fast"
    assert entry.load() is StoreLM
    assert get_model(entry.name) is StoreLM


def test_the_harness_finds_it_by_name_and_its_numbers_are_those_of_hf(tmp_path):
    rng = random.Random(6)
    rows = [
        {"q": words(6, rng), "choices": [words(n, rng) for n in (1, 2, 4)], "gold": rng.randrange(3)} for _ in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question : {{q}} answer :",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    store = tmp_path / "store"
    make_model("llama").save_pretrained(tmp_path / "llama")
    make_tokenizer("llama").save_pretrained(tmp_path / "llama")
    slm = make_slm("llama")
    slm.save_pretrained(store)
    found = get_model("slm-fast").create_from_arg_string(
        f"store={store},backbone={tmp_path / 'llama'}", {"batch_size": "auto", "device": "cpu"}
    )
    manager = TaskManager(include_defaults=False)
    results = [
        lm_eval.evaluate(lm, manager.load([copy.deepcopy(task)]), bootstrap_iters=0)["results"]["local"]
        for lm in (found, hf())
    ]
    for metric in ("acc,none", "acc_norm,none"):
        assert results[0][metric] == results[1][metric]
    assert 0 < results[0]["acc,none"] < 1
    assert found.shares() == {"local": {BARE: 1.0}}
