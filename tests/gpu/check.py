"""Runs the parts of the check one after another, each with a time limit, and goes on after one that fails.

    python -m tests.gpu.check [--device cpu] [--small] [--out FOLDER] [--only NAME,NAME]

After every part FOLDER/gpu.json and the page FOLDER/gpu.md are written anew, so that they are there whatever happens
later. A part's output is in FOLDER/NAME.log. The exit status is 0 if all parts are ok, else 1.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from configs.loader import toml
from tests.gpu import page
from tests.gpu.parts import Part, all_parts

ROOT = Path(__file__).parents[2]
_REASON = 240  # characters of a reason


def run_part(part: Part, out: Path, device: str) -> dict[str, Any]:
    """Runs one part and returns {name, title, ok, seconds, reason, result}."""
    started, log = time.perf_counter(), out / f"{part.name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **part.environment}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    part.result.unlink(missing_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status: int | None = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found: dict[str, Any] = json.loads(part.result.read_text()) if part.result.is_file() else {}
    reason = found.get("failed", "")
    if status is None:
        reason = f"stopped after {part.seconds:.0f} s; the end of its output: {_last_line(log)}"
    elif status and not reason:
        reason = _last_line(log)
    return {
        "name": part.name,
        "title": part.title,
        "ok": status == 0 and not reason,
        "seconds": round(time.perf_counter() - started, 1),
        "reason": reason,
        "result": found,
    }


def _last_line(log: Path) -> str:
    """Returns the line that says most about a failure: the last one that begins with a word for one, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "rror:" in line or " out of bounds; first on the way" in line]
    return (said or lines or ["it printed nothing"])[-1][:_REASON]


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    """Runs all parts, or those given, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description="Checks Trivium on one GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model in place of the one of 1B parameters")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where to write; runs/gpu if left out")
    parser.add_argument("--only", default="", help="names of parts with commas between; all if left out")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if parts is None:
        from pretrain.proof.devices import config_of

        write_atomic(out / "layouts.toml", toml(config_of("deepseek", out / "layouts")))
        parts = all_parts(args.device, args.small, out)
    chosen = [part for part in parts if not args.only or part.name in args.only.split(",")]
    done: list[dict[str, Any]] = []
    for part in chosen:
        done.append(run_part(part, out, args.device))
        last = done[-1]
        print(
            f"{part.name}: {'ok' if last['ok'] else 'failed: ' + last['reason']} ({last['seconds']:.0f} s)", flush=True
        )
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": args.device,
            "small": args.small,
            "parts": done,
            "not_run": [other.name for other in chosen[len(done) :]],
        }
        write_atomic(out / "gpu.json", json.dumps(report, indent=1).encode())
        write_atomic(out / "gpu.md", page.draw(report).encode())
    print(f"one page: {out / 'gpu.md'}; all numbers: {out / 'gpu.json'}")
    return 0 if all(one["ok"] for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
