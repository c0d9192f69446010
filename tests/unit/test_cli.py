"""The `trivium` command: its table of subcommands, wrong commands, and help without heavy imports."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).resolve().parents[2]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, cli; status = cli.main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'rich', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    assert all(f"trivium {name}" in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("target", sorted({target for target, _ in cli.COMMANDS.values()}))
def test_every_command_leads_to_a_function(target: str) -> None:
    module, _, function = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    assert f"\ndef {function}(" in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["trian"], 2, "did you mean 'train'?"),
        (["data"], 2, "needs one of: run, report"),
        (["data", "frobnicate"], 2, "needs one of: run, report"),
        (["data", "veryfy"], 2, "did you mean 'data verify'?"),
        (["verify"], 2, "did you mean 'data verify'?"),
        (["SFT"], 2, "did you mean 'sft'?"),
        (["qqq"], 2, "there is no command 'qqq'; `trivium --help` lists them"),
        (["--help"], 0, "usage: trivium"),
    ],
)
def test_wrong_commands(argv: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == status
    said = capsys.readouterr()
    assert words in (said.err if status else said.out)


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: trivium" in capsys.readouterr().out


def test_a_subcommand_gets_the_rest_and_its_status_is_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(SystemExit) as done:
        cli.main(["report", str(tmp_path)])
    assert done.value.code == 0 and str(tmp_path / "report.html") in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        cli.main(["report", str(tmp_path / "nowhere")])
    assert failed.value.code == 2 and "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data/ledger.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "data")])
    assert f"trivium data report {tmp_path}/data/config.toml run.dir={tmp_path}/data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["data", "--help"], ["config", "--help"], ["config", "--explain", "data"]]
)
def test_output_that_nobody_reads_is_no_error(argv: list[str]) -> None:
    """Closes the pipe before all is written, as `trivium --help | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cli", *argv]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert done.stderr == "" and done.returncode in (0, 1)


def test_what_a_terminal_has_no_character_for_is_escaped() -> None:
    script = "from configs.cli import entrypoint; entrypoint(lambda _: print('caf\\udce9 \u2014'), [])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9 \\u2014\n", "")
