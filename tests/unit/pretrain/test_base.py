"""Bases that a run keeps as hard links: one that cannot be linked costs no other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import base as bases
from pretrain.checkpoint.base import base_of, content_of, keep_bases


def _imported(folder: Path, name: str) -> dict[str, Any]:
    """Writes a Hugging Face folder whose content depends on `name` and returns what names it as a base."""
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}), encoding="utf-8")
    (model / "model.safetensors").write_bytes(name.encode())
    return {"checkpoint": str(model), "relative": f"../{name}", "sha256": content_of(model), "step": 0}


def test_a_base_that_cannot_be_linked_leaves_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = tmp_path / "run", []
    first, second = _imported(tmp_path, "first"), _imported(tmp_path, "second")
    keep_bases(run, [first], said.append)
    assert not said
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
