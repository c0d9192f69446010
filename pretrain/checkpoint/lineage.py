"""A model's tokenizer, chat template and origin, all of which every run keeps in its own directory.

A run directory has `tokenizer.model` or `tokenizer.json`, beside a tokenizer.json that was trained elsewhere
`tokenizer_config.json` with the roles of its tokens, and after post-training `chat_template.jinja`. The identity in
each checkpoint's manifest holds their SHA-256, so that weights are never used with another tokenizer or template than
in training. The manifest also holds the model's `context`, the checkpoint that the run began from (`init`), and
its data plan, whose held-out part evaluations use. So a run may be moved, and the run that it began from may continue,
be moved or be deleted.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.differences import changes, words
from configs.files import file_sha256, write_atomic
from configs.loader import ConfigError
from data_pipeline.mixture.earlier import where
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.tokenizer import ROLES_FILE, difference_of_files, file_name, roles_beside, tokenizer_file
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import CheckpointError

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Pin:
    """The checkpoint that a run began from, identified by its manifest's SHA-256; it may be deleted by now."""

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
    """The data plan that a model was trained on: absolute path, path relative to the run, and fingerprint."""

    path: str
    relative: str
    fingerprint: str

    @classmethod
    def of(cls, path: Path, fingerprint: str, run_dir: Path) -> "PlanLocation":
        path = path.resolve()
        return cls(str(path), os.path.relpath(path, run_dir.resolve()), fingerprint)

    def find(self, run_dir: Path) -> Path | None:
        """Returns the plan's folder if one of the two paths still holds the plan with this fingerprint, else None."""
        paths = (self.path, os.path.normpath(run_dir.resolve() / self.relative))
        return next((folder for path in paths if (folder := where(path, self.fingerprint))), None)


