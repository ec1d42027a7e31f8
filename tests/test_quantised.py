"""Quantised backbones: base layers of any quantisation library are called as they are, and LoRA updates are added."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
import transformers
from models import (
    easy,
    farm_and_sea,
    make_model,
    make_tokenizer,
    mixed_texts,
    one_thread,  # noqa: F401
    route_of,
)
from torch import nn

from slm_fast import ScalableLM

WAYS = ("torchao", "bitsandbytes-8", "bitsandbytes-4", "gptqmodel")
# transformers does not know which layers of a BERT GPTQ has quantised.
PAIRS = [(name, way) for name in ("bert", "llama", "phi3") for way in WAYS if (name, way) != ("bert", "gptqmodel")]
pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries emit many warnings


def wide_model(name: str) -> transformers.PreTrainedModel:
    """A random model of a width that all kernels support: GPTQ's and bitsandbytes' need multiples of 32 and 64."""
    model = make_model(name)
    for field, value in {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}.items():
        if hasattr(model.config, field):
            setattr(model.config, field, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(model.config)


def quantised_folder(name: str, way: str, path) -> str:
    """A folder with a quantised model, as saved by transformers, and its tokenizer."""
    library, _, bits = way.partition("-")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: docs/families.md says how to install it")
    model, tokenizer = wide_model(name), make_tokenizer(name)
    tokenizer.save_pretrained(path / "quantised")
    if library == "gptqmodel":
        tokenizer.pad_token = tokenizer.eos_token
        texts = [" ".join(mixed_texts(4, seed)) for seed in range(16)]
        how = transformers.GPTQConfig(4, tokenizer, texts, group_size=32, backend="gptq_torch")
    elif library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model.save_pretrained(path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = type(model).from_pretrained(path / "plain", quantization_config=how)
    model.save_pretrained(path / "quantised")
    return str(path / "quantised")


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_increments_are_added_to_what_a_quantised_layer_gives(name, way, tmp_path):
    slm = ScalableLM.from_backbone(quantised_folder(name, way, tmp_path), targets=("query",))
    farm, sea = farm_and_sea(slm)
    module = slm.model.modules[0]
    layer = slm.model.backbone.model.get_submodule(module.partition("[")[0])
    assert hasattr(layer.base, "weight") == (way != "gptqmodel")  # whose layers hold packed integers instead
    assert type(getattr(layer.base, "weight", None)) is not nn.Parameter
    part = layer.parts[module] if name == "phi3" else slice(None)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, _, _ = slm.model.call(lambda: layer(x), torch.ones(2, 3), route_of([[1], [0]], [[1.0], [0.5]]))
        wanted = layer.base(x).clone()
        for row, (task, share) in enumerate(((sea, 1.0), (farm, 0.5))):
            lora_a, lora_b = task.values[module]
            wanted[row, :, part] += share * (x[row] @ lora_a[0].T @ lora_b[0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert {answer.task for answer in slm.predict(mixed_texts(8), max_new_tokens=2)} == {"farm", "sea"}


@pytest.mark.parametrize(("name", "way"), [pair for pair in PAIRS if pair[0] != "phi3"])
def test_a_quantised_backbone_learns_and_a_store_knows_it_again(name, way, tmp_path):
    folder = quantised_folder(name, way, tmp_path)
    slm = ScalableLM.from_backbone(folder)
    slm.save_pretrained(tmp_path / "store")
    task = easy("sea", rows=8)
    slm.learn(task, epochs=30, batch_size=8, learning_rate=2e-2)
    answers = slm.predict([row.text for row in task.rows], max_new_tokens=2)
    assert sum((a.label or a.text) == row.target for a, row in zip(answers, task.rows, strict=True)) >= 7
    again = ScalableLM.from_pretrained(tmp_path / "store")
    assert again.predict([row.text for row in task.rows], max_new_tokens=2) == answers
