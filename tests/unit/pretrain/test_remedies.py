"""Remedies in what training says as it goes on: each fault is made, the words are read, and what they say is done."""

import errno
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.loader import ConfigError, validate
from configs.sealed import CHECKPOINT
from configs.train import EvalConfig
from pretrain.checkpoint import resume, storage
from pretrain.checkpoint.fetching import Fetcher
from pretrain.checkpoint.lineage import Lineage, tokenizer_difference
from pretrain.checkpoint.mirror import MirrorError
from pretrain.data.batch_source import PlanSource
from pretrain.evaluation import text_samples
from pretrain.evaluation.text_samples import TextSamples
from pretrain.generation.text_codec import TextCodec
from pretrain.logs.metrics import MetricsLog
from pretrain.model import build_single
from pretrain.parallel.split_decoder import SplitDecoder
from pretrain.proof import compare
from pretrain.replay import _agreement
from pretrain.run import rewinding
from pretrain.run.agreement import Agreement
from pretrain.run.pretraining_config import with_initial_model
from pretrain.run.step_log import spike
from pretrain.watchdog.watchdog import _state
from tests.foreign_tokenizers import gpt2, write
from tests.tiny_models import wide_decoder
from tests.training_configs import BASES


def write_checkpoint(run: Path, step: int, **facts: Any) -> Path:
    folder = storage.directory(run, step)
    folder.mkdir(parents=True)
    (folder / storage.MANIFEST).write_bytes(CHECKPOINT.write({"step": step, "files": {}, **facts}))
    return folder


