"""What a model needs beside its weights, and where it comes from. Every run keeps it in itself.

A run directory has `tokenizer.model`, and after post-training `chat_template.jinja`; the identity in each checkpoint's
manifest has their SHA-256, so weights never meet another tokenizer or template than those of training. The manifest
also has the model's `context`, the checkpoint that the run began from (`init`), and its data plan, for the held-out
part. So a run may be moved, and the run that it began from may go on, be moved or be deleted.
"""

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.files import file_sha256, write_atomic
from configs.loader import ConfigError
from data_pipeline.mixture.earlier import where
from data_pipeline.mixture.rows import Plan
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import CheckpointError

TOKENIZER, CHAT_TEMPLATE = "tokenizer.model", "chat_template.jinja"


@dataclass(frozen=True)
class Pin:
    """The checkpoint that a run began from. It may be gone by now: `sha256` of its manifest says which one it was."""

    checkpoint: str
    step: int
    sha256: str

    @classmethod
    def of(cls, checkpoint: Path) -> "Pin":
        manifest = checkpoint / storage.MANIFEST
        step = int(storage.read_manifest(checkpoint)["step"])
        return cls(str(checkpoint.resolve()), step, file_sha256(manifest))

    @property
    def run(self) -> Path:
        return storage.run_of(Path(self.checkpoint))


@dataclass(frozen=True)
class PlanLocation:
    """A data plan that a model was trained on: where it was, seen from the root and from the run, and which one."""

    path: str
    relative: str
    fingerprint: str

    @classmethod
    def of(cls, path: Path, fingerprint: str, run_dir: Path) -> "PlanLocation":
        path = path.resolve()
        return cls(str(path), os.path.relpath(path, run_dir.resolve()), fingerprint)

    def find(self, run_dir: Path) -> Path | None:
        """The plan as it is now; None where there is none any more, or another one."""
        paths = (self.path, os.path.normpath(run_dir.resolve() / self.relative))
        return next((folder for path in paths if (folder := where(path, self.fingerprint))), None)


@dataclass(frozen=True)
class Lineage:
    """Of the model that a run trains, or that a checkpoint holds.

    `context` is the number of tokens in the longest rows that the weights were trained on so far. `tokenizer` is a file
    that is known to be the right one.
    """

    tokenizer: Path | None = None
    chat_template: str | None = None
    context: int = 0
    plan: PlanLocation | None = None
    init: Pin | None = None

    @classmethod
    def of_plan(cls, plan: Plan, run_dir: str | Path) -> "Lineage":
        """Of a model that is drawn, and then trained on `plan`."""
        return cls(plan.tokenizer_path, plan=PlanLocation.of(plan.path, plan.fingerprint, Path(run_dir)))

    @classmethod
    def of_checkpoint(cls, path: Path, manifest: dict[str, Any]) -> "Lineage":
        """Errors: CheckpointError where the run's tokenizer or template is gone, or another than in training."""
        run, template = storage.run_of(path), None
        plan = plan_of(manifest)
        if sha256 := manifest.get("identity", {}).get("chat_template"):
            template = _kept(run / CHAT_TEMPLATE, sha256).read_text(encoding="utf-8")
        init = Pin(**manifest["init"]) if manifest.get("init") else None
        return cls(tokenizer_of(path, manifest), template, manifest.get("context", 0), plan, init)

    @property
    def identity(self) -> dict[str, str | None]:
        """What of it may not change in a run."""
        return {
            "init": self.init.sha256 if self.init else None,
            "tokenizer": file_sha256(self.tokenizer) if self.tokenizer else None,
            "chat_template": text_sha256(self.chat_template) if self.chat_template is not None else None,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What else a checkpoint's manifest says of it."""
        return {"init": self.init and asdict(self.init), "plan": self.plan and asdict(self.plan)}

    def keep(self, run_dir: Path, identity: dict[str, Any]) -> None:
        """Writes the tokenizer and the template of `identity` into the run. Errors: ConfigError, one has changed."""
        if self.tokenizer is not None:
            content = self.tokenizer.read_bytes()
            if hashlib.sha256(content).hexdigest() != identity["tokenizer"]:
                raise ConfigError(f"{self.tokenizer} was replaced while the run started; start it again")
            write_atomic(run_dir / TOKENIZER, content)
        if self.chat_template is not None:
            write_atomic(run_dir / CHAT_TEMPLATE, self.chat_template.encode())


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plan_of(manifest: dict[str, Any]) -> PlanLocation | None:
    """The data plan that a checkpoint's model was pretrained on; None where it was none."""
    return PlanLocation(**manifest["plan"]) if manifest.get("plan") else None


def tokenizer_of(path: Path, manifest: dict[str, Any]) -> Path | None:
    """The tokenizer that a checkpoint's run keeps; the plan's, if it is gone from there and that is the same.

    None for a model without one. Errors: CheckpointError where there is none any more, or another.
    """
    sha256, run = manifest.get("identity", {}).get("tokenizer"), storage.run_of(path)
    if sha256 is None:
        return None
    plan = plan_of(manifest)
    if not (run / TOKENIZER).is_file() and plan is not None and (folder := plan.find(run)) is not None:
        with contextlib.suppress(ValueError):
            other = Plan.open(folder).tokenizer_path
            if file_sha256(other) == sha256:
                return other
    return _kept(run / TOKENIZER, sha256)


def _kept(file: Path, sha256: str) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{file} is gone, with which the model was trained (SHA-256 {sha256[:12]}...); put it back there"
        )
    if (found := file_sha256(file)) != sha256:
        raise CheckpointError(
            f"{file} is not the one that the model was trained with (its SHA-256 is {found[:12]}..., that one's "
            f"{sha256[:12]}...); put that back"
        )
    return file
