"""Required content of manifests and task files, and the one-line errors for invalid ones."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from stores import ABOUT, CONFIG, make_task

from slm_fast import schema
from slm_fast.errors import WorkError
from slm_fast.fields import word
from slm_fast.options import ModelConfig
from slm_fast.schema import check_fits, check_manifest, check_task, manifest_of
from slm_fast.store import task_to_bytes
from slm_fast.tasks import LearnedTask

FILE = Path("here")
GAUSSIAN, DTKR = ({"router": router, "features": 0} for router in ("gaussian", "dtkr"))
DIGEST = "0123456789abcdef" * 4
ENTRY = {"file": f"tasks/a/{DIGEST}.safetensors", "sha256": DIGEST}
MANIFEST = {"format": 1, "model": ABOUT, "tasks": {"a": ENTRY}}
SENTENCE = {
    **ABOUT,
    "encoder_fingerprint": "beef",
    "config": {**CONFIG, "query": "sentence", "taps": None, "encoder": "minilm"},
}
GONE = object()
DEEP = "[" * 100_000 + "]" * 100_000


def changed(content: dict, path: str, value: Any) -> Any:
    """A copy in which the field at `path` is set to `value`, or deleted if that is GONE."""
    content = copy.deepcopy(content)
    *parents, last = path.split("/")
    place = content
    for parent in parents:
        place = place[parent]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return content


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(WorkError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("here: ")
    return message.removeprefix("here: ")


# The manifest


def test_a_manifest_gives_what_its_tasks_have_in_common_and_their_digests() -> None:
    for model in (ABOUT, SENTENCE, changed(ABOUT, "backbone", "")):
        assert check_manifest(json.dumps({**MANIFEST, "model": model}).encode(), FILE) == (model, {"a": DIGEST})


def test_every_field_of_the_configuration_is_known_to_the_manifest() -> None:
    assert {field.name for field in dataclasses.fields(ModelConfig)} == schema.CONFIG.keys()
    assert schema.WHEN_ABSENT.keys() <= schema.CONFIG.keys()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", GONE, "damaged: format: missing"),
        ("format", "1", "damaged: format: expected an integer from 1 on, got '1'"),
        ("format", True, "damaged: format: expected an integer"),
        ("format", 0, "damaged: format: expected an integer"),
        ("format", 2, "format 2; this version of slm_fast reads format 1"),
        ("model", [], "damaged: model: expected an object, got []"),
        ("model/backbone", 7, "damaged: model.backbone: expected a string, got 7"),
        ("model/backbone", "\ud800", "damaged: model.backbone: expected a string"),
        ("model/fingerprint", None, "damaged: model.fingerprint: expected a non-empty string, got None"),
        ("model/fingerprint", GONE, "damaged: model.fingerprint: missing"),
        ("model/encoder_fingerprint", "beef", "damaged: model.encoder_fingerprint: does not go with query 'trunk'"),
        ("model/config", None, "damaged: model.config: expected an object"),
        ("model/config/k", GONE, "damaged: model.config.k: missing"),
        ("model/config/k", 0, "damaged: model.config.k: expected an integer from 1 to 1,024, got 0"),
        ("model/config/k", 1025, "damaged: model.config.k: expected an integer from 1 to 1,024, got 1025"),
        ("model/config/k", 2.0, "damaged: model.config.k: expected an integer"),
        ("model/config/k", True, "damaged: model.config.k: expected an integer"),
        ("model/config/k", 2**31, "damaged: model.config.k: expected an integer"),
        ("model/config/groups", None, "damaged: model.config.groups: expected an integer"),
        (
            "model/config/first_layer",
            -1,
            "damaged: model.config.first_layer: expected an integer from 0 to 10,000, got -1",
        ),
        ("model/config/query", "both", "damaged: model.config.query: expected 'trunk' or 'sentence', got 'both'"),
        ("model/config/router", ["dtkr"], "damaged: model.config.router: expected 'gaussian' or 'dtkr'"),
        ("model/config/aggregate", "max", "damaged: model.config.aggregate: expected"),
        ("model/config/route_on", None, "damaged: model.config.route_on: expected"),
        (
            "model/config/temperature",
            0,
            "damaged: model.config.temperature: expected a number from 0.0001 to 10000, got 0",
        ),
        ("model/config/temperature", 10**400, "damaged: model.config.temperature: expected a number"),
        ("model/config/temperature", "4", "damaged: model.config.temperature: expected a number from 0.0001"),
        ("model/config/taps", 1, "damaged: model.config.taps: expected a list"),
        ("model/config/taps", [1, "3"], "damaged: model.config.taps: expected a list"),
        ("model/config/taps", [], "damaged: model.config.taps: expected a list"),
        ("model/config/taps", [1, 3, 1], "damaged: model.config.taps: 1 is listed twice"),
        ("model/config/targets", ["query", "query"], "damaged: model.config.targets: 'query' is listed twice"),
        ("model/config/taps", None, "damaged: model.config.taps: missing with query 'trunk'"),
        ("model/config/encoder", "x", "damaged: model.config.encoder: does not go with query 'trunk'"),
        ("model/config/targets", "query", "damaged: model.config.targets: expected a list"),
        ("model/config/later", 1, "model.config.later: not known; written by a newer version of slm_fast"),
        ("model/later", 1, "model.later: not known; written by a newer version of slm_fast"),
        ("la\nter", 1, "la\\nter: not known; written by a newer version of slm_fast"),
        ("tasks", None, "damaged: tasks: expected an object"),
        ("tasks/a", [], "damaged: tasks.a: expected an object"),
        ("tasks/a/file", GONE, "damaged: tasks.a.file: missing"),
        ("tasks/a/file", "tasks/b/x", "damaged: tasks.a.file: expected 'tasks/a/0123"),
        ("tasks/a/file", None, "damaged: tasks.a.file: expected 'tasks/a/0123"),
        ("tasks/a/sha256", DIGEST[:-1], "damaged: tasks.a.sha256: expected 64 hexadecimal digits"),
        ("tasks/a/sha256", DIGEST.upper(), "damaged: tasks.a.sha256: expected 64 hexadecimal digits"),
        ("tasks/a/sha256", DIGEST + "\n", "damaged: tasks.a.sha256: expected 64 hexadecimal digits"),
        ("tasks/a/later", 1, "tasks.a.later: not known; written by a newer version of slm_fast"),
        ("tasks/..", ENTRY, "damaged: tasks: task name '..'"),
        ("tasks/\u2028", ENTRY, "damaged: tasks: task name '\\u2028'"),
    ],
)
def test_a_wrong_field_of_a_manifest_is_named(path: str, value: Any, said: str) -> None:
    assert refusal(check_manifest, json.dumps(changed(MANIFEST, path, value)).encode(), FILE).startswith(said)


@pytest.mark.parametrize("field", ["encoder_fingerprint", "config/encoder"])
def test_a_sentence_query_needs_its_encoder(field: str) -> None:
    value = None if "config" in field else GONE
    data = json.dumps({**MANIFEST, "model": changed(SENTENCE, field, value)}).encode()
    assert refusal(check_manifest, data, FILE) == (
        f"damaged: model.{field.replace('/', '.')}: missing with query 'sentence'"
    )


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"format": ' + DEEP,
        json.dumps(MANIFEST).replace("4.0", "NaN"),
        json.dumps(MANIFEST).replace("4.0", "1" * 5000),
        json.dumps(MANIFEST).replace('"format": 1', '"format": 1, "format": 1'),
        json.dumps(MANIFEST) + "}",
        "\ufeff" + json.dumps(MANIFEST),
    ],
    ids=["deep", "deep and cut short", "not a number", "digits", "twice", "longer", "byte order mark"],
)
def test_a_manifest_that_is_not_plain_json_is_damaged(text: str) -> None:
    assert refusal(check_manifest, text.encode(), FILE).startswith("damaged: ")


def test_a_missing_field_takes_the_value_that_older_stores_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.CONFIG, "pooling", word("mean", "last"))
    data = json.dumps(MANIFEST).encode()
    assert refusal(check_manifest, data, FILE) == "damaged: model.config.pooling: missing"
    monkeypatch.setitem(schema.WHEN_ABSENT, "pooling", "mean")
    assert check_manifest(data, FILE)[0]["config"] == {**CONFIG, "pooling": "mean"}
    given = json.dumps(changed(MANIFEST, "model/config/pooling", "last")).encode()
    assert check_manifest(given, FILE)[0]["config"]["pooling"] == "last"


def test_a_store_of_before_there_were_random_features_has_none() -> None:
    older = {key: value for key, value in CONFIG.items() if key != "features"}
    data = json.dumps(changed(MANIFEST, "model/config", older)).encode()
    assert check_manifest(data, FILE)[0]["config"] == CONFIG


# A task's file

SLOTS = 3
TASK = make_task("a", slots=SLOTS)


def parts(task: LearnedTask) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and tensors of a task's file."""
    data = task_to_bytes(task)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["slm_fast"]), safetensors.torch.load(data)