def test_a_run_without_a_checkpoint_to_go_back_to_goes_back_once_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes a checkpoint where there was none; tests/parallel/test_rewinds.py tests what is computed from there."""
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path, local=None),
        first_not_finite=lambda batches: "; loss is nan",
        activities=SimpleNamespace(begin=lambda name, step: None),
        rewinds=SimpleNamespace(refusal=lambda bad: None),
        mesh=None,
        step=4,
    )
    bad: Any = SimpleNamespace(step=4, record={"loss_spike": 9, "loss": 7.0}, is_finite=True, batches=())
    saver: Any = SimpleNamespace(wait=lambda: None)
    chosen: list[Path | None] = [None]
    monkeypatch.setattr(resume, "choose", lambda *given, **more: chosen[0])
    words = (
        f"{tmp_path} has no checkpoint of a step before it to go back to; free disk space if it is full, or lower "
        "optimizer.lr"
    )
    with pytest.raises(FloatingPointError, match=words):
        rewinding.go_back(trainer, bad, SimpleNamespace(), saver)  # type: ignore[arg-type]
    chosen[0] = write_checkpoint(tmp_path, 2)

    class Restored(Exception):
        pass

    def restore(engine: Any, path: Path) -> None:
        raise Restored(path)

    trainer.engine = None
    monkeypatch.setattr(rewinding.state, "restore", restore)
    with pytest.raises(Restored, match="step_2"):
        rewinding.go_back(trainer, bad, SimpleNamespace(), saver)  # type: ignore[arg-type]
    assert spike({**bad.record, "skipped": 1}) == "loss 7, 9 deviations above the median; it changed no weight"


def test_a_log_without_room_is_written_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{broken\n{"step": 3}\n')
    log, wrote = MetricsLog(tmp_path, 1, tensorboard=False), os.write
    aside = f"left out: they are moved to {tmp_path / 'metrics.broken'}"
    assert aside in capsys.readouterr().out and (tmp_path / "metrics.broken").read_text() == "{broken\n"

    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    log._board = SimpleNamespace(add_scalar=full, close=lambda: None)
    for step in (2, 3):
        log.write({"step": step, "loss": 1.0})
    said = capsys.readouterr().out.splitlines()
    no_room = "cannot be written (No space left on device); its lines wait in memory until there is room"
    assert said == [
        f"warning: {tmp_path / 'metrics.jsonl'} {no_room}",
        "warning: TensorBoard files are no longer written in this run (No space left on device)",
    ]
    monkeypatch.setattr(os, "write", wrote)
    log.write({"step": 4, "loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not capsys.readouterr().out


def test_samples_of_text_without_room_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = TextCodec(write(tmp_path, *gpt2()) / "tokenizer.json")
    config = validate(EvalConfig, {"prompts": ["It"], "prompt_tokens": 1})
    samples, decoder = TextSamples(config, codec, 20, tmp_path, lambda: 3), wide_decoder(64)
    mesh = SimpleNamespace(is_main=True, device=torch.device("cpu"), gather_json=lambda value: [value])
    engine: Any = SimpleNamespace(mesh=mesh, module=decoder, model_config=None, separate_adapter=None)
    monkeypatch.setattr(text_samples, "gather_weights", lambda engine: {})
    monkeypatch.setattr(text_samples, "build_single", lambda *given: decoder)
    monkeypatch.setattr(text_samples, "generate", lambda *given, **more: [SimpleNamespace(tokens=[5])])
    (tmp_path / "samples.jsonl").mkdir()
    samples(engine)
    assert capsys.readouterr().out == f"warning: {tmp_path / 'samples.jsonl'} cannot be written (Is a directory)\n"
    (tmp_path / "samples.jsonl").rmdir()
    samples(engine)
    assert not capsys.readouterr().out and json.loads((tmp_path / "samples.jsonl").read_text())["step"] == 3


def test_a_run_goes_on_from_its_own_checkpoint_without_its_mirror(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetcher, own = Fetcher.__new__(Fetcher), write_checkpoint(tmp_path, 2)
    fetcher._mirror = SimpleNamespace(address="s3://bucket/run")  # type: ignore[assignment]

    def gone(own: Path | None) -> None:
        raise MirrorError("no route to host")

    fetcher._fetch_newer = gone  # type: ignore[method-assign]
    assert fetcher.fetch_newer(own) is None
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and said.endswith(
        f"; going on from {own}, the newest in the run's own folder\n"
    )


def test_tokenizers_that_differ_in_their_files_alone_are_told(tmp_path: Path) -> None:
    file = write(tmp_path / "new", *gpt2()) / "tokenizer.json"
    began = Lineage(file)
    own = write_checkpoint(tmp_path / "run", 1, identity=began.identity)
    began.keep(tmp_path / "run", began.identity)
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    said = tokenizer_difference(Lineage(file), own, storage.read_manifest(own))
    assert said == f"{file} against {tmp_path / 'run/tokenizer.json'}: they give the same ids, and the files differ"


def test_data_that_were_no_plan_are_told() -> None:
    assert PlanSource.difference(SimpleNamespace(), {"rows": 3}) == "they are no data plan"  # type: ignore[arg-type]


def test_weights_are_taken_by_the_model_that_was_saved_with_them() -> None:
    model = wide_decoder(64)
    weights = {name: tensor.detach() for name, tensor in model.named_global_parameters()}
    other = model.model_config.model_copy(update={"tie_embeddings": True})
    words = (
        r"the weights are of another model: missing none, unknown \['lm_head.weight'\]; build it from the config that"
    )
    with pytest.raises(ValueError, match=words):
        build_single(other, weights)
    build_single(model.model_config, weights)
    layout = SimpleNamespace(pp=1, cp=1, sp=False, tp=1)
    groups = {"device": torch.device("cpu"), "tp_group": None, "ep_group": None}
    mesh: Any = SimpleNamespace(layout=layout, slices=None, **groups)
    words = r"the weights are of another model: \['lm_head.weight'\] are in one of the two only"
    with pytest.raises(ValueError, match=words):
        SplitDecoder(other, weights, mesh, torch.float32)


def test_a_pretraining_config_is_taken_as_the_message_says() -> None:
    tree = {"init": {"run": "x"}, "data": {"dialogues": ["a"]}}
    with pytest.raises(ConfigError, match=r"sft\.toml has \[data\] without a plan: it is no pretraining config, and"):
        with_initial_model(tree, "sft.toml", "trivium prove")
    assert with_initial_model(BASES["pretrain"], "pretrain.toml", "trivium prove") == BASES["pretrain"]


def test_a_proof_tells_what_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"precision": "fp32", "loss": 1.0, "heldout": 1.0, "grad_norm": 1.0, "optimizer_steps": 2}
    facts |= {"gathered_norms": [1.0], "norms": [[1.0], [1.0]], "differing_copies": []}
    found = {name: SimpleNamespace(facts=dict(facts), keys=set()) for name in ("one", compare.COMPANION, "other")}
    monkeypatch.setattr(compare, "RecordedStep", lambda folder: found[folder.name])
    config: Any = SimpleNamespace(model=SimpleNamespace(num_layers=1))
    bounds = SimpleNamespace(loss=lambda: 1e-3, gradient=lambda depth: 1e-3)
    monkeypatch.setattr(compare, "Bounds", SimpleNamespace(of=lambda config, precision: bounds))

    def failures() -> str:
        return str(compare.compare(Path("one"), Path("other"), "tp2", 2, config, 1.0).__dict__)

    told = ("the optimizer has taken 3 steps, and on one rank 2", "after 1 steps ranks differ in 1 tensors: ['a']")
    assert not any(words in failures() for words in told)
    found["other"].facts |= {"optimizer_steps": 3, "differing_copies": ["a"]}
    assert all(json.dumps(words)[1:-1] in failures().replace("\\'", "'") for words in told)


def test_numbers_of_another_layout_may_be_rounded_otherwise() -> None:
    record: dict[str, Any] = {
        "recorded": {"loss": 1.0},
        "metrics": {"loss": 1.5},
        "layout": "tp2",
        "recorded_layout": "tp1",
    }
    assert _agreement(record) == "not the layout of the run, tp1, so rounding may differ: loss 1.5, not 1.0"
    assert _agreement(record | {"layout": "tp1"}).startswith("NOT equal to the run's metrics.jsonl: loss 1.5")


def test_a_run_that_ends_waits_for_the_check_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    agreement, check = Agreement(), SimpleNamespace(running=True, wait=lambda: None)
    agreement.unchecked_from = 5
    monkeypatch.setattr(agreement, "signal", lambda step, check, watch: 0)
    assert agreement.wait_for_check(5, check, None, said.append) == 0  # type: ignore[arg-type]
    assert said == ["waiting until the training data is checked against its checksums"]


@pytest.mark.parametrize(
    ("host", "process", "words"),
    [
        (lambda: "elsewhere", lambda: 1, "or its machine is stopped, dead or cut off"),
        (platform.node, os.getpid, "is running, in code that keeps Python from answering"),
        (platform.node, lambda: 2**22 + 1, "has ended"),
    ],
)
def test_the_state_of_a_rank_that_does_not_answer(
    host: Callable[[], str], process: Callable[[], int], words: str
) -> None:
    assert _state(host(), process()) == f"process {process()} on {host()} {words}"
