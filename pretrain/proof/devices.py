"""Compares two devices or machines: `trivium prove --against cpu`, and `trivium prove --record FOLDER`.

One rank on the CPU takes three clipped steps of small models, and files keep everything that it computed, with the
weights and rows that it began from. One rank on another device begins from the same files, and is held against them
within the bounds of `proof.bounds`, tensor by tensor. The folder of the files can be carried to another machine and
named there by `--against FOLDER`. It holds safetensors and JSON, and is published by renaming.

Weights after the last step are compared too. Each step of Adam may differ by what its first step may, and a step taken
from other weights differs by more; the reference takes the same steps in fp64, which shows by how much.
"""

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.files import file_sha256, write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, plain, validate
from configs.train import PretrainConfig
from pretrain.proof.bounds import COMPANION, Bounds
from pretrain.proof.rank_pool import ProofRanks
from pretrain.proof.verdict import RelativeError, Verdict

FORMAT = 1  # of the folder's files
REFERENCE, START, FINAL = "reference.json", "start.safetensors", "final.safetensors"
GPU_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # in /dev, at least one on a Linux machine with a GPU

# Sizes are multiples of 8, as GPU kernels want them.
_DENSE: dict[str, Any] = {
    "vocab_size": 256,
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "init_std": 0.1,
}
_DEEPSEEK: dict[str, Any] = {
    **_DENSE,
    "tie_embeddings": True,
    "attention": {"qk_norm": "head"},
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "num_shared_experts": 1,
        "gating": "sigmoid",
        "routed_scaling": 2.0,
        "num_groups": 4,
        "top_groups": 2,
        "group_score": "top2",
        "aux_loss": "global_batch",
        "aux_loss_coef": 0.5,
        "z_loss_coef": 0.1,
        "bias_update_rate": 0.05,
    },
}
# Models by name, and the rows that they are trained on: `whole` rows are one document, `packed` ones are several with
# padding.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "dense": (_DENSE, "whole"),
    "packed": (_DENSE, "packed"),
    "deepseek": (_DEEPSEEK, "packed"),
}


def config_of(name: str, run_dir: Path) -> dict[str, Any]:
    """Returns the config of case `name` of `CASES`; instead of a path its data.plan has the kind of rows to make."""
    model, rows = CASES[name]
    return {
        "run": {"dir": str(run_dir)},
        "model": model,
        "data": {"plan": rows},
        "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 64},
        "optimizer": {"lr": 0.01},
    }


