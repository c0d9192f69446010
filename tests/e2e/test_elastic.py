"""A run that loses one of two nodes goes on with the other in another layout, and takes both again when it is back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.loader import load
from configs.train import PretrainConfig
from launch.ranks import free_port
from pretrain.checkpoint import storage
from pretrain.proof.bounds import Bounds
from tests.parallel.runs import trained_on
from tests.small_training import last_step, write_config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
STEPS, EVERY = 60, 5


def start(
    node: int, nodes: int, port: int, config: Path, run: Path, steps: int, layout: list[str]
) -> "subprocess.Popen[str]":
    """Starts the launcher of one node of two ranks, which stands in for a machine."""
    meeting = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-address", "127.0.0.1"]
    words = ["launch", "--nproc-per-node", "2", "--min-nodes", "1", *meeting, "--master-port", str(port)]
    command = [sys.executable, "-m", "cli", *words, "train", str(config), f"run.dir={run}", f"train.steps={steps}"]
    return subprocess.Popen(
        [*command, *layout],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.full
@pytest.mark.parametrize(
    ("degrees", "says", "then"),
    [
        (["tp=2"], "", "tp2 pp1 dp1 zero1"),
        (
            ["tp=2", "pp=2"],
            "elastic: 1 node with 2 ranks: the layout is tp2 pp1 dp1 zero1; with parallel.pp=1; a",
            "tp2",
        ),
    ],
)
def test_a_lost_node_shrinks_the_layout_and_its_return_grows_it(
    tmp_path: Path, degrees: list[str], says: str, then: str
) -> None:
    """Compares the samples with the uninterrupted run's exactly, and losses within the proof's bound for each step."""
    config = write_config(tmp_path, STEPS, tmp_path / "run", rows=2000, every=EVERY)
    run, straight = tmp_path / "run", tmp_path / "straight"
    layout = [f"parallel.{degree}" for degree in degrees]
    done = [start(node, 2, port, config, straight, STEPS, layout) for port in [free_port()] for node in range(2)]
    assert [process.wait(120) for process in done] == [0, 0], done[0].communicate()

    port = free_port()
    first, lost = (start(node, 2, port, config, run, STEPS, layout) for node in range(2))
    deadline = time.monotonic() + 120
    while last_step(run) < EVERY + 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    lost.send_signal(signal.SIGKILL)  # its ranks end with it
    first.communicate(timeout=120)
    assert first.returncode != 0
    saved = storage.steps(run)[-1]
    assert saved < STEPS

    alone = start(0, 1, free_port(), config, run, STEPS - 20, layout)
    said, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0, said
    assert says in said if says else "elastic:" not in said  # fewer data-parallel ranks by hand are nothing to say
    assert storage.read_manifest(storage.directory(run, STEPS - 20))["layout"].startswith(then)
    assert f"going on from {storage.directory(run, saved)}" in said

    port = free_port()
    back = [start(node, 2, port, config, run, STEPS, layout) for node in range(2)]
    said, _ = back[0].communicate(timeout=120)
    assert back[0].returncode == back[1].wait(60) == 0, said
    assert "elastic:" not in said and ("parallel.pp 1 -> 2" in said) == ("pp=2" in degrees)
    grown = storage.read_manifest(storage.directory(run, STEPS))["layout"]
    assert grown == storage.read_manifest(storage.directory(straight, STEPS))["layout"]
    assert trained_on(run) == trained_on(straight)
    bound = Bounds.of(load(PretrainConfig, config), "fp32").loss()
    found, expected = losses(run), losses(straight)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, loss in expected.items():  # until it is lost, the run is the same
        assert abs(found[step] - loss) <= (0 if step <= saved else bound * loss * (step - saved)), step
    print(f"largest difference: {max(abs(found[step] / loss - 1) for step, loss in expected.items()):.2g}, {bound:.2g}")
