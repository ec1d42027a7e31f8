"""A real, tiny LLaMA: it loads, generates the expected text, and still does after tasks were learned and forgotten."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import transformers
from models import one_thread  # noqa: F401

from slm_fast import ScalableLM, Task

ROOT = Path(__file__).parents[1]
SOURCE = ROOT.parent / "shared" / "data" / "checkpoints" / "stories260K"
SENTENCE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a"
    " big, red ball. She wanted to play with it, but it was too high."
)
ANIMALS, FOODS = ("cat", "dog", "bird", "fish", "frog", "bear"), ("cake", "apple", "soup", "bread", "pie", "candy")
PLACES = ("park", "house", "garden", "tree", "box")

pytestmark = pytest.mark.skipif(
    not SOURCE.is_dir(), reason=f"the stories260K checkpoint is not at {SOURCE} (it is not part of the repository)"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories260K"
    runpy.run_path(str(ROOT / "benchmarks" / "continual" / "stories260k.py"))["convert"](SOURCE, path)
    return path


def animals_or_foods(seed: int) -> Task:
    """Stories about an animal or about food, which differ in the verb and its object."""
    rows = []
    for i in range(30):
        place = PLACES[(i + seed) % len(PLACES)]
        rows.append((f"Lily went to the {place}. She saw a {ANIMALS[(i * 5 + seed) % 6]}.", "animal"))
        rows.append((f"Lily went to the {place}. She ate a {FOODS[(i * 5 + seed) % 6]}.", "food"))
    return Task("things", rows)


def happy_or_sad(seed: int) -> Task:
    rows = []
    for i in range(24):
        name, place = ("Tom", "Ben", "Sue", "Mia")[(i + seed) % 4], PLACES[(i * 3 + seed) % len(PLACES)]
        rows.append((f"{name} was in the {place}. {name} was very happy and smiled a lot!", "happy"))
        rows.append((f"{name} was in the {place}. {name} was very sad and cried a lot!", "sad"))
    return Task("feelings", rows)


def test_greedy_text_from_the_start_token_is_the_sentence_its_author_gets(converted):
    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    start = torch.tensor([[tokenizer.bos_token_id]])
    out = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=80, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip().startswith(SENTENCE)


def test_it_learns_two_tasks_and_writes_the_same_stories_without_them(converted):
    slm = ScalableLM.from_backbone(str(converted))
    assert slm.model.backbone.kind == "causal"
    assert len(slm.model.backbone.layers) == 5
    prompts = ["Once upon a time", "Tom and his dog went to the", "The sun was", "Lily had a red ball. One day"]
    before = slm.predict(prompts, max_new_tokens=24)
    assert all(len(answer.text) > 20 for answer in before)
    for task in (animals_or_foods(0), happy_or_sad(0)):
        slm.learn(task, epochs=5, batch_size=8, learning_rate=1e-2)
    assert slm.tasks == ["feelings", "things"]

    def text(**options) -> list[str]:
        return [answer.text for answer in slm.predict(prompts, max_new_tokens=24, **options)]

    stories = [answer.text for answer in before]
    assert text(bare=True) == stories
    far = ["3 + 4 = 7 and 8 x 9 = 72", "ZZZZ QQQQ XXXX ZZZZ QQQQ XXXX"]
    abstained = slm.predict(far, max_new_tokens=24, abstain=True)
    assert [answer.task for answer in abstained] == [None, None]
    bare = slm.predict(far, max_new_tokens=24, bare=True)
    assert [answer.text for answer in abstained] == [answer.text for answer in bare]
    assert text(task="things") != stories  # the LoRA updates have an effect

    found = slm.evaluate({"things": animals_or_foods(1), "feelings": happy_or_sad(1)}, max_new_tokens=8)
    assert min(found.routing.values()) > 0.9
    assert min(found.accuracy.values()) > 0.75  # chance is at most 0.5: the text must equal the label

    for name in ("things", "feelings"):
        slm.forget(name)
    assert [(a.text, a.score) for a in slm.predict(prompts, max_new_tokens=24)] == [(a.text, a.score) for a in before]
