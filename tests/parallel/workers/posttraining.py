"""Functions run in the ranks: saving an untrained model, from which post-training starts, and whole commands."""

import contextlib
import hashlib
import importlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from configs.loader import ConfigError, Failure
from configs.method_layout import Way
from data_pipeline.tokens.tokenizer import file_name
from posttrain.preference import reference_logprobs
from posttrain.preference.group_packing import PackedRow
from posttrain.rl.policy_copy import PolicyCopy
from pretrain.checkpoint.lineage import Lineage
from tests.parallel.workers.layouts import make_engine, rows
from tests.parallel.workers.training import save_now


def save_untrained(run_dir: str, model: dict[str, Any], tokenizer: str, context: int = 128) -> None:
    identity = Lineage(Path(tokenizer)).identity
    facts = {"config": {"model": model}, "identity": identity, "context": context}
    save_now(make_engine(model, {}), run_dir, step=1, facts=facts)
    shutil.copy(tokenizer, Path(run_dir) / file_name(Path(tokenizer)))


def precision_of_copy(model: dict[str, Any]) -> list[str]:
    """Returns the dtypes of a bf16 engine's weights and of those that are sampled from."""
    engine = make_engine(model, {}, "bfloat16")
    copy = PolicyCopy()
    copy.refresh(engine)
    return sorted({str(p.dtype) for module in (engine.module, copy.decoder) for p in module.parameters()})


def command(module: str, argv: list[str]) -> dict[str, Any]:
    """Runs a command; returns its exit status, its output, and the message if it refused its config or failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            status = importlib.import_module(module).main(argv)
        except (ConfigError, Failure) as error:
            status = 2 if isinstance(error, ConfigError) else 1
            return {"status": status, "said": said.getvalue(), "error": str(error)}
    return {"status": status, "said": said.getvalue(), "error": ""}


def copy_has_adapters(model: dict[str, Any], parallel: dict[str, Any], adapter: dict[str, Any], way: Way) -> float:
    """Returns the largest difference between logits of the trained module and of what completions are sampled with."""
    engine = make_engine(model, parallel, adapter=adapter)
    copy = PolicyCopy(way)
    copy.refresh(engine)
    tokens = torch.arange(20).view(2, 10) % engine.model_config.vocab_size
    positions = torch.arange(10).expand(2, 10)
    with torch.no_grad():
        trained = engine.module.eval()(tokens, positions)
        sampled = copy.decoder(tokens, positions)
        part = sampled.chunk(parallel.get("tp", 1), -1)[engine.mesh.tp_rank]
    return float((trained - part).abs().max())


def logprobs_on_and_off(
    model: dict[str, Any], parallel: dict[str, Any], adapter: dict[str, Any] | None
) -> dict[str, str]:
    """Returns digests of the log-probabilities of a model with its adapters, with these off, and with them again."""

    def digest() -> str:
        return hashlib.sha256(reference_logprobs.compute(engine, packed).tobytes()).hexdigest()

    engine = make_engine(model, parallel, adapter=adapter)
    packed = [
        PackedRow(row.tokens, row.labels, row.loss_mask, row.positions, row.segments, row.source, {})
        for row in rows(0, 4, model["vocab_size"])
    ]
    found = {"on": digest()}
    with engine.without_adapters():
        found["off"] = digest()
    return found | {"on again": digest()}
