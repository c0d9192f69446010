"""Signals to small processes in each phase: they end it at once, are noted, or change nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# A call of compiled code that no signal interrupts and that lets other threads run, as a collective does.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
TRAINS = "watch = signals.saving().__enter__(); watch.agree(); watch.work()\n"

# A process keeps ignoring what its parent ignored: nohup's children SIGHUP, a shell's background commands SIGINT.
NOT_IGNORED = ("env", "--default-signal=INT,HUP")


def start(script: str, *, saves: bool = True, launched: bool = False) -> subprocess.Popen[str]:
    """Starts `script` and waits until it prints `up`."""
    begin = f"import os, sys, time\nfrom configs import signals\nsignals.begin({saves}, launched={launched})\n"
    process = subprocess.Popen(
        [*NOT_IGNORED, sys.executable, "-u", "-c", begin + script],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "up\n", line + (process.stderr.read() if process.stderr else "")
    return process


def ended(process: subprocess.Popen[str], *numbers: int, within: float = 9.0) -> tuple[int, str, str]:
    began = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - began < within
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_before_its_first_step_training_ends_at_once_even_in_compiled_code(number: int, status: int) -> None:
    process = start("print('up')\n" + BUSY)
    name = signal.Signals(number).name
    said = f"stopped by {name} before the first step was done; run the same command again to go on\n"
    assert ended(process, number) == (status, "", said)


@pytest.mark.parametrize(
    ("number", "saves", "status"),
    [(signal.SIGTERM, True, 75), (signal.SIGUSR1, True, 75), (signal.SIGINT, True, 130), (signal.SIGINT, False, 130)],
)
def test_a_signal_that_was_held_back_from_the_first_instruction_on_is_answered(
    number: int, saves: bool, status: int
) -> None:
    script = f"from configs import signals\nsignals.begin({saves})\nimport time; time.sleep(60)"
    process = subprocess.Popen(
        [*NOT_IGNORED, "--block-signal=INT,TERM,HUP,USR1", sys.executable, "-c", script],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not held_back(process.pid):  # until `env` has blocked the signals; Python may not have started
        time.sleep(0.001)
    assert ended(process, number, within=30)[0] == status


def held_back(pid: int) -> str:
    """Returns the mask of the signals that a process blocks."""
    return re.findall(r"SigBlk:\s*0*(.*)", Path(f"/proc/{pid}/status").read_text())[0]


def test_children_have_nothing_held_back() -> None:
    script = (
        "from configs import signals\nsignals.begin(True)\nimport multiprocessing, subprocess, threading\n"
        "show = ['grep', 'SigBlk', '/proc/self/status']\n"
        "subprocess.run(show)\n"
        "thread = threading.Thread(target=subprocess.run, args=(show,)); thread.start(); thread.join()\n"
        "for way in ('fork', 'spawn', 'forkserver'):\n"
        "    child = multiprocessing.get_context(way).Process(target=subprocess.run, args=(show,))\n"
        "    child.start(); child.join()\n"
    )
    argv = [*NOT_IGNORED, "--block-signal=INT,TERM,HUP,USR1", sys.executable, "-c", script]
    shown = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert shown.split() == ["SigBlk:", "0" * 16] * 5


def test_later_it_is_noted_and_a_second_one_changes_nothing() -> None:
    save = "print('up')\nwhile not watch.number: time.sleep(0.01)\ntime.sleep(0.5)\nprint('saved', watch.number)\n"
    process = start(TRAINS + save + "signals.exit(signals.status_of(watch.number))")
    assert ended(process, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM) == (75, "saved 10\n", "")


def test_what_has_ended_well_stays_so() -> None:
    process = start(TRAINS + "watch.end(); print('up')\ntime.sleep(0.5)\nsignals.exit(0)")
    assert ended(process, signal.SIGTERM, signal.SIGINT) == (0, "", "")


def test_a_rank_that_fails_before_its_first_step_may_have_felt_anothers_end() -> None:
    """Fails a rank because a signal ended another one; if the signal then reaches it too, it reports the signal."""
    script = (
        "watch = signals.saving().__enter__(); watch.agree(); signals.ECHO_SECONDS = {}; print('up')\n"
        "signals.let_a_signal_pass()\nraise ValueError"
    )
    status, _, said = ended(start(script.format(60.0), launched=True), signal.SIGTERM)
    assert (status, "Traceback" in said) == (75, False)
    status, _, said = ended(start(script.format(0.2), launched=True))
    assert (status, "ValueError" in said) == (1, True)


def test_a_rank_that_waits_for_others_after_its_first_step_does_not_wait_forever() -> None:
    script = "signals.AGREEMENT_SECONDS = 0.5; signals._watch.agree(); print('up')\n" + BUSY
    assert ended(start(script), signal.SIGTERM)[0] == 75


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('up')\n" + BUSY, "before the first step"),
        (
            TRAINS + "print('up')\nwhile not watch.number: time.sleep(0.1)\nos.write(2, b'saved')\nos._exit(75)\n",
            "saved",
        ),
        ("signals.ORPHAN_SECONDS = 0.5\n" + TRAINS + "print('up')\n" + BUSY, "SIGTERM"),  # waits for a dead rank
    ],
)
def test_ranks_end_when_their_launcher_is_gone(tmp_path: Path, script: str, said: str) -> None:
    launcher = "import subprocess, sys; subprocess.Popen([sys.executable, '-u', '-c', sys.argv[1]]).wait()"
    begin = "import os, sys, time\nfrom configs import signals\nsignals._POLL_SECONDS = 0.1\n"
    begin += "signals.begin(True, launched=True)\nprint(os.getpid())\n"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, begin + script],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "up\n"
    time.sleep(0.3)
    os.kill(pid, 0)  # it does not end while its launcher lives
    process.kill()
    process.wait()
    began = time.monotonic()
    assert said in process.stderr.read()  # read until the rank closes the pipe
    assert time.monotonic() - began < 30


def test_any_other_command_is_interrupted_and_cleans_up() -> None:
    script = "signals.run()\ntry:\n print('up'); time.sleep(60)\nfinally:\n time.sleep(0.3); print('clean')\n"
    status, out, said = ended(start(script, saves=False), signal.SIGINT, signal.SIGINT)
    assert (status, out) == (-signal.SIGINT, "clean\n") and "KeyboardInterrupt" in said


def test_an_interruption_of_a_string_that_runs_is_130_too(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import time\nfrom configs import signals\nsignals.begin(); signals.run()\n"
        "try: exec('print(\"up\"); time.sleep(60)')\nexcept KeyboardInterrupt: signals.exit(130)\n"
    )
    process = subprocess.Popen(
        [*NOT_IGNORED, sys.executable, "-u", "-m", "interrupted"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert ended(process, signal.SIGINT) == (130, "", "")


def test_an_interrupted_command_does_not_wait_until_its_modules_are_unloaded() -> None:
    """Times an interrupted command: unloading torch takes half a minute, and exit functions still run."""
    script = (
        "import atexit\nclass Slow:\n def __del__(self, sleep=time.sleep): sleep(60)\n"
        "slow = Slow(); atexit.register(print, 'cleaned up'); signals.run()\n"
        "try:\n print('up'); time.sleep(60)\nexcept KeyboardInterrupt: signals.exit(130)\n"
    )
    assert ended(start(script, saves=False), signal.SIGINT) == (130, "cleaned up\n", "")


def test_a_command_that_swallows_its_interruption_is_ended() -> None:
    script = (
        "signals.CLEANUP_SECONDS = 0.5; signals.run()\n"
        "while True:\n try: print('up'); time.sleep(60)\n except BaseException: pass\n"
    )
    assert ended(start(script, saves=False), signal.SIGINT) == (
        130,
        "up\n",
        "interrupted; run the same command again to go on\n",
    )


def test_a_failure_that_an_interruption_caused_is_no_failure() -> None:
    script = (
        "from configs.cli import entrypoint\ndef main(argv):\n try:\n  print('up'); time.sleep(60)\n"
        " except BaseException: raise ImportError('half imported')\nentrypoint(main, [])\n"
    )
    assert ended(start(script, saves=False), signal.SIGINT) == (
        130,
        "",
        "interrupted; run the same command again to go on\n",
    )


def test_while_it_is_imported_any_command_ends_at_once() -> None:
    assert ended(start("print('up')\n" + BUSY, saves=False), signal.SIGINT)[0] == 130


def test_nohup_holds() -> None:
    script = "from configs import signals; signals.begin(True)\nimport time\n"
    script += "print('up'); time.sleep(0.5); print('finished')"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-u", "-c", script],
        cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert ended(process, signal.SIGHUP)[:2] == (0, "finished\n")


def test_a_signal_to_a_forked_child_is_the_childs_alone() -> None:
    script = (  # Python 3.12 and newer warn when a process with threads forks
        "import signal, warnings\nwarnings.simplefilter('ignore')\n"
        "child = os.fork()\nif not child: time.sleep(60)\nprint('up'); time.sleep(0.2)\n"
        "os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1]); time.sleep(0.2)\nsignals.exit(0)"
    )
    assert ended(start(script)) == (0, "15\n", "")
