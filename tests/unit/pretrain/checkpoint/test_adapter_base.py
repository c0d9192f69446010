"""Bases that a run keeps as hard links: one that cannot be linked costs no other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.sealed import CHECKPOINT
from pretrain.checkpoint import adapter_base as bases
from pretrain.checkpoint import pruning, storage
from pretrain.checkpoint.adapter_base import base_of, content_of, keep_bases
from pretrain.checkpoint.lineage import Pin


def _imported(folder: Path, name: str) -> dict[str, Any]:
    """Writes a Hugging Face folder whose content depends on `name` and returns what names it as a base."""
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}), encoding="utf-8")
    (model / "model.safetensors").write_bytes(name.encode())
    return {"checkpoint": str(model), "relative": f"../{name}", "sha256": content_of(model), "step": 0}


def test_a_base_that_cannot_be_linked_leaves_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    first, second = _imported(tmp_path, "first"), _imported(tmp_path, "second")
    keep_bases(run, [first], said.append)
    assert not said
    keep_bases(run, [first], said.append, mirror="s3://bucket/run")
    told = (
        f"note: s3://bucket/run gets no copy of {tmp_path / 'first'}, whose weights this run does not train; to go on"
    )
    assert said.pop() == f"{told} from there without this folder, keep that model where it is" and not said
    link = os.link

    def refuses(source: Path, target: Path) -> None:
        if "second" in str(source):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(bases.os, "link", refuses)
    keep_bases(run, [second], said.append)
    assert len(said) == 1 and "second" in said[0]

    os.rename(tmp_path / "first", tmp_path / "elsewhere")
    found = base_of(run / "checkpoints" / "step_1", {"base": first})
    assert found is not None and found.is_relative_to(run)
    assert not list(run.rglob(".step_*"))


def test_a_base_is_kept_by_links_or_by_its_own_run_never_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links bases: one that its run prunes lives on where it is linked; one that cannot be linked is not pruned."""
    runs = {name: tmp_path / name for name in ("base", "linked", "elsewhere")}
    for run in runs.values():
        run.mkdir()
    for step in (1, 2, 3):
        (checkpoint := runs["base"] / f"checkpoints/step_{step}").mkdir(parents=True)
        (checkpoint / storage.MANIFEST).write_bytes(CHECKPOINT.write({"step": step, "files": {"a": {}}}))
        (checkpoint / "a").write_bytes(bytes([step]))
    pins = [Pin.of(runs["base"] / f"checkpoints/step_{step}") for step in (1, 2)]
    linked, stays = (bases.named_base(pin, run) for pin, run in zip(pins, list(runs.values())[1:], strict=True))
    said: list[str] = []
    keep_bases(runs["linked"], [linked], said.append)
    monkeypatch.setattr(
        bases.os, "link", lambda *paths: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link"))
    )
    keep_bases(runs["elsewhere"], [stays], said.append)
    assert len(said) == 1 and "Invalid cross-device link" in said[0]
    pruning.prune(runs["base"], 3, keep=1)
    assert storage.steps(runs["base"]) == [2, 3]
    found = [base_of(run / "checkpoints/step_9", {"base": base}) for run, base in
             ((runs["linked"], linked), (runs["elsewhere"], stays))]  # fmt: skip
    assert [folder and (folder / "a").read_bytes() for folder in found] == [b"\x01", b"\x02"]
