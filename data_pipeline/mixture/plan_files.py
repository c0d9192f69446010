"""Writes mixture plans: plan.json and index arrays over token stores, without copies of tokens. `rows` reads them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import write_atomic
from configs.mixture import PlanConfig
from configs.sealed import PLAN
from data_pipeline.core.shards import HELDOUT, TRAIN
from data_pipeline.core.stage import read_manifest
from data_pipeline.mixture import cursor
from data_pipeline.mixture import fim as fill
from data_pipeline.mixture.draft import Gone, PlannedSource, check_stores, draft_plan
from data_pipeline.mixture.packing import PACKINGS, Packed
from data_pipeline.mixture.rows import PLAN_FILE, SEGMENT_ARRAYS, Plan
from data_pipeline.mixture.weights import running_counts
from data_pipeline.tokens.store import SourceStores, Store


def build_plan(
    tokens: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    settings: PlanConfig,
    *,
    without: Gone | None = None,
    after: tuple[Plan, int] | None = None,
    key: str = "mixture",
) -> dict[str, Any]:
    """Writes the plan that `draft_plan` makes of `settings` to folder `out`; returns the content of plan.json.

    The other arguments are those of `draft_plan`, whose ValueError is raised before anything is written.
    """
    tokens, out = Path(tokens), Path(out)
    draft = draft_plan(tokens, tokenizer, settings, without=without, after=after, key=key)
    plan, model = draft.outlook(), draft.model
    begins, left = cursor.described(draft.cursors)
    arrays: dict[str, np.ndarray] = {
        "token_bytes.npy": model.token_bytes,
        "sample_sources.npy": draft.sample_sources.astype(np.uint16),
        "sample_rows.npy": running_counts(draft.sample_sources),
        **left,
    }
    described, filled = [], 0
    for source, outlook in zip(draft.sources, plan.pop("sources"), strict=True):
        used = source.documents.rows(outlook["samples"])
        arrays |= _segment_arrays(f"{TRAIN}.{source.name}", used)
        if source.forms is not None:
            arrays[f"{TRAIN}.{source.name}.fim.npy"] = source.forms[used.document]
        filled += int(used.length.sum(dtype=np.int64)) + int(source.documents.extra[used.document].sum())
        heldout_folder = tokens / HELDOUT / source.name
        heldout = SourceStores.in_folder(heldout_folder) if heldout_folder.is_dir() else SourceStores([])
        heldout.leave_out(draft.gone.get(f"{HELDOUT}/{source.name}", ()))
        check_stores(heldout.stores, model)
        held_rows = PACKINGS[plan["packing"]](heldout.lengths, plan["seq_length"])
        arrays |= _segment_arrays(f"{HELDOUT}.{source.name}", held_rows)
        described.append(outlook | _describe(source, used, heldout, held_rows, tokens))
    out.mkdir(parents=True, exist_ok=True)
    files = {name: _save(out / name, array) for name, array in arrays.items()}
    plan = {
        "after": after
        and {
            "plan": after[0].fingerprint,
            "samples": after[1],
            "first_sample": after[0].first_sample + after[1],
        },
        "begins": begins,
        "without": draft.gone,
        **plan,
        "padding_share": round(1 - filled / (plan["samples"] * plan["seq_length"]), 6),
        "tokens": os.path.relpath(tokens, out),
        "tokenizer": {
            "model": os.path.relpath(model.origin, out),
            "sha256": model.sha256,
            "vocab_size": model.vocab_size,
            "special_ids": model.special_ids,
            "bos_id": model.bos_id,
            "eos_id": model.eos_id,
            "pad_id": model.pad_id,
        },
        "sources": described,
        "files": files,
    }
    write_atomic(out / PLAN_FILE, PLAN.write(plan))
    return plan


def build_stages(
    tokens: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    stages: Mapping[str, PlanConfig],
    without: Gone | None = None,
    after: tuple[Plan, int] | None = None,
) -> None:
    """Writes a chain of plans, one for each stage, to out/<name>/plan.json; each goes on after the one before.

    The first goes on from the plan and sample `after`, if given. A single stage without a name is written to
    out/plan.json. Raises ValueError as `build_plan` does, with the config key of the stage.
    """
    for name, settings in without_empty(Path(tokens), stages).items():
        folder = Path(out) / name
        try:
            key = f"mixture.stages.{name}" if name else "mixture"
            build_plan(tokens, tokenizer, folder, settings, without=without, after=after, key=key)
        except ValueError as error:
            raise ValueError(f"{key}: {error}" if name else str(error)) from None
        plan = Plan.open(folder)
        after = plan, plan.num_samples


def without_empty(tokens: Path, stages: Mapping[str, PlanConfig]) -> dict[str, PlanConfig]:
    """Returns `stages` without the data run's sources that have no document to train on.

    Raises ValueError if a stage has no source left.
    """
    manifest = read_manifest(tokens) or {"sources": {}}
    empty = {source for source in manifest["sources"] if not (tokens / TRAIN / source).is_dir()}
    left = {}
    for name, plan in stages.items():
        weights = plan.weights and {source: share for source, share in plan.weights.items() if source not in empty}
        if plan.weights and not weights:
            raise ValueError(
                f"mixture{f'.stages.{name}' if name else ''}.weights: none of {', '.join(plan.weights)} has a document "
                "to train on; loosen their rules, give them more files, or give other sources a weight"
            )
        own = {
            key: {source: value for source, value in getattr(plan, key).items() if source not in empty}
            for key in ("epochs", "fim")
        }
        left[name] = plan.model_copy(update={"weights": weights, **own})
    return left


def _segment_arrays(prefix: str, packed: Packed) -> dict[str, np.ndarray]:
    """Returns the arrays of packed rows by file name."""
    dtypes = {"document": np.int64, "start": np.int64, "length": np.int32, "offsets": np.int64}
    return {f"{prefix}.{name}.npy": getattr(packed, name).astype(dtypes[name]) for name in SEGMENT_ARRAYS}


def _describe(
    source: PlannedSource, used: Packed, heldout: SourceStores, held_rows: Packed, tokens: Path
) -> dict[str, Any]:
    """Returns the facts about a source for plan.json that are known only once its rows are made."""
    documents = source.documents
    stats = source.packed.stats(documents.lengths, documents.seq_length, documents.extra)
    facts: dict[str, Any] = {"trained_tokens": int(used.length.sum(dtype=np.int64))}
    if source.forms is not None:
        forms = source.forms[used.document]
        facts["fim_pieces"] = {name: int((forms == form).sum()) for form, name in fill.NAMES.items()}
    return {
        **facts,
        **{key: round(value, 6) for key, value in stats.items()},
        "stores": [_store_entry(store, tokens) for store in source.shards.stores],
        "heldout": {
            "rows": len(held_rows),
            "documents": len(heldout.lengths),
            "tokens": int(heldout.lengths.sum(dtype=np.int64)),
            "stores": [_store_entry(store, tokens) for store in heldout.stores],
        },
    }


def _store_entry(store: Store, tokens: Path) -> dict[str, Any]:
    """Returns the path, size and checksums by which a plan identifies a token store."""
    facts = store.facts()
    return {
        "path": store.path.relative_to(tokens).as_posix(),
        "documents": len(store),
        "bin_bytes": store.file(".bin").stat().st_size,
        **{key: facts[key] for key in ("bin_sha256", "idx_sha256", "parquet_sha256", "text_bytes") if key in facts},
    }


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes an array to a .npy file; returns its SHA-256, bytes, type and shape."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            entry = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {**entry, "dtype": array.dtype.name, "shape": list(array.shape)}
