"""Compiled code that is kept belongs to the sources that it was compiled from."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.model import compiling

WIDTH = {"now": 4}


@torch.library.custom_op("trivium_tests::spare_rows", mutates_args=())
def spare_rows(x: torch.Tensor) -> torch.Tensor:
    """Appends rows of zeros, in each version of this operator another number of them."""
    return torch.cat((x, x.new_zeros(WIDTH["now"] - len(x), x.shape[1])))


@spare_rows.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(WIDTH["now"], x.shape[1])


class Spare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spare_rows(x) * 2


@pytest.fixture(autouse=True)
def tag_of_this_test() -> Iterator[None]:
    """Restores what kept code is looked up by."""
    before = torch.compiler.config.cache_key_tag
    yield
    torch.compiler.config.cache_key_tag = before


@pytest.mark.full
def test_code_of_other_sources_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles a block twice with an operator whose output has other shapes the second time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for version, width in enumerate((4, 5)):
        torch._dynamo.reset()
        monkeypatch.setattr(compiling, "digest_of_sources", lambda _, version=version: f"version {version}")
        monkeypatch.setitem(WIDTH, "now", width)
        block = Spare()
        compiling.compile_blocks([block])
        assert block(torch.ones(3, 2)).tolist() == [[2, 2]] * 3 + [[0, 0]] * (width - 3)
    torch._dynamo.reset()


def test_kept_code_is_looked_up_by_the_contents_of_all_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiling.TAG, "mine ")
    compiling.compile_blocks([])
    sources = Path(compiling.__file__).parent
    assert torch.compiler.config.cache_key_tag == f"mine {compiling.digest_of_sources(sources)}"
    copies = [shutil.copytree(sources, tmp_path / name) for name in ("same", "other")]
    with (copies[1] / "moe" / "experts.py").open("a") as changed:
        changed.write("# another version\n")
    same, other = map(compiling.digest_of_sources, copies)
    assert same == compiling.digest_of_sources(sources) != other
