"""Export and import of a model of 2 GB hold a file of weights and a layer in memory, never the model."""

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from configs.export import ExportConfig
from configs.loader import plain, validate
from configs.model import ModelConfig
from export import huggingface
from export.checked_texts import read_texts
from export.conversion.tensor_shapes import parameters
from export.import_hf import import_directory
from export.model_source import open_source
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage

SIZES = {"vocab_size": 4096, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_heads": 16, "num_kv_heads": 16}
LAYERS, GB = 29, 10**9


def large_run(folder: Path, tokenizer: Path) -> tuple[Path, int]:
    """Writes a run of a model of 2 GB whose weights two ranks hold in halves; returns it and the size in bytes."""
    config = validate(ModelConfig, {**SIZES, "num_layers": LAYERS})
    lineage = Lineage(tokenizer)
    final = storage.directory(folder, 1)
    temporary = storage.temporary_name(final)
    temporary.mkdir(parents=True)
    parts, total = [], 0
    for rank in range(2):
        pieces = {}
        for name, shape in parameters(config).items():
            half = torch.Size(shape).numel() // 2
            piece = storage.Piece(name, shape, (0,) * len(shape), shape, rank * half, half)
            values = torch.randn(half) * 0.02 + ("norm" in name)
            pieces[name] = (piece, {"weight": values})
            total += values.nbytes
        parts.append(storage.write_rank(temporary, rank, pieces))
    facts = {"config": {"model": plain(config)}, "context": 64, "identity": lineage.identity, **lineage.facts}
    storage.publish(temporary, final, parts, {"step": 1, **facts})
    lineage.keep(folder, lineage.identity)
    return folder, total


@contextlib.contextmanager
def peak_growth(found: list[int]) -> Iterator[None]:
    """Appends by how many bytes this process's own memory grows at most; pages of files are the kernel's to drop."""
    done, before = threading.Event(), _anonymous()
    peak = [before]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(peak[0] - before)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.full
def test_a_model_of_2_gb_is_exported_and_imported_in_a_fraction_of_its_size(tmp_path, tokenizer_path):
    run, size = large_run(tmp_path / "run", tokenizer_path)
    assert size > 1.9 * GB
    out, shard = tmp_path / "hf", 0.1
    config = ExportConfig(
        run=str(run), out=str(out), prompts=["It was"], sample_tokens=2, max_shard_gb=shard,
        verify={"layers": 1, "greedy_tokens": 4, "far_tokens": 0},
    )  # fmt: skip
    console = Console(record=True, width=200, file=io.StringIO())
    source = open_source(run)
    texts = read_texts(source, config, console)
    grown: list[int] = []
    with peak_growth(grown):
        assert huggingface.export(source, texts, config, out, {}, console) == 0
    with peak_growth(grown):
        import_directory(out, tmp_path / "back", max_shard_gb=shard)
    # Two copies of one layer and of the embeddings, and a file of weights while it is written; the rest is room for
    # the libraries.
    assert max(grown) < 0.45 * size, [f"{growth / GB:.2f} GB" for growth in grown]
    assert grown[1] < 0.25 * size, f"{grown[1] / GB:.2f} GB"
