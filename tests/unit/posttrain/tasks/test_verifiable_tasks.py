"""The generated tasks: disjoint splits, reproducible problems, and rules that tell wrong from unscorable answers."""

import re
from itertools import permutations, product

import pytest

from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.tasks.countdown import CountdownTask, value_of
from posttrain.tasks.sorting import SortTask
from posttrain.tasks.task import Task, split_of


def score(task: Task, prompt: str, completion: str) -> TaskScore:
    return task.score([Attempt(Problem("one", prompt), completion)])[0]


def test_scores() -> None:
    task = SortTask(6)
    assert score(task, "Sort 529143", "123459").value == 1.0
    assert score(task, "Sort 529143", "123495") == score(task, "Sort 529143", "529143")
    assert score(task, "Sort 529143", "123495").reason == "wrong order"
    assert score(task, "Sort 529143", "12345").reason == "wrong digits"
    assert score(task, "Sort 112233", "123").value == 0.0
    assert score(task, "Sort 529143", " 123459").reason == "not a number"
    assert score(task, "Sort 529143", "").value == 0.0


@pytest.mark.parametrize("task", [SortTask(6), CountdownTask()])
def test_unscorable_is_not_zero(task: Task) -> None:
    found = score(task, "Add 1 and 2", "3")
    assert found.value is None
    assert found.reason == "not a prompt of this task"  # reports count by the reason
    form = "Sort DIGITS" if isinstance(task, SortTask) else "Make N of D D D"
    assert found.detail == f"'Add 1 and 2' is not '{form}'"
    assert score(task, "Sort 21" if isinstance(task, SortTask) else "Make 3 of 1 2", "3").value == 0


@pytest.mark.parametrize("task", [SortTask(4), CountdownTask()])
def test_splits_are_disjoint_and_stable(task: Task) -> None:
    # So many draws of a split repeat many of the few thousand problems there are, and would soon collide.
    drawn = {
        split: {task.problem(seed, split, i).id for seed in (0, 1) for i in range(1500)}
        for split in ("train", "heldout")
    }
    assert not drawn["train"] & drawn["heldout"]
    assert 60 < len(drawn["heldout"]) <= 1100
    assert split_of("sort/1234") == split_of("sort/1234")


def test_problems_are_a_function_of_seed_split_and_index() -> None:
    task = SortTask(6)
    first = [task.problem(7, "train", i) for i in range(50)]
    assert [task.problem(7, "train", i) for i in reversed(range(50))] == first[::-1]
    assert [task.problem(8, "train", i) for i in range(50)] != first
    # Fixed: every machine and version must draw the same prompts.
    assert first[0].prompt == "Sort 992116" and first[0].answer == first[0].demonstration == "112699"
    assert task.facts == {"digits": 6, "max_new_tokens": 16, "name": "sort"}


@pytest.mark.parametrize("kind", [SortTask, CountdownTask])
def test_bad_settings_are_named(kind: type) -> None:
    with pytest.raises(ValueError, match=r"task\.digits = 2"):
        kind(2)


@pytest.mark.parametrize(
    ("completion", "value", "reason"),
    [
        ("3*5+7", 1.0, "right"),
        ("7 + 5 * 3", 1.0, "right"),
        ("(7+(3*5))", 1.0, "right"),
        ("3*(5+7)", 0.0, "another number"),
        ("3*5+3+4", 0.0, "other digits"),
        ("22", 0.0, "other digits"),
        ("35-7-6", 0.0, "other digits"),
        ("3*5+07", 0.0, "not an expression"),
        ("+3*5+7", 0.0, "not an expression"),
        ("3**5+7", 0.0, "not an expression"),
        ("3*5+7=22", 0.0, "not an expression"),
        ("3*5+", 0.0, "not an expression"),
        ("(" * 99, 0.0, "not an expression"),
        ("9" * 5000, 0.0, "not an expression"),
        ("", 0.0, "not an expression"),
        ("__import__('os').abort()", 0.0, "not an expression"),
    ],
)
def test_countdown_takes_any_expression_of_the_digits(completion: str, value: float, reason: str) -> None:
    assert score(CountdownTask(), "Make 22 of 5 7 3", completion) == TaskScore(value, reason)


def test_countdown_teaches_the_form_and_not_the_answer() -> None:
    task = CountdownTask()
    problems = [task.problem(3, "train", i) for i in range(400)]
    solved = task.score([Attempt(problem, str(problem.solution)) for problem in problems])
    assert all(one.value == 1 for one in solved)
    shown = task.score([Attempt(problem, str(problem.demonstration)) for problem in problems])
    assert {one.reason for one in shown} == {"right", "another number"}
    # As often right as an expression that is drawn without regard to the number.
    chances = []
    for problem in problems[:60]:
        target, digits = problem.answer["target"], problem.answer["digits"]
        texts = [f"{a}{s}{b}{t}{c}" for a, b, c in permutations(digits) for s, t in product("+-*", repeat=2)]
        chances.append(sum(value_of(text) == target for text in texts) / len(texts))
    expected = sum(chances) / len(chances)
    assert abs(sum(one.value or 0 for one in shown) / len(shown) - expected) < 0.05
    assert expected < 0.12
    assert all(re.fullmatch(r"Make \d+ of [1-9] [1-9] [1-9]", str(problem.prompt)) for problem in problems)
