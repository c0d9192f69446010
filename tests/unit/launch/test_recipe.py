"""The recipe's runner with three small stages: order, failures, interruptions, times, gates, and the closing table."""

import dataclasses
import html
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.loader import ConfigError, Failure, load, validate
from configs.recipe import GateConfig, RecipeConfig
from launch import recipe
from launch.recipe import DEMO, read_times, run_stages, updated, write_specimen
from launch.recipe_stages import KINDS, RecipeStage, Specimen, specimens_of, stages_of
from launch.recipe_stop import command_line, fails
from pages import duration

ROOT = Path(__file__).resolve().parents[3]
# A stage that does its work once, records each call, and fails or hangs while a certain file exists.
SCRIPT = """
import pathlib, signal, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / "calls", "a") as calls:
    calls.write(name + " ")
print(name, "on a terminal" if sys.stdout.isatty() else "in a pipe", flush=True)
if (folder / f"fail_{name}").exists():
    print("error: train.steps = <0> is not above 0; set it to 1 or more.", flush=True)
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
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RecipeStage]:
    (tmp_path / "small_stage.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return [
        RecipeStage(name, name, ("small_stage", str(tmp_path), name), tmp_path / name, "mark", lambda _: ("in", "out"))
        for name in ("one", "two", "three")
    ]


def run(stages: list[RecipeStage], folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    return run_stages(stages, [], folder, Console(file=text, width=160)), text.getvalue()


def test_stages_run_in_order_and_end_in_a_table(stages: list[RecipeStage], tmp_path: Path) -> None:
    status, text = run(stages, tmp_path)
    assert status == 0
    assert (tmp_path / "calls").read_text() == "one two three "
    assert (tmp_path / "logs" / "two.log").read_text() == "two in a pipe\n"
    assert "in → out" in text and " s this time. The report, with curves: " in text.replace("\n", " ")
    assert str(tmp_path / "report.html") in text.replace("\n", "")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr>") == 4 and "http" not in page


def test_a_stage_alone_needs_those_before_it(stages: list[RecipeStage], tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="--only two: stage one before it is not finished; run that one first"):
        run_stages(stages[:2], [], tmp_path, console, only="two")
    assert run_stages(stages[:2], [], tmp_path, console, only="one") == 0
    assert run_stages(stages[:2], [], tmp_path, console, only="two") == 0


def test_a_specimen_is_what_its_command_prints(tmp_path: Path) -> None:
    assert write_specimen(Specimen(("config", "--new", "sft"))).startswith("#")
    refused = ("chat", str(tmp_path / "none"), "--temperature", "warm")  # before torch is imported
    with pytest.raises(Failure, match=r"specimen `echo Hello \| trivium chat .*/none .*` ended with status 2: "):
        write_specimen(Specimen(refused, "Hello"))


def test_a_rerun_keeps_the_times_of_the_work(stages: list[RecipeStage], tmp_path: Path) -> None:
    run(stages, tmp_path)
    first = read_times(tmp_path)
    assert all(entry["done"] and entry["seconds"] >= 0.3 for entry in first.values())
    run(stages, tmp_path)
    assert read_times(tmp_path) == first


def test_a_failure_stops_and_says_how_to_go_on(stages: list[RecipeStage], tmp_path: Path) -> None:
    (tmp_path / "fail_two").touch()
    status, text = run(stages, tmp_path)
    assert status == 3
    assert (tmp_path / "calls").read_text() == "one two "
    what = "Stage two failed with exit status 3: train.steps = <0> is not above 0; set it to 1 or more. "
    assert (
        f"\n{what}The recipe stopped there. The stage's output is in {tmp_path}/logs/two.log; to run it alone" in text
    )
    assert f": {command_line(stages[1])}. After fixing it, run the same command again" in text
    page = (tmp_path / "report.html").read_text()
    assert f"<b>{html.escape(what)}The recipe stopped there.</b></p><p>The stage&#x27;s output is in" in page
    assert re.findall(r"<td>(\w+)</td>(?:<td></td>)?<td>(failed|did not run|out)</td>", page) == [
        *(("in", "out"), ("two", "failed"), ("three", "did not run"))
    ]
    assert '<a href="logs/two.log">' in page and f"The report so far: {tmp_path}/report.html" in text
    (tmp_path / "fail_two").unlink()
    record = (tmp_path / "recipe.json").read_text()
    damaged = (
        '{"stages": ',
        "[]",
        '{"stages": {"one": {}}}',
        record.replace("done", "dome"),
        record.replace("0.", '"'),
    )
    for content in damaged:  # the first is torn, as by a full disk
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(Failure, match=r"is damaged .*; restore it, or delete it and run the recipe") as refused:
            run(stages, tmp_path)
    Path(str(refused.value).split(" is damaged")[0]).unlink()
    assert run(stages, tmp_path)[0] == 0
    assert "failed" not in (tmp_path / "report.html").read_text()


def test_a_stage_that_failed_is_told_by_its_last_sentence_or_by_what_ended_it(
    stages: list[RecipeStage], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first = "error: of an earlier attempt\n"
    ranks = "rank 1 ended with exit status 1; the other ranks were stopped. Logs of the ranks\n"
    for output, said in (
        (f"step 1\n{ranks}last lines of rank 1's log:\n  step 1\n  error: the disk is full\n", ": the disk is full"),
        ("Traceback (most recent call last):\n  x.py\nValueError: no number\n" + ranks, ": ValueError: no number"),
        ("Traceback (most recent call last):\nnumpy.linalg.LinAlgError\n", ": numpy.linalg.LinAlgError"),
        ("step 1\n", ""),
    ):
        log.write_text(first + output)
        stop = fails(stages[0], 1, log, len(first))
        assert (stop.what, stop.how) == (
            f"Stage one failed with exit status 1{said}. The recipe stopped there.",
            "failed",
        )
    for status, said in ((137, "SIGKILL, as systems do when memory is full"), (139, "SIGSEGV")):
        assert f"with exit status {status}: it was killed by {said}. " in fails(stages[0], status, log, 0).what
    assert fails(stages[0], 143, log, 0).how == "interrupted"


def interrupted_in(name: str, line: str, folder: Path) -> tuple[int, str]:
    """Runs stages one, two and three, and sends Ctrl-C when stage `name` has printed `line`."""
    (folder / f"hang_{name}").touch()
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from launch.recipe import run_stages; from launch.recipe_stages import RecipeStage\n"
        "f = Path(sys.argv[1])\n"
        "s = [RecipeStage(n, n, ('small_stage', str(f), n), f / n, 'mark', lambda _: ('', ''))\n"
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


def test_an_interrupted_stage_is_called_again(stages: list[RecipeStage], tmp_path: Path) -> None:
    status, output = interrupted_in("two", "two", tmp_path)
    assert status == 130
    assert "Interrupted in stage two. Run the same command again" in output
    assert "<td>interrupted</td>" in (tmp_path / "report.html").read_text()
    assert not read_times(tmp_path)["two"]["done"]
    (tmp_path / "hang_two").unlink()
    assert run(stages, tmp_path)[0] == 0
    assert read_times(tmp_path)["two"]["done"]


def test_an_interruption_at_the_end_of_a_stage_needs_no_second_one(stages: list[RecipeStage], tmp_path: Path) -> None:
    """Interrupts a stage at its end: it finishes its work, and no other stage is started."""
    (tmp_path / "busy_two").touch()
    status, output = interrupted_in("two", "may be interrupted", tmp_path)
    assert (status, (tmp_path / "calls").read_text()) == (130, "one two ")
    assert "Interrupted after stage two. Run the same command again" in output
    assert read_times(tmp_path)["two"]["done"]


def test_a_stage_finds_a_terminal_where_the_recipe_has_one(tmp_path: Path) -> None:
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
    stages: list[RecipeStage], tmp_path: Path
) -> None:
    config = tmp_path / "two.toml"
    config.write_text("[optimizer]\nlr = 1.0\n[log]\nevery = 1\n")
    one = stages[0]
    two = dataclasses.replace(stages[1], command=(*stages[1].command, str(config)), needs=(one,), trains=True)
    assert run([one, two], tmp_path)[0] == 0
    config.write_text("# the same\n[optimizer]\nlr = 1.0\n[log]\nevery = 2\n")
    assert run([one, two], tmp_path)[0] == 0
    config.write_text("[optimizer]\nlr = 2.0\n")
    (one.output / "checkpoints/step_10").mkdir(parents=True)
    (one.output / "checkpoints/step_9").mkdir(parents=True)
    (one.output / "checkpoints/step_10.bak").mkdir()  # a copy that someone keeps there
    for step in (9, 10, "10.bak"):
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


def test_the_demo_is_a_recipe() -> None:
    config = load(RecipeConfig, DEMO)
    stages = stages_of(config)
    assert [stage.name for stage in stages] == [
        *("data", "baselines", "pretrain", "pretrain_moe", "sft", "grpo"),
        *(f"export_{name}" for name in ("pretrain", "pretrain_moe", "sft", "grpo")),
    ]
    assert command_line(stages[4]).split(" -m ")[1] == (
        "launch.ranks --nproc-per-node 2 posttrain.sft configs/posttrain/demo_sft.toml init.run=runs/demo/pretrain "
        "run.dir=runs/demo/sft"
    )
    assert [stage.name for stage in stages[5].needs] == ["sft"] and [stage.name for stage in stages[6].needs] == [
        "pretrain"
    ]
    assert specimens_of(config, stages)[1].command == ("chat", "runs/demo/grpo", "--temperature", "0")
    assert duration(125.4) == "2 min 05 s" and duration(7385.0) == "2 h 03 min"


def test_stages_run_the_modules_of_their_commands() -> None:
    from cli import COMMANDS

    assert {name: f"{kind.module}:main" for name, kind in KINDS.items()} == {name: COMMANDS[name][0] for name in KINDS}


def test_a_missed_gate_stops_the_recipe_and_says_what_to_do(stages: list[RecipeStage], tmp_path: Path) -> None:
    """Follows each remedy of the message: a lower bound, and the stage repeated."""
    metrics = {"step": 1, "loss": 2.0}, {"step": 1, "eval": {"sort answers": {"sampled": 0.4}}}
    assert run(stages[:1], tmp_path)[0] == 0
    (stages[0].output / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))

    def gated(**bounds: float) -> list[RecipeStage]:
        gate = GateConfig(metric="sort answers.sampled", **bounds)
        return [dataclasses.replace(stages[0], gates=(gate,)), *stages[1:]]

    status, text = run(gated(at_least=0.5), tmp_path)
    assert status == 1
    assert "misses its gates: sort answers.sampled is 0.4, and at least 0.5 is asked." in text
    page = (tmp_path / "report.html").read_text()
    stopped = "Stage one is finished, but misses its gates: sort answers.sampled is 0.4, and at least 0.5 is asked."
    assert f"<b>{stopped} The recipe stopped there.</b>" in page
    assert f"{stopped} The recipe stopped there. Its result stays in {tmp_path}/one. Change the stage's config" in text
    assert "Its result stays in" in page and f"The report so far: {tmp_path}/report.html" in text
    assert "<td>0.4</td><td>at least 0.5</td><td>missed</td>" in page
    assert re.findall(r"<td>(\w+)</td><td></td><td>did not run</td>", page) == ["two", "three"]
    assert GateConfig(metric="loss", at_most=0.5).shown(0.500004) == "0.500004"  # "0.5" would have passed
    assert "stages.one.gates" in text and (tmp_path / "calls").read_text() == "one one "  # two was not started
    assert run(gated(at_least=0.3, at_most=0.4), tmp_path)[0] == 0
    assert "did not run" not in (tmp_path / "report.html").read_text()
    assert run(gated(at_most=0.3), tmp_path)[0] == 1
    loss = dataclasses.replace(stages[0], gates=(GateConfig(metric="loss", at_most=2.0),))
    assert run([loss], tmp_path)[0] == 0
    wrong = dataclasses.replace(stages[0], gates=(GateConfig(metric="sort.sampled", at_least=0.5),))
    with pytest.raises(
        ConfigError, match=r"'sort.sampled', which .*one did not measure; it measured loss, sort answers.sampled"
    ):
        run([wrong], tmp_path)


def test_the_record_says_what_each_result_was_made_from(stages: list[RecipeStage], tmp_path: Path) -> None:
    one = stages[0]
    words = "train.steps=5", f"run.dir={tmp_path}", f"init.run={one.output}"
    two = dataclasses.replace(stages[1], command=(*stages[1].command, *words), needs=(one,), trains=True)
    assert run([one, two], tmp_path)[0] == 0
    record = read_times(tmp_path)
    made_from = record["two"]["made_from"]
    steps, begins = "the override of train.steps", "the override of init.run"
    assert made_from == {"the result of stage one": record["one"]["result"], steps: "5", begins: str(one.output)}
    other = dataclasses.replace(two, command=(*stages[1].command, "train.steps=6", *words[1:], "parallel.tp=2"))
    status, text = run([one, other], tmp_path)
    assert status == 1 and f"but {steps} changed since" in text
    fewer = dataclasses.replace(two, command=(*stages[1].command, *words[1:]))
    assert f"but {steps} changed since" in run([one, fewer], tmp_path)[1]
    alone = dataclasses.replace(fewer, needs=())  # a stage that needs no other has a config too
    assert f"but the result of stage one and {steps} changed since" in run([one, alone], tmp_path)[1]
    moved = tmp_path / "elsewhere/one"
    there = dataclasses.replace(one, output=moved), (words[0], "run.dir=elsewhere", f"init.run={moved}")
    again = dataclasses.replace(two, command=(*stages[1].command, *there[1]), needs=(there[0],))
    entry = record["two"] | {
        "made_from": {**made_from, "the result of stage one": None, "the override of run.dir": "x"}
    }
    assert again.changed_since(entry) == [], "the recipe's folder was moved as a whole"
    assert again.changed_since(entry | {"made_from": {**made_from, begins: "another/two"}})[-1] == begins


def test_a_config_that_is_no_toml_is_one_sentence_before_anything_runs(
    stages: list[RecipeStage], tmp_path: Path
) -> None:
    config = tmp_path / "two.toml"
    for content, fault in (
        (b"[optimizer\n", r" is not valid TOML: .*; correct it"),
        (b"\xff", " is not UTF-8 at byte 0"),
    ):
        config.write_bytes(content)
        two = dataclasses.replace(stages[1], command=(*stages[1].command, str(config)), trains=True)
        with pytest.raises(ConfigError, match=rf"config file {config}{fault}"):
            run([two], tmp_path)
    config.write_bytes(b"[optimizer]\n")
    assert run([two], tmp_path)[0] == 0


def test_until_names_the_last_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--until last names no stage; the stages are data, baselines"):
        recipe.main([str(DEMO), "--until", "last"])
    assert recipe.main([str(DEMO), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("\n  to: runs/demo/") == 10


def test_stages_may_sample_and_distil(tmp_path: Path) -> None:
    """Runs a stage of rejection sampling, which starts ranks; its record has the dialogues' checksum."""
    tree = {
        "dir": str(tmp_path),
        "ranks": 2,
        "stages": {
            "rl": {"command": "grpo", "config": "configs/posttrain/demo_grpo.toml"},
            "chosen": {"command": "sample", "config": "configs/posttrain/demo_sample.toml", "set": ["init.run={rl}"]},
            "tuned": {
                "command": "sft",
                "config": "configs/posttrain/demo_sft.toml",
                "set": ["data.dialogues=['{chosen}/dialogues.jsonl']"],
            },
            "student": {
                "command": "distill",
                "config": "configs/posttrain/demo_distill.toml",
                "set": ["teacher.run={tuned}"],
            },
        },
    }
    _, chosen, tuned, student = stages_of(validate(RecipeConfig, tree))
    assert chosen.command[:4] == ("launch.ranks", "--nproc-per-node", "2", "posttrain.sample")
    assert f"data.dialogues=['{tmp_path}/chosen/dialogues.jsonl']" in tuned.command
    assert "posttrain.distill" in student.command and f"teacher.run={tmp_path}/tuned" in student.command
    chosen.output.mkdir()
    assert chosen.result() is None and chosen.describe(chosen.output) == ("", "")
    measures = {"samples": 40, "prompts": 10, "kept": 9, "prompts_kept": 8, "kept_share": 0.225}
    (chosen.output / "sample.json").write_text(json.dumps({"measures": measures}))
    before = tuned.made_from()["the result of stage chosen"]
    assert before == chosen.result() is not None
    assert chosen.describe(chosen.output) == ("40 samples of 10 prompts", "9 kept, of 8 prompts")
    gate = GateConfig(metric="kept_share", at_least=0.5)
    assert dataclasses.replace(chosen, gates=(gate,)).missed_gates() == [
        "kept_share is 0.225, and at least 0.5 is asked"
    ]
