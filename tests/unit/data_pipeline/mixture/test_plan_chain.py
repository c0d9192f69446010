"""Tests that chains of plans, by stages or after a change in mid-run, use every token exactly once per epoch."""

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import ConfigError, plain, validate
from configs.mixture import MixtureConfig, PlanConfig
from configs.sealed import CHECKPOINT
from data_pipeline.mixture.epochs import Pieces
from data_pipeline.mixture.plan_files import build_plan, build_stages
from data_pipeline.mixture.rows import Plan, open_plans
from data_pipeline.provenance import replan
from data_pipeline.tokens.store import SourceStores
from tests.unit.data_pipeline.mixture.plans import GENERAL, STAGES, mixture

Use = tuple[str, int, int, int]  # shard, document, start, length


def uses(plans: Sequence[tuple[Plan, int]]) -> dict[str, list[list[Use]]]:
    """Returns by source the pieces of its rows in order of training, for the given number of samples of each plan."""
    found: dict[str, list[list[Use]]] = {}
    for plan, samples in plans:
        for i in range(samples):
            row = [(e["shard"], e["document"], e["start"], e["length"]) for e in plan.provenance(i)]
            found.setdefault(plan.sources[plan.row(i).source], []).append(row)
    return found


def assert_epochs_are_whole(tokens: Path, plans: Sequence[tuple[Plan, int]]) -> dict[str, float]:
    """Asserts that at no sample a token was used two times more often than another; returns epochs used by source."""
    epochs = {}
    for source, rows in uses(plans).items():
        shards = SourceStores.in_folder(tokens / "train" / source)
        counts = {
            store.path.name: [np.zeros(length, np.int64) for length in store.lengths.tolist()]
            for store in shards.stores
        }
        total, done = int(shards.lengths.sum()), 0
        for row in rows:
            epoch = done // total  # the epoch of the row's tokens; rows never cross the end of an epoch
            for shard, document, start, length in row:
                part = counts[shard][document][start : start + length]
                assert len(part) == length and (part == epoch).all()
                part += 1
                done += length
        everything = np.concatenate([one for documents in counts.values() for one in documents])
        assert everything.sum() == done and everything.max() - everything.min() <= 1
        epochs[source] = done / total
    return epochs


def test_what_is_left_is_what_was_not_used() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(0, 12, size=8)
        whole = Pieces.whole(lengths)
        owner = [random.integers(0, 3, size=length) for length in lengths]  # the user of each token; 0: none
        parts: dict[int, list[tuple[int, int, int]]] = {0: [], 1: [], 2: []}
        for document, marks in enumerate(owner):
            starts = [i for i in range(len(marks)) if i == 0 or marks[i] != marks[i - 1]]
            for start, end in pairwise([*starts, len(marks)]):
                parts[int(marks[start])].append((document, start, end - start))
        first, second = (Pieces(*np.array(random.permutation(parts[n]), np.int64).reshape(-1, 3).T) for n in (1, 2))
        left = whole.without(first).without(second)
        assert list(zip(left.document, left.start, left.length, strict=True)) == sorted(parts[0])


