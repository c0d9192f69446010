"""`trivium report RUN_DIR`: draws a run's metrics.jsonl as one report.html that needs neither network nor server.

The page has curves of all numbers that were logged, with spikes and restarts marked, a table of held-out numbers by
source, what the run was trained on and by which ranks, where its time went, its history and its config. Several runs
are compared on one page, see `pretrain.report.run_comparison`. The trainer calls `write` at the end of every run. The
module imports no torch.
"""

import html
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from configs import run_history
from configs.cli import command_parser, entrypoint
from configs.differences import flat
from configs.files import write_atomic
from configs.loader import ConfigError
from pages import duration, page, short
from pretrain.logs import goodput, text_samples_file
from pretrain.logs.metrics_file import read_metrics
from pretrain.report import mask_page, run_comparison
from pretrain.report.drawn_metrics import (
    CHARTS,
    HELD_OUT,
    HELD_OUT_NOTES,
    NOT_DRAWN,
    WITHOUT_NOISE,
    last_of_each_step,
    read_json,
    titled,
)
from pretrain.report.line_charts import Mark, Points, line_chart
from pretrain.run import history

MOST_LINES = 12  # in a chart by layer; of more layers only the highest, the median and the lowest are drawn
SHOWN_SAMPLES = 6  # evaluations from which the report shows texts
SPIKY = ("loss", "grad_norm")  # charts on which spikes are marked
SPIKES = ("loss_spike", "grad_norm_spike", "skipped")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes RUN_DIR/report.html, or for several runs comparison.html in the first one's folder; prints its path."""
    parser = command_parser(
        prog="trivium report",
        description="Draws a training run's report.html from its metrics.jsonl; several runs are compared on one page.",
        example="trivium report runs/demo/pretrain",
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a directory with metrics.jsonl, or several"
    )
    run_dirs = parser.parse_args(argv).run_dirs
    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            if (run_dir / "ledger.json").is_file():
                raise ConfigError(
                    f"{run_dir} is a data run, whose report another command draws: trivium data report "
                    f"{run_dir}/config.toml run.dir={run_dir}"
                )
            raise ConfigError(f"{run_dir} has no metrics.jsonl; name a training run's directory, e.g. runs/demo/sft")
        if broken := read_metrics(run_dir / "metrics.jsonl").warning:
            print(f"warning: {run_dir}: {broken}", file=sys.stderr)
    if len(run_dirs) == 1:
        print(write(run_dirs[0]))
        return 0
    print(run_comparison.write(run_dirs))
    return 0


