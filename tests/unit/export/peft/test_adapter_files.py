"""Files of adapters that nothing should be trained from, and numbers that are zero and not left out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.peft import folder
from export.peft.adapter import PeftError
from export.peft.low_rank import _scale

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_adapter_whose_training_failed_is_refused(tmp_path: Path, broken: float) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    good = torch.ones(2, 8)
    save_file({NAME: good}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(folder.read(tmp_path)[0].tensors[NAME], good)
    good[1, 7] = broken
    save_file({NAME: good}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PeftError, match=rf"has NaN or infinite numbers in {NAME}; its training failed"):
        folder.read(tmp_path)


def test_a_rank_or_an_alpha_of_zero_is_not_taken_for_one_that_is_left_out() -> None:
    assert _scale({"r": 2, "lora_alpha": 0}, "q_proj", 2) == 0.0 and _scale({"r": 2}, "q_proj", 2) == 4.0
    with pytest.raises(PeftError, match=r"has rank 2, and adapter_config.json says 0"):
        _scale({"r": 0}, "q_proj", 2)
