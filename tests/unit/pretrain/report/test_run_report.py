"""Report of a run: complete and well-formed, also from damaged metrics, without anything loaded from a network."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.loader import ConfigError
from pages import short, ticks
from pretrain.logs.metrics import MetricsLog
from pretrain.logs.metrics_file import read_metrics
from pretrain.report.drawn_metrics import last_of_each_step
from pretrain.report.line_charts import line_chart, running_mean, thin
from pretrain.report.run_report import main, write
from tests.browser import Browser


class OpenTags(HTMLParser):
    """Parser that checks that tags nest, and collects attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def metrics(run_dir: Path, steps: int) -> None:
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss = math.nan if step == 3 else 9 / step
            record = {"step": step, "tokens": step * 100, "loss": loss, "loss_by_source": {"a": loss, "b": 1.0}}
            file.write(json.dumps({**record, "mfu": None, "grad_norm": 1.0}) + "\n")
            if step % 10 == 0:
                measures = {"loss": 5 / step, "bits_per_byte": 1 / step}
                file.write(json.dumps({"step": step, "eval": {"<a>": measures, "b": measures}}) + "\n")


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    metrics(tmp_path, 100)
    (tmp_path / "config.toml").write_text('dir = "<x>"\n')
    page = write(tmp_path).read_text(encoding="utf-8")
    tags = OpenTags()
    tags.feed(page)
    assert not tags.open and not tags.links
    assert "url(" not in page and "@import" not in page and "<script" not in page
    # charts: loss, loss by source, gradient norm; held-out loss and bits per byte
    assert page.count("<svg") == 5
    assert "100 steps, 10,000 tokens, training loss 0.0900." in page
    assert "&lt;a&gt;" in page
    assert "nan" not in page.lower()


def test_spikes_and_restarts_are_marked_and_sources_counted(browser: Browser, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1} for step in range(1, 21)]
    lines[6] |= {"loss_spike": 9.5, "skipped": True}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"began": 0.0, "updated": 10.0, "last_step": 20, "seconds": {"training": 8.0}}
    starts = [{**start, "first_step": 0, "last_step": 12}, {**start, "began": 20.0, "updated": 30.0, "first_step": 10}]
    (tmp_path / "time.json").write_text(json.dumps({"starts": starts}))
    lines = [{"step": step, "samples": [{"prompt": "<b>", "text": f"text {step}\n<i>"}]} for step in range(0, 30, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{")
    (tmp_path / "rewinds.json").write_text(json.dumps([{"step": 15, "to_step": 10, "samples": [1, 2]}]))
    (tmp_path / "env.json").write_text(json.dumps({"layout": "tp1 pp1 dp2 zero1", "parameters": 12345}))
    for step, ledger in ((10, {"a": 1, "b": 1}), (9, {"a": 9}), (20, {"<a>": 30.0, "b": 10.0})):
        manifest = tmp_path / "checkpoints" / f"step_{step}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"ledger": ledger}))
    page = write(tmp_path).read_text(encoding="utf-8")
    assert page.count("spike at step 7, skipped") == 2 and page.count("went on from step 10<") == 3
    assert page.count("went back from step 15 to step 10") == 2
    assert "red where there was a spike or a rewind (2) and grey where the run was started again (1)" in page
    assert "tp1 pp1 dp2 zero1" in page and "12,345" in page and "loss_spike" not in page and "Loss spike" not in page
    assert not browser.all_faults(tmp_path / "report.html")
    assert "<b>&lt;b&gt;</b>" in page and page.count("&lt;i&gt;</pre>") == 6
    assert "<pre>text 0\n" in page and "<pre>text 28\n" in page
    assert '&lt;a&gt;</td><td class="n">30</td><td class="n">75.00%</td>' in page


def test_of_many_layers_the_spread_is_drawn(tmp_path: Path) -> None:
    by_layer = {f"layer {i}": float(i) for i in range(80)}
    line = {"step": 1, "loss": 1.0, "attention_logit_by_layer": by_layer}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    page = write(tmp_path).read_text(encoding="utf-8")
    assert [f"{words} of 80: last {value} at 1<" in page for words, value in (
        ("highest", "79"), ("median", "39.5"), ("lowest", "0")
    )] == [True] * 3  # fmt: skip
    assert "layer 7" not in page


def test_runs_are_compared_by_settings_and_last_values(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "three" / "run"]
    for number, run in enumerate(runs, 1):
        run.mkdir(parents=True)
        metrics(run, 10 * number)
        (run / "config.toml").write_text(f'[run]\ndir = "{run}"\n[optimizer]\nlr = 0.{number}\neps = 1e-8\n')
    assert main(list(map(str, runs))) == 0
    path = Path(capsys.readouterr().out.strip())
    page = path.read_text(encoding="utf-8")
    assert path == runs[0] / "comparison.html"
    tags = OpenTags()
    tags.feed(page)
    assert not tags.open and not tags.links and "<script" not in page
    differing = "<tr><td>optimizer.lr</td><td>0.1</td><td>0.2</td><td>0.3</td></tr>"
    assert differing in page and "optimizer.eps" not in page and "run.dir" not in page
    assert "<td>two/run</td><td class=n>20</td><td class=n>2,000</td><td class=n>0.4500</td>" in page
    assert "Training loss by tokens" not in page  # all have as many tokens a step
    assert page.count("two/run</span>") == page.count("<figure>") == 8
    assert not browser.all_faults(path)
    with pytest.raises(ConfigError, match=r"no_run has no metrics\.jsonl"):
        main([str(runs[0]), str(tmp_path / "no_run")])
    (runs[1] / "config.toml").write_bytes(b"a = '\xe9'")  # a damaged config is compared as an empty one
    assert main(list(map(str, runs))) == 0 and "<td>optimizer.lr</td><td>0.1</td>" in path.read_text(encoding="utf-8")


def test_a_run_without_a_step_still_has_a_page(tmp_path: Path) -> None:
    assert "No step has been logged yet." in write(tmp_path).read_text()


def test_broken_lines_are_named_and_cost_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path).records == [{"step": 1, "loss": 2.0}] and not read_metrics(path).broken
    broken = [b'{"step": 1, "lo', b"[1]", b"\x00\x00\xff", b'{"loss": 1}']
    path.write_bytes(b"\n".join([broken[0], b'{"step": 2, "loss": 2.0}', *broken[1:], b'{"step": 3, "loss": 1.0}\n']))
    assert [record["step"] for record in read_metrics(path).records] == [2, 3]
    main([str(tmp_path)])
    said = "lines 1, 3, 4, 5 of metrics.jsonl are no JSON object with a step and left out"
    assert said in capsys.readouterr().err and said in (tmp_path / "report.html").read_text()

    log = MetricsLog(tmp_path, 2, tensorboard=False)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 0.5},
    ]
    assert (tmp_path / "metrics.broken").read_bytes().splitlines() == broken