def with_keys(task: LearnedTask) -> LearnedTask:
    """The same task with the tensors of a dtkr router."""
    return dataclasses.replace(task, router={"keys": task.router["mean"], "distance": task.router["distance"]})


@pytest.mark.parametrize("task", [TASK, with_keys(TASK), make_task("free", labels=None)], ids=["head", "dtkr", "free"])
def test_a_task_that_was_written_is_read(task: LearnedTask) -> None:
    about, tensors = parts(task)
    found = check_task(json.dumps(about), tensors, FILE)
    assert (found.name, found.labels, found.options) == (task.name, task.labels, task.options)
    assert task_to_bytes(found) == task_to_bytes(task)


def test_labels_may_stand_without_a_head() -> None:
    about, tensors = parts(dataclasses.replace(TASK, head=None))
    assert check_task(json.dumps(about), tensors, FILE).labels == TASK.labels


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", GONE, "not a task file: name: missing"),
        ("name", 7, "not a task file: name: expected a non-empty string, got 7"),
        ("name", "../a", "not a task file: task name '../a'"),
        ("labels", GONE, "not a task file: labels: missing"),
        ("labels", None, "not a task file: labels: expected those of the head, got null"),
        ("labels", "no", "not a task file: labels: expected a list"),
        ("labels", [], "not a task file: labels: expected a list"),
        ("labels", ["no", ""], "not a task file: labels: expected a list"),
        ("labels", ["no", 1], "not a task file: labels: expected a list"),
        ("labels", ["no", "\ud800"], "not a task file: labels: expected a list"),
        ("labels", ["no", "no"], "not a task file: labels: 'no' is listed twice"),
        ("labels", ["no", "yes", "x"], "not a task file: head.weight: expected [3, H], got [2, 3]"),
        ("options", GONE, "not a task file: options: missing"),
        ("options", None, "not a task file: options: expected an object"),
        ("later", 1, "later: not known; written by a newer version of slm_fast"),
    ],
)
def test_a_wrong_field_of_a_tasks_metadata_is_named(field: str, value: Any, said: str) -> None:
    about, tensors = parts(TASK)
    assert refusal(check_task, json.dumps(changed(about, field, value)), tensors, FILE).startswith(said)


