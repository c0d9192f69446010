"""The table of `--profile`, from traces whose times are known, and the steps that the option names."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from configs.checkpoint_folders import MANIFEST
from configs.cli import profiled_steps
from configs.loader import ConfigError
from pretrain.parallel.engine import OPTIMIZER
from pretrain.profiling import DATA, KINDS, STEP, table, time_by_kind

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def event(cat: str, name: str, first: float, end: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": first, "dur": end - first, "tid": thread}


# Two steps of 100 with a gap of 10 between them, in which the loop does something else.
STEPS = [event("user_annotation", STEP, 0, 100), event("user_annotation", STEP, 110, 210)]


def test_the_time_of_a_cpu_is_divided_by_what_the_thread_of_the_steps_does() -> None:
    found = time_by_kind(
        [
            *STEPS,
            {"ph": "i", "name": "an event without a duration"},
            event("user_annotation", DATA, 0, 7),
            event("cpu_op", "aten::nonzero", 0, 90, thread=2),  # rows of a later step
            event("cpu_op", "aten::mm", 10, 40),
            event("user_annotation", "gloo:all_reduce", 30, 60, thread=3),  # hidden up to 40
            event("cpu_op", "c10d::allreduce_", 35, 45),
            event("cpu_op", "autograd::engine::evaluate_function: AllReduceBackward", 50, 70),  # waits up to 60
            event("user_annotation", OPTIMIZER, 70, 100),
            event("cpu_op", "aten::_fused_adamw_", 72, 80),
            event("user_annotation", "gloo:all_gather", 90, 100, thread=3),
            event("cpu_op", "aten::mm", 300, 400),  # after the steps
        ]
    )
    assert found == {"compute": 30 + 10, "communication": 20 + 10, "data": 7, "optimizer": 20, "idle": 103}


def test_the_time_of_a_gpu_is_divided_by_its_kernels() -> None:
    found = time_by_kind(
        [
            *STEPS,
            event("user_annotation", DATA, 0, 20),  # the first 5 of them while the GPU still computes
            event("cpu_op", "aten::mm", 20, 22),
            event("kernel", "gemm", 0, 5, thread=7),
            event("kernel", "gemm", 25, 60, thread=7),
            event("kernel", "ncclDevKernel_ReduceScatter", 50, 80, thread=8),  # hidden up to 60
            event("gpu_user_annotation", OPTIMIZER, 85, 120, thread=7),
            event("kernel", "multi_tensor_apply", 90, 110, thread=7),
            event("gpu_memcpy", "Memcpy HtoD", 200, 230, thread=7),  # ends after the host is done
        ]
    )
    assert found == {"compute": 70, "communication": 20, "data": 15, "optimizer": 20, "idle": 105}


def test_a_table_has_a_line_for_each_rank() -> None:
    lines = table([dict.fromkeys(KINDS, 4000.0), dict.fromkeys(KINDS, 0.0)], steps=2)
    assert lines[1].split()[:4] == ["0", "10.0", "2.0", "(20.0%)"] and len(lines) == 3


@pytest.mark.parametrize(
    ("chosen", "steps"), [("", range(0)), ("3", range(3, 4)), ("3-5", range(3, 6)), ("1-12", range(1, 13))]
)
def test_steps_to_profile(chosen: str, steps: range) -> None:
    assert profiled_steps(chosen, 12) == steps


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("pretrain.train", "pretrain/demo.toml"),
        ("posttrain.sft", "posttrain/demo_sft.toml"),
        ("posttrain.rm", "posttrain/demo_rm.toml"),
        ("posttrain.grpo", "posttrain/demo_grpo.toml"),
    ],
)
def test_every_training_command_checks_the_option_first(command: str, config: str, tmp_path: Path) -> None:
    manifest = tmp_path / "checkpoints" / "step_1" / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")  # enough of a run to begin from, before any checkpoint is read
    overrides = ["train.steps=70", *([f"init.run={tmp_path}"] if command.startswith("posttrain") else [])]
    with pytest.raises(ConfigError, match="steps = 70; give others, such as --profile 68-70"):
        import_module(command).main([str(CONFIGS / config), *overrides, "--dry-run", "--profile", "60-80"])


@pytest.mark.parametrize("chosen", ["x", "3-", "-3", "3-x", "0", "0-4", "5-3", "3-13", "13", "1,2", "3-4-5", "\u0663"])
@pytest.mark.parametrize("last", [1, 12])
def test_other_values_are_refused_with_one_that_works(chosen: str, last: int) -> None:
    with pytest.raises(ConfigError, match="--profile") as caught:
        profiled_steps(chosen, last)
    offered = str(caught.value).split("such as --profile ")[1].split(",")[0].split()[0]
    assert profiled_steps(offered, last)
