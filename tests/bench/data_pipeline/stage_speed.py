"""Measures each stage of the demo's recipe without a peer: CPU time, memory, files and bytes, for docs/scale.md.

Stages that cut parts out of documents are left out, and so is the comparison of near-duplicates' texts (dedup.verify).

Two corpora: the whole demo, and its web pages alone (WARC to plan). Megabytes are of text after extraction for all
stages of a run, also for those behind the filter, which see less of it: then seconds of stages add up. Measured in a
process of its own, after a warm-up run on a part of the files: one core, one task at a time. Bytes read and written are
those of this process's system calls, whatever the file system did with them; mapped files are not in them.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from rich.console import Console

from configs.data import DataConfig
from configs.loader import validate
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shards import shards_under
from data_pipeline.core.stage import PublishedStage, perform, sole_user
from data_pipeline.executors.local_executor import LocalExecutor
from data_pipeline.executors.stage_tasks import quiet
from data_pipeline.run import recipe as every_stage
from tests.bench.data_pipeline import recipe
from tests.bench.data_pipeline.measure import DEMO, ROOT, Result, cpu_seconds

CORPORA = ("demo", "web")


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "stages.json"
        subprocess.run([sys.executable, "-m", __name__, str(out)], check=True)
        return [Result(**row) for row in json.loads(out.read_text(encoding="utf-8"))]


_WEB_SAMPLES, _WARM_UP_SAMPLES = 3000, 300  # rows of the plan, about one epoch of the pages


def config_of(corpus: str, files: Path, run_dir: Path) -> DataConfig:
    """Returns the demo's config, for the corpus "web" only its web pages, for "warm-up" with a small plan."""
    tree = tomllib.loads((ROOT / "configs/data/demo.toml").read_text(encoding="utf-8"))
    tree = {name: section for name, section in tree.items() if name not in (*recipe.CUTTING, "canaries")}
    tree["run"] |= {"dir": str(run_dir), "workers": 1}
    tree["dedup"]["verify"] = False
    if corpus == "web":
        tree["sources"] = {"web": tree["sources"]["web"]}
        tree["mixture"] |= {"weights": {"web": 1.0}, "samples": _WEB_SAMPLES}
    if corpus == "warm-up":
        tree["mixture"]["samples"] = _WARM_UP_SAMPLES
        tree["tokenizer"]["vocab_size"] = 2000
    for source in tree["sources"].values():
        source["files"] = [str(files / Path(path).name) for path in source["files"]]
    used = {name for source in tree["sources"].values() for name in source["rules"].values()}
    tree["rules"] = {name: rules for name, rules in tree["rules"].items() if name in used}
    return validate(DataConfig, tree)


def measure(corpus: str, files: Path, run_dir: Path) -> list[Result]:
    """Runs the recipe and returns one row per stage."""
    config, rows = config_of(corpus, files, run_dir), []
    with sole_user(run_dir):
        quiet(None)
        for stage in every_stage(RunContext(config, run_dir, Console(file=io.StringIO()), LocalExecutor(1))):
            _forget_peak()
            before = _counters()
            done: list[PublishedStage] = []
            seconds = cpu_seconds(lambda stage=stage, done=done: done.append(perform(stage, run_dir, None)))
            read, written = (now - then for now, then in zip(_counters(), before, strict=True))
            paths = [path for path in (run_dir / stage.name).rglob("*") if path.is_file()]
            total = done[0].tally.total()
            details = {
                "corpus": corpus,
                "stage": stage.name,
                "documents_in": total.came_in.documents,
                "bytes_in": total.came_in.bytes,
                "documents_kept": total.kept.documents,
                "bytes_kept": total.kept.bytes,
                "disk_bytes": sum(path.stat().st_size for path in paths),
                "shard_files": sum(_is_of_a_shard(path.relative_to(run_dir / stage.name)) for path in paths),
                "shards": len(shards_under(run_dir / "extract")),
                "read_bytes": read,
                "written_bytes": written,
                "peak_memory_bytes": _peak(),
            }
            rows.append(Result(f"{corpus}: {stage.name}", 0, seconds, details=details))
    for row in rows:
        row.megabytes = recipe.extracted_mb(run_dir)
    return rows


def _is_of_a_shard(path: Path) -> bool:
    """Whether a stage has such a file for each shard, unlike its manifest and its samples of dropped documents."""
    return len(path.parts) > 1 and path.parts[0] not in ("drops", "rejected")


def _counters() -> tuple[int, int]:
    """Returns the bytes that this process has read and written so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak() -> int:
    """Returns the largest resident memory since `_forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe.lay_out(1.0, folder / "few")
        measure("warm-up", folder / "few", folder / "warm-up")
        rows = [row for corpus in CORPORA for row in measure(corpus, DEMO, folder / corpus)]
    args.out.write_text(json.dumps([vars(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
