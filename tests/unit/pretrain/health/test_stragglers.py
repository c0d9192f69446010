"""The rule by which a rank is said to be slow: for ten steps one after another, beside ranks with the same work."""

from configs.train import WatchdogConfig
from pretrain.health.stragglers import AGAIN, STEPS, Stragglers

NAMES = [f"rank {rank}" for rank in range(4)]


def test_a_rank_is_named_after_ten_slow_steps_and_then_seldom() -> None:
    stragglers = Stragglers(WatchdogConfig(), [0, 0, 0, 0], NAMES)
    said = [stragglers.note([1.0, 1.1, 1.6, 0.9]) for _ in range(AGAIN + STEPS)]
    assert [step for step, lines in enumerate(said, 1) if lines] == [STEPS, AGAIN + STEPS]
    assert said[STEPS - 1] == [
        "rank 2 is slow: 1.6 s of work in a step, 1.6 times the median of ranks with the same work, for 10 steps; "
        "the others wait for it"
    ]


def test_a_step_in_between_begins_the_count_again() -> None:
    stragglers = Stragglers(WatchdogConfig(), [0, 0, 0, 0], NAMES)
    slow, usual = [1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.4]
    for _ in range(3):
        assert not any(stragglers.note(slow) for _ in range(STEPS - 1))
        assert not stragglers.note(usual)


def test_ranks_are_compared_within_their_stage() -> None:
    stragglers = Stragglers(WatchdogConfig(), [0, 0, 1, 1], NAMES)
    assert not any(stragglers.note([1.0, 1.0, 3.0, 3.0]) for _ in range(3 * STEPS))
    alone = Stragglers(WatchdogConfig(), [0, 1], NAMES[:2])
    assert not any(alone.note([1.0, 3.0]) for _ in range(3 * STEPS)), "a stage of one rank has none to compare with"