def write(run_dir: str | Path) -> Path:
    """Draws the metrics logged in `run_dir` so far into its report.html and returns that file's path.

    The page names broken lines of metrics.jsonl and is made from the others.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    records = metrics.records
    steps = last_of_each_step(records)
    evals = last_of_each_step(record for record in records if "eval" in record)
    marked = marks(steps, goodput.read(run_dir), _rewinds(run_dir))
    config = run_dir / "config.toml"
    body = [
        f"<h1>{html.escape(str(run_dir))}</h1>",
        f"<p>{html.escape(summary(steps))}</p>",
        f"<p>Warning: {html.escape(metrics.warning)}.</p>" if metrics.broken else "",
        _section("While training", charts(steps, marked), _legend(marked)),
        _section("Held out", eval_charts(evals, {key for record in steps for key in record})),
        _eval_table(evals),
        _samples(text_samples_file.read(run_dir)),
        _ranks(run_dir),
        _composition(run_dir),
    ]
    body += [mask_page.section(run_dir), _time(goodput.read(run_dir)), _history(run_history.read(run_dir))]
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8", errors="backslashreplace"))
        body.append(f"<h2>Config</h2><details><summary>config.toml, resolved</summary><pre>{text}</pre></details>")
    path = run_dir / "report.html"
    write_atomic(
        path, page(f"{os.path.basename(os.path.abspath(run_dir))}: Trivium run", body, mask_page.STYLE).encode()
    )
    return path


def summary(steps: list[dict[str, Any]]) -> str:
    """Returns one sentence on the last logged step: its number, the tokens trained on, and the loss or reward."""
    last = next((record for record in reversed(steps) if "loss" in record), None)
    if last is None:
        return "No step has been logged yet."
    parts = [f"{last['step']:,} steps"]
    if "tokens" in last:
        parts.append(f"{last['tokens']:,} tokens")
    # The value of a policy-gradient loss does not measure progress; the reward does.
    parts.append(f"mean reward {last['reward']:.3f}" if "reward" in last else f"training loss {last['loss']:.4f}")
    return ", ".join(parts) + "."


def _rewinds(run_dir: Path) -> list[tuple[int, int]]:
    """Returns (step, step that training went back to) of each rewind, as the run keeps them in rewinds.json."""
    try:
        found = json.loads((run_dir / "rewinds.json").read_text(encoding="utf-8"))
        return [(int(one["step"]), int(one["to_step"])) for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def marks(
    steps: list[dict[str, Any]], starts: Sequence[goodput.StartRecord], rewinds: Sequence[tuple[int, int]] = ()
) -> list[Mark]:
    """Returns a mark for each spike, each rewind, and each start but the first."""
    found = [Mark(step, "spike", f"went back from step {step} to step {to_step}") for step, to_step in rewinds]
    found += [
        Mark(one.first_step, "restart", f"went on from step {one.first_step}" if one.first_step else "began again")
        for one in starts[1:]
    ]
    for record in steps:
        if any(key in record for key in SPIKES):
            skipped = ", skipped" if "skipped" in record else ""
            found.append(Mark(record["step"], "spike", f"spike at step {record['step']}{skipped}"))
    return found


def _legend(marked: Sequence[Mark]) -> str:
    """Returns a sentence that explains the kinds of marks in the charts."""
    counts = {kind: sum(mark.kind == kind for mark in marked) for kind in ("spike", "restart")}
    words = {
        "spike": "red where there was a spike or a rewind",
        "restart": "grey where the run was started again",
    }
    said = " and ".join(f"{words[kind]} ({count})" for kind, count in counts.items() if count)
    return f"<p>Dashed lines: {said}.</p>" if said else ""


def charts(steps: list[dict[str, Any]], marked: Sequence[Mark] = ()) -> list[str]:
    """Draws a chart for every key of the records; a dict of numbers (loss by source) becomes one chart."""
    keys = dict.fromkeys(key for record in steps for key in record if key not in NOT_DRAWN)
    drawn = []
    for key in sorted(keys, key=lambda key: (list(CHARTS).index(key) if key in CHARTS else len(CHARTS), key)):
        title, unit = titled(key, keys)
        own = [mark for mark in marked if mark.kind != "spike" or key in SPIKY]
        drawn.append(line_chart(title, _series(steps, key), "step", unit, key not in WITHOUT_NOISE, own))
    return drawn


def eval_charts(evals: list[dict[str, Any]], keys: Collection[str] = ()) -> list[str]:
    """Draws a chart of each held-out measure (loss, bits per byte, accuracy …) with a line per source.

    `keys` are those of the run's steps, which say what its loss is.
    """
    by_measure: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in evals:
        for source, measures in record["eval"].items():
            for measure, value in (measures if isinstance(measures, dict) else {source: measures}).items():
                if _is_number(value):
                    by_measure.setdefault(measure, {}).setdefault(source, []).append((record["step"], value))
    titles = {"loss": ("Held-out loss", titled("loss", keys)[1]), **HELD_OUT}
    found = []
    for measure, series in by_measure.items():
        words = measure.replace("_", " ")
        title, unit = titles.get(measure, (f"Held-out {words}", words))
        found.append(line_chart(title, series, "step", unit))
    return found


def _series(steps: list[dict[str, Any]], key: str) -> dict[str, Points]:
    series: dict[str, list[tuple[float, float]]] = {}
    for record in steps:
        value = record.get(key)
        for name, number in value.items() if isinstance(value, dict) else [(key, value)]:
            if _is_number(number):
                series.setdefault(name, []).append((record["step"], number))
    return _spread(series) if key.endswith("_by_layer") and len(series) > MOST_LINES else dict(series)


def _spread(series: Mapping[str, Points]) -> dict[str, Points]:
    """Returns the highest, the median and the lowest of many lines at each step."""
    values: dict[float, list[float]] = {}
    for points in series.values():
        for step, value in points:
            values.setdefault(step, []).append(value)
    found: dict[str, Callable[[list[float]], float]] = {"highest": max, "median": median, "lowest": min}
    return {
        f"{name} of {len(series)}": [(step, of(values[step])) for step in sorted(values)] for name, of in found.items()
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _section(title: str, figures: Sequence[str], words: str = "") -> str:
    figures = [figure for figure in figures if figure]
    return f'<h2>{title}</h2>{words}<div class="charts">{"".join(figures)}</div>' if figures else ""


def _eval_table(evals: list[dict[str, Any]]) -> str:
    if not evals or not all(isinstance(measures, dict) for measures in evals[-1]["eval"].values()):
        return ""
    first, last = evals[0], evals[-1]
    measures = list(dict.fromkeys(name for values in last["eval"].values() for name in values))
    head = "".join(f'<th class="n">{html.escape(name.replace("_", " "))}</th>' for name in measures)
    rows = []
    for source, values in last["eval"].items():
        cells = []
        for name in measures:
            before = first["eval"].get(source, {}).get(name)
            then = f"{short(before)} → " if first is not last and _is_number(before) else ""
            cells.append(f'<td class="n">{then}{short(values[name]) if _is_number(values.get(name)) else ""}</td>')
        rows.append(f"<tr><td>{html.escape(source)}</td>{''.join(cells)}</tr>")
    when = f"step {first['step']} → step {last['step']}" if first is not last else f"step {last['step']}"
    table = f'<div class="scroll"><table><tr><th>source</th>{head}</tr>{"".join(rows)}</table></div>'
    notes = "".join(f"<p>{words}</p>" for measure, words in HELD_OUT_NOTES.items() if measure in measures)
    return f"<p>{when}</p>{table}{notes}"


def _time(starts: Sequence[goodput.StartRecord]) -> str:
    """Returns a table of where the time of all starts went."""
    if not starts:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(kind)}</td><td class="n">{duration(seconds)}</td><td class="n">{share:.1%}</td></tr>'
        for kind, seconds, share in goodput.table(starts)
    )
    said = "1 start" if len(starts) == 1 else f"{len(starts)} starts"
    return (
        f"<h2>Where the time went</h2><p>{said}; goodput is the share of steps that count.</p>"
        '<div class="scroll"><table><tr><th></th><th class="n">time</th><th class="n">share</th></tr>'
        f"{rows}</table></div>"
    )


def _samples(found: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    """Returns what the model wrote after each prompt, at up to SHOWN_SAMPLES evaluations from first to last."""
    parts = []
    for prompt, texts in found.items():
        last = len(texts) - 1
        chosen = sorted({round(last * at / (SHOWN_SAMPLES - 1)) for at in range(SHOWN_SAMPLES)})
        rows = "".join(
            f'<tr><td class="n">{step:,}</td><td><pre>{html.escape(text)}</pre></td></tr>'
            for step, text in (texts[at] for at in chosen)
        )
        parts.append(
            f"<p><b>{html.escape(prompt)}</b></p>"
            f'<div class="scroll"><table><tr><th class="n">step</th><th>continuation</th></tr>{rows}</table></div>'
        )
    return "<h2>What it wrote</h2>" + "".join(parts) if parts else ""


def _ranks(run_dir: Path) -> str:
    """Returns a table of what computed the run: layout, device, versions."""
    facts = read_json(run_dir / "env.json")
    rows: dict[str, Any] = {key: facts[key] for key in ("layout", "device", "platform", "python") if key in facts}
    rows |= {"parameters": f"{facts['parameters']:,}"} if isinstance(facts.get("parameters"), int) else {}
    rows |= facts.get("packages", {})
    cells = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(v))}</td></tr>" for key, v in rows.items())
    return f'<h2>Layout and machine</h2><div class="scroll"><table>{cells}</table></div>' if rows else ""


def composition(run_dir: Path) -> dict[str, float]:
    """Returns the number of tokens of each source that were trained on, from the newest checkpoint's manifest."""
    folders = (run_dir / "checkpoints").glob("step_*/manifest.json")
    newest = max(folders, key=lambda path: int(path.parent.name.split("_")[1]), default=None)
    ledger = read_json(newest).get("ledger", {}) if newest else {}
    return {name: tokens for name, tokens in ledger.items() if _is_number(tokens)}


