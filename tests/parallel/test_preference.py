"""`trivium dpo` by its command: the same run at any layout, the same after an interruption, and a model that learns."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.tokenizer_training import train as train_tokenizer
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.runs import assert_same_state, metrics
from tests.shards import write_shard
from tests.training_configs import write_training_config

VOCAB = 301
MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
}
LOGGED = ("loss", "grad_norm", "rewards/margin", "rewards/accuracy", "logps/chosen")


def records(count: int) -> list[dict[str, Any]]:
    """Returns requests to sort digits with the right answer and one in which two digits are swapped."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        digits = draw.sample("123456789", 4)
        right = "".join(sorted(digits))
        wrong = "".join(sorted(digits, reverse=True))
        found.append({"prompt": f"Sort {''.join(digits)}", "chosen": right, "rejected": wrong})
    return found


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, an untrained model, pairs, labelled completions, and a config."""
    base = tmp_path_factory.mktemp("preference")
    text = {"text": "Sort 1234567890, how are you? I am fine.\n" * 40, "id": "0", "metadata": {}}
    shard = write_shard(base / "text.jsonl.zst", [text])
    train_tokenizer([shard], base / "tokenizer", TokenizerConfig(vocab_size=VOCAB))
    pairs = records(120)
    (base / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for i, pair in enumerate(pairs)
        for side in (("chosen", "rejected")[i % 2],)
    ]
    (base / "judged.jsonl").write_text("".join(json.dumps(one) + "\n" for one in judged))
    write_training_config(
        base / "dpo.toml",
        base / "dpo",
        3,
        (4, 4),
        96,
        run={"seed": 5},
        init={"run": str(base / "init"), "tokenizer": str(base / "tokenizer")},
        data={"pairs": [str(base / "pairs.jsonl")], "heldout_share": 0.2},
        optimizer={"lr": 1e-3, "eps": 1e-5},
        eval={"every": 1000, "rows": 64},
    )
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL,
        tokenizer=str(base / "tokenizer/tokenizer.model"),
    )
    return base


def dpo(ranks: RanksOf, base: Path, name: str, *overrides: str, world: int = 1) -> dict[str, Any]:
    """Runs the command into a folder of its own and returns its status, output and error on the first rank."""
    argv = [str(base / "dpo.toml"), f"run.dir={base / name}", *overrides]
    worker = "tests.parallel.workers.posttraining:command"
    answers = ranks(world).run(worker, process_group=False, timeout=300, module="posttrain.dpo", argv=argv)
    return dict(answers[0])


def logged(run: Path) -> list[list[float]]:
    return [[line[name] for name in LOGGED if name in line] for line in metrics(run) if "loss" in line]


def assert_equal_runs(base: Path, name: str, other: str) -> None:
    one, two = logged(base / name), logged(base / other)
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


LAYOUTS = {
    "dp": (2, "train.micro_batch_size=1"),
    "pp": (2, "parallel.pp=2", "train.micro_batch_size=2"),
}
MORE = {
    "tp": (2, "parallel.tp=2", "train.micro_batch_size=2"),
    "sp": (2, "parallel.tp=2", "parallel.sp=true"),
    "zero": (2, "parallel.zero=2", "train.micro_batch_size=2"),
    "all": (4, "parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=1"),
}


def test_a_layout_changes_neither_losses_nor_gradients(ranks: RanksOf, base: Path) -> None:
    assert dpo(ranks, base, "one")["status"] == 0
    first = metrics(base / "one")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and first["rewards/margin"] == 0, "begins at log 2"
    assert first["grad_norm"] > 0.01
    for name, (world, *overrides) in LAYOUTS.items():
        assert dpo(ranks, base, name, *overrides, world=world)["status"] == 0
        assert_equal_runs(base, name, "one")


@pytest.mark.full
@pytest.mark.parametrize("loss", ["dpo", "ipo_mean", "orpo", "simpo", "kto"])
def test_more_layouts_and_losses(ranks: RanksOf, base: Path, loss: str) -> None:
    own = [f"preference.loss={loss}"]
    if loss == "kto":
        own.append(f"data.pairs=['{base}/judged.jsonl']")
    assert dpo(ranks, base, loss, *own)["status"] == 0
    assert len({line[0] for line in logged(base / loss)}) == 3
    for name, (world, *overrides) in (LAYOUTS | MORE).items():
        assert dpo(ranks, base, f"{loss}_{name}", *own, *overrides, world=world)["status"] == 0
        assert_equal_runs(base, f"{loss}_{name}", loss)


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(ranks: RanksOf, base: Path) -> None:
    """Compares with an uninterrupted run: the reference stays that of the first step, whatever is resumed."""
    own = [f"data.pairs=['{base}/judged.jsonl']", "preference.loss=kto"]
    assert dpo(ranks, base, "whole", "train.steps=4", "eval.at_start=true", *own)["status"] == 0
    assert "eval" in metrics(base / "whole")[0]
    assert dpo(ranks, base, "parts", "train.steps=2", *own)["status"] == 0
    kept = list((base / "parts/reference").iterdir())
    assert len(kept) == 1 and [p.name for p in (base / "whole/reference").iterdir()] == [kept[0].name]
    before = kept[0].stat().st_mtime_ns
    shutil.copytree(base / "parts", base / "lost")
    assert dpo(ranks, base, "parts", "train.steps=4", *own)["status"] == 0
    assert kept[0].stat().st_mtime_ns == before, "it is read, not computed again"
    assert_same_state(base / "whole/checkpoints/step_4", base / "parts/checkpoints/step_4")
    assert logged(base / "whole") == logged(base / "parts")

    damaged = bytearray(kept[0].read_bytes())
    damaged[-1] ^= 1
    (base / "lost/reference" / kept[0].name).write_bytes(damaged)
    refused = dpo(ranks, base, "lost", "train.steps=4", *own)
    assert refused["status"] == 2 and "restore the file" in refused["error"]
    shutil.copy(kept[0], base / "lost/reference")
    assert dpo(ranks, base, "lost", "train.steps=4", *own)["status"] == 0, "the remedy works"
    assert logged(base / "lost") == logged(base / "whole")

    resume = "--resume", str(base / "parts/checkpoints/step_2")
    assert dpo(ranks, base, "branch", "train.steps=4", "checkpoint.keep=9", *own, *resume)["status"] == 0
    assert (base / "branch/reference" / kept[0].name).read_bytes() == kept[0].read_bytes()


@pytest.mark.parametrize(
    ("world", "layout", "adapter"),
    [
        (1, [], ["adapter.kind=p_tuning_v2", "adapter.virtual_tokens=4"]),
        pytest.param(2, ["parallel.tp=2"], ["adapter.rank=4"], marks=pytest.mark.full),
        pytest.param(2, ["parallel.pp=2", "train.micro_batch_size=2"], ["adapter.kind=dora"], marks=pytest.mark.full),
    ],
)
def test_with_adapters_the_reference_is_the_model_without_them(
    ranks: RanksOf, base: Path, tmp_path: Path, world: int, layout: list[str], adapter: list[str]
) -> None:
    """Compares the reference's log-probabilities with those of a run without adapters before its first step."""
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    own = ["optimizer.lr=1e-2", "train.steps=3"]
    assert dpo(ranks, base, str(plain), *layout, "train.steps=1", world=world)["status"] == 0
    assert dpo(ranks, base, str(tuned), *layout, *own, *adapter, world=world)["status"] == 0
    (of_plain,), (of_tuned,) = (list((run / "reference").iterdir()) for run in (plain, tuned))
    assert of_plain.name == of_tuned.name and of_plain.read_bytes() == of_tuned.read_bytes()
    steps = logged(tuned)
    assert steps[2][0] != steps[0][0]
    held = storage.read_manifest(storage.directory(tuned, 3))["parameters"]
    assert held and all(".adapter." in name for name in held)


@pytest.mark.full
@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "orpo", "simpo", "kto"])
def test_held_out_pairs_are_told_apart(ranks: RanksOf, base: Path, loss: str) -> None:
    own = ["train.steps=60", "train.global_batch_size=8", "train.micro_batch_size=8", f"preference.loss={loss}"]
    if loss == "kto":
        own.append(f"data.pairs=['{base}/judged.jsonl']")
    assert dpo(ranks, base, f"learns_{loss}", *own)["status"] == 0
    found = [line["eval"]["preferences"] for line in metrics(base / f"learns_{loss}") if "eval" in line][-1]
    assert found["accuracy"] > 0.9, found