@pytest.mark.parametrize("first", [0, 1])
def test_an_evaluation_before_the_first_step_is_logged_once(tmp_path: Path, first: int) -> None:
    """Goes on after a kill, before the first checkpoint or behind it; only the former evaluates at the start again."""
    lines = [{"step": 0, "eval": {}}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = MetricsLog(tmp_path, first, tensorboard=False)
    log.go_back(first)  # in the run itself it stays
    for line in lines[2 * first :]:
        log.write(line)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl").records == lines


def test_a_repeated_step_counts_once_with_its_later_values() -> None:
    records = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "loss": 1}, {"step": 2, "eval": {}}]
    assert last_of_each_step(records) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1, "eval": {}}]


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0.13, 0.92) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(5, 5)[0] < 5 < ticks(5, 5)[-1]
    for low, high in ((-3e-7, 2e-6), (1e9, 3e12), (0.999, 1.001)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and len(found) <= 8


def test_thinning_keeps_peaks_and_ends() -> None:
    points = [(float(x), 100.0 if x == 7_777 else math.sin(x)) for x in range(20_000)]
    thinned = thin(points)
    assert len(thinned) < 500
    assert (7777.0, 100.0) in thinned and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


def test_the_running_mean_follows_a_straight_line_exactly() -> None:
    points = [(float(x), 2.0 * x) for x in range(200)]
    assert [y for _, y in running_mean(points)] == pytest.approx([y for _, y in points])
    spike = [(float(x), 40.0 if x == 100 else 0.0) for x in range(200)]
    assert max(y for _, y in running_mean(spike)) == pytest.approx(40.0 / 11)


def test_charts_of_nothing_and_of_one_point() -> None:
    assert line_chart("t", {"a": [(1, math.inf)]}, "x", "y") == ""
    assert "stroke-width: 6" in line_chart("t", {"a": [(1, 2.0)]}, "x", "y")
    assert [short(value) for value in (12_345, 3.5e6, 0.0003, 2e-6, 1500)] == [
        "12.35k",
        "3.5M",
        "0.0003",
        "2e-06",
        "1500",
    ]


def test_a_directory_without_metrics_is_refused_until_one_with_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl; name a training run's directory"):
        main([str(tmp_path)])
    metrics(tmp_path, 5)
    assert main([str(tmp_path)]) == 0


def test_files_that_are_not_utf_8_cost_no_report(tmp_path: Path) -> None:
    metrics(tmp_path, 3)
    for name in ("config.toml", "samples.jsonl", "metrics.jsonl", "time.json", "rewinds.json"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"caf\xe9\n")
    assert "caf\\xe9" in write(tmp_path).read_text(encoding="utf-8")
