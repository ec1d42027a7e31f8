"""Fuzz tests of damaged and hostile stores: a one-line error, or the unchanged tasks answer as before.

300 stores in `make test`, 10,000 in `make fuzz`.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from effort import SEED, times
from models import (
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
)
from mutations import mutate_store

from slm_fast import InputError, ScalableLM, SlmError, WorkError
from slm_fast.store import Store

TEXTS = mixed()


def answers(slm: ScalableLM, task: str | None = None) -> list[tuple[str | None, str | None, float]]:
    return [(a.label, a.text, round(a.score, 4)) for a in slm.predict(TEXTS, task=task, max_new_tokens=3)]


def opened(path: Path, backbone: str, **options: bool) -> ScalableLM | SlmError:
    """The model of a store, or the error that refuses it, whose message must be one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reopened(path, backbone, **options)
    except SlmError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return error


def verified(path: Path) -> list[str]:
    try:
        return Store.open(path).verify()
    except SlmError as error:
        return [str(error)]


def outcome(path: Path, name: str, backbone: str, own: dict[str, list]) -> str:
    """How a store with a changed file of task `name` (or a changed manifest, if "") is handled, as a short label.

    `own` holds the answers of the sound store, by task. Raises AssertionError where the store is handled wrongly.
    """
    wrong, slm = verified(path), opened(path, backbone)
    assert not any("\n" in line for line in wrong)
    if isinstance(slm, InputError):
        assert not name  # only for a manifest that names another model, which the caller can supply
        return "another model"
    if isinstance(slm, WorkError):
        assert wrong, f"load refuses what verify does not find: {slm}"
        if name:  # a damaged task affects only itself
            slm = opened(path, backbone, skip_damaged=True)
            assert isinstance(slm, ScalableLM), slm
            assert slm.tasks == sorted(own.keys() - {name})
            assert {other: answers(slm, other) for other in slm.tasks} == {other: own[other] for other in slm.tasks}
        return "refused"
    assert isinstance(slm, ScalableLM)
    others = [other for other in slm.tasks if other in own and other != name]
    assert len(others) >= len(own) - 1 or not name
    assert {other: answers(slm, other) for other in others} == {other: own[other] for other in others}
    try:
        found = [score for *_, score in answers(slm)]
    except WorkError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "cannot answer"
    assert not any(map(math.isnan, found)) or wrong, "a score is no number"
    return "answers"


@pytest.fixture
def in_time() -> Iterator[None]:
    """Handle SIGALRM with a TimeoutError, so that a test that hangs fails once its alarm rings."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(("backbone", "router"), [("bert", "gaussian"), ("bert", "dtkr"), ("llama", "gaussian")])
def test_a_changed_store_is_refused_in_one_line_or_answers(backbone: str, router: str, tmp_path: Path) -> None:
    made = make_slm(backbone, router=router)
    texts = backbone == "llama"
    knows(made, *(random_task(made, name, labels=None if texts else ("no", "yes")) for name in ("farm", "sea")))
    made.save_pretrained(tmp_path / "sound")
    own = {name: answers(made, name) for name in made.tasks}
    seen: Counter[str] = Counter()
    for number in range(times(100, 3334)):
        seed = f"{SEED} {backbone} {router} {number}"
        path = tmp_path / "changed"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "sound", path)
        name = mutate_store(path, random.Random(seed))
        signal.alarm(60)
        try:
            seen[outcome(path, name, backbone, own)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {seed!r}, task {name!r}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
    assert seen["refused"] > seen.total() / 3  # many changes have an effect, and all are handled
    assert seen["answers"]
