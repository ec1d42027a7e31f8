"""Chat templates: prompts equal what transformers renders, and stores keep their template."""

from __future__ import annotations

import json

import pytest
import torch
from command import one_line, slm_fast
from models import (
    easy,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    saved,
)

from slm_fast import InputError, ScalableLM, Task
from slm_fast.data import Row
from slm_fast.origin import origin
from slm_fast.worker import task_message, task_of

pytestmark = pytest.mark.usefixtures("few_features")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}word1 {{ m['role'] }} : {{ m['content'] }} \n {% endfor %}"
    "{% if add_generation_prompt %}word2 answer : {% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def tokenizer(template=TEMPLATE):
    found = make_tokenizer("llama")
    found.chat_template = template
    return found


def chatting(template=TEMPLATE, **config) -> ScalableLM:
    config = {"features": 32, "chat_template": True, **config}
    return ScalableLM.from_backbone(make_model("llama"), tokenizer=tokenizer(template), **config)


def rendered(turns: list[tuple[str, str]], template: str = TEMPLATE) -> list[int]:
    messages = [{"role": role, "content": said} for role, said in turns]
    found = tokenizer(template).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(template)(found, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT_SYSTEM, {"default": TEMPLATE, "tools": "x"}])
def test_the_prompt_is_what_transformers_renders(template):
    slm = chatting(template)
    rows = [Row("sea1 sea2"), Row("sea3", instruction="the question"), Row("", instruction="the question")]
    ids = [reading.ids for reading in slm.model.tokenize(rows)]
    whole = WITHOUT_SYSTEM if template == WITHOUT_SYSTEM else TEMPLATE
    two = [("system", "the question"), ("user", "sea3")]
    two = [("user", "the question\nsea3")] if template == WITHOUT_SYSTEM else two
    turns = [[("user", "sea1 sea2")], two, [("user", "the question")]]
    assert ids == [rendered(each, whole) for each in turns]


SAID = [("user", "sea1 sea2"), ("assistant", "good1"), ("user", "sea3"), ("assistant", "bad1"), ("user", "sea4")]
TURNS = [{"role": role, "content": said} for role, said in SAID]
SYSTEM = {"role": "system", "content": "the question"}
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TEMPLATE
)


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": said} for role, said in SAID]},
        {"prompt": TURNS, "completion": [{"role": "assistant", "content": "good2"}]},
    ],
)
def test_a_chat_of_several_turns_is_what_transformers_renders(chat):
    [reading] = chatting().model.tokenize([Row.parse(chat)])
    assert reading.ids == rendered(SAID)


def test_the_prompt_of_a_row_to_learn_ends_before_the_answer():
    task = Task("chat", [{"messages": [*TURNS, {"role": "assistant", "content": "good2"}]}])
    assert [reading.ids for reading in chatting().model.tokenize(task.rows)] == [rendered(SAID)]
    assert task.rows[0].target == "good2"


def test_a_template_without_a_system_turn_has_the_instruction_in_the_first_user_turn():
    chat = Row.parse({"messages": [SYSTEM, *TURNS]})
    assert [reading.ids for reading in chatting().model.tokenize([chat])] == [
        rendered([("system", "the question"), *SAID])
    ]
    merged = [("user", "the question\nsea1 sea2"), *SAID[1:]]
    assert [reading.ids for reading in chatting(WITHOUT_SYSTEM).model.tokenize([chat])] == [rendered(merged)]


def test_turns_that_a_template_refuses_are_lines_of_one_user_turn():
    twice = Row.parse({"messages": [TURNS[0], TURNS[0], *TURNS[1:]]})
    slm = chatting(ALTERNATING)
    [refused, taken] = slm.model.tokenize([twice, Row.parse({"messages": TURNS})])
    assert refused.ids == rendered([("user", twice.text)])
    assert twice.text.startswith("User: sea1 sea2\nUser: sea1 sea2\nAssistant: good1\n")
    assert taken.ids == rendered(SAID)


