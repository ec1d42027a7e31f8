"""`import_adapter(check=True)`: an imported task compared with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_slm
from peft_adapters import texts, write_adapter

from slm_fast import SlmError
from slm_fast.errors import SlmWarning, WorkError
from slm_fast.integrations import peft_check


def test_a_check_compares_with_peft_and_an_adapter_that_differs_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, "bert")
    slm = make_slm("bert")
    found = slm.import_adapter(tmp_path, "sky", texts("sky"), check=True)
    assert found is not None
    assert found < 1e-4
    with pytest.warns(SlmWarning, match="already imported"):
        assert slm.import_adapter(tmp_path, "sky", texts("sky"), check=True) == found
    slm.forget("sky")
    monkeypatch.setattr("slm_fast.integrations.peft_files.PeftAdapter.scaling", lambda *_: 0.5)
    with pytest.raises(SlmError, match=r"differs from PEFT by .*no task was added"):
        slm.import_adapter(tmp_path, "sky", texts("sky"), check=True)
    assert slm.tasks == []


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize(("in_float64", "is_imported"), [(0.0, True), (3e-4, False)])
def test_a_check_of_a_row_that_peft_rounds_badly_is_against_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, in_float64: float, is_imported: bool
) -> None:
    write_adapter(tmp_path, name)
    slm, their_logits = make_slm(name), peft_check._their_logits

    def rounded(theirs: Any, *rest: Any) -> torch.Tensor:
        return their_logits(theirs, *rest) + (3e-4 if theirs.dtype == torch.float32 else in_float64)

    monkeypatch.setattr(peft_check, "_their_logits", rounded)
    if is_imported:
        found = slm.import_adapter(tmp_path, "sky", texts("sky"), check=True)
        assert found is not None
        assert found < 1e-4
    else:
        with pytest.raises(WorkError, match=r"differs from PEFT by 3\.0e-04, expected at most 0\.0001 "):
            slm.import_adapter(tmp_path, "sky", texts("sky"), check=True)
    assert bool(slm.tasks) == is_imported
