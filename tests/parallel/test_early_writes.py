"""Runs that are refused leave their folder, their mirror and the nodes' disks as they were, the times too."""

from pathlib import Path
from typing import Any

from configs.files import write_atomic
from configs.loader import toml
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.published_plans import publish
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import training_config


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns time of change and size of the folder and of all that is in it."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder, *folder.rglob("*"))}


def test_a_refused_run_writes_nothing(ranks: RanksOf, tmp_path: Path) -> None:
    make_tokens(tmp_path / "data")
    publish(tmp_path / "data")
    written = tmp_path / "written"

    def train(steps: int, seed: int = 3, **more: Any) -> dict[str, Any]:
        kept = {"every": 2, "local_every": 1, "local_dir": str(written / "local"), "mirror": str(written / "mirror")}
        tree = training_config(
            written / "run",
            steps,
            (4, 2),
            32,
            run={"seed": seed},
            model={**MODELS["dense"], "vocab_size": VOCAB},
            data={"plan": str(tmp_path / "data/plan")},
            optimizer={"lr": 0.001},
            checkpoint=kept,
            eval={"rows": 0},
            **more,
        )
        write_atomic(tmp_path / "config.toml", toml(tree))
        (answer,) = ranks(1).run(
            "tests.parallel.workers.posttraining:command",
            process_group=False,
            module="pretrain.train",
            argv=[str(tmp_path / "config.toml")],
        )
        return dict(answer)

    refused = train(9)
    assert "needs 24 samples more" in refused["error"] and not written.exists(), list(written.rglob("*"))
    assert train(2)["status"] == 0
    before = listing(written)
    assert {"run", "mirror", "local"} <= {path.name for path in written.iterdir()}
    for words, answer in (
        ("run.seed 3 -> 4", train(3, seed=4)),
        ("needs 24 samples more", train(9)),
        ("section adapter, of kind lora, is new", train(3, adapter={"kind": "lora"})),
    ):
        assert words in answer["error"] and listing(written) == before, (answer, set(listing(written)) ^ set(before))