@dataclass(frozen=True)
class Lineage:
    """The tokenizer, chat template and origin of the model that a run trains or a checkpoint holds.

    `context` is the length, in tokens, of the longest rows that the weights were trained on so far. `tokenizer` is a
    file whose content has been checked, and `roles` the content of the file with the roles of its tokens, which only
    one that was trained elsewhere has. `imported` is what an export has to know of a model that descends from an
    imported one: its `architecture` in transformers, its `token_ids`, and its `generation` config.
    """

    tokenizer: Path | None = None
    chat_template: str | None = None
    context: int = 0
    plan: PlanLocation | None = None
    init: Pin | None = None
    roles: bytes | None = None
    imported: dict[str, Any] | None = None

    @classmethod
    def of_plan(cls, plan: Plan, run_dir: str | Path) -> "Lineage":
        """Makes the lineage of a model with random initial weights that is trained on `plan`."""
        location = PlanLocation.of(plan.path, plan.fingerprint, Path(run_dir))
        return cls(plan.tokenizer_path, plan=location, roles=roles_beside(plan.tokenizer_path))

    @classmethod
    def of_checkpoint(cls, path: Path, manifest: dict[str, Any], tokenizer: Path | None = None) -> "Lineage":
        """Reads a checkpoint's lineage, with the `tokenizer` that is given or else the one that its run keeps.

        Raises CheckpointError if tokenizer or template is missing or replaced.
        """
        template, roles = template_of(path, manifest), None
        identity = manifest.get("identity", {})
        tokenizer = tokenizer or tokenizer_of(path, manifest)
        if tokenizer is not None and identity.get("roles"):
            roles = _kept(tokenizer.with_name(ROLES_FILE), identity["roles"]).read_bytes()
        elif tokenizer is not None and "roles" not in identity:  # a checkpoint from before it was recorded
            roles = roles_beside(tokenizer)
        init = Pin(**manifest["init"]) if manifest.get("init") else None
        context, imported = manifest.get("context", 0), manifest.get("import")
        return cls(tokenizer, template, context, plan_of(manifest), init, roles, imported)

    @property
    def identity(self) -> dict[str, str | None]:
        """The facts that may not change during a run, as SHA-256 sums."""
        return {
            "init": self.init.sha256 if self.init else None,
            "tokenizer": file_sha256(self.tokenizer) if self.tokenizer else None,
            "roles": hashlib.sha256(self.roles).hexdigest() if self.roles is not None else None,
            "chat_template": text_sha256(self.chat_template) if self.chat_template is not None else None,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that a checkpoint's manifest holds beside the identity."""
        facts: dict[str, Any] = {"init": self.init and asdict(self.init), "plan": self.plan and asdict(self.plan)}
        return facts | ({"import": self.imported} if self.imported else {})

    def keep(self, run_dir: Path, identity: dict[str, Any]) -> None:
        """Copies tokenizer and template into the run. Raises ConfigError if the tokenizer has changed since."""
        if self.tokenizer is not None:
            content = self.tokenizer.read_bytes()
            if hashlib.sha256(content).hexdigest() != identity["tokenizer"]:
                raise ConfigError(f"{self.tokenizer} was replaced while the run started; start it again")
            write_atomic(run_dir / file_name(self.tokenizer), content)
        if self.roles is not None:
            write_atomic(run_dir / ROLES_FILE, self.roles)
        if self.chat_template is not None:
            write_atomic(run_dir / CHAT_TEMPLATE, self.chat_template.encode())


def text_sha256(text: str) -> str:
    """Returns the SHA-256, in hex, of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def plan_of(manifest: dict[str, Any]) -> PlanLocation | None:
    """Returns the data plan that a checkpoint's model was pretrained on, or None if there was none."""
    return PlanLocation(**manifest["plan"]) if manifest.get("plan") else None


def template_of(path: Path, manifest: dict[str, Any]) -> str | None:
    """Returns the chat template that a checkpoint's run keeps, or None for a model that was not trained on dialogues.

    Raises CheckpointError if it is missing or was replaced.
    """
    sha256 = manifest.get("identity", {}).get("chat_template")
    return _kept(storage.run_of(path) / CHAT_TEMPLATE, sha256).read_text(encoding="utf-8") if sha256 else None


def tokenizer_of(path: Path, manifest: dict[str, Any]) -> Path | None:
    """Returns the tokenizer file that a checkpoint's run keeps, or None for a model without tokenizer.

    If the run's file is missing, the data plan's is returned, provided that it has the same content. Raises
    CheckpointError if neither is there, or the run's has another content.
    """
    sha256, run = manifest.get("identity", {}).get("tokenizer"), storage.run_of(path)
    if sha256 is None:
        return None
    plan = plan_of(manifest)
    if not tokenizer_file(run).is_file() and plan is not None and (folder := plan.find(run)) is not None:
        with contextlib.suppress(ValueError):
            other = Plan.open(folder).tokenizer_path
            if file_sha256(other) == sha256:
                return other
    return _kept(tokenizer_file(run), sha256)


def tokenizer_difference(lineage: Lineage, path: Path, manifest: dict[str, Any]) -> str:
    """Returns in words how a run's tokenizer differs from that of a checkpoint; "" if one of them is not there."""
    with contextlib.suppress(CheckpointError, ValueError):
        kept = tokenizer_of(path, manifest)
        if kept is None or lineage.tokenizer is None:
            return ""
        roles = json.loads(roles_beside(kept) or b"{}"), json.loads(lineage.roles or b"{}")
        found = changes(*roles)
        template = ["its chat template differs"] if found.pop("chat_template", None) else []
        said = difference_of_files(lineage.tokenizer, kept) or "; ".join([*words(found), *template])
        return f"{lineage.tokenizer} against {kept}: {said or 'they give the same ids, and the files differ'}"
    return ""


def _kept(file: Path, sha256: str) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{file}, with which the model was trained, is missing; restore it (its SHA-256 begins with {sha256[:12]})"
        )
    if (found := file_sha256(file)) != sha256:
        raise CheckpointError(
            f"{file} is not the one that the model was trained with (its SHA-256 begins with {found[:12]}, not "
            f"{sha256[:12]}); restore the original"
        )
    return file
