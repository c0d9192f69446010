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

# Overrides of a run that keeps its checkpoints in its folder alone.
NO_COPIES = ("checkpoint.local_dir=", "checkpoint.local_every=0", "checkpoint.mirror=")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns time of change and size of the folder and of all that is in it."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder, *folder.rglob("*"))}


def test_a_refused_run_writes_nothing(ranks: RanksOf, tmp_path: Path) -> None:
    make_tokens(tmp_path / "data")
    publish(tmp_path / "data")
    written = tmp_path / "written"

    def train(steps: int, *options: str) -> dict[str, Any]:
        kept = {"every": 2, "local_every": 1, "local_dir": str(written / "local"), "mirror": str(written / "mirror")}
        tree = training_config(
            written / "run",
            steps,
            (4, 2),
            32,
            run={"seed": 3},
            model={**MODELS["dense"], "vocab_size": VOCAB},
            data={"plan": str(tmp_path / "data/plan")},
            optimizer={"lr": 0.001},
            checkpoint=kept,
            eval={"rows": 0},
        )
        write_atomic(tmp_path / "config.toml", toml(tree))
        (answer,) = ranks(1).run(
            "tests.parallel.workers.posttraining:command",
            process_group=False,
            module="pretrain.train",
            argv=[str(tmp_path / "config.toml"), *options],
        )
        return dict(answer)

    refused = train(9)
    assert "needs 24 samples more" in refused["error"] and not written.exists(), list(written.rglob("*"))
    assert train(2)["status"] == 0
    before = listing(written)
    assert {"run", "mirror", "local"} <= {path.name for path in written.iterdir()}
    step_2, gone = written / "run/checkpoints/step_2", tmp_path / "gone"
    branch = [f"run.dir={gone}", *NO_COPIES]
    for words, options in (
        ("needs 24 samples more", ["train.steps=9"]),
        ("section adapter, of kind lora, is new", ["adapter.kind=lora"]),
        ("matches no weight of the model", ["train.freeze=['nothing.*']"]),
        ("which --resume no would overwrite; choose another", ["--resume", "no"]),
        ("there is no such checkpoint; give auto, no, or a path", [*branch, "--resume", str(written / "step_9")]),
        ("run.seed 3 -> 4", [*branch, "run.seed=4", "--resume", str(step_2)]),
    ):
        for dry in ([], ["--dry-run"]):
            answer = train(3, *options, *dry)
            assert words in answer["error"] and listing(written) == before, (
                answer,
                set(listing(written)) ^ set(before),
            )
            assert not gone.exists()
    assert f"the run would go on from {step_2}" in train(3, "--dry-run")["said"]
    closed = [f"run.dir={gone}", f"checkpoint.local_dir={tmp_path / 'config.toml'}/local", "checkpoint.mirror="]
    answer = train(3, *closed)
    assert "name a folder that can be written on every node" in answer["error"] and not gone.exists(), answer
    assert "is finished at step 2" in train(2, "--dry-run")["said"] and listing(written) == before
