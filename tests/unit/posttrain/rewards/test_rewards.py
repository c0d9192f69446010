"""Rewards: what each accepts, and that no function of a user can stop the trainer or be counted as 0."""

import json
import os
import re
import select
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.loader import ConfigError
from configs.rewards import RewardConfig
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.gym import gym
from posttrain.rewards.mathematics import mathematics
from posttrain.rewards.reward_registry import make_rewards
from posttrain.rewards.unscorable import Unscorable
from posttrain.rewards.worker import Call, WorkerReward
from pretrain.checkpoint.lineage import Pin

MODULE = """
import os, subprocess, sys, time
import numpy

def right(prompt, completion, answer, metadata): return float(completion == answer) * metadata["worth"]
def truth(prompt, completion, answer, metadata): return completion == answer
def scalar(prompt, completion, answer, metadata): return numpy.float32(0.5)
def messages(prompt, completion, answer, metadata): return len(prompt)
def defaults(prompt, completion, answer, metadata, more=3): return more
def unsure(prompt, completion, answer, metadata): return None
def text(prompt, completion, answer, metadata): return "1.0"
def array(prompt, completion, answer, metadata): return numpy.zeros(2)
def nan(prompt, completion, answer, metadata): return float("nan")
def infinite(prompt, completion, answer, metadata): return float("-inf")
def raises(prompt, completion, answer, metadata): return 1 / 0
def hangs(prompt, completion, answer, metadata): time.sleep(1000)
def loops(prompt, completion, answer, metadata):
    while True: pass
def stubborn(prompt, completion, answer, metadata):
    while True:
        try: time.sleep(1000)
        except BaseException: pass
def allocates(prompt, completion, answer, metadata):
    kept = []
    while True: kept.append(bytearray(2**24))
def leaves(prompt, completion, answer, metadata): sys.exit(0)
def dies(prompt, completion, answer, metadata): os._exit(0)
def aborts(prompt, completion, answer, metadata): os.abort()
def prints(prompt, completion, answer, metadata):
    print("x" * 100000); sys.stderr.write("y" * 100000); return 1
def closes(prompt, completion, answer, metadata):
    sys.stdin.close(); os.dup2(2, 1); os.close(1); return 1
def closes_all(prompt, completion, answer, metadata):
    os.closerange(0, 100_000); return 1
def forks(prompt, completion, answer, metadata):
    return os.fork() or time.sleep(1000)
def returns_twice(prompt, completion, answer, metadata):
    os.fork(); return 1
def sleeper(prompt, completion, answer, metadata):
    return subprocess.Popen(["sleep", "1000"]).pid
def orphan(prompt, completion, answer, metadata):
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)

def two(prompt, completion): return 1
def five(prompt, completion, answer, metadata, more): return 1
async def later(prompt, completion, answer, metadata): return 1
number = 3
"""
BROKEN = "import there_is_no_such_module\n"
ENDS = "import os\nos._exit(0)\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attempt(completion: str, answer: Any = "yes", prompt: Any = "Is it?", **metadata: Any) -> Attempt:
    return Attempt(Problem("one", prompt, answer, metadata=metadata), completion)


def score(attempts: list[Attempt], **settings: Any) -> list[TaskScore]:
    rewards = make_rewards({"mine": RewardConfig(**settings)})
    rewards.check("task.rewards")
    return rewards(attempts)


def function(name: str, seconds: float = 5.0, memory_mb: int = 1024) -> WorkerReward:
    return WorkerReward(Call(f"my_rewards:{name}", {}, seconds, memory_mb * 2**20), compares=False, workers=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("right", 0.25),
        ("truth", 1),
        ("scalar", 0.5),
        ("messages", 6),
        ("defaults", 3),
        ("prints", 1),
        ("closes", 1),
        ("returns_twice", 1),
    ],
)
def test_a_function_of_the_user_gives_any_number(here: Path, name: str, value: float) -> None:
    assert [one.value for one in function(name)([attempt("yes", worth=0.25)] * 2)] == [value, value]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unsure", "returned None"),
        ("text", "returned str, which is no number"),
        ("array", "returned ndarray, which is no number"),
        ("nan", "returned nan"),
        ("infinite", "returned -inf"),
        ("raises", "raised ZeroDivisionError"),
        ("leaves", "raised SystemExit"),
        ("dies", "ended its process"),
        ("aborts", "ended its process"),
        ("closes_all", "ended its process"),
        ("orphan", "ended its process"),
        ("allocates", "ran out of memory"),
    ],
)
def test_what_is_no_number_is_unscorable_and_counted_by_its_reason(here: Path, name: str, reason: str) -> None:
    reward = function(name, seconds=60.0)  # on a busy machine filling the memory takes long
    scores = reward([attempt("yes")] * 2)  # the second attempt too: a new process takes the place of one that ended
    assert [one.value for one in scores] == [None, None]
    assert [one.reason for one in scores] == [reason] * 2
    reward.close()


