"""Programs in the sandbox end within their limits, cannot do harm by mistake, and are judged by what they do."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from configs.loader import ConfigError
from pretrain.evaluation.humaneval import judge, read_problems
from pretrain.evaluation.sandbox import Limits, run_program, run_programs

SPAWN = "import sys; from multiprocessing.util import spawnv_passfds as spawn\n"
SPAWN += "child = spawn(sys.executable.encode(), [b'python', b'-c', b'import time; time.sleep(60)'], [])\n"
SPAWN += "import os, time; time.sleep(0.3); assert os.waitpid(child, os.WNOHANG) == (0, 0), 'it does not run'"


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("x = sum(range(10)); assert x == 45", "passed"),
        ("print('x' * 10**6); open('own', 'w').write('text'); import tempfile; tempfile.TemporaryFile()", "passed"),
        ("import os; assert os.environ['HOME'] == os.getcwd() and 'PYTHONPATH' not in os.environ", "passed"),
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError"),
        ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
        ("import os; os._exit(0)", "failed: the program ended itself with status 0"),
        ("import ctypes; ctypes.string_at(0)", "failed: "),
        ("x = bytearray(3 * 10**9)", "failed: out of memory"),
        ("open('own', 'w').write('x' * 10**8)", "failed: OSError"),
        ("input()", "failed: EOFError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "failed: PermissionError: a program may not ca"),
        ("import _socket; _socket.socket().connect(('127.0.0.1', 80))", "failed: PermissionError"),
        (
            "import subprocess; subprocess.run(['true'])",
            "failed: PermissionError: a program may not call",
        ),
        ("import os; os.system('true')", "failed: PermissionError"),
        ("import os; os.fork()", "failed: PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "failed: PermissionError"),
    ],
)
def test_a_program_is_judged_by_what_it_does(program: str, result: str) -> None:
    outcome = run_program(program)
    assert outcome.result.startswith(result), outcome
    assert outcome.passed == (result == "passed")


@pytest.mark.parametrize(
    "program",
    [
        "open({file!r}, 'w')",
        "open({file!r}, 'r+')",
        "import os; os.remove({file!r})",
        "import os; os.rename({file!r}, 'own')",
        "import os; open('own', 'w'); os.replace('own', {file!r})",
        "import os; os.truncate({file!r}, 0)",
        "import os; os.symlink({file!r}, 'link'); open('link', 'w')",
        "import os; os.chdir({folder!r}); open('kept', 'w')",
        "import shutil; shutil.rmtree({folder!r})",
    ],
)
def test_files_outside_of_its_folder_stay_as_they_are(program: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("text")
    outcome = run_program(program.format(file=str(kept), folder=str(tmp_path)))
    assert "PermissionError" in outcome.result and kept.read_text() == "text"
    told = f"a program may not write {str(kept)!r}, outside", f"a program may not change {str(tmp_path)!r}, outside"
    if "open({file" in program or "rmtree" in program:
        assert any(f"{words} of its folder" in outcome.result for words in told), outcome


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    start = time.monotonic()
    outcome = run_program(program, Limits(seconds=0.5))
    assert not outcome.passed and time.monotonic() - start < 15
    assert "timed out" in outcome.result or "SIGKILL" in outcome.result or "SIGXCPU" in outcome.result


def test_what_a_program_started_ends_with_it() -> None:
    assert run_program(SPAWN).passed, "this way to start a process gets by the sandbox's guard"
    left = [path for path in Path("/proc").glob("[0-9]*/cwd") if "trivium-program-" in _target(path)]
    assert not left


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # it has ended
        return ""


def test_outcomes_are_in_the_order_of_the_programs() -> None:
    found = run_programs([f"assert {i} % 2" for i in range(6)], workers=3)
    assert [outcome.passed for outcome in found] == [False, True] * 3


def test_humaneval_is_solved_by_its_own_solutions_and_by_no_other() -> None:
    problems = read_problems()
    assert len(problems) == 164
    some = problems[::16]
    assert all(outcome.passed for outcome in judge(some, [one["canonical_solution"] for one in some]))
    assert not any(outcome.passed for outcome in judge(some, ["    pass\n"] * len(some)))


@pytest.mark.full
def test_all_of_humaneval_is_solved_by_its_own_solutions() -> None:
    problems = read_problems()
    outcomes = judge(problems, [one["canonical_solution"] for one in problems])
    assert [outcome.result for outcome in outcomes] == ["passed"] * 164


def test_a_file_of_problems_is_read_or_refused(tmp_path: Path) -> None:
    problems = read_problems()[:2]
    plain, packed = tmp_path / "two.jsonl", tmp_path / "two.jsonl.gz"
    plain.write_text("".join(json.dumps(one) + "\n" for one in problems))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_problems(plain) == read_problems(packed) == problems
    whole = packed.read_bytes()
    for content in (whole[:-20], whole[:40] + b"\xff" * 20 + whole[60:]):
        packed.write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"two\.jsonl\.gz is not JSON Lines: .*; fetch HumanEval\.jsonl\.gz again"
        ):
            read_problems(packed)
    plain.write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="is not HumanEval: a problem in it has no 'task_id'"):
        read_problems(plain)
    with pytest.raises(ConfigError, match=r"are not at .*none; name its HumanEval\.jsonl\.gz with --humaneval FILE"):
        read_problems(tmp_path / "none")