def with_start(start: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Metadata and tensors of a task's file whose `warm_start` option is `start`."""
    about, tensors = parts(TASK)
    return json.dumps({**about, "options": {**about["options"], "warm_start": start}}), tensors


@pytest.mark.parametrize("start", [True, {"task": "b", "sha256": DIGEST}])
def test_what_a_tasks_values_began_at_is_read_as_it_was_written(start: Any) -> None:
    assert check_task(*with_start(start), FILE).options["warm_start"] == start


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (False, "not a task file: options.warm_start: expected an object, got False"),
        ({"task": "b"}, "not a task file: options.warm_start.sha256: missing"),
        ({"task": "", "sha256": DIGEST}, "not a task file: options.warm_start.task: expected a non"),
        ({"task": "b", "sha256": "b"}, "not a task file: options.warm_start.sha256: expected 64"),
        ({**ENTRY, "task": "b"}, "options.warm_start.file: not known; written by a newer version"),
    ],
)
def test_a_start_that_cannot_have_been_is_refused(start: Any, said: str) -> None:
    assert refusal(check_task, *with_start(start), FILE).startswith(said)


@pytest.mark.parametrize("metadata", [None, "", "[]", "{", '{"name": NaN}', '{"options": ' + DEEP, DEEP, "7"])
def test_metadata_that_is_no_object_is_no_task(metadata: str | None) -> None:
    assert refusal(check_task, metadata, parts(TASK)[1], FILE).startswith("not a task file: ")


