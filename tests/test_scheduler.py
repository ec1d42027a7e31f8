"""Continuous batching: requests are added, run, cancelled and finished without affecting one another's output."""

from __future__ import annotations

import pytest
import torch
from models import (
    GENERATORS,
    farm_and_sea,
    make_slm,
    mixed_texts,
    one_thread,  # noqa: F401
)

from slm_fast import InputError, ScalableLM, layers
from slm_fast import scheduler as scheduling
from slm_fast.data import Row
from slm_fast.ops import Route
from slm_fast.scheduler import Generated, Request, Sampling, Scheduler


def scheduler_of(slm: ScalableLM, **sizes: int) -> Scheduler:
    return Scheduler(slm.model, **{"max_rows": 3, "max_prompt": 40, "max_new_tokens": 12, **sizes})


def prompts_of(slm: ScalableLM, texts: list[str]) -> list[list[int]]:
    return [reading.ids for reading in slm.model.tokenize([Row(text) for text in texts])]


def run(scheduler: Scheduler) -> dict[int, Generated]:
    ended: dict[int, Generated] = {}
    while scheduler.unfinished:
        ended |= scheduler.step()
    return ended


def texts_of(slm: ScalableLM, ended: dict[int, Generated]) -> list[str]:
    tokens = [ended[number].tokens for number in sorted(ended)]
    return [text.strip() for text in slm.model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@pytest.fixture(params=GENERATORS)
def slm(request: pytest.FixtureRequest) -> ScalableLM:
    made = make_slm(request.param)
    farm_and_sea(made)
    return made


def test_requests_that_come_while_others_run_are_answered_as_predict_does(slm: ScalableLM) -> None:
    texts = mixed_texts(11)
    scheduler, ended = scheduler_of(slm), {}
    for ids in prompts_of(slm, texts):  # one request is added before each step
        scheduler.add_request(Request(ids, max_new_tokens=9))
        ended |= scheduler.step()
    ended |= run(scheduler)
    answers = slm.predict(texts, max_new_tokens=9)
    assert texts_of(slm, ended) == [answer.text for answer in answers]
    assert [ended[i].score for i in range(11)] == pytest.approx([answer.score for answer in answers], abs=1e-5)
    for i, answer in enumerate(answers):
        route = ended[i].route
        assert route is not None
        assert tuple(route.slot_ids.tolist()) == answer.route.slots


def test_a_row_ends_by_itself_or_at_its_own_length_and_says_which(slm: ScalableLM) -> None:
    scheduler = scheduler_of(slm)
    lengths = [1, 4, 12]
    for ids, most in zip(prompts_of(slm, mixed_texts(3)), lengths, strict=True):
        scheduler.add_request(Request(ids, max_new_tokens=most))
    ended = run(scheduler)
    ends = set(slm.model.backbone.end_tokens().tolist())
    for number, most in enumerate(lengths):
        written = ended[number]
        if written.finish_reason == "length":
            assert len(written.tokens) == most
        else:
            assert written.finish_reason == "stop"
            assert written.tokens[-1] in ends
    assert ended[0].finish_reason is not None
    assert len(ended[0].tokens) == 1


def test_each_token_is_told_as_soon_as_it_is_known(slm: ScalableLM) -> None:
    told: list[tuple[int, float]] = []
    scheduler = scheduler_of(slm)
    (ids,) = prompts_of(slm, ["sea1 sea2"])
    number = scheduler.add_request(Request(ids, max_new_tokens=6, on_token=lambda t, p: told.append((t, p))))
    ended = scheduler.step()
    assert len(told) == 1  # the prefill yields the first token
    ended |= run(scheduler)
    assert [token for token, _ in told] == ended[number].tokens
    assert sum(p for _, p in told) == pytest.approx(ended[number].probability)


@pytest.mark.parametrize(("new", "steps"), [(1, 3), (2, 2), (3, 1)])
def test_new_rows_are_prefilled_once_there_are_many_or_they_have_waited_long_enough(
    slm: ScalableLM, new: int, steps: int, monkeypatch
) -> None:
    monkeypatch.setattr(slm.model.backbone, "end_tokens", lambda: torch.tensor([-1]))  # all texts are long
    scheduler = scheduler_of(slm, max_rows=12)
    prompts = prompts_of(slm, mixed_texts(3 + new))
    for ids in prompts[:3]:
        scheduler.add_request(Request(ids, max_new_tokens=12))
    scheduler.step()
    numbers = [scheduler.add_request(Request(ids, max_new_tokens=12)) for ids in prompts[3:]]
    taken = 0
    while not any(scheduler.generated[number].tokens for number in numbers):
        scheduler.step()
        taken += 1
    assert taken == steps
    assert all(scheduler.generated[number].tokens for number in numbers)


def test_requests_are_cancelled_while_they_wait_and_while_they_run(slm: ScalableLM) -> None:
    texts = mixed_texts(8)
    scheduler = scheduler_of(slm)
    numbers = [scheduler.add_request(Request(ids, max_new_tokens=10)) for ids in prompts_of(slm, texts)]
    ended = scheduler.step()  # three run, five wait
    gone = [number for number in (0, 6) if number not in ended]
    for number in gone:
        written = scheduler.generated[number]
        assert scheduler.cancel(number)
        assert written.finish_reason == "cancelled"
        assert not scheduler.cancel(number)
    ended |= run(scheduler)
    assert sorted(ended) == [number for number in numbers if number not in gone]
    expected = slm.predict(texts, max_new_tokens=10)
    assert texts_of(slm, ended) == [expected[number].text for number in sorted(ended)]


def test_requests_of_unlike_sampling_and_given_tasks_run_together(slm: ScalableLM) -> None:
    texts = mixed_texts(6)
    kinds = [None, Sampling(temperature=1.3, top_p=0.7, seed=4), Sampling(seed=9)] * 2
    only_sea = slm.model.pool.slots_of("sea")

    def requests() -> list[Request]:
        masks = [None, only_sea] * 3
        return [
            Request(ids, max_new_tokens=7, sampling=kind, slot_mask=mask)
            for ids, kind, mask in zip(prompts_of(slm, texts), kinds, masks, strict=True)
        ]

    alone = []
    for request in requests():
        scheduler = scheduler_of(slm, max_rows=1)
        scheduler.add_request(request)
        alone.append(run(scheduler)[0])
    scheduler = scheduler_of(slm, max_rows=6)
    for request in requests():
        scheduler.add_request(request)
    together = run(scheduler)
    for number, expected in enumerate(alone):
        assert together[number].tokens == expected.tokens
        route = together[number].route
        assert route is not None
        if number % 2:
            assert set(route.slot_ids.tolist()) <= {-1, *only_sea.nonzero().flatten().tolist()}


def test_a_row_whose_query_is_not_finite_ends_with_an_error_and_the_others_go_on() -> None:
    slm = make_slm("llama")
    farm_and_sea(slm)
    bad = slm.model.backbone.tokenizer.get_vocab()["word79"]
    slm.model.backbone.model.get_input_embeddings().weight.data[bad] = torch.nan
    scheduler = scheduler_of(slm)
    for ids in prompts_of(slm, ["sea1", "word79 sea2", "farm3"]):
        scheduler.add_request(Request(ids, max_new_tokens=4))
    ended = run(scheduler)
    assert [ended[i].finish_reason == "error" for i in range(3)] == [False, True, False]
    assert ended[1].tokens == []


def test_a_request_that_does_not_fit_is_refused_and_nothing_waits() -> None:
    slm = make_slm("llama")
    scheduler = scheduler_of(slm, max_prompt=4)
    for request, message in (
        (Request([]), r"ids: expected 1\.\.4 tokens, got 0"),
        (Request([5] * 5), r"ids: expected 1\.\.4 tokens, got 5"),
        (Request([5], max_new_tokens=13), r"max_new_tokens: expected 1\.\.12, got 13"),
    ):
        with pytest.raises(InputError, match=message):
            scheduler.add_request(request)
    assert scheduler.unfinished == 0
    assert scheduler.step() == {}


def test_what_fails_in_a_callback_or_a_prefill_loses_nothing(slm: ScalableLM, monkeypatch) -> None:
    texts = mixed_texts(4)
    expected = slm.predict(texts, max_new_tokens=1)

    def fail(token: int, probability: float) -> None:
        raise RuntimeError("nobody listens")

    scheduler = scheduler_of(slm, max_rows=4)
    for i, ids in enumerate(prompts_of(slm, texts)):
        scheduler.add_request(Request(ids, max_new_tokens=1, on_token=fail if i == 1 else None))
    for owner, name in ((slm.model, "call"), (scheduling, "Decoder"), (scheduling.Decoder, "join")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, None)
            with pytest.raises(TypeError):
                scheduler.step()
        assert scheduler.unfinished == 4
    with pytest.raises(RuntimeError, match="nobody listens"):
        scheduler.step()
    ended = scheduler.step()  # returns the requests that finished in the step that raised
    assert texts_of(slm, ended) == [answer.text for answer in expected]


def test_rows_on_routes_of_unlike_width_run_together_as_alone(slm: ScalableLM) -> None:
    texts = mixed_texts(4)
    none = slm.model.empty_route(1)
    routes = [Route(none.slot_ids[0], none.weights[0]), Route(torch.tensor([1]), torch.ones(1))] * 2
    alone = []
    for ids, route in zip(prompts_of(slm, texts), routes, strict=True):
        scheduler = scheduler_of(slm, max_rows=1)
        scheduler.add_request(Request(ids, max_new_tokens=6, route=route))
        alone.append(run(scheduler)[0].tokens)
    scheduler = scheduler_of(slm)
    for i, (ids, route) in enumerate(zip(prompts_of(slm, texts), routes, strict=True)):
        scheduler.add_request(Request(ids, max_new_tokens=6, route=route if i else None))
    together = run(scheduler)
    assert [together[i].tokens for i in (1, 2, 3)] == alone[1:]


def test_a_closed_scheduler_holds_nothing(slm: ScalableLM) -> None:
    scheduler = scheduler_of(slm)
    number = scheduler.add_request(Request(prompts_of(slm, ["sea1"])[0], max_new_tokens=9))
    scheduler.step()
    scheduler.close()
    assert scheduler.unfinished == 0
    assert not scheduler.cancel(number)


def test_a_closed_scheduler_returns_nothing_of_before(slm: ScalableLM) -> None:
    def fail(token: int, probability: float) -> None:
        raise RuntimeError("nobody listens")

    scheduler, (ids,) = scheduler_of(slm), prompts_of(slm, ["sea1"])
    scheduler.add_request(Request(ids, max_new_tokens=1, on_token=fail))
    with pytest.raises(RuntimeError, match="nobody listens"):
        scheduler.step()
    scheduler.close()
    number = scheduler.add_request(Request(ids, max_new_tokens=1))
    assert run(scheduler).keys() == {number}


@pytest.mark.parametrize("size", ["max_rows", "max_prompt", "max_new_tokens"])
def test_a_scheduler_without_room_or_for_an_encoder_is_a_wrong_call(size: str) -> None:
    with pytest.raises(InputError, match=f"{size}: expected at least 1, got 0"):
        scheduler_of(make_slm("llama"), **{size: 0})
    with pytest.raises(InputError, match="model: expected a backbone that writes texts"):
        scheduler_of(make_slm("bert"))


def test_no_more_rows_run_than_the_memory_for_their_cache_holds(slm: ScalableLM) -> None:
    texts = mixed_texts(7)
    scheduler = scheduler_of(slm, max_rows=7)
    for ids in prompts_of(slm, texts):
        scheduler.add_request(Request(ids, max_new_tokens=6))
    scheduler.step()
    decoder = scheduler._decoder
    assert decoder is not None
    taken = sum(buffer.nbytes for layer in decoder.layers for buffer in layer.buffers)
    small, most = scheduler_of(slm, max_rows=7, cache_bytes=taken * 3 // 7), 0
    numbers = [small.add_request(Request(ids, max_new_tokens=6)) for ids in prompts_of(slm, texts[:1])]
    ended = small.step()
    assert (small.cache_rows, small.max_rows) == (3, 3)
    numbers += [small.add_request(Request(ids, max_new_tokens=6)) for ids in prompts_of(slm, texts[1:])]
    while small.unfinished:
        ended |= small.step()
        most = max(most, len(small._running))
    assert most == 3
    assert texts_of(slm, ended) == [answer.text for answer in slm.predict(texts, max_new_tokens=6)]


def test_steps_of_the_bare_model_alone_add_no_increments(slm: ScalableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [0], layers.multi_lora_

    def counted(*given: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return plain(*given)

    monkeypatch.setattr(layers, "multi_lora_", counted)
    scheduler, empty = scheduler_of(slm), slm.model.empty_route(1)
    bare = Route(empty.slot_ids[0], empty.weights[0])
    first, second, third = prompts_of(slm, mixed_texts(3))
    scheduler.add_request(Request(first, max_new_tokens=12, route=bare))
    scheduler.add_request(Request(second, max_new_tokens=12, route=bare))
    ended, before = scheduler.step(), calls[0]
    for _ in range(2):
        ended |= scheduler.step()
    assert calls[0] == before
    scheduler.add_request(Request(third, max_new_tokens=12))  # a routed row joins: all are adapted as their routes say
    ended |= run(scheduler)
    assert calls[0] > before
    texts = texts_of(slm, ended)
    answers = [answer.text for answer in slm.predict(mixed_texts(3)[:2], bare=True, max_new_tokens=12)]
    assert texts == [*answers, slm.predict(mixed_texts(3)[2:], max_new_tokens=12)[0].text]