@pytest.mark.parametrize("name", ["hangs", "loops", "stubborn"])
def test_a_function_that_never_returns_is_ended(here: Path, name: str) -> None:
    reward = function(name, seconds=0.3)
    begun = time.monotonic()
    assert reward([attempt("yes")])[0] == TaskScore(None, "took more than 0.3 s")
    assert time.monotonic() - begun < 60
    reward.close()


@pytest.mark.parametrize("name", ["forks", "sleeper"])
def test_processes_that_a_function_starts_end_with_its_own(here: Path, name: str) -> None:
    reward = function(name)
    started = [os.pidfd_open(int(score.value or 0)) for score in reward([attempt("yes")] * 2)]
    reward.close()
    for process in started:
        ended, _, _ = select.select([process], [], [], 30)
        os.close(process)
        assert ended


def test_many_attempts_keep_their_order_and_one_that_hangs_harms_no_other(here: Path) -> None:
    (here / "mixed.py").write_text(
        "import time\ndef f(prompt, completion, answer, metadata):\n"
        "    if completion == '7': time.sleep(1000)\n    return float(completion)\n"
    )
    attempts = [attempt(str(i), answer="x" * 300_000) for i in range(12)]  # more than a pipe holds
    scores = score(attempts, kind="function", function="mixed:f", seconds=1.0)
    assert [one.value for one in scores] == [None if i == 7 else float(i) for i in range(12)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_rewards:two", r"two\(prompt, completion\) does not take four arguments"),
        ("my_rewards:five", r"five\(.*more\) does not take four arguments"),
        ("my_rewards:later", "later is async; write a plain function"),
        ("my_rewards:number", "is int, not a function"),
        ("my_rewards:missing", "no attribute 'missing'"),
        ("no_such:right", "No module named 'no_such'"),
        ("broken:right", "No module named 'there_is_no_such_module'"),
        ("ends:right", "its module, when imported, ended its process"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_the_first_step(here: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.rewards\.mine\.function = '{name}' cannot be called: .*{words}"):
        score([], kind="function", function=name)


@pytest.mark.parametrize(
    ("completion", "answer", "settings", "value"),
    [
        (" 12\n", 12, {}, 1),
        ("12.", "12", {}, 0),
        ("Yes", "yes", {}, 0),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("<think>a\nb</think> <answer>c</answer>\n", "d", {"pattern": "<think>.*</think>\\s*<answer>.*</answer>"}, 1),
        ("well <think>a</think><answer>c</answer>", "d", {"pattern": "<think>.*</think>\\s*<answer>.*</answer>"}, 0),
        ("#### 3 no, #### 4", "4", {"pattern": r"#### (\d+)"}, 1),
        ("#### 3 no, #### 4", "3", {"pattern": r"#### (\d+)"}, 0),
        ("nothing", "3", {"pattern": r"#### (\d+)"}, 0),
        ("ANSWER: B", "b", {"pattern": "answer: (.)", "ignore_case": True}, 1),
    ],
)
def test_exact_and_regex(completion: str, answer: Any, settings: dict[str, Any], value: float) -> None:
    kind = "regex" if "pattern" in settings else "exact"
    assert score([attempt(completion, answer)], kind=kind, **settings)[0].value == value


def test_a_pattern_that_takes_time_without_end_is_unscorable() -> None:
    assert score([attempt("a" * 40 + "b")], kind="regex", pattern="(?:a+)+", seconds=0.5)[0].reason == (
        "mine: took more than 0.5 s"
    )


def test_a_weighted_sum_keeps_each_rewards_value_and_is_unscorable_if_one_is(here: Path) -> None:
    rewards = make_rewards(
        {
            "right": RewardConfig(kind="regex", pattern="<a>(.*)</a>"),
            "form": RewardConfig(kind="regex", pattern="<a>.*</a>", weight=0.2),
            "mine": RewardConfig(kind="function", function="my_rewards:right", weight=-0.5),
        }
    )
    attempts = [attempt("<a>yes</a>", worth=1.0), attempt("<a>no</a>", worth=1.0), attempt("no")]
    scores = rewards(attempts)
    assert [one.value for one in scores[:2]] == [pytest.approx(1.2), pytest.approx(0.2)]
    assert scores[0].parts == {"right": 1.0, "form": 1.0, "mine": 0.0}
    assert scores[2].value is None and scores[2].reason == "mine: raised KeyError"  # it has no "worth"
    sums = [sum(score.parts.get(name, 0.0) for score in scores) for name in ("right", "form", "mine")]
    assert sums == [1.0, 2.0, 0.0] and [len(score.parts) for score in scores].count(2) == 1
    assert rewards([]) == []


PROGRAM = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("completion", "partial", "value"),
    [
        (PROGRAM, False, 1.0),
        (f"It is:\n```python\n{PROGRAM}```\nDone.", False, 1.0),
        ("def double(x):\n    return x + 2\n", False, 0.0),
        ("def double(x):\n    return x + 2\n", True, 0.5),
        ("def double(x:", False, 0.0),
        ("import os\nos._exit(0)", False, 0.0),
        ("import socket\nsocket.socket()\n" + PROGRAM, False, 0.0),
        ("while True: pass", False, 0.0),
        ("raise SystemExit(0)", False, 0.0),
    ],
)
def test_code_is_run_with_its_tests(completion: str, partial: bool, value: float) -> None:
    tests = ["assert double(2) == 4", "assert double(5) == 10"]
    found = score([attempt(completion, tests)], kind="tests", seconds=1.0, memory_mb=1024, partial=partial)
    assert found[0].value == value


def test_a_problem_without_tests_is_unscorable() -> None:
    assert score([attempt(PROGRAM, 3)], kind="tests")[0].reason == "mine: the answer holds no tests"


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"so it is $\frac{1}{2}$", "0.5", 1),
        ("The answer is 0.5", r"\frac{1}{2}", 1),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
        ("It is 41", 42, 0),
        ("no idea", 42, 0),
    ],
)
def test_mathematics(completion: str, answer: Any, value: float) -> None:
    pytest.importorskip("math_verify")
    assert score([attempt(completion, answer)], kind="math_verify", seconds=30.0)[0].value == value