LORA_A, LORA_B = "values.layer.1.query.lora_a", "values.layer.0.value.lora_b"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("distance", GONE, "distance: missing"),
        ("distance", torch.zeros(100), "distance: expected [101], got [100]"),
        ("count", GONE, "count: missing"),
        ("count", torch.zeros(SLOTS + 1), "count: expected [3], got [4]"),
        ("mean_slot", torch.tensor([0.0, 1.0, 2.0, 2.0]), "count: expected [4], got [3]"),
        ("mean_slot", torch.tensor([0.0, 2.0, 1.0]), "mean_slot: expected each of 0..2 in rising order"),
        ("mean_slot", torch.tensor([0.0, 1.0, 1.0]), "mean_slot: expected each of 0..2 in rising order"),
        ("mean_slot", torch.tensor([0.0, 0.5, 1.0]), "mean_slot: expected each of 0..2 in rising order"),
        ("mean_slot", torch.zeros(1, 3), "mean_slot: expected [M], got [1, 3]"),
        ("mean", torch.zeros(SLOTS, 5), "scatter: expected [15], got [10]"),
        ("mean", torch.zeros(1, 4), "mean: expected [3, D], got [1, 4]"),
        ("mean", torch.zeros(SLOTS), "mean: expected [3, D], got [3]"),
        ("mean", torch.zeros(SLOTS, 0), "mean: expected [3, D], got [3, 0]"),
        ("scatter", torch.zeros(4, 4), "scatter: expected [10], got [4, 4]"),
        ("keys", torch.zeros(SLOTS, 4), "count: not known"),
        ("head.weight", GONE, "head.weight: missing"),
        ("head.bias", GONE, "head.bias: missing"),
        ("head.weight", torch.zeros(2), "head.weight: expected [2, H], got [2]"),
        ("head.bias", torch.zeros(3), "head.bias: expected [2], got [3]"),
        ("head.scale", torch.zeros(2), "head.scale: not known; written by a newer version of slm_fast"),
        ("values.x\ny.lora_a", torch.zeros(2), "values.x\\ny.lora_a: not known"),
        (LORA_A, GONE, "values.layer.1.query.lora_a: missing"),
        (LORA_B, GONE, "values.layer.0.value.lora_b: missing"),
        (LORA_A, torch.zeros(SLOTS, 1, 4), "values.layer.1.query.lora_a: expected [3, 2, I], got [3, 1, 4]"),
        (LORA_B, torch.zeros(SLOTS + 1, 2, 3), "values.layer.0.value.lora_b: expected [3, 2, O], got [4, 2, 3]"),
        (LORA_B, torch.zeros(SLOTS, 2), "values.layer.0.value.lora_b: expected [3, 2, O], got [3, 2]"),
        (LORA_A, torch.zeros(SLOTS, 2, 4).double(), "values.layer.1.query.lora_a: expected float32, got float64"),
        (LORA_A, torch.full((SLOTS, 2, 4), torch.nan), "values.layer.1.query.lora_a: holds a number that is not"),
        ("count", torch.full((SLOTS,), torch.inf), "count: holds a number that is not finite"),
    ],
)
def test_a_wrong_tensor_of_a_task_is_named(name: str, tensor: Any, said: str) -> None:
    about, tensors = parts(TASK)
    # Replace, add or remove the named tensor.
    tensors = {key: t for key, t in tensors.items() if key != name} | ({} if tensor is GONE else {name: tensor})
    message = refusal(check_task, json.dumps(about), tensors, FILE)
    assert message.removeprefix("not a task file: ").startswith(said)