@pytest.mark.parametrize("first", [2, 4])
def test_of_a_long_chat_the_first_turns_are_left_out(first):
    kept = rendered([("system", "the question"), *SAID[first:]])
    slm = chatting(max_length=len(kept) + 1)
    [whole, long] = slm.model.tokenize([Row("sea1"), Row.parse({"messages": [SYSTEM, *TURNS]})])
    assert (whole.truncated, long.truncated) == (False, True)
    assert long.ids == kept


def test_of_a_chat_whose_last_turn_is_too_long_that_is_cut():
    slm = chatting(max_length=16)
    long = [*TURNS[:2], {"role": "user", "content": "sea1 " * 40}]
    [row, alone] = slm.model.tokenize([Row.parse({"messages": long}), Row("sea1 " * 40)])
    assert row.ids == alone.ids
    assert row.truncated


@pytest.mark.parametrize(
    "turns", [(("assistant", "a"),), (("user", "a"), ("bot", "b")), ("user",), (("user", "a"), ())]
)
def test_turns_that_are_no_chat_are_refused(turns):
    with pytest.raises(InputError, match="turns: expected"):
        Row("a", turns=turns)


def test_the_same_text_as_turns_and_as_one_text_is_another_task():
    lines = "User: sea1\nAssistant: good1\nUser: sea2"
    turns = (("user", "sea1"), ("assistant", "good1"), ("user", "sea2"))
    texts, chats = (Task("sea", [Row(lines, "yes", turns=own)] * 4, free_text=True) for own in ((), turns))
    for slm, same in ((chatting(), False), (make_slm("llama", features=32), True)):
        origins = {origin(slm.model, task, {"joint": False}, None) for task in (texts, chats)}
        assert (len(origins) == 1) == same


def test_a_chat_of_several_turns_reaches_another_process_alike():
    task = Task("chat", [{"messages": [*TURNS, {"role": "assistant", "content": f"good{i}"}]} for i in range(3)])
    again = task_of(json.loads(json.dumps(task_message(task))))
    assert again.rows == task.rows
    assert [row.turns for row in again.rows] == [tuple(SAID)] * 3


@pytest.mark.parametrize("query", [{}, {"route_on": "prompt"}, {"taps": (0,)}])
def test_routes_are_those_of_the_rows_own_words(query):
    chat, plain = chatting(**query), make_slm("llama", features=32, **query)
    for slm in (chat, plain):
        knows(slm, random_task(slm, "sea", labels=None), random_task(slm, "farm", labels=None))
    texts = [*mixed(), {"instruction": "the question", "input": "sea1 sea2"}]
    for one, other in zip(chat.predict(texts, max_new_tokens=2), plain.predict(texts, max_new_tokens=2), strict=True):
        assert one.route.slots == other.route.slots
        assert one.route.weights == pytest.approx(other.route.weights, abs=1e-5)


def test_the_bare_backbone_writes_what_transformers_writes():
    slm = chatting()
    knows(slm, random_task(slm, "sea", labels=None))
    for text in ("sea1 sea2", "farm1 the question word3"):
        ids = torch.tensor([rendered([("user", text)])])
        out = make_model("llama").generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, do_sample=False
        )
        expected = tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert slm.predict([text], bare=True, max_new_tokens=6)[0].text == expected


def test_a_task_is_learned_on_the_prompt_that_it_is_answered_with(tmp_path):
    slm = chatting()
    task = Task("sea", easy("sea").rows, free_text=True)
    slm.learn(task, epochs=6, batch_size=8, learning_rate=1e-2)
    answers = slm.predict([row.text for row in task.rows])
    right = sum(answer.text == row.target for answer, row in zip(answers, task.rows, strict=True))
    assert right / len(task.rows) > 0.9
    plain = make_slm("llama", features=32)
    plain.learn(task, epochs=6, batch_size=8, learning_rate=1e-2)
    assert saved(plain, "sea") != saved(slm, "sea")
    slm.save_pretrained(tmp_path / "store")
    # The store's template is used, not the tokenizer's.
    again = ScalableLM.from_pretrained(tmp_path / "store", backbone=make_model("llama"), tokenizer=tokenizer("x"))
    assert again.predict(mixed()) == slm.predict(mixed())
    slm.export_adapter("sea", tmp_path / "lora")
    assert (tmp_path / "lora" / "chat_template.jinja").read_text() == TEMPLATE
    other = make_slm("llama", features=32)
    other.import_adapter(tmp_path / "lora", "sea", [row.text for row in task.rows])
    asked = [row.text for row in task.rows[:6]]
    asked += [{"messages": [SYSTEM, *TURNS]}, {"messages": TURNS}]
    assert [a.text for a in other.predict(asked, task="sea")] == [a.text for a in slm.predict(asked, task="sea")]


