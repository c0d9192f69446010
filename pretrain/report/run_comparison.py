"""Comparison of several training runs on one page: final values, differences of their configs, curves over each other.

It draws what `pretrain.report.run_report` draws, and imports no torch.
"""

import html
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from configs.differences import flat
from configs.files import write_atomic
from pages import duration, page, short
from pretrain.logs import goodput
from pretrain.logs.metrics_file import numbers, read_metrics
from pretrain.report.drawn_metrics import CHARTS, NOT_DRAWN, WITHOUT_NOISE, last_of_each_step, read_json, titled
from pretrain.report.line_charts import Points, line_chart

STYLE = "table.runs td { white-space: nowrap; } summary { cursor: pointer; padding: 4px 0; }"


@dataclass(frozen=True)
class LoggedRun:
    """A run as its folder shows it; `numbers` are the records, one a step, as flat dicts."""

    name: str
    path: Path
    numbers: list[dict[str, float]]
    config: dict[str, Any]

    def last(self, key: str) -> float | None:
        """The last value of a number; None if it was never logged."""
        return next((record[key] for record in reversed(self.numbers) if key in record), None)

    def points(self, key: str, x: str = "step") -> Points:
        """The number over the number `x`."""
        return [(record[x], record[key]) for record in self.numbers if key in record and x in record]


def write(run_dirs: Sequence[Path]) -> Path:
    """Draws the runs into comparison.html in the first one's folder and returns that file's path."""
    runs = [_read(path, name) for path, name in zip(run_dirs, names(run_dirs), strict=True)]
    body = [f"<h1>{len(runs)} runs</h1>", _finals(runs), _differences(runs), *_charts(runs)]
    path = run_dirs[0] / "comparison.html"
    write_atomic(path, page(f"{', '.join(run.name for run in runs)}: Trivium runs", body, STYLE).encode())
    return path


def names(run_dirs: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that differ from one another."""
    parts = [path.absolute().parts for path in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(one[-length:]) for one in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{path} ({number})" for number, path in enumerate(run_dirs, 1)]  # a run that is named twice


def _read(path: Path, name: str) -> LoggedRun:
    records = last_of_each_step(read_metrics(path / "metrics.jsonl").records)
    try:
        config = flat(tomllib.loads((path / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        config = {}
    return LoggedRun(name, path, [{"step": record["step"], **numbers(record)} for record in records], config)


def _finals(runs: Sequence[LoggedRun]) -> str:
    """Returns the table of final values; a column is there if one of the runs has a value for it."""
    shared = [key for key in ("reward", "loss", "grad_norm") if any(run.last(key) is not None for run in runs)]
    heldout = dict.fromkeys(key for run in runs for record in run.numbers for key in record if key.startswith("eval/"))
    measures = [key for key in heldout if key.endswith(("/loss", "/accuracy"))]
    head = ["run", "steps", "tokens", *shared, *(key.removeprefix("eval/") for key in measures)]
    head += ["tokens/s, median", "goodput", "time", "layout"]
    rows = []
    for run in runs:
        starts = goodput.read(run.path)
        seconds = goodput.goodput(starts)
        whole = sum(seconds.values())
        speeds = [record["tokens_per_s"] for record in run.numbers if "tokens_per_s" in record]
        cells = [_said(run.last("step"), ",.0f"), _said(run.last("tokens"), ",.0f")]
        cells += [_said(run.last(key), ".4f") for key in (*shared, *measures)]
        cells += [_said(median(speeds), ",.0f") if speeds else ""]
        cells += [f"{seconds['training'] / whole:.1%}" if whole else "", duration(whole) if whole else ""]
        cells += [html.escape(str(read_json(run.path / "env.json").get("layout", "")))]
        rows.append(f"<tr><td>{html.escape(run.name)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>")
    heads = f"<th>{head[0]}</th>" + "".join(f'<th class="n">{html.escape(name)}</th>' for name in head[1:])
    return f'<h2>Last values</h2><div class="scroll"><table class="runs"><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _said(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _differences(runs: Sequence[LoggedRun]) -> str:
    """Returns the table of config keys that differ, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    differing = [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]
    if not differing:
        return "<h2>Settings</h2><p>The configs are the same but for run.dir.</p>"
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td>"
        + "".join(f"<td>{html.escape(str(run.config.get(key, 'unset')))}</td>" for run in runs)
        + "</tr>"
        for key in differing
    )
    return f'<h2>Settings that differ</h2><div class="scroll"><table><tr><th>key</th>{head}</tr>{rows}</table></div>'


def _charts(runs: Sequence[LoggedRun]) -> list[str]:
    """Returns the curves with a line per run: the usual numbers, and behind a fold all others."""
    keys = dict.fromkeys(key for run in runs for record in run.numbers for key in record)
    keys = {key: None for key in keys if key.split("/")[0] not in NOT_DRAWN or key.startswith("eval/")}
    usual = [key for name in CHARTS for key in keys if key.split("/")[0] == name and key != "memory_bytes"]
    usual += [key for key in keys if key.startswith("eval/")]
    sections = []
    if len({record["tokens"] / record["step"] for run in runs for record in run.numbers if "tokens" in record}) > 1:
        by_tokens = {run.name: run.points("loss", "tokens") for run in runs}
        usual_charts = [line_chart("Training loss by tokens", by_tokens, "tokens", titled("loss", keys)[1])]
    else:
        usual_charts = []
    usual_charts += [_chart(runs, key, keys) for key in usual]
    others = [chart for key in keys if key not in usual and (chart := _chart(runs, key, keys))]
    sections.append(f'<h2>Curves</h2><div class="charts">{"".join(usual_charts)}</div>')
    if others:
        sections.append(
            f"<details><summary>{short(len(others))} other numbers</summary>"
            f'<div class="charts">{"".join(others)}</div></details>'
        )
    return sections


def _chart(runs: Sequence[LoggedRun], key: str, keys: Collection[str]) -> str:
    name, _, part = key.partition("/")
    title, unit = titled(key, keys)
    if name == "eval":
        title, unit = f"Held out: {part}", part.rpartition("/")[2].replace("_", " ")
    series = {run.name: run.points(key) for run in runs}
    return line_chart(title, series, "step", unit, name not in WITHOUT_NOISE)
