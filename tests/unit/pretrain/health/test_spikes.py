"""Which steps are spikes, by numbers worked out by hand, and what is done about them."""

import math
import random
import statistics
from itertools import count

import pytest

from configs.loader import ConfigError, validate
from configs.train import SpikesConfig, TrainerConfig
from pretrain.health.spikes import SpikeGuard

# 20 norms whose logarithms have median 0 and median absolute deviation log(1.1): (1 / 1.1 and 1.1) are as far from 1.
NORMS = [1 / 1.1, 1.1] * 9 + [1.0, 1.0]
DEVIATION = 1.4826 * math.log(1.1)  # one robust standard deviation


def _guard(action: str = "skip", **keys: float) -> SpikeGuard:
    return SpikeGuard(SpikesConfig.model_validate({"action": action, "z_score": 4.0, **keys}))


def _after(guard: SpikeGuard, norms: list[float]) -> int:
    """Notes norms from step 1 on; returns the number of the next step."""
    for step, norm in enumerate(norms, 1):
        assert guard.note(step, 2.0, norm, applied=True) == {}
    return len(norms) + 1


def test_the_bound_comes_from_the_steps_up_to_the_one_before_the_last() -> None:
    guard = _guard()
    step = _after(guard, NORMS)
    assert guard.largest_norm(step) == math.inf, "only 19 steps count for it"
    guard.note(step, 2.0, 50.0, applied=False)
    assert guard.largest_norm(step + 1) == pytest.approx(math.exp(4.0 * DEVIATION))
    assert _guard("log").largest_norm(99) is None
    assert _guard("rewind").largest_norm(99) == math.inf


def test_a_loss_or_norm_far_above_the_median_is_a_spike() -> None:
    guard = _guard("log")
    step = _after(guard, NORMS)
    guard.note(step, 2.0, 1.0, applied=True)
    # The losses are all 2.0: then 5% of the median stands for their spread, which is 0.1.
    assert guard.note(step + 1, 2.3, 1.2, applied=True) == {}
    assert guard.note(step + 2, 2.6, 1.2, applied=True) == {"loss_spike": 6.0}
    found = guard.note(step + 3, 2.0, math.exp(10 * DEVIATION), applied=True)
    assert list(found) == ["grad_norm_spike"] and found["grad_norm_spike"] == pytest.approx(10.0, abs=0.4)


def test_norms_with_a_long_tail_are_no_spikes() -> None:
    """Notes log-normal norms, as of a batch of two rows: only on their own scale are the largest far out.

    One that is twenty times as large as the median is a spike on both.
    """
    guard, draw = SpikeGuard(SpikesConfig()), random.Random(7)
    norms = [math.exp(draw.gauss(0.0, 0.35)) for _ in range(2000)]
    middle = statistics.median(norms)
    deviation = 1.4826 * statistics.median(abs(norm - middle) for norm in norms)
    assert max(norms) > middle + 5 * deviation
    assert not any(guard.note(step, 2.0, norm, applied=True) for step, norm in enumerate(norms, 1))
    guard.note(2001, 2.0, 1.0, applied=True)
    assert guard.note(2002, 2.0, 20.0 * middle, applied=True).keys() == {"grad_norm_spike"}


def test_what_is_not_finite_is_a_spike_from_the_first_step_on() -> None:
    found = _guard().note(1, math.nan, math.inf, applied=False)
    assert found == {"loss_spike": None, "grad_norm_spike": None, "skipped": 1}


def test_skipped_steps_do_not_move_the_bound_and_are_counted() -> None:
    guard = _guard(most_skipped=2)
    step = _after(guard, [*NORMS, 1.0])
    bound = guard.largest_norm(step + 1)
    numbers = count(step)
    for _ in range(2):
        assert guard.note(next(numbers), 2.0, 99.0, applied=False)["skipped"] == 1
    assert guard.largest_norm(step + 2) == bound
    with pytest.raises(FloatingPointError, match=r"3 of the last 1000 steps were skipped .* steps 22, 23, 24 "):
        guard.note(next(numbers), 2.0, 99.0, applied=False)


def test_old_skips_are_forgiven() -> None:
    guard = _guard(most_skipped=1)
    for step in (1, 1001, 2001):
        assert guard.note(step, 1.0, 9.0, applied=False)["skipped"] == 1


def test_a_guard_goes_on_as_one_that_never_stopped() -> None:
    guard, again = _guard(), _guard()
    step = _after(guard, [*NORMS, 1.3])
    guard.note(step, 2.0, 9.0, applied=False)
    again.note(1, 2.0, 70.0, applied=True)
    again.restore({})  # of a version without
    assert again.state() == {"norms": [], "losses": [], "skipped": []}
    again.restore(guard.state())
    assert again.largest_norm(step + 1) == guard.largest_norm(step + 1) < math.inf
    assert again.state() == guard.state()


@pytest.mark.parametrize(
    ("section", "remedy"),
    [
        ({"parallel": {"zero": 2}}, {"parallel": {"zero": 1}}),
        ({"parallel": {"offload_optimizer": True}}, {"parallel": {}}),
        ({"adapter": {"kind": "adalora", "rank": 8, "budget_steps": 5}}, {"spikes": {}}),
    ],
)
def test_a_step_cannot_be_skipped_everywhere(section: dict[str, object], remedy: dict[str, object]) -> None:
    tree = {
        "run": {"dir": "run"},
        "train": {"steps": 8, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 8},
        "optimizer": {"lr": 1e-3},
        "spikes": {"action": "skip"},
        **section,
    }
    with pytest.raises(ConfigError, match="skip"):
        validate(TrainerConfig, tree)
    validate(TrainerConfig, tree | remedy)