def _composition(run_dir: Path) -> str:
    """Returns a table of the sources that the run was trained on."""
    found = composition(run_dir)
    whole = sum(found.values())
    if len(found) < 2 or not whole:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{tokens:,.0f}</td><td class="n">{tokens / whole:.2%}</td>'
        f'<td><div class="share" style="width: {120 * tokens / whole:.0f}px"></div></td></tr>'
        for name, tokens in found.items()
    )
    return (
        "<h2>What it was trained on</h2><p>Tokens that counted in the loss, up to the newest checkpoint.</p>"
        '<div class="scroll"><table><tr><th>source</th><th class="n">tokens</th><th class="n">share</th><th></th></tr>'
        f"{rows}</table></div>"
    )


def _history(data_spans: Sequence[history.DataSpan]) -> str:
    """Returns a table of the data spans, each with its whole config behind a fold."""
    if not data_spans:
        return ""
    rows = []
    for one, sentence in zip(data_spans, history.describe_spans(data_spans), strict=True):
        settings = "\n".join(f"{key} = {value}" for key, value in flat(one.get("config", {})).items())
        rows.append(
            f"<tr><td>{html.escape(sentence)}</td><td><details><summary>all settings</summary>"
            f"<pre>{html.escape(settings)}</pre></details></td></tr>"
        )
    return f'<h2>Data and settings</h2><div class="scroll"><table>{"".join(rows)}</table></div>'


if __name__ == "__main__":
    entrypoint(main)
