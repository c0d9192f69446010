"""The sort task: disjoint splits, reproducible prompts, and a verifier that tells wrong from unscorable answers."""

import pytest

from posttrain.tasks.verifiable_tasks import SortTask, split_of


def test_scores() -> None:
    task = SortTask(6)
    assert task.answer("Sort 529143") == "123459"
    assert task.score("Sort 529143", "123459").value == 1.0
    assert task.score("Sort 529143", "123495") == task.score("Sort 529143", "529143")
    assert task.score("Sort 529143", "123495").reason == "wrong order"
    assert task.score("Sort 529143", "12345").reason == "wrong digits"
    assert task.score("Sort 112233", "123").value == 0.0
    assert task.score("Sort 529143", " 123459").reason == "not a number"
    assert task.score("Sort 529143", "").value == 0.0


def test_unscorable_is_not_zero() -> None:
    score = SortTask(6).score("Add 1 and 2", "3")
    assert score.value is None
    assert "Add 1 and 2" in score.reason


def test_splits_are_disjoint_and_stable() -> None:
    task = SortTask(4)  # 10,000 numbers, so 3000 draws of a split repeat many and would soon collide
    drawn = {
        split: {task.prompt(seed, split, i) for seed in (0, 1) for i in range(1500)} for split in ("train", "heldout")
    }
    assert not drawn["train"] & drawn["heldout"]
    assert 600 < len(drawn["heldout"]) <= 1100  # about a tenth of all numbers
    assert split_of("sort/1234") == split_of("sort/1234")


def test_prompts_are_a_function_of_seed_split_and_index() -> None:
    task = SortTask(6)
    first = [task.prompt(7, "train", i) for i in range(50)]
    assert [task.prompt(7, "train", i) for i in reversed(range(50))] == first[::-1]
    assert [task.prompt(8, "train", i) for i in range(50)] != first
    assert first[0] == "Sort 992116"  # fixed: every machine and version must draw the same prompts


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"task\.digits = 2"):
        SortTask(2)
