"""Folders of torch.distributed.checkpoint are read whole or by row, and nothing in them is ever run."""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from export import import_hf
from export.conversion.walk import ConversionError
from export.dcp_folder import DcpFolder
from export.training_checkpoint import open_checkpoint
from tests.unit.export.conversion.parity import random_model


class PickledCommand:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_of = function, arguments

    def __reduce__(self) -> Any:
        return self.made_of


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {
        "model.a": torch.arange(12.0).view(3, 4),
        "model.b": torch.randn(5).bfloat16(),
        "model.scalar": torch.tensor(7),
    }
    dcp.save({**tensors, "step": 3, "note": "text"}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp", tensors


def test_tensors_are_read_whole_and_by_row(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = saved
    found = DcpFolder(folder)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    assert found.read("model.b").dtype == torch.bfloat16
    assert torch.equal(found.read("model.a", 2), tensors["model.a"][2])


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_metadata_of_any_python_is_read(saved: tuple[Path, dict[str, torch.Tensor]], module: bytes) -> None:
    """Writes the class of paths under the name that it has in Python 3.13, and under that of all others."""
    folder, tensors = saved
    content = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    changed = re.sub(rb"cpathlib(\._local)?\nPosixPath\n", b"c" + module + b"\nPosixPath\n", content)
    assert b"c" + module + b"\n" in changed
    (folder / ".metadata").write_bytes(changed)
    assert torch.equal(DcpFolder(folder).read("model.a"), tensors["model.a"])


@pytest.mark.parametrize(
    ("function", "named"), [(os.system, "system"), (eval, "eval"), (getattr, "getattr"), (torch.load, "load")]
)
def test_metadata_that_names_anything_else_is_refused_unrun(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, function: Any, named: str
) -> None:
    folder, _ = saved
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    trace = tmp_path / "ran"
    metadata.planner_data = PickledCommand(function, f"touch {trace}")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"is not read: it names \w+(\.\w+)*\.{named}, which no checkpoint"):
        DcpFolder(folder)
    assert not trace.exists()


def test_a_part_that_is_more_than_a_tensor_is_refused_unrun(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = saved
    metadata, trace, file = pickle.loads((folder / ".metadata").read_bytes()), tmp_path / "ran", io.BytesIO()
    torch.save(PickledCommand(os.system, f"touch {trace}"), file)
    assert zipfile.is_zipfile(file)
    (folder / "evil.distcp").write_bytes(file.getvalue())
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"evil\.distcp in .*: the part of model\.a cannot be read"):
        DcpFolder(folder).read("model.a")
    assert not trace.exists()
    for info in metadata.storage_data.values():
        info.relative_path = "../evil.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file \.\./evil\.distcp, which is outside of the folder"):
        DcpFolder(folder).read("model.a")


def test_what_is_no_checkpoint_is_told(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = saved
    with pytest.raises(ValueError, match=r"has no \.metadata; name a folder that torch\.distributed\.checkpoint wrote"):
        DcpFolder(tmp_path)
    content = (folder / ".metadata").read_bytes()
    for wrong, said in (
        (content[:100], "is not a whole file of torch.distributed.checkpoint"),
        (pickle.dumps({"a": 1}), "holds dict, not the metadata"),
    ):
        (folder / ".metadata").write_bytes(wrong)
        with pytest.raises(ValueError, match=said):
            DcpFolder(folder)


def test_tensors_of_unknown_names_are_read_once_they_are_named_as_the_message_says(
    saved: tuple[Path, dict[str, torch.Tensor]], exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConversionError, match=r"no embedding that --from dcp knows by its name; .*; save it by the names of .*transf"
    ):
        open_checkpoint(saved[0], "dcp", exported)
    named = load_file(exported / "model.safetensors")
    dcp.save(dict(named), checkpoint_id=tmp_path / "named", no_dist=True)
    opened = open_checkpoint(tmp_path / "named", "dcp", exported)
    assert torch.equal(opened.tensors.read("model.norm.weight"), named["model.norm.weight"])


def _no_parts(metadata: Any) -> None:
    metadata.state_dict_metadata["model.a"].chunks = []


def _no_locations(metadata: Any) -> None:
    metadata.storage_data = {}


def _compressed(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


class PicklerOfOthers(pickle.Pickler):
    """Writes the text of a planner as an object that is somewhere else."""

    def persistent_id(self, value: Any) -> str | None:
        return "elsewhere" if value == "planner" else None


def _refers(metadata: Any) -> None:
    metadata.planner_data = "planner"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_parts, r"model\.a in \S+ has 0 of 12 elements; save the model again$"),
        (_no_locations, r"does not say where a part of model\.a is; save the model again$"),
        (_compressed, r"model\.a in \S+ is compressed or encrypted; save the model without that$"),
        (_refers, "it refers to objects outside the file; save the model again with torch's own writer$"),
    ],
)
def test_a_tensor_is_read_once_the_model_is_saved_again_as_the_message_says(
    saved: tuple[Path, dict[str, torch.Tensor]], damage: Callable[[Any], None], words: str
) -> None:
    folder, tensors = saved
    metadata, file = pickle.loads((folder / ".metadata").read_bytes()), io.BytesIO()
    damage(metadata)
    PicklerOfOthers(file).dump(metadata)
    (folder / ".metadata").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=words):
        DcpFolder(folder).read("model.a")
    dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    assert torch.equal(DcpFolder(folder).read("model.a"), tensors["model.a"])


def test_a_model_with_experts_is_imported_from_the_folder_that_the_message_asks_for(tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2}
    model = random_model("mixtral", **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    model.save_pretrained(tmp_path / "hf")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    words = r"of dcp checkpoints only LLaMA shapes are read; save the model with transformers and import that folder"
    with pytest.raises(ConversionError, match=words):
        open_checkpoint(tmp_path / "dcp", "dcp", tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--dry-run"]) == 0
