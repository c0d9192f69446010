"""`trivium prove --against`: files of one rank on the CPU, and a second device, for which the CPU stands in here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, validate
from configs.train import PretrainConfig
from pretrain.proof import devices
from pretrain.proof.prove import main as prove_main
from pretrain.proof.verdict import Verdict
from tests.parallel.harness import RanksOf


@pytest.fixture(scope="module")
def recorded(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the steps of one rank on the CPU in the cases and precisions that tests here compare."""
    folder = tmp_path_factory.mktemp("recorded")
    for case, precision in (("deepseek", "fp32"), ("packed", "bf16")):
        _take(ranks, folder, case, precision, folder / case / precision, None, None)
    return folder


def _take(
    ranks: RanksOf, folder: Path, case: str, precision: str, out: Path, inject: str | None, reference: Path | None
) -> None:
    options: dict[str, Any] = {"config": devices.config_of(case, out), "precision": precision, "inject": inject}
    options |= {"start": str(folder / case / devices.START), "reference": None if reference is None else str(reference)}
    ranks(1).run("tests.parallel.workers.proof:prove_on_device", process_group=False, **options)


def _verdict(ranks: RanksOf, folder: Path, case: str, precision: str, out: Path, inject: str | None) -> Verdict:
    one = folder / case / precision
    _take(ranks, folder, case, precision, out, inject, one)
    return devices.compare_case(one, out, case, validate(PretrainConfig, devices.config_of(case, out)), 0.0)


@pytest.mark.parametrize(("case", "precision"), [("deepseek", "fp32"), ("packed", "bf16")])
def test_the_same_device_computes_the_same(
    ranks: RanksOf, recorded: Path, tmp_path: Path, case: str, precision: str
) -> None:
    found = _verdict(ranks, recorded, case, precision, tmp_path, None)
    assert found.passed, found.failed
    assert {error.found for error in found.worst.values()} == {0.0}


@pytest.mark.parametrize(
    ("inject", "case", "precision", "column"),
    [
        ("products_in_tf32", "deepseek", "fp32", "forward"),
        ("attention_across_documents", "deepseek", "fp32", "forward"),
        ("attention_across_documents", "packed", "bf16", "forward"),
        ("mean_of_means", "packed", "bf16", "backward"),
    ],
)
def test_a_fault_of_the_second_device_is_found(
    ranks: RanksOf, recorded: Path, tmp_path: Path, inject: str, case: str, precision: str, column: str
) -> None:
    found = _verdict(ranks, recorded, case, precision, tmp_path, inject)
    assert not found.passed
    assert found.first is not None and found.first.startswith(column)


def test_weights_after_the_last_step_are_compared(ranks: RanksOf, recorded: Path, tmp_path: Path) -> None:
    """Plants a step of twice the learning rate as the second one, which nothing recorded of the first step shows."""
    found = _verdict(ranks, recorded, "deepseek", "fp32", tmp_path, "learning_rate_doubled_later")
    assert found.failed and all("final/" in line or " of step 3" in line for line in found.failed), found.failed


@pytest.mark.full
def test_the_command_records_and_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "reference", tmp_path / "out"
    assert prove_main(["--record", str(folder), "--precision", "fp32"]) == 0
    own = ["--against", str(folder), "--device", "cpu", "--precision", "fp32", "--out", str(out)]
    assert prove_main(own) == 0
    assert prove_main([*own, "--inject", "products_in_tf32"]) == 1
    result = json.loads((out / "prove.json").read_text())
    assert {layout["layout"] for layout in result["layouts"] if not layout["passed"]} == set(devices.CASES)
    with pytest.raises(ConfigError, match="was recorded in fp32; set --precision fp32, or record it again"):
        prove_main([*own, "--precision", "bf16"])
    with pytest.raises(ConfigError, match="it exists; name a new folder"):
        prove_main(["--record", str(folder)])
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    start = moved / "packed" / devices.START
    start.write_bytes(start.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=f"packed/{devices.START} is missing or damaged"):
        prove_main(["--against", str(moved), *own[2:]])
