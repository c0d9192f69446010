"""The demo's runner with three small stages: their order, failures, interruptions, times, and the closing table."""

import dataclasses
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch.demo import STAGES, command_line, read_times, run_stages, updated, write_specimen
from launch.demo_report import (
    DemoStage,
    Specimen,
    describe_baselines,
    describe_data,
    describe_export,
    describe_training,
    duration,
    show_comparison,
    write_html,
)

ROOT = Path(__file__).resolve().parents[3]
# A stage that does its work once, records each call, and fails or hangs while a certain file exists.
SCRIPT = """
import pathlib, signal, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / "calls", "a") as calls:
    calls.write(name + " ")
print(name, "on a terminal" if sys.stdout.isatty() else "in a pipe", flush=True)
if (folder / f"fail_{name}").exists():
    sys.exit(3)
if (folder / f"busy_{name}").exists():
    signal.signal(signal.SIGINT, lambda *_: (folder / f"hang_{name}").unlink())
    print("may be interrupted", flush=True)
while (folder / f"hang_{name}").exists():
    time.sleep(0.05)
mark = folder / name / "mark"
if not mark.exists():
    time.sleep(0.3)
    mark.parent.mkdir()
    mark.write_text("done")
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DemoStage]:
    (tmp_path / "small_stage.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return [
        DemoStage(name, name, ("small_stage", str(tmp_path), name), tmp_path / name, "mark", lambda _: ("in", "out"))
        for name in ("one", "two", "three")
    ]


def run(stages: list[DemoStage], folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    return run_stages(stages, [], folder, Console(file=text, width=160)), text.getvalue()


def test_stages_run_in_order_and_end_in_a_table(stages: list[DemoStage], tmp_path: Path) -> None:
    status, text = run(stages, tmp_path)
    assert status == 0
    assert (tmp_path / "calls").read_text() == "one two three "
    assert (tmp_path / "logs" / "two.log").read_text() == "two in a pipe\n"
    assert "in → out" in text and str(tmp_path / "report.html") in text.replace("\n", "")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr>") == 4 and "http" not in page


def test_a_specimen_is_what_its_command_prints(tmp_path: Path) -> None:
    assert write_specimen(Specimen(("config", "--new", "sft"))).startswith("#")
    refused = ("chat", str(tmp_path / "none"), "--temperature", "warm")  # before torch is imported
    with pytest.raises(ChildProcessError, match=r"`echo Hello \| trivium chat .*/none .*` ended with status 2: "):
        write_specimen(Specimen(refused, "Hello"))


def test_a_rerun_keeps_the_times_of_the_work(stages: list[DemoStage], tmp_path: Path) -> None:
    run(stages, tmp_path)
    first = read_times(tmp_path)
    assert all(entry["done"] and entry["seconds"] >= 0.3 for entry in first.values())
    run(stages, tmp_path)
    assert read_times(tmp_path) == first


def test_a_failure_stops_and_says_how_to_go_on(stages: list[DemoStage], tmp_path: Path) -> None:
    (tmp_path / "fail_two").touch()
    status, text = run(stages, tmp_path)
    assert status == 3
    assert (tmp_path / "calls").read_text() == "one two "
    assert "Stage two failed with exit status 3" in text
    assert str(tmp_path / "logs" / "two.log") in text
    assert command_line(stages[1]) in text
    (tmp_path / "fail_two").unlink()
    (tmp_path / "demo.json").write_text('{"stages": ')  # torn, as by a full disk
    with pytest.raises(ValueError, match=r"is damaged .*; delete it and run the demo again") as refused:
        run(stages, tmp_path)
    Path(str(refused.value).split(" is damaged")[0]).unlink()
    assert run(stages, tmp_path)[0] == 0


def interrupted_in(name: str, line: str, folder: Path) -> tuple[int, str]:
    """Runs stages one, two and three, and sends Ctrl-C when stage `name` has printed `line`."""
    (folder / f"hang_{name}").touch()
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from launch.demo import run_stages; from launch.demo_report import DemoStage\n"
        "f = Path(sys.argv[1])\n"
        "s = [DemoStage(n, n, ('small_stage', str(f), n), f / n, 'mark', lambda _: ('', ''))\n"
        "     for n in ('one', 'two', 'three')]\n"
        "sys.exit(run_stages(s, [], f, Console()))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    log, deadline = folder / "logs" / f"{name}.log", time.monotonic() + 20
    while not log.exists() or line not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


def test_an_interrupted_stage_is_called_again(stages: list[DemoStage], tmp_path: Path) -> None:
    status, output = interrupted_in("two", "two", tmp_path)
    assert status == 130
    assert "Interrupted in stage two" in output
    assert not read_times(tmp_path)["two"]["done"]
    (tmp_path / "hang_two").unlink()
    assert run(stages, tmp_path)[0] == 0
    assert read_times(tmp_path)["two"]["done"]


def test_an_interruption_at_the_end_of_a_stage_needs_no_second_one(stages: list[DemoStage], tmp_path: Path) -> None:
    """The interrupted stage finishes its work, and no other stage is started."""
    (tmp_path / "busy_two").touch()
    status, output = interrupted_in("two", "may be interrupted", tmp_path)
    assert (status, (tmp_path / "calls").read_text()) == (130, "one two ")
    assert "Interrupted after stage two. Run the same command again" in output
    assert read_times(tmp_path)["two"]["done"]


def test_a_stage_finds_a_terminal_where_the_demo_has_one(tmp_path: Path) -> None:
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"this system has no pseudo-terminals: {error}")
    script = (
        "import sys; from pathlib import Path; from launch import tee\n"
        "code = 'import os, sys; print(sys.stdout.isatty(), os.get_terminal_size().columns)'\n"
        "sys.exit(tee.run([sys.executable, '-c', code], Path(sys.argv[1])).status)"
    )
    env = {**os.environ, "COLUMNS": "101", "LINES": "20"}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "log"], cwd=ROOT, env=env, stdout=theirs)
    assert process.wait(20) == 0
    assert os.read(ours, 1000).split() == [b"True", b"101"]
    assert (tmp_path / "log").read_bytes().split() == [b"True", b"101"]
    os.close(ours)
    os.close(theirs)


def test_a_stage_is_not_taken_for_done_once_what_it_was_made_from_has_changed(
    stages: list[DemoStage], tmp_path: Path
) -> None:
    config = tmp_path / "two.toml"
    config.write_text("[optimizer]\nlr = 1.0\n[log]\nevery = 1\n")
    one = stages[0]
    two = dataclasses.replace(stages[1], command=(*stages[1].command, str(config)), needs=(one,))
    assert run([one, two], tmp_path)[0] == 0
    config.write_text("# the same\n[optimizer]\nlr = 1.0\n[log]\nevery = 2\n")
    assert run([one, two], tmp_path)[0] == 0
    config.write_text("[optimizer]\nlr = 2.0\n")
    (one.output / "checkpoints/step_10").mkdir(parents=True)
    (one.output / "checkpoints/step_9").mkdir(parents=True)
    for step in (9, 10):
        (one.output / f"checkpoints/step_{step}/manifest.json").write_text(str(step))
    for _ in range(2):  # it is refused again
        status, text = run([one, two], tmp_path)
        assert status == 1
        assert f"but the result of stage one and {config} changed since. Remove {two.output}" in text
    shutil.rmtree(two.output)
    assert run([one, two], tmp_path)[0] == 0
    (one.output / "checkpoints/step_9/manifest.json").write_text("other")  # not the newest checkpoint
    assert run([one, two], tmp_path)[0] == 0
    (one.output / "checkpoints/step_10/manifest.json").write_text("other")
    assert run([one, two], tmp_path)[0] == 1


def test_times_add_up_over_attempts_and_start_over_with_new_work() -> None:
    broken = updated(None, 10.0, status=75, wrote=True)
    assert updated(None, 10.0, status=130, wrote=True) == broken
    assert broken == {"seconds": 10.0, "done": False}
    assert updated(broken, 5.0, status=1, wrote=True) == broken
    done = updated(broken, 5.0, status=0, wrote=True)
    assert done == {"seconds": 15.0, "done": True}
    assert updated(done, 1.0, status=0, wrote=False) == done
    assert updated(done, 7.0, status=0, wrote=True) == {"seconds": 7.0, "done": True}


def test_what_stages_wrote_is_told(tmp_path: Path) -> None:
    def write(name: str, *records: dict) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records))

    total = {"in": {"documents": 1200, "bytes": 5_000_000}, "kept": {"documents": 900, "bytes": 4_000_000}}
    write("ledger.json", {"stages": [{"name": "extract", "total": total}, {"name": "documents", "total": total}]})
    write("plan/plan.json", {"samples": 64, "seq_length": 256, "sources": [{"tokens": 1_500_000}, {"tokens": 500_000}]})
    assert describe_data(tmp_path) == (
        "1,200 documents, 5.0 MB",
        "900 documents kept, 2.00M tokens\n64 rows of 256",
    )
    write(
        "metrics.jsonl",
        {"step": 1, "tokens": 1000, "loss": 9.0},
        {"step": 1, "eval": {"code": {"loss": 8.0, "bits_per_byte": 3.0}}},
        {"step": 2, "tokens": 2_000_000, "loss": 4.0},
        {"step": 2, "eval": {"code": {"loss": 4.0, "bits_per_byte": 1.5}}},
    )
    came_in, out = describe_training(tmp_path)
    assert came_in == "2 steps, 2.00M tokens"
    assert out == "loss 9.00 → 4.00\nheld-out bits a byte: code 3.00 → 1.50"
    write("trivium_export.json", {"checkpoint": "a/step_2", "checks": {"logits, max": "1e-6"}})
    assert describe_export(tmp_path) == ("step_2", "logits, max: 1e-6")
    assert describe_training(tmp_path / "nothing") == ("", "")


def test_models_are_compared_with_xz_and_ngrams_on_each_source(tmp_path: Path) -> None:
    for name in ("data", "dense", "sft"):
        (tmp_path / name).mkdir()
    values = {"code": {"bytes": 2000, "xz": 1.861, "ngram": 1.5}, "web": {"bytes": 3000, "xz": 2.868, "ngram": 1.291}}
    (tmp_path / "data/baselines.json").write_text(
        json.dumps({"titles": {"ngram": "5-gram", "xz": "xz -9"}, "sources": values})
    )
    evals = [
        {"step": 1, "eval": {"code": {"bits_per_byte": 3.0}}},
        {"step": 2, "eval": {"code": {"bits_per_byte": 2.5}}},
    ]
    (tmp_path / "dense/metrics.jsonl").write_text("\n".join(map(json.dumps, evals)))
    (tmp_path / "sft/metrics.jsonl").write_text(json.dumps({"step": 1, "eval": {"sort": {"bits_per_byte": 0.5}}}))
    stages = [
        DemoStage("data", "data", (), tmp_path / "data", "plan/plan.json", describe_data),
        DemoStage("baselines", "xz and 5-gram", (), tmp_path / "data", "baselines.json", describe_baselines),
        DemoStage("pretrain", "dense", (), tmp_path / "dense", "metrics.jsonl", describe_training),
        DemoStage("sft", "SFT", (), tmp_path / "sft", "metrics.jsonl", describe_training),
    ]
    assert describe_baselines(tmp_path / "data") == ("5 kB of held-out text", "bits a byte, below: 5-gram, xz -9")
    text = io.StringIO()
    show_comparison(stages, Console(file=text, width=100))
    cells = [line.split() for line in text.getvalue().splitlines()]
    assert ["source", "dense", "5-gram", "xz", "-9"] in cells
    assert ["code", "2.50", "1.50", "1.86"] in cells and ["web", "1.29", "2.87"] in cells
    times = {stage.name: {"seconds": 1.0} for stage in stages}
    page = write_html(stages, times, [], tmp_path).read_text()
    assert "<tr><td>code</td><td class=n>2.50</td><td class=n>1.50</td><td class=n>1.86</td></tr>" in page


def test_the_list_of_stages_is_whole() -> None:
    assert [stage.name for stage in STAGES] == [
        *("data", "baselines", "pretrain", "pretrain_moe", "sft", "grpo"),
        *(f"export_{name}" for name in ("pretrain", "pretrain_moe", "sft", "grpo")),
    ]
    configs = {word for stage in STAGES for word in stage.command if word.endswith(".toml")}
    assert len(configs) == 6
    assert duration(125.4) == "2 min 05 s"
