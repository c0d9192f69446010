"""Runs that go on in the middle of a rollout: with the settings that it was sampled and scored by, until its end."""

from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, plain, validate
from configs.rl import GRPOConfig, PPOConfig
from posttrain.rl.phases import Phases
from posttrain.rl.replaying import check_middle
from posttrain.rl.rl_start import _settled
from tests.training_configs import BASES

PHASES = Phases(batches=2, epochs=2, batch_size=4, seed=5)


def config(method: str, **sections: dict[str, Any]) -> GRPOConfig | PPOConfig:
    return validate(GRPOConfig if method == "grpo" else PPOConfig, {**BASES[method], **sections})


@pytest.mark.parametrize(
    ("method", "changed", "words"),
    [
        ("grpo", {"grpo": {"temperature": 0.5}}, "grpo.temperature 1.0 -> 0.5"),
        ("grpo", {"grpo": {"dialect": "gspo"}}, "grpo.dialect grpo@trl -> gspo"),
        ("grpo", {"rl": {"kl": "loss"}}, "rl.kl none -> loss"),
        ("grpo", {"rl": {"overlong_buffer": 2, "kl_coef": 0.5}}, "rl.overlong_buffer 0 -> 2"),
        ("ppo", {"ppo": {"gamma": 0.5}, "rl": {"kl_coef": 0.5}}, "ppo.gamma 1.0 -> 0.5; rl.kl_coef 0.02 -> 0.5"),
        ("grpo", {"grpo": {"clip_low": 0.1}}, ""),
    ],
)
def test_what_a_rollout_was_made_with_stays(method: str, changed: dict[str, Any], words: str) -> None:
    manifest = {"step": 6, "source": {"batch": 4}, "config": plain(config(method))}
    now = config(method, **changed)
    settled = _settled(now, getattr(now, method), method)
    if not words:
        check_middle(Path("step_6"), manifest, PHASES, settled)
        return
    with pytest.raises(ConfigError) as refused:
        check_middle(Path("step_6"), manifest, PHASES, settled)
    assert str(refused.value) == (
        "step_6 is in the middle of rollout 1, which was sampled and scored with other settings: "
        f"{words}; set back what differs, at least until step 8"
    )
