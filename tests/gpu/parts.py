"""The parts of the check of a GPU, in their order: the command of each, its time limit, and what it proves."""

import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One part; its command runs in the repository and may write the JSON values of its result into `result`."""

    name: str
    title: str
    command: list[str]
    seconds: float  # after which it is stopped
    result: Path
    environment: dict[str, str] = field(default_factory=dict)


def all_parts(device: str, small: bool, out: Path) -> list[Part]:
    """Returns the parts for a device; with `small`, models that a CPU trains in seconds."""
    reference = out / "reference"
    precisions = ("fp32", "bf16")

    def part(name: str, title: str, seconds: float, *command: str, **environment: str) -> Part:
        result = out / f"{name}.json"
        return Part(name, title, [sys.executable, "-m", *command], seconds, result, environment)

    def own(name: str, title: str, seconds: float, module: str, **environment: str) -> Part:
        size = ["--small"] if small else []
        result = str(out / f"{name}.json")
        command = [f"tests.gpu.{module}", "--device", device, "--result", result, *size]
        return part(name, title, seconds, *command, **environment)

    def prove(precision: str) -> Part:
        folder = str(out / f"prove_{precision}")
        return part(
            f"prove_{precision}",
            f"one rank against the CPU's files, {precision}",
            180,
            *("cli", "prove", "--against", str(reference), "--device", device, "--precision", precision),
            *("--out", folder),
        )

    layouts = out / "layouts.toml"
    return [
        own("versions", "imports, and what is there", 180, "versions"),
        own("one_step", "one step, kernels one at a time", 180, "one_step", CUDA_LAUNCH_BLOCKING="1"),
        part(
            "record",
            "the CPU's files",
            240,
            *("cli", "prove", "--record", str(reference), "--precision", ",".join(precisions)),
        ),
        *(prove(precision) for precision in precisions),
        part(
            "layouts",
            "tp2, ep2, dp2 and pp2 on one device over gloo",
            420,
            *("cli", "prove", str(layouts), "parallel.backend=gloo", "--layouts", "tp2,ep2,dp2,pp2"),
            *("--precision", "fp32" if small else ",".join(precisions), "--out", str(out / "layouts")),
        ),
        own("train", "trivium train, stopped and gone on", 240, "train_run"),
        own("syncs", "waits for the device in a step", 120, "syncs"),
        own(
            "speed",
            "speed and memory of a small model" if small else "a model of 1B parameters at 8,192 tokens",
            420,
            "speed",
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        ),
        own("resume", "save and resume, bit by bit", 240, "resume", CUBLAS_WORKSPACE_CONFIG=":4096:8"),
    ]
