"""Passages of a data plan's held-out documents, as token ids, on which models are compared."""

from pathlib import Path

from data_pipeline.tokens.tokenizer import difference_of_files


def heldout_passages(plan: str | Path, per_source: int, max_tokens: int, tokenizer: Path) -> list[list[int]]:
    """Returns the first `per_source` held-out passages of each source, of two to `max_tokens` tokens.

    A passage is a document, or the part of a long one that fits into a row. The list is empty if the plan holds nothing
    out. Raises ValueError if the plan has another tokenizer than the model.
    """
    from data_pipeline.mixture.rows import Plan

    opened = Plan.open(plan)
    if said := difference_of_files(opened.tokenizer_path, tokenizer):
        raise ValueError(
            f"plan {plan} was made with another tokenizer than the model's, {tokenizer}: {said}; name the model's own "
            "plan"
        )
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