def test_keys_must_be_as_many_as_slots() -> None:
    about, tensors = parts(with_keys(TASK))
    message = refusal(check_task, json.dumps(about), tensors | {"keys": torch.zeros(1, 4)}, FILE)
    assert message == "not a task file: keys: expected [3, D], got [1, 4]"


@pytest.mark.parametrize("shape", [(0, 2), (SLOTS, 0)], ids=["no slots", "no rank"])
def test_a_task_has_at_least_one_slot_of_at_least_rank_1(shape: tuple[int, int]) -> None:
    about, tensors = parts(TASK)
    for name in tensors:
        if name.startswith("values."):
            tensors[name] = torch.zeros(*shape, tensors[name].shape[2])
    assert "values.layer.0.value.lora_a: expected" in refusal(check_task, json.dumps(about), tensors, FILE)


def test_a_task_has_increments_of_at_least_one_module() -> None:
    about, tensors = parts(TASK)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("values.")}
    assert refusal(check_task, json.dumps(about), tensors, FILE).startswith("not a task file: values: expected")


# Compatibility of a task with a model

MODULES = {"layer.0.value": (4, 3), "layer.1.query": (4, 3)}
SHAPES = {"layers": MODULES, "hidden": 3, "query": 4}


def test_a_task_fits_the_model_it_was_learned_with() -> None:
    free, keyed = make_task("free", labels=None), with_keys(TASK)
    assert check_fits(TASK, SHAPES, GAUSSIAN) is None
    assert check_fits(free, {**SHAPES, "hidden": None}, GAUSSIAN) is None
    assert check_fits(keyed, SHAPES, DTKR) is None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layers", {"layer.0.value": (4, 3)}, "values.layer.1.query: the model has no such layer"),
        ("layers", {**MODULES, "layer.2.key": (4, 3)}, "values.layer.2.key: missing"),
        ("layers", {**MODULES, "layer.0.value": (5, 3)}, "values.layer.0.value.lora_a: expected [3, 2, 5], got"),
        ("layers", {**MODULES, "layer.1.query": (4, 8)}, "values.layer.1.query.lora_b: expected [3, 2, 8], got"),
        ("hidden", 5, "head.weight: expected [2, 5], got [2, 3]"),
        ("hidden", None, "head: the model answers without one"),
        ("query", 6, "mean: expected [M, 6], got [3, 4]"),
    ],
)
def test_a_task_that_does_not_fit_the_model_is_named(field: str, value: Any, said: str) -> None:
    for file, named in ((None, "task 'a'"), (Path("x.safetensors"), "x.safetensors")):
        with pytest.raises(WorkError) as caught:
            check_fits(TASK, {**SHAPES, field: value}, GAUSSIAN, file=file)
        assert str(caught.value).startswith(f"{named}: does not fit the model: {said}")


def test_a_task_of_another_router_does_not_fit() -> None:
    with pytest.raises(WorkError, match="router: expected distance, keys, got count, distance, mean, scatter"):
        check_fits(TASK, SHAPES, DTKR)


def test_an_encoders_task_needs_a_head() -> None:
    with pytest.raises(WorkError, match="task 'free': does not fit the model: head: missing"):
        check_fits(make_task("free", labels=None), SHAPES, GAUSSIAN)


def test_keys_fit_the_width_of_queries() -> None:
    with pytest.raises(WorkError, match=r"keys: expected \[3, 8\], got \[3, 4\]"):
        check_fits(with_keys(TASK), {**SHAPES, "query": 8}, DTKR)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_manifest_is_sorted_json_with_an_indent_of_one(count: int) -> None:
    files = {f"t{i}-A.b_{i}": f"{i}a" * 32 for i in reversed(range(count))}
    tasks = {name: {"file": f"tasks/{name}/{d}.safetensors", "sha256": d} for name, d in files.items()}
    about = {"fingerprint": "né", "config": {"z": [1, 2], "a": None}, "backbone": "b"}
    expected = json.dumps({"format": 1, "model": about, "tasks": tasks}, indent=1, sort_keys=True) + "\n"
    assert manifest_of(about, files) == expected.encode()