def test_a_long_text_is_cut_and_the_turn_that_follows_stays():
    slm = chatting(max_length=16)
    [short, long] = slm.model.tokenize([Row("sea1"), Row("sea1 " * 40)])
    assert (short.truncated, long.truncated) == (False, True)
    assert long.ids == rendered([("user", " ".join(["sea1"] * (16 - len(rendered([("user", "")])))))])
    assert len(long.ids) == 16


def test_without_it_a_store_says_nothing_of_templates(tmp_path):
    slm = ScalableLM.from_backbone(make_model("llama"), tokenizer=tokenizer(), features=32)
    slm.save_pretrained(tmp_path / "store")
    assert "chat_template" not in json.loads((tmp_path / "store" / "manifest.json").read_text())["model"]["config"]
    again = ScalableLM.from_pretrained(tmp_path / "store", backbone=make_model("llama"), tokenizer=tokenizer())
    assert again.model.config.chat_template is False
    with pytest.raises(InputError, match=r"config.chat_template is None, .* has "):
        chatting().save_pretrained(tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "template", "given", "said"),
    [
        ("llama", None, True, "the tokenizer has none; set tokenizer.chat_template"),
        ("llama", "{{ raise_exception('no') }}", True, "cannot write the turns: no"),
        ("llama", None, "{% if %}", "cannot write the turns: "),
        ("llama", None, "chatml", "'chatml' writes no word of the user's: expected Jinja that writes the turns"),
        ("llama", None, __file__, "writes no word of the user's: is a file; give its content"),
        ("llama", "{{ bos_token }}{% for m in messages %}{{ m.text }}{% endfor %}:", True, "writes no word of"),
        ("bert", None, True, "goes with a causal backbone"),
        ("t5", None, TEMPLATE, "goes with a causal backbone"),
        ("llama", None, 1, "expected True, False or a template, got 1"),
        ("llama", None, "", "expected True, False or a template, got ''"),
    ],
)
def test_what_cannot_be_a_template_is_a_wrong_call(name, template, given, said):
    words = make_tokenizer(name)
    words.chat_template = template
    with pytest.raises(InputError) as error:
        ScalableLM.from_backbone(make_model(name), tokenizer=words, chat_template=given)
    assert str(error.value).startswith("chat_template: ")
    assert said in str(error.value)


def test_the_command_line_makes_such_a_store_and_holds_to_it(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    rows = [
        {"instruction": "the question", "input": row.text, "output": row.target} for row in easy("sea", rows=8).rows
    ]
    (tmp_path / "sea.jsonl").write_text("\n".join(map(json.dumps, rows)))
    learn = ["learn", tmp_path / "store", f"--task=sea={tmp_path}/sea.jsonl", "--epochs=1"]
    new = ["--backbone", tmp_path / "llama", "--features=32"]
    assert slm_fast(*learn, *new, "--chat-template").returncode == 0
    assert (
        json.loads((tmp_path / "store" / "manifest.json").read_text())["model"]["config"]["chat_template"] == TEMPLATE
    )
    again = slm_fast(*learn, "--chat-template")
    assert again.returncode == 0, again.stderr
    make_slm("llama", features=32).save_pretrained(tmp_path / "plain")
    done = slm_fast("learn", tmp_path / "plain", *learn[2:], *new[:2], "--chat-template")
    one_line(done, 2, "--chat-template: ", "was made with False")
