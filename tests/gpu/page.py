"""Draws the result of a check as one page of Markdown: a line for each part, then the numbers of the card."""

from typing import Any

# Values of a part's result that the page shows: (part, key, title, format).
_NUMBERS = (
    ("versions", "gpu", "card", "{}"),
    ("versions", "memory_gib", "memory of the card", "{:.0f} GiB"),
    ("versions", "torch", "torch", "{}"),
    ("versions", "cuda", "CUDA", "{}"),
    ("versions", "driver", "driver", "{}"),
    ("versions", "python", "Python", "{}"),
    ("speed", "parameters", "parameters of the model", "{:,}"),
    ("speed", "row", "a row", "{}"),
    ("speed", "recompute", "recomputation", "{}"),
    ("speed", "attention", "attention kernel", "{}"),
    ("speed", "tokens_per_s", "tokens/s", "{:,.0f}"),
    ("speed", "mfu", "MFU, of the data sheet's peak", "{:.1%}"),
    ("speed", "share_of_product_rate", "share of the card's own matrix-product rate", "{:.1%}"),
    ("speed", "idle", "idle share of the device", "{:.1%}"),
    ("speed", "peak_gib", "peak memory", "{:.2f} GiB"),
    ("speed", "expected_gib", "peak memory by the formula", "{:.2f} GiB"),
    ("resume", "resume", "save and resume", "{}"),
    ("syncs", "count", "waits for the device in a step", "{}"),
)


def draw(report: dict[str, Any]) -> str:
    """Returns the page of a report, as `check` writes it."""
    by_name = {part["name"]: part for part in report["parts"]}
    where = by_name.get("versions", {}).get("result", {}).get("gpu") or report["device"]
    lines = [f"# Trivium on {where}, {report['date'][:10]}", "", "| check | result | time |", "|---|---|---:|"]
    for part in report["parts"]:
        result = "ok" if part["ok"] else f"**failed**: {part['reason'].replace('|', '/')}"
        lines.append(f"| {part['title']} | {result} | {part['seconds']:.0f} s |")
    lines += [f"| {name} | not run | |" for name in report["not_run"]]
    shown = [
        f"| {title} | {form.format(value)} |"
        for name, key, title, form in _NUMBERS
        if (value := by_name.get(name, {}).get("result", {}).get(key)) is not None
    ]
    if shown:
        lines += ["", "| measured | |", "|---|---:|", *shown]
    waits = by_name.get("syncs", {}).get("result", {}).get("lines", {})
    if waits:
        lines += ["", "| waits for the device, by line of code | in a step |", "|---|---:|"]
        lines += [f"| {line} | {count} |" for line, count in waits.items()]
    kernels = by_name.get("speed", {}).get("result", {}).get("kernels", {})
    if kernels:
        lines += ["", "| kernels that took most | share |", "|---|---:|"]
        lines += [f"| {name.replace('|', '/')[:100]} | {share:.1%} |" for name, share in kernels.items()]
    return "\n".join(lines) + "\n"
