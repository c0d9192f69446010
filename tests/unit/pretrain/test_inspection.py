"""`trivium inspect` on a checkpoint of two ranks: whole, damaged, and with a value that is not finite."""

import json
import math
from pathlib import Path

import pytest
import torch

from configs.loader import ConfigError
from configs.sealed import Format
from pretrain import inspection
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import Piece

STATE = {"step": 7, "tokens": 1792, "samples": 28, "layout": "tp2 pp1 dp1 zero1", "optimizer_steps": 7}
STATE |= {"ledger": {"prose": 1500.0, "code": 201.0}}


def write(run_dir: Path, weight: torch.Tensor) -> Path:
    """Writes a checkpoint of one parameter [4, 3], of which each rank has two rows; its moments are 2 and 9."""
    final = storage.directory(run_dir, 7)
    temporary = final.with_name(".step_7")
    temporary.mkdir(parents=True)
    parts = []
    for rank in range(2):
        flat = weight[2 * rank : 2 * rank + 2].flatten()
        kinds = {"weight": flat, "exp_avg": torch.full((6,), 2.0), "exp_avg_sq": torch.full((6,), 9.0)}
        piece = Piece("layers.0.mlp.up_proj.weight", (4, 3), (2 * rank, 0), (2, 3), 0, 6)
        parts.append(storage.write_rank(temporary, rank, {piece.name: (piece, kinds)}))
    storage.publish(temporary, final, parts, {**STATE, "config": {"model": {"hidden_size": 3}}, "identity": {}})
    return final


def test_norms_are_of_whole_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    weight = torch.arange(12.0).view(4, 3)
    path = write(tmp_path, weight)
    assert inspection.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "layers.0.mlp.up_proj.weight",
        "4×3",
        "step 7",
        "1,792 tokens",
        "12 parameters",
        "tp2",
        "2 files",
        "prose 1,500, code 201",
    ):
        assert words in shown
    assert "hidden_size = 3" in shown
    assert inspection.main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (tensor,) = found["tensors"]
    assert tensor["norm"] == pytest.approx(math.sqrt(sum(i * i for i in range(12)))) and tensor["largest"] == 11
    assert (tensor["exp_avg"], tensor["exp_avg_sq"], found["not_finite"]) == (2.0, 3.0, 0)


def test_values_that_are_not_finite_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.ones(4, 3)
    weight[3, 1] = torch.nan
    write(tmp_path, weight)
    assert inspection.main([str(tmp_path)]) == 1
    assert "1 values are not finite" in capsys.readouterr().out


def test_a_damaged_or_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"neither a checkpoint .* nor a run"):
        inspection.main([str(tmp_path)])
    path = write(tmp_path, torch.ones(4, 3))
    (path / "rank_00001.safetensors").write_bytes(b"torn")
    for named in (path, tmp_path):
        assert inspection.main([str(named)]) == 1
        assert "rank_00001.safetensors has 4 bytes" in capsys.readouterr().err


def test_a_manifest_of_version_2_has_its_data_spans_under_another_key(tmp_path: Path) -> None:
    values = {"step": 1, "stretches": [{"first_step": 0}]}
    (tmp_path / storage.MANIFEST).write_bytes(Format("trivium-checkpoint", version=2, oldest=2).write(values))
    assert storage.read_manifest(tmp_path)["data_spans"] == [{"first_step": 0}]