@pytest.fixture(scope="module")
def staged(tokens: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    out = tmp_path_factory.mktemp("staged")
    build_stages(tokens, tokenizer_folder, out, mixture().plans())
    return open_plans(out)


def test_stages_go_on_where_the_one_before_ended(tokens: Path, staged: dict[str, Plan]) -> None:
    assert list(staged) == list(STAGES)
    epochs = assert_epochs_are_whole(tokens, [(plan, plan.num_samples) for plan in staged.values()])
    assert min(epochs.values()) > 0.3 and max(epochs.values()) > 2  # ends of epochs lie within stages
    assert [plan.seq_length for plan in staged.values()] == [64, 64, 256]
    assert [plan.first_sample for plan in staged.values()] == [0, 900, 2300]
    for plan, sources in zip(staged.values(), ("english chinese code", "code chinese", "english code"), strict=True):
        counts = Counter(plan.sources[plan.row(i).source] for i in range(plan.num_samples))
        assert set(counts) == set(sources.split())
    used = Counter[str]()
    for plan in staged.values():
        for source in plan.description["sources"]:
            name, total = source["name"], int(SourceStores.in_folder(tokens / "train" / source["name"]).lengths.sum())
            assert source["forecast"]["begun"] == pytest.approx(used[name] / total, abs=1e-6)
            used[name] += source["trained_tokens"]
    annealing = staged["annealing"]
    assert Counter(annealing.sources[annealing.row(i).source] for i in range(1400)) == {"code": 1120, "chinese": 280}


def test_epochs_end_where_the_plan_says(tokens: Path, staged: dict[str, Plan]) -> None:
    totals = {name: int(SourceStores.in_folder(tokens / "train" / name).lengths.sum()) for name in GENERAL["weights"]}
    used = Counter[str]()
    seen = 0
    for plan in staged.values():
        ends = {
            (source["name"], end["sample"]): end["epoch"]
            for source in plan.description["sources"]
            for end in source["forecast"]["epoch_ends"]
        }
        for i in range(plan.num_samples):
            for entry in plan.provenance(i):
                used[entry["source"]] += entry["length"]
            source = plan.sources[plan.row(i).source]
            whole = used[source] % totals[source] == 0
            assert whole == ((source, i) in ends)
            if whole:
                assert ends[source, i] == used[source] // totals[source]
                seen += 1
    assert seen >= 3


@pytest.mark.parametrize("seed", range(6))
def test_plans_change_after_any_sample(tokens: Path, tokenizer_folder: Path, tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    chain: list[tuple[Plan, int]] = []
    for number in range(4):
        weights = dict(zip(GENERAL["weights"], random.dirichlet([1, 1, 1]).tolist(), strict=True))
        settings = {
            "seq_length": int(random.choice([32, 64, 200])),
            "samples": 500,
            "max_epochs": 20,
            "packing": str(random.choice(["concat", "best_fit"])),
            "seed": int(random.integers(9)),
            "weights": {name: share for name, share in weights.items() if share > 0.05},
        }
        out = tmp_path / str(number)
        build_plan(tokens, tokenizer_folder, out, PlanConfig(**settings), after=chain[-1] if chain else None)
        chain.append((Plan.open(out), int(random.integers(1, 500))))
    assert_epochs_are_whole(tokens, chain)
    # The same inputs give the same plan, byte for byte.
    again = tmp_path / "again"
    build_plan(tokens, tokenizer_folder, again, PlanConfig(**settings), after=chain[-2])
    assert Plan.open(again).fingerprint == chain[-1][0].fingerprint


def test_caps_count_all_stages(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    build_stages(tokens, tokenizer_folder, tmp_path / "enough", mixture().plans())
    with pytest.raises(
        ValueError, match=r"mixture\.stages\.annealing: too few tokens .*mixture\.stages\.annealing\.max_epochs = 1"
    ) as error:
        build_stages(tokens, tokenizer_folder, tmp_path / "few", mixture(max_epochs=1).plans())
    cap = int(str(error.value).split("raise mixture.stages.annealing.max_epochs to ")[1].split(",")[0])
    stages = dict(list(mixture(max_epochs=cap).plans().items())[:2])
    build_stages(tokens, tokenizer_folder, tmp_path / "just", stages)
    with pytest.raises(ValueError, match="annealing: too few tokens"):
        stages = {name: stage.model_copy(update={"max_epochs": cap - 1}) for name, stage in stages.items()}
        build_stages(tokens, tokenizer_folder, tmp_path / "less", stages)


def test_what_was_taken_down_stays_out(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path, staged: dict[str, Plan]
) -> None:
    gone = staged["general"].provenance(0)[0]
    without = {f"train/{gone['source']}": [(gone["shard"], gone["document"])]}
    stages = mixture().plans()
    general = stages.pop("general")
    build_plan(tokens, tokenizer_folder, tmp_path / "general", general, without=without)
    first = Plan.open(tmp_path / "general")
    build_stages(tokens, tokenizer_folder, tmp_path, stages, after=(first, 700))
    for name in STAGES:
        plan = Plan.open(tmp_path / name)
        assert plan.uses(gone["source"], gone["shard"], gone["document"]) == []
    # A document removed in mid-run was used before the removal, and is not used after it.
    build_plan(tokens, tokenizer_folder, tmp_path / "later", general, without=without, after=(staged["general"], 500))
    assert Plan.open(tmp_path / "later").uses(gone["source"], gone["shard"], gone["document"]) == []


def test_an_epoch_of_which_only_what_was_taken_down_is_left_is_over(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = PlanConfig(seq_length=64, samples=2000, seed=3, weights={"code": 1.0}, max_epochs=4)
    build_plan(tokens, tokenizer_folder, tmp_path / "a", settings)
    first = Plan.open(tmp_path / "a")
    used = first.description["sources"][0]["forecast"]["epoch_ends"][0]["sample"]  # all of the epoch but its last row
    gone = {(entry["shard"], entry["document"]) for entry in first.provenance(used)}
    without = {"train/code": sorted(gone)}
    build_plan(tokens, tokenizer_folder, tmp_path / "b", settings, without=without, after=(first, used))
    second = Plan.open(tmp_path / "b")
    total = int(SourceStores.in_folder(tokens / "train" / "code").lengths.sum()) - sum(
        int(store.lengths[document])
        for store in SourceStores.in_folder(tokens / "train" / "code").stores
        for shard, document in gone
        if shard == store.path.name
    )
    (told,) = second.description["sources"]
    assert told["forecast"]["begun"] == 1
    ended = told["forecast"]["epoch_ends"][0]
    assert ended["epoch"] == 2
    assert sum(entry["length"] for i in range(ended["sample"] + 1) for entry in second.provenance(i)) == total
    assert second.cursors(ended["sample"] + 1)["code"].epoch == 2
    short = settings.model_copy(update={"samples": 100})
    build_plan(tokens, tokenizer_folder, tmp_path / "c", short, after=(second, ended["sample"] + 1))
    assert Plan.open(tmp_path / "c").description["sources"][0]["forecast"]["begun"] == 2


def test_a_source_that_has_changed_is_refused(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = PlanConfig(seq_length=64, samples=50, seed=1, weights={"code": 1.0})
    build_plan(tokens, tokenizer_folder, tmp_path / "a", settings)
    for split in ("train", "heldout"):
        (tmp_path / "tokens" / split / "code").mkdir(parents=True)
        for path in (tokens / split / "code").glob("00000.*"):
            (tmp_path / "tokens" / split / "code" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="source code has other token stores"):
        build_plan(
            tmp_path / "tokens", tokenizer_folder, tmp_path / "b", settings, after=(Plan.open(tmp_path / "a"), 20)
        )
    with pytest.raises(ValueError, match="51 samples cannot be used of plan"):
        Plan.open(tmp_path / "a").cursors(51)


def test_stages_take_over_what_they_leave_out() -> None:
    stages = mixture(
        epochs={"english": 2},
        stages={**STAGES, "even": {"unimax": True, "samples": 10}, "code": {"weights": {"code": 1}}},
    ).plans()
    assert stages["annealing"].seed == 3 and stages["annealing"].packing == "concat"
    assert stages["even"].unimax and stages["even"].weights is None and stages["even"].epochs == {"english": 2}
    assert stages["code"].epochs == {}
    assert list(mixture(stages={}).plans()) == [""]
    # The config survives being written in full, as config.toml is, and read again.
    for whole in (mixture(), mixture(weights=None, temperature=2.0, stages={"a": {}, "b": {"weights": {"code": 1}}})):
        assert validate(MixtureConfig, plain(whole)) == whole
    for changes, message in (
        ({"stages": {"a-b": {}}}, "stage name 'a-b'"),
        ({"stages": {"late": {"weights": {"code": 0}}}}, r"mixture\.stages\.late\.weights\.code = 0"),
        ({"stages": {"late": {"unimax": True, "temperature": 1.0}}}, r"mixture\.stages\.late takes exactly one"),
        ({"stages": {"late": {"lenght": 2}}}, r"stages\.late\.lenght"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixture(**changes)


def test_the_rest_of_a_run() -> None:
    stages = mixture().plans()
    assert {name: stage.samples for name, stage in replan.rest(stages, 0).items()} == {
        "general": 900,
        "annealing": 1400,
        "long_context": 450,
    }
    assert {name: s.samples for name, s in replan.rest(stages, 1000).items()} == {
        "annealing": 1300,
        "long_context": 450,
    }
    assert {name: s.samples for name, s in replan.rest(stages, 2300).items()} == {"long_context": 450}
    with pytest.raises(ConfigError, match=r"used 2,750 samples.* has 2,750 in all"):
        replan.rest(stages, 2750)


def test_a_checkpoint_must_be_of_the_plan(staged: dict[str, Plan], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*manifest\.json"):
        replan.used(tmp_path)
    plan = staged["annealing"]
    manifest: dict[str, Any] = {"samples": 1000, "identity": {"data": plan.fingerprint}, "config": {}}
    (tmp_path / "manifest.json").write_bytes(CHECKPOINT.write(manifest))
    with pytest.raises(ConfigError, match="was not trained on a plan"):
        replan.used(tmp_path)
    found, samples = replan.used(tmp_path, plan.path)
    assert (found.fingerprint, samples) == (plan.fingerprint, 100)
    manifest["config"] = {"data": {"plan": str(staged["general"].path)}}  # the right plan is beside it
    (tmp_path / "manifest.json").write_bytes(CHECKPOINT.write(manifest))
    assert replan.used(tmp_path)[0].path == plan.path
    manifest["identity"]["data"] = "0" * 64
    (tmp_path / "manifest.json").write_bytes(CHECKPOINT.write(manifest))
    with pytest.raises(ConfigError, match=r"neither .* nor a plan kept beside it is the one that it was trained on"):
        replan.used(tmp_path)


def test_a_checkpoint_is_found_as_the_message_says(staged: dict[str, Plan], tmp_path: Path) -> None:
    plan, run = staged["annealing"], tmp_path / "run"
    manifest: dict[str, Any] = {
        "samples": 1000,
        "identity": {"data": plan.fingerprint},
        "config": {"data": {"plan": str(plan.path)}},
    }
    for step in (1, 2):
        (run / f"checkpoints/step_{step}").mkdir(parents=True)
        (run / f"checkpoints/step_{step}/manifest.json").write_bytes(CHECKPOINT.write(manifest))
    with pytest.raises(ConfigError, match=r"; name a checkpoint, such as \S+/checkpoints/step_\d+$") as told:
        replan.used(run)
    named = Path(str(told.value).split("such as ")[1])
    assert replan.used(named)[1] == 100
    (named / "manifest.json").write_bytes(CHECKPOINT.write(manifest)[:-9])
    with pytest.raises(ConfigError, match=r"name an earlier checkpoint$"):
        replan.used(named)
    assert replan.used(named.with_name("step_1"))[1] == 100
    lost = manifest | {"config": {"data": {"plan": str(tmp_path / "moved")}}}
    (named / "manifest.json").write_bytes(CHECKPOINT.write(lost))
    with pytest.raises(ConfigError, match=r"name that by --plan$"):
        replan.used(named)
    assert replan.used(named, plan.path)[1] == 100
    shutil.copytree(plan.path, tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        if file.name != "plan.json":
            file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"or say where its plan is by --plan$"):
        replan.used(named)
    assert replan.used(named, plan.path)[1] == 100
