"""Run in the ranks: an untrained model as a checkpoint, for post-training to start from."""

from typing import Any

from pretrain.checkpoint import state
from tests.parallel.layouts import make_engine


def save_untrained(run_dir: str, model: dict[str, Any]) -> None:
    state.save(make_engine(model, {}), run_dir, step=1, state={"config": {"model": model}}, keep=1)
