"""The check of a GPU goes on after a part that fails or hangs, says why, and writes a page; parts run in tests/e2e."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.loader import validate
from configs.model import ModelConfig
from tests.gpu import check, common, page, parts, requirements, syncs
from tests.gpu.parts import Part


def made(name: str, code: str, out: Path, seconds: float = 60, **environment: str) -> Part:
    return Part(name, name.title(), [sys.executable, "-c", code], seconds, out / f"{name}.json", environment)


def test_the_check_goes_on_after_failures_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    write = "import pathlib, json; pathlib.Path({!r}).write_text(json.dumps({}))"
    run = [
        made("versions", write.format(str(out / "versions.json"), {"gpu": "Card|7", "memory_gib": 79.6}), out),
        made("raises", "raise ValueError('no kernel image is available')", out),
        made("reports", write.format(str(out / "reports.json"), {"failed": "OutOfMemoryError: 80 GiB"}), out),
        made("silent", "raise SystemExit(3)", out),
        made("hangs", "import time; print('step 1', flush=True); time.sleep(60)", out, seconds=3),
        made("after", "import os; raise SystemExit(os.environ['GIVEN'] != 'x')", out, GIVEN="x"),
    ]
    assert check.main(["--out", str(out)], run) == 1
    report = json.loads((out / "gpu.json").read_text())
    reasons = {part["name"]: part["reason"] for part in report["parts"]}
    assert [part["ok"] for part in report["parts"]] == [True, False, False, False, False, True]
    assert reasons == {
        "versions": "",
        "raises": "ValueError: no kernel image is available",
        "reports": "OutOfMemoryError: 80 GiB",
        "silent": "it printed nothing",
        "hangs": "stopped after 3 s; the end of its output: step 1",
        "after": "",
    }
    drawn = (out / "gpu.md").read_text()
    assert "# Trivium on Card|7" in drawn and "| Raises | **failed**: ValueError: no kernel" in drawn
    assert "| memory of the card | 80 GiB |" in drawn
    assert "hangs: failed: stopped after 3 s" in capsys.readouterr().out
    assert check.main(["--out", str(out), "--only", "after"], run) == 0
    assert [part["name"] for part in json.loads((out / "gpu.json").read_text())["parts"]] == ["after"]


def test_a_page_says_what_has_not_run_yet() -> None:
    drawn = page.draw({"date": "2026-01-01", "device": "cuda", "parts": [], "not_run": ["speed"]})
    assert "| speed | not run | |" in drawn


def test_parts_are_commands_that_exist(tmp_path: Path) -> None:
    for part in parts.all_parts("cuda", False, tmp_path):
        module = part.command[2]
        path = Path(module.replace(".", "/") + ".py")
        assert path.is_file(), module
    names = [part.name for part in parts.all_parts("cuda", False, tmp_path)]
    assert names.index("record") < names.index("prove_fp32") and names.index("speed") < names.index("resume")


@pytest.mark.parametrize(
    ("torch", "own", "pinned"), [("", True, True), ("2.13.0+cu130", False, True), ("2.11.0", False, False)]
)
def test_requirements_leave_a_torch_that_is_there(tmp_path: Path, torch: str, own: bool, pinned: bool) -> None:
    requirements.write(torch, tmp_path)
    wanted = {requirements.name_of(line) for line in (tmp_path / "requirements.txt").read_text().splitlines()}
    lines = (tmp_path / "constraints.txt").read_text().splitlines()
    held = {requirements.name_of(line): line for line in lines}
    assert ("torch" in wanted) == own and {"megatron-core", "deepspeed", "pydantic"} <= wanted
    assert ("setuptools" in held) == pinned and "pydantic" in held
    assert held["torch"] == f"torch=={torch.partition('+')[0] or '2.13.0'}" and len(held) == len(lines)


def test_the_script_refuses_what_the_check_does_not_know(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["tests/gpu/run.sh", "--no-install", "--device", "abacus"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "invalid choice: 'abacus'" in ran.stderr


def test_the_memory_formula_counts_what_autograd_saves() -> None:
    import torch

    from configs.train import TrainSection
    from tests.gpu import common, memory

    shape = {"vocab_size": 256, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_heads": 4}
    model = validate(ModelConfig, {**shape, "num_kv_heads": 2})
    train = TrainSection(steps=1, global_batch_size=2, micro_batch_size=2, seq_length=64)
    batch = common.batches(model, train, 0)[0]
    whole = memory.expected(model, train, batch, torch.bfloat16)
    assert whole["state"] == 18 * model.num_parameters()
    again = memory.expected(model, train.model_copy(update={"recompute": "full"}), batch, torch.bfloat16)
    tokens = 2 * 64
    assert again["activations"] < whole["activations"] / 3
    # The inputs of every linear layer at least are saved: twice the hidden states, attention's output, and the MLP's.
    assert whole["activations"] > 2 * tokens * (3 * 64 + 3 * 96) * 2
    deeper = validate(ModelConfig, {**shape, "num_kv_heads": 2, "num_layers": 4})
    growth = memory.expected(deeper, train, batch, torch.bfloat16)["activations"] / whole["activations"]
    assert 1.7 < growth < 2.0


def test_values_that_are_read_count_as_waits() -> None:
    lines: Counter[str] = Counter()
    with syncs._counted("cpu", lines):
        torch.ones(2).nonzero()
        assert torch.ones(1).add(1).item() == 2
    torch.ones(1).item()
    assert lines == {"elsewhere": 2}


def test_a_second_engine_of_a_process_opens_no_port_either(monkeypatch: pytest.MonkeyPatch) -> None:
    common.environment.cache_clear()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in common.environment().as_variables().items():  # as the first engine does
        monkeypatch.setenv(name, value)
    assert common.environment().launcher == "single"
