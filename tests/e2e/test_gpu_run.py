"""The check of a GPU, from its script to its page, on the CPU and with small models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
def test_the_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["tests/gpu/run.sh", "--no-install", "--device", "cpu", "--small", "--out", str(tmp_path / "gpu")]
    ran = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "gpu/gpu.json").read_text())
    assert len(report["parts"]) == 10 and all(part["ok"] for part in report["parts"])
    results = {part["name"]: part["result"] for part in report["parts"]}
    assert results["speed"]["tokens_per_s"] > 0 and 0 < results["speed"]["share_of_product_rate"] < 1
    assert "causal_documents" in results["speed"]["attention"]
    assert results["resume"]["resume"] == "the next step is the same, bit by bit"
    assert results["syncs"]["by_model"] == {"packed": 0, "deepseek": 0}
    assert "| save and resume | the next step is the same, bit by bit |" in (tmp_path / "gpu/gpu.md").read_text()
