"""A real chat model, SmolLM2-135M-Instruct, behind the server: many streams over three tasks, each its own text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from models import knows, random_task
from served import serving

from slm_fast import ScalableLM
from tests.gguf_file import needs_smollm2

TOPICS = ("the weather in Lima", "a lost parcel", "how bread rises", "the moons of Mars")
CLIENTS, TOKENS = 16, 8


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> ScalableLM:
    needs_smollm2()
    slm = ScalableLM.from_backbone("smollm2", first_layer=20)
    knows(slm, *(random_task(slm, name, labels=None) for name in ("post", "sky", "kitchen")))
    slm.save_pretrained(tmp_path_factory.mktemp("chat") / "store")
    return slm


def test_sixteen_clients_stream_what_predict_writes_for_their_rows_over_three_tasks(slm: ScalableLM) -> None:
    chats = [
        [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": f"Tell me about {topic}."}]
        for topic in TOPICS
    ]
    asked = [(name, chat) for name in ("auto", "post", "sky", "kitchen") for chat in chats]
    assert len(asked) == CLIENTS
    rows = [{"messages": chat} for chat in chats]
    expected = [
        answer
        for name in (None, "post", "sky", "kitchen")
        for answer in slm.predict(rows, task=name, max_new_tokens=TOKENS)
    ]
    with serving(slm, max_new_tokens=TOKENS) as (client, _), ThreadPoolExecutor(CLIENTS) as pool:
        api = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)

        def stream(name: str, chat: list[dict[str, str]]) -> tuple[str, str]:
            parts = list(api.chat.completions.create(model=name, messages=chat, stream=True))
            return "".join(part.choices[0].delta.content or "" for part in parts), parts[0].choices[0].task

        found = list(pool.map(lambda one: stream(*one), asked))
    assert found == [(answer.text, answer.task) for answer in expected]
    assert [task for _, task in found[4:]] == ["post"] * 4 + ["sky"] * 4 + ["kitchen"] * 4
    assert len({text for text, _ in found}) > len(TOPICS)  # the tasks change what is written
