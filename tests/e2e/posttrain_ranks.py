"""Run in the ranks: an untrained model as a checkpoint, for post-training to start from."""

from typing import Any

from tests.parallel.layouts import make_engine
from tests.parallel.training import save_now


def save_untrained(run_dir: str, model: dict[str, Any]) -> None:
    save_now(make_engine(model, {}), run_dir, step=1, facts={"config": {"model": model}})
