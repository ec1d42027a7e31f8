"""The caller's global torch settings affect neither learning nor predictions, and are restored."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from models import easy, make_model, make_slm, make_tokenizer, random_task, reopened, saved

import slm_fast.store_view
from slm_fast import ScalableLM
from slm_fast.errors import WorkError
from slm_fast.surroundings import PinnedLock


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "another device": lambda: torch.device("meta"),
    "two threads": lambda: threads(2),
}
TEXTS = ["sea1 sea2 good0", "sea3 sea4 bad0", "sea5"]


def outcome(name, around, *, train=False, **config):
    """Bytes of a task that was learned under these settings, and predictions for TEXTS."""
    model = make_model(name)
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name), **config)
    if train:
        model.train()
    with around:
        slm.learn(easy("sea", 24), epochs=2)
        answers = slm.predict(TEXTS, max_new_tokens=4)
    assert all(module.training == train for module in (model, model.get_submodule(slm.model.backbone.family.layers)))
    return saved(slm, "sea"), answers


@pytest.fixture(scope="module")
def plain():
    return {name: outcome(name, threads(1)) for name in ("bert", "t5", "llama")}


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_learning_and_answering_are_the_same_in_all_surroundings(name, around, plain):
    assert outcome(name, SURROUNDINGS[around]()) == plain[name]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_in_train_mode_learns_and_answers_as_in_evaluation_mode(name, plain):
    assert outcome(name, nullcontext(), train=True) == plain[name]


def test_a_model_made_under_another_default_dtype_is_the_same(plain):
    with default_dtype(torch.float64):
        slm = make_slm("bert")
    slm.learn(easy("sea", 24), epochs=2)
    assert saved(slm, "sea") == plain["bert"][0]


def test_a_backbone_and_a_store_are_opened_in_any_surroundings(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    slm = ScalableLM.from_backbone(str(tmp_path))
    slm.learn(easy("sea", 24), epochs=1)
    slm.save_pretrained(tmp_path / "store")
    expected = slm.predict(TEXTS)
    for around in SURROUNDINGS.values():
        with around():
            assert ScalableLM.from_backbone(str(tmp_path)).model.about == slm.model.about
            again = ScalableLM.from_pretrained(tmp_path / "store")
        assert again.predict(TEXTS) == expected


def test_what_was_set_is_back_after_the_last_holder_lets_the_lock_go():
    model = torch.nn.Dropout().train()
    lock = PinnedLock([model], one_thread=True)
    with threads(2), default_dtype(torch.float64):
        with lock, lock:
            assert (torch.get_default_dtype(), torch.get_num_threads(), model.training) == (torch.float32, 1, False)
        assert (torch.get_default_dtype(), torch.get_num_threads(), model.training) == (torch.float64, 2, True)
        with pytest.raises(ZeroDivisionError), lock:
            raise ZeroDivisionError
        assert (torch.get_default_dtype(), torch.get_num_threads(), model.training) == (torch.float64, 2, True)


@pytest.mark.parametrize("on", [True, False])
def test_the_search_for_cycles_is_as_it_was_after_a_store_was_opened(tmp_path, monkeypatch, on):
    slm, seen = make_slm("bert"), []
    slm.save_pretrained(tmp_path)
    slm.add(random_task(slm, "city"))
    load = slm_fast.store_view.map_task
    monkeypatch.setattr(slm_fast.store_view, "map_task", lambda *a, **b: seen.append(gc.isenabled()) or load(*a, **b))
    (gc.enable if on else gc.disable)()
    try:
        reopened(tmp_path)
        assert gc.isenabled() == on
        next((tmp_path / "tasks" / "city").iterdir()).write_bytes(b"")
        with pytest.raises(WorkError, match="damaged"):
            reopened(tmp_path)
        assert gc.isenabled() == on
    finally:
        gc.enable()
    assert seen
    assert not any(seen)


ALONE = """
import os
import torch
from slm_fast.surroundings import in_one_thread

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
before = count()
with in_one_thread():
    torch.ones(1 << 22).sum()
    print(torch.get_num_threads(), count() - before)
torch.ones(1 << 22).sum()
print(torch.get_num_threads(), count() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_computed_in_one_thread_leaves_no_others_behind():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 0", "4 3"]