def test_the_scorers_of_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    attempts, expected = [], []
    for name in ("leg_counting", "countdown"):
        for entry in gym.create_dataset(name, size=2, seed=3):
            record = json.loads(json.dumps(entry))
            for text in (record["answer"] or "1", f"I say <answer>{record['answer']}</answer>", "7"):
                attempts.append(attempt(text, record["answer"], record["question"], metadata=record["metadata"]))
                said = record["answer"] if "<answer>" in text else text
                expected.append(gym.get_score_answer_fn(name)(answer=said, entry=record))
    assert [one.value for one in score(attempts, kind="reasoning_gym", seconds=60.0)] == expected
    assert score([attempt("1")], kind="reasoning_gym", seconds=60.0)[0].value is None


def test_a_record_of_no_dataset_of_reasoning_gym_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer_of(name: str) -> Any:
        if name != "sums":
            raise ValueError(name)
        return lambda answer, entry: float(answer == entry["answer"])

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(get_score_answer_fn=scorer_of))
    for metadata, words in (
        ({}, "no source_dataset in the record's metadata"),
        ({"source_dataset": "none"}, "reasoning-gym has no dataset 'none'"),
    ):
        with pytest.raises(Unscorable, match=words):
            gym("1 + 1", "2", "2", {"metadata": metadata})
    assert gym("1 + 1", "2", "2", {"metadata": {"source_dataset": "sums"}}) == 1


def test_an_answer_that_is_no_mathematics_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        parse=lambda text, parsing_timeout: re.findall("[0-9]+", text),
        verify=lambda right, said, timeout_seconds: right == said,
    )
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    with pytest.raises(Unscorable, match="the answer is no mathematics"):
        mathematics("", "42", "a lot", {})
    assert mathematics("", "42", 42, {}) == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, package in (("math_verify", "math-verify"), ("reasoning_gym", "reasoning-gym")):
        with pytest.raises(ConfigError, match=rf"task\.rewards\.mine needs the package {package}.*pip install"):
            score([], kind=kind)


def test_a_reward_model_scores_a_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def scorer(dialogues: Any) -> list[float]:
        batches.append(len(dialogues))
        return [float("nan") if "bad" in one[-1]["content"] else -3.5 for one in dialogues]

    settings = {"model": RewardConfig(kind="reward_model", model="runs/rm")}
    with pytest.raises(ConfigError, match=r"rewards\.model\.model = 'runs/rm' does not exist; name the folder"):
        make_rewards(settings)
    scorer.pin = Pin("runs/rm/checkpoints/step_4", 4, "b00c")  # type: ignore[attr-defined]
    monkeypatch.setattr("posttrain.rewards.dialogue_scorer.open_scorer", lambda path, key: scorer)
    scores = make_rewards(settings)([attempt("good"), attempt("bad")])
    assert [one.value for one in scores] == [-3.5, None] and batches == [2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "function", "function": "a.b"}, "not of the form module:function"),
        ({"kind": "exact", "seconds": 3.0}, "says nothing of kind"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardConfig(**settings)