def record(folder: Path, precisions: Sequence[str]) -> None:
    """Records all cases on this CPU in `folder`, which must not exist. Raises RuntimeError if a rank fails."""
    if folder.exists():
        raise ConfigError(f"--record {folder}: it exists; name a new folder, or remove this one")
    check_writable(folder.parent, "--record", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        cases = {}
        with ProofRanks("cpu") as pool:
            for name in CASES:
                start = temporary / name / START
                for precision in precisions:
                    config = config_of(name, temporary / name / precision)
                    pool.run(1, config, precision, None, None, start)
                cases[name] = plain(validate(PretrainConfig, config_of(name, Path(name))))
        facts = {
            "format": FORMAT,
            "machine": platform.machine(),
            "versions": {package: version(package) for package in ("torch", "numpy")},
            "precisions": list(precisions),
            "cases": cases,
            "files": {str(path.relative_to(temporary)): file_sha256(path) for path in _files(temporary)},
        }
        write_atomic(temporary / REFERENCE, json.dumps(facts, indent=1).encode())
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_reference(folder: Path, precisions: Sequence[str]) -> dict[str, Any]:
    """Reads reference.json and checks every file against its checksum; raises ConfigError if anything is amiss."""
    again = "record it again: trivium prove --record FOLDER"
    try:
        facts = dict(json.loads((folder / REFERENCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigError(f"--against {folder}: it has no {REFERENCE} that can be read; {again}") from None
    if facts.get("format") != FORMAT or not facts.keys() >= {"files", "precisions", "cases"}:
        raise ConfigError(f"--against {folder}: another version of Trivium recorded it; {again}")
    for name, digest in facts["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise ConfigError(f"--against {folder}: {name} is missing or damaged; copy the folder again, or {again}")
    if missing := [precision for precision in precisions if precision not in facts["precisions"]]:
        have = ",".join(facts["precisions"])
        raise ConfigError(
            f"--precision {missing[0]}: {folder} was recorded in {have}; set --precision {have}, or record it again "
            f"with --precision {','.join(precisions)}"
        )
    return facts


def check_device(device: str) -> None:
    """Raises ConfigError if torch finds no such device. Imports torch only if the machine may have one."""
    if device != "cuda":
        return
    found = platform.system() != "Linux" or any(next(Path("/dev").glob(name), None) for name in GPU_FILES)
    if found and not version("torch").endswith("+cpu"):
        import torch

        found = torch.cuda.is_available()
    if not found:
        raise ConfigError(
            f"--device cuda: torch {version('torch')} finds no GPU; install a CUDA build of torch on a machine with "
            "one, or set --device cpu"
        )


def hold_against(
    folder: Path, out: Path, precisions: Sequence[str], device: str, inject: str | None
) -> tuple[dict[str, Any], list[Verdict]]:
    """Takes the recorded steps again on `device` and compares; returns the reference's facts and the verdicts.

    Raises RuntimeError if the rank fails.
    """
    facts, verdicts = read_reference(folder, precisions), []
    with ProofRanks(device) as pool:
        for precision in precisions:
            for name, settings in facts["cases"].items():
                started, own, one = time.perf_counter(), out / f"on_{device}" / name / precision, folder / name
                shutil.rmtree(own, ignore_errors=True)
                config = {**settings, "run": {**settings["run"], "dir": str(own)}}
                pool.run(1, config, precision, inject, one / precision, one / START)
                checked = validate(PretrainConfig, settings)
                verdicts.append(compare_case(one / precision, own, name, checked, time.perf_counter() - started))
    return facts, verdicts


def compare_case(one: Path, other: Path, name: str, config: PretrainConfig, seconds: float) -> Verdict:
    """Compares all that the first step computed, then loss and grad norm of later steps, and the last weights."""
    from pretrain.proof.compare import compare

    verdict = compare(one, other, name, 1, config, seconds)
    expected, exact, found = (json.loads((at / "step.json").read_text()) for at in (one, one / COMPANION, other))
    bounds = Bounds.of(config, verdict.precision)
    for column, error in _later_numbers(expected, exact, found, bounds):
        verdict.add(column, error)
    for error in _final_errors(one, other, config, bounds, len(expected["losses"])):
        verdict.add("state", error)
    return verdict


def _later_numbers(
    expected: dict[str, Any], exact: dict[str, Any], found: dict[str, Any], bounds: Bounds
) -> Iterator[tuple[str, RelativeError]]:
    """Yields the errors of losses and grad norms, each with its column; `exact` has those of the companion."""
    from pretrain.proof.compare import margin

    losses = [facts["losses"] for facts in (expected, exact, found)]
    norms = [facts["norms"][0] for facts in (expected, exact, found)]
    for column, numbers, bound in ("loss", losses, bounds.loss()), ("grad_norm", norms, bounds.gradient(0)):
        for step, (number, right, other) in enumerate(zip(*numbers, strict=True), start=1):
            allowed = max(bound, margin(abs(right / number - 1), bounds.precision))
            yield column, RelativeError(f"{column} of step {step}", abs(other / number - 1), allowed)


def _final_errors(
    one: Path, other: Path, config: PretrainConfig, bounds: Bounds, steps: int
) -> Iterator[RelativeError]:
    """Yields the errors of the weights after the last step, each with its bound."""
    from safetensors.torch import load_file

    from pretrain.proof.compare import allowed_weight, margin
    from pretrain.proof.step_reader import RecordedStep

    reference, companion = RecordedStep(one), RecordedStep(one / COMPANION)
    weights, exact, found = (load_file(at / FINAL) for at in (one, one / COMPANION, other))
    for name in sorted(weights):
        expected, scale = weights[name].double(), float(weights[name].double().norm()) or 1.0
        own = float((exact[name].double() - expected).norm()) / scale
        one_step = allowed_weight(name, reference, companion, bounds, config)
        difference = float((found[name].double() - expected).norm()) / scale if name in found else float("inf")
        yield RelativeError(f"final/{name}", difference, max(steps * one_step, margin(own, bounds.precision)))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
