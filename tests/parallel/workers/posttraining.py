"""Run in the ranks: an untrained model as a checkpoint, for post-training to start from; and a whole command."""

import contextlib
import importlib
import io
import shutil
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from pretrain.checkpoint.lineage import TOKENIZER, Lineage
from tests.parallel.workers.layouts import make_engine
from tests.parallel.workers.training import save_now


def save_untrained(run_dir: str, model: dict[str, Any], tokenizer: str) -> None:
    identity = Lineage(Path(tokenizer)).identity
    facts = {"config": {"model": model}, "identity": identity, "context": 128}
    save_now(make_engine(model, {}), run_dir, step=1, facts=facts)
    shutil.copy(tokenizer, Path(run_dir) / TOKENIZER)


def command(module: str, argv: list[str]) -> dict[str, Any]:
    """What the command says and its exit status; a refused config is 2, in the words of its error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            status = importlib.import_module(module).main(argv)
        except ConfigError as error:
            return {"status": 2, "said": said.getvalue(), "error": str(error)}
    return {"status": status, "said": said.getvalue(), "error": ""}
