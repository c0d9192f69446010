"""Passages of a data plan's held-out documents, as token ids, on which models are compared."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.tokens.tokenizer import difference_of_files

if TYPE_CHECKING:
    from data_pipeline.mixture.rows import Plan


def check_heldout(plan: "Plan") -> None:
    """Raises DamagedData if a file of the plan's held-out text, which is in tokens/heldout, has another checksum."""
    from data_pipeline.core.integrity import DamagedData, check_files

    if found := check_files([one for one in plan.store_files() if one.path.parts[-3] == "heldout"], threading.Event()):
        raise DamagedData(found[0])


def heldout_passages(plan: str | Path, per_source: int, max_tokens: int, tokenizer: Path) -> list[list[int]]:
    """Returns the first `per_source` held-out passages of each source, of two to `max_tokens` tokens.

    A passage is a document, or the part of a long one that fits into a row. The list is empty if the plan holds nothing
    out. Raises ValueError if the plan has another tokenizer than the model, DamagedData as `check_heldout`.
    """
    from data_pipeline.mixture.rows import Plan

    opened = Plan.open(plan)
    if said := difference_of_files(opened.tokenizer_path, tokenizer):
        raise ValueError(
            f"plan {plan} was made with another tokenizer than the model's, {tokenizer}: {said}; name the model's own "
            "plan"
        )
    check_heldout(opened)
    passages: list[list[int]] = []
    for source in opened.sources:
        found: list[list[int]] = []
        for i in range(opened.heldout_rows(source)):
            row = opened.heldout_row(source, i)
            for segment in range(int(row.segments.max()) + 1):
                ids = row.tokens[row.segments == segment][:max_tokens].tolist()
                if len(ids) > 1:
                    found.append(ids)
            if len(found) >= per_source:
                break
        passages += found[:per_source]
    return passages
