"""A run keeps the checkpoint it started from and its model's tokenizer, and is never used with others."""

import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from configs.files import file_sha256
from configs.loader import ConfigError
from configs.mixture import PlanConfig
from configs.sealed import CHECKPOINT, PLAN
from configs.tokenizer import TokenizerConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from export import chat, generate, huggingface, import_hf
from export.model_source import open_source
from posttrain.chat.chat_format import ChatFormat, jinja_template
from pretrain import inspection
from pretrain.checkpoint import storage
from tests.e2e.small_lineage import LONGER, SEQ_LENGTH, SHORTER, pretraining, rewarding, tuning
from tests.parallel.harness import RanksOf
from tests.shards import write_shard
from tests.small_data import VOCAB, make_tokens

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def call(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Runner of a training command on one rank, which returns its status, output and error."""
    folder = tmp_path_factory.mktemp("configs")

    def call(module: str, config: dict[str, Any], *overrides: str) -> dict[str, Any]:
        path = folder / "config.toml"
        path.write_text(tomli_w.dumps(config))
        argv = [str(path), *overrides]
        arguments: dict[str, Any] = {"process_group": False, "module": module, "argv": argv}
        (answer,) = ranks(1).run("tests.parallel.workers.posttraining:command", **arguments)
        return dict(answer)

    return call


@pytest.fixture(scope="module")
def trained(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, a pretraining run of four steps on it, and another tokenizer of the same size."""
    base = tmp_path_factory.mktemp("lineage")
    tokens, tokenizer = make_tokens(base / "data")
    weights = {"code": 1.0, "prose": 1.0}
    plan = PlanConfig(seq_length=SEQ_LENGTH, samples=40, seed=1, weights=weights, max_epochs=8)
    build_plan(tokens, tokenizer, base / "data/plan", plan)
    other = [{"text": Path(os.__file__).read_text(encoding="utf-8")[:30_000], "id": "0", "metadata": {}}]
    train([write_shard(base / "other.jsonl.zst", other)], base / "other", TokenizerConfig(vocab_size=VOCAB))
    assert call("pretrain.train", pretraining(base))["status"] == 0
    return base


@pytest.fixture(scope="module")
def tuned(call: Call, trained: Path) -> Path:
    """Folder of `trained`, with an SFT run of two steps that starts from the pretraining run."""
    assert call("posttrain.sft", tuning(trained, trained / "sft"))["status"] == 0
    return trained


@pytest.fixture
def copied(tuned: Path, tmp_path: Path) -> Iterator[Path]:
    """Copy of the folder `tuned`, which itself is renamed, so that the absolute paths in the runs lead nowhere."""
    hidden = tuned.with_name(tuned.name + ".hidden")
    shutil.copytree(tuned, tmp_path / "moved")
    tuned.rename(hidden)
    yield tmp_path / "moved"
    hidden.rename(tuned)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the terminal wide, so that no sentence that a test looks for is wrapped."""
    monkeypatch.setenv("COLUMNS", "240")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def export(run: Path, out: Path, *overrides: str) -> int:
    config = out.with_suffix(".toml")
    config.write_text(tomli_w.dumps({"run": str(run), "out": str(out), "sample_tokens": 4, "prompts": ["a"],
                                     "chat_prompts": ["b"], "verify": {"greedy_tokens": 8}}))  # fmt: skip
    return huggingface.main([str(config), *overrides])


def claims(out: Path) -> tuple[int, int]:
    names = ("config.json", "tokenizer_config.json")
    config, tokenizer = (json.loads((out / name).read_text()) for name in names)
    return config["max_position_embeddings"], tokenizer["model_max_length"]


def test_another_tokenizer_of_the_same_size_is_refused(call: Call, tuned: Path, tmp_path: Path) -> None:
    other, right = str(tuned / "other"), str(tuned / "data/tokenizer")
    assert Tokenizer.load(other).vocab_size == Tokenizer.load(right).vocab_size
    sft = tuning(tuned, tmp_path / "new/sft", run=str(tuned / "pretrain"), tokenizer=other)
    grpo = rewarding(tuned / "sft", tmp_path / "new/grpo", tokenizer=other)
    for module, config in (("posttrain.sft", sft), ("posttrain.grpo", grpo)):
        answer = call(module, config)
        assert answer["status"] == 2 and "is not the tokenizer that" in answer["error"], answer
        assert "leave the key out" in answer["error"]
        assert not (tmp_path / "new").exists()
        assert call(module, config, "--dry-run", "init.tokenizer=")["status"] == 0
        assert call(module, config, "--dry-run", f"init.tokenizer={right}")["status"] == 0


def test_no_command_reads_a_run_with_another_tokenizer(
    call: Call, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned / "sft", run)
    shutil.copy(tuned / "other/tokenizer.model", run)
    words = r"tokenizer\.model is not the one that the model was trained with"
    for command in (generate.main, chat.main):
        with pytest.raises(ConfigError, match=words):
            command([str(run), *(["--prompt", "a"] if command is generate.main else [])])
    assert export(run, tmp_path / "hf") == 1
    assert "is not the one that the model was trained with" in capsys.readouterr().out.replace("\n", " ")
    answer = call("posttrain.grpo", rewarding(run, tmp_path / "grpo"))
    assert answer["status"] == 2 and "is not the one that the model was trained with" in answer["error"]
    shutil.copy(tuned / "data/tokenizer/tokenizer.model", run)
    assert generate.main([str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    (run / "chat_template.jinja").write_text(jinja_template() + " ")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not the one .*; restore the original"):
        chat.main([str(run)])
    shutil.copy(tuned / "sft/chat_template.jinja", run)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main([str(run)]) == 0


def test_a_held_out_plan_and_an_import_with_another_tokenizer_are_refused(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tuned / "data", tmp_path / "data")
    shutil.copytree(tuned / "other", tmp_path / "data/tokenizer", dirs_exist_ok=True)
    file = tmp_path / "data/plan/plan.json"
    plan = PLAN.read(file.read_bytes(), file)
    plan["tokenizer"]["sha256"] = Tokenizer.load(tuned / "other").sha256
    file.write_bytes(PLAN.write(plan))  # undamaged, but of tokens of the other tokenizer
    assert export(tuned / "pretrain", tmp_path / "hf", f"plan={tmp_path / 'data/plan'}") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "made with another tokenizer than the model's" in said and "name the model's own plan" in said
    assert export(tuned / "pretrain", tmp_path / "hf", f"plan={tuned / 'data/plan'}") == 0
    shutil.copy(tuned / "other/tokenizer.model", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"is not the one that .*hf was exported with"):
        import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")])
    (tmp_path / "hf/trivium_export.json").unlink()
    with pytest.raises(ConfigError, match=r"have different vocabularies .* another model's; put the right one there"):
        import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")])
    shutil.copy(tuned / "data/tokenizer/tokenizer.model", tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    shutil.copy(tuned / "other/tokenizer.model", tmp_path / "back")
    with pytest.raises(ConfigError, match=r"is not the one that the model was trained with"):
        generate.main([str(tmp_path / "back"), "--prompt", "a"])


def test_training_does_not_go_on_with_another_tokenizer(call: Call, trained: Path, tmp_path: Path) -> None:
    """Resumes a run whose checkpoint names another tokenizer than the plan's."""
    run = tmp_path / "run"
    shutil.copytree(trained / "pretrain", run)
    manifest = run / "checkpoints/step_4/manifest.json"
    found = storage.read_manifest(manifest.parent)
    found["identity"]["tokenizer"] = "0" * 64
    manifest.write_bytes(CHECKPOINT.write(found))
    answer = call("pretrain.train", pretraining(trained), f"run.dir={run}", "train.steps=6")
    assert answer["status"] == 2 and "tokenizer" in answer["error"]


def test_a_refused_start_writes_nothing(call: Call, tuned: Path, tmp_path: Path) -> None:
    """Compares the folder before and after a refused start, which makes and changes no file."""
    base = tmp_path / "pretrain"
    shutil.copytree(tuned / "pretrain", base)
    before = contents(base)
    new = tmp_path / "deep/new"
    refused: list[tuple[str, dict[str, Any], Sequence[str]]] = [
        ("posttrain.sft", tuning(tuned, base), []),  # the folder has a run of another kind
        ("posttrain.grpo", rewarding(tuned / "sft", base), []),
        ("posttrain.sft", tuning(tuned, new, run="nowhere"), []),
        ("posttrain.sft", tuning(tuned, new), ["train.seq_length=8"]),
        ("posttrain.sft", tuning(tuned, new), ["--resume", "nowhere"]),
        ("pretrain.train", pretraining(tuned), [f"run.dir={new}", "--resume", "nowhere"]),
        ("pretrain.train", pretraining(tuned), [f"run.dir={base}", "run.seed=2", "train.steps=6"]),
    ]
    for module, config, overrides in refused:
        answer = call(module, config, *overrides)
        assert answer["status"] == 2, (module, overrides, answer)
        assert not new.parent.exists() and contents(base) == before, (module, overrides)
    assert open_source(base).chat_template is None
    shutil.copytree(tuned / "sft", tmp_path / "held")
    before = contents(tmp_path / "held")
    with open(tmp_path / "held/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = call("posttrain.sft", tuning(tuned, tmp_path / "held"), "train.steps=4")
    assert answer["status"] == 2 and "another process is training" in answer["error"]
    assert contents(tmp_path / "held") == before
    held = tmp_path / "held only"
    held.mkdir()
    with open(held / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call("posttrain.sft", tuning(tuned, held))["status"] == 2
    assert list(contents(held)) == [".lock"]


def test_a_stray_template_makes_no_chat_model(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "pretrain", tmp_path / "run")
    (tmp_path / "run/chat_template.jinja").write_text(jinja_template())
    source = open_source(tmp_path / "run")
    assert source.chat_template is None and source.codec().stop_ids == [2]


def test_a_run_keeps_to_the_checkpoint_it_began_from(call: Call, trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trained, base)
    straight, stopped = (tuning(base, base / name) for name in ("straight", "stopped"))
    assert call("posttrain.sft", straight, "train.steps=6")["status"] == 0
    assert call("posttrain.sft", stopped, "train.steps=2")["status"] == 0
    assert call("pretrain.train", pretraining(base), "train.steps=6")["status"] == 0
    answer = call("posttrain.sft", stopped, "train.steps=4")
    assert answer["status"] == 0, answer
    assert re.search(r"began from .*step_4 and keeps it; the newer .*step_6 is ignored", answer["said"])
    shutil.rmtree(base / "pretrain")  # the SFT run has all it needs itself
    shutil.rmtree(base / "data")
    assert call("posttrain.sft", stopped, "train.steps=6")["status"] == 0
    assert losses(base / "stopped") == losses(base / "straight") and len(losses(base / "straight")) == 6
    answer = call("posttrain.sft", tuning(base, base / "stopped", run=str(base / "straight")), "train.steps=8")
    assert answer["status"] == 2 and "straight' does not hold; name the run that does" in answer["error"]


def test_init_names_a_run_or_a_checkpoint(call: Call, trained: Path, tmp_path: Path) -> None:
    run, two = trained / "pretrain", trained / "pretrain/checkpoints/step_2"
    from_two = tuning(trained, tmp_path / "two", checkpoint=str(two))
    assert call("posttrain.sft", from_two)["status"] == 0
    manifest = storage.read_manifest(tmp_path / "two/checkpoints/step_2")
    assert (manifest["init"]["step"], manifest["init"]["checkpoint"]) == (2, str(two))
    other = f"init.checkpoint={run / 'checkpoints/step_4'}"
    cases: list[tuple[list[str], str]] = [
        ([f"init.run={run}"], r"name the model to start from; leave only one of them"),
        (["init.checkpoint="], r"none of init.run, init.checkpoint and init.hf names the model"),
        ([f"init.run={two}", "init.checkpoint="], "is a checkpoint, not a run; set init.checkpoint="),
        ([f"init.checkpoint={run}"], "is a run, not a checkpoint; set init.checkpoint="),
        ([f"init.checkpoint={run}/checkpoints/step_9"], "does not exist; checkpoints of .* are step_2, step_4: set"),
        (
            [f"run.dir={tmp_path / 'two'}", other, "train.steps=4"],
            "two began from .*, and init.checkpoint = .* is another; name the first",
        ),
    ]
    for overrides, words in cases:
        answer = call("posttrain.sft", from_two, f"run.dir={tmp_path / 'new'}", *overrides)
        assert answer["status"] == 2, overrides
        assert re.search(words, answer["error"]), answer["error"]
    for remedy in ([f"init.run={run}", "init.checkpoint="], [f"init.checkpoint={two}", "init.run="], [other]):
        assert call("posttrain.sft", from_two, "--dry-run", f"run.dir={tmp_path / 'new'}", *remedy)["status"] == 0


def test_the_context_is_the_models_and_only_grows_with_longer_texts(call: Call, tuned: Path, tmp_path: Path) -> None:
    chat = ChatFormat(Tokenizer.load(tuned / "data/tokenizer"))
    found = [{"role": "user", "content": "9" * 46}, {"role": "assistant", "content": "x"}]
    longest = len(chat.render(found)[0])  # more than SEQ_LENGTH
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": found}))
    grown = tuning(tuned, tmp_path / "grown") | {"data": {"dialogues": [str(tmp_path / "long.jsonl")]}}
    assert call("posttrain.sft", grown)["status"] == 0
    rows = f"train.seq_length={4 * LONGER}"
    assert call("posttrain.grpo", rewarding(tmp_path / "grown", tmp_path / "grpo"), rows)["status"] == 0
    assert call("posttrain.sft", tuning(tuned, tmp_path / "short"), f"train.seq_length={SHORTER}")["status"] == 0
    assert {open_source(run).context for run in (tuned / "pretrain", tuned / "sft", tmp_path / "short")} == {SEQ_LENGTH}
    assert open_source(tmp_path / "grown").context == open_source(tmp_path / "grpo").context == longest
    assert export(tmp_path / "grpo", tmp_path / "hf") == 0
    assert claims(tmp_path / "hf") == (longest, longest)
    import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")])
    assert export(tmp_path / "back", tmp_path / "again") == 0
    assert claims(tmp_path / "again") == (longest, longest)
    with pytest.raises(ConfigError, match=rf"would go past the {longest} tokens") as refused:
        export(tmp_path / "grpo", tmp_path / "hf", f"verify.greedy_tokens={LONGER}", "sample_tokens=60")
    remedy = str(refused.value).partition("; set ")[2].partition(", or")[0].split()
    assert [word.partition("=")[0] for word in remedy] == ["verify.greedy_tokens", "sample_tokens"]
    assert export(tmp_path / "grpo", tmp_path / "hf", *remedy) == 0


def test_an_export_is_known_by_content(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def exported_anew(run: Path, *overrides: str) -> bool:
        capsys.readouterr()
        assert export(run, tmp_path / "hf", *overrides) == 0
        return "up to date" not in capsys.readouterr().out

    assert export(tuned / "pretrain", tmp_path / "first") == 0
    import_hf.main([str(tmp_path / "first"), str(tmp_path / "model")])
    assert exported_anew(tmp_path / "model") and not exported_anew(tmp_path / "model")
    weights = tmp_path / "model/checkpoints/step_0/weights_00001.safetensors"
    content, times = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    os.utime(weights, ns=times)  # with the same name, size and time
    for named in ([], ["step=0"]):
        assert export(tmp_path / "model", tmp_path / "hf", *named) == 1
        assert "does not match its SHA-256" in capsys.readouterr().out.replace("\n", " ")
    weights.write_bytes(content)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert not exported_anew(tmp_path / "elsewhere")
    for override in ('prompts=["other"]', "sample_tokens=5", f"plan={tuned / 'data/plan'}", "verify.rows=1"):
        assert exported_anew(tmp_path / "elsewhere", override), override
        assert not exported_anew(tmp_path / "elsewhere", override), override


def test_tuning_starts_from_an_export_and_its_import_as_from_the_run_itself(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    assert export(trained / "pretrain", tmp_path / "hf") == 0
    import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")])
    found = []
    for key, start in (("run", trained / "pretrain"), ("hf", tmp_path / "hf"), ("run", tmp_path / "back")):
        out = tmp_path / f"sft_{start.name}"
        assert call("posttrain.sft", tuning(trained, out, **{key: str(start)}))["status"] == 0
        found.append(losses(out))
    assert found == [found[0]] * 3 and len(found[0]) == 2
    assert call("posttrain.grpo", rewarding(tmp_path / "sft_hf", tmp_path / "grpo"))["status"] == 0


def test_a_moved_run_is_used_from_anywhere(
    call: Call, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    for run in (copied / "pretrain", copied / "sft"):
        assert generate.main([str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0
        assert export(run, tmp_path / "hf") == 0
        assert "held-out passages" in capsys.readouterr().out  # the plan was moved together with the run
    shutil.rmtree(copied / "data")
    shutil.rmtree(copied / "pretrain")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main([str(copied / "sft")]) == 0
    assert export(copied / "sft", tmp_path / "hf") == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "is gone or has changed" in printed and "not on held-out text" in printed
    assert claims(tmp_path / "hf") == (SEQ_LENGTH, SEQ_LENGTH)
    answer = call("posttrain.sft", tuning(copied, copied / "sft"), "train.steps=4")
    assert answer["status"] == 0 and "going on from" in answer["said"], answer


def test_a_changed_plan_is_not_taken_for_that_of_training(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "pretrain"):
        shutil.copytree(tuned / name, tmp_path / name)
    manifest = tmp_path / "pretrain/checkpoints/step_4/manifest.json"
    found = storage.read_manifest(manifest.parent)
    found["plan"]["path"] = str(tmp_path / "data/plan")
    manifest.write_bytes(CHECKPOINT.write(found))
    plan = tmp_path / "data/plan/plan.json"
    assert open_source(tmp_path / "pretrain").plan == tmp_path / "data/plan"
    plan.write_text(plan.read_text() + "\n")
    source = open_source(tmp_path / "pretrain")
    assert source.plan is None and source.lost_plan == str(tmp_path / "data/plan")
    (tmp_path / "pretrain/tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model, with which the model was trained, is missing") as refused:
        generate.main([str(tmp_path / "pretrain"), "--prompt", "a"])
    begins = re.findall(r"restore it \(its SHA-256 begins with (\w+)\)", str(refused.value))[0]
    files = {file_sha256(file): file for file in tuned.rglob("tokenizer.model")}
    (right,) = (file for digest, file in files.items() if digest.startswith(begins))
    shutil.copy(right, tmp_path / "pretrain")
    assert generate.main([str(tmp_path / "pretrain"), "--prompt", "a", "--max-new-tokens", "2"]) == 0


def test_a_run_of_another_version_is_told(call: Call, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "old"
    shutil.copytree(trained / "pretrain", run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        found = storage.read_manifest(manifest.parent)
        manifest.write_text(json.dumps(found | {"version": 1}))
    words = "another version of Trivium wrote it"
    for main, options in ((generate.main, ["--prompt", "a"]), (chat.main, []), (inspection.main, [])):
        with pytest.raises(ConfigError, match=words):
            main([str(run), *options])
    with pytest.raises(ConfigError, match=words):
        export(run, tmp_path / "hf")
    for module, config in (
        ("pretrain.train", pretraining(trained) | {"run": {"dir": str(run), "seed": 1}}),
        ("posttrain.sft", tuning(trained, tmp_path / "sft", run=str(run))),
    ):
        answer = call(module, config, "train.steps=6")
        assert answer["status"] == 2 and words in answer["error"], answer
