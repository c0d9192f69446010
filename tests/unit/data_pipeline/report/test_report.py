"""The page of a real small run: whole, well-formed, fetching nothing, with the ledger's and the tables' own numbers."""

import gzip
import itertools
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline import run
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.provenance import recall
from data_pipeline.report import ledger_tables as report
from data_pipeline.report import measures
from data_pipeline.report import page_samples as samples
from data_pipeline.report.page import chain_of
from data_pipeline.scores.filtering import broken

ROOT = Path(__file__).parents[4]
CONFIG = """
[run]
dir = "{folder}/run"
workers = 1
shard_bytes = 20000

[sources.prose]
files = ["{folder}/prose.jsonl"]
format = "jsonl"
rules = {{ en = "english" }}

[sources.code]
files = ["{folder}/code.jsonl"]
format = "jsonl"
rules = {{ any = "code" }}

[extract]
max_bad_share = 0.1

[rules.english]
stop_words = ["the", "of", "and", "to"]
language_score = {{ min = 0.5 }}
word_count = {{ min = 50, max = 100000 }}
mean_word_length = {{ min = 4.5 }}
stop_word_count = {{ min = 2 }}

[rules.code]
max_line_length = {{ max = 100 }}

[decontaminate]
files = ["{folder}/evaluation.jsonl"]

[lines]
max_copies = 1

[pii]

[tokenizer]
vocab_size = 400

[heldout]
share = 0.1

[mixture]
seq_length = 64
samples = 100
weights = {{ prose = 3.0, code = 1.0 }}

[alarms]
min_documents = 10
max_drop_share = 0.9
"""
SCRIPT = "<script>alert('&')</script> </svg> "
_DROPPING = ("extract", "language", "filter", "dedup", "decontaminate", "documents")
MAIL = "jane.roe@acme-corp.com"


def records(source: str, step: int) -> list[dict[str, Any]]:
    with gzip.open(ROOT / f"data/demo/{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][::step]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: texts of which four are copies, one is short, one French, one line broken."""
    folder = tmp_path_factory.mktemp("report")
    prose = [dict(record, text=record["text"][:3000]) for record in records("english", 9)]
    copied = SCRIPT + prose[0]["text"]
    prose += [{"id": f"copy-{number}<b>", "text": copied} for number in range(4)]
    prose.append({"id": "short", "text": f"Write to {MAIL} about the roads of the town and the ships in the harbour."})
    prose.append({"id": "letter", "text": f"Write to {MAIL} about it.\n{prose[5]['text'][1000:2500]}"})
    prose.append(
        {"id": "french", "text": "Nous sommes arrivés hier soir dans la ville, et il faisait déjà nuit. " * 20}
    )
    question = " ".join(prose[3]["text"].split()[100:140])
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": question}) + "\n", encoding="utf-8")
    lines = [json.dumps(record) for record in prose]
    (folder / "prose.jsonl").write_text("\n".join([*lines, '{"text": "cut']) + "\n", encoding="utf-8")
    code = [dict(record, text=record["text"][:2000]) for record in records("code", 6)]
    (folder / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in code), encoding="utf-8")
    path = folder / "data.toml"
    path.write_text(CONFIG.format(folder=folder))
    assert run.main([str(path)]) == 0
    assert report.main([str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def run_dir(config: Path) -> Path:
    return config.parent / "run"


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ledger(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "ledger.json").read_text(encoding="utf-8"))


class Tags(HTMLParser):
    """Checks that tags nest, collects attributes that could fetch something, and cells of tables by row."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1][-1] += data
        elif self.open[-1:] == ["h2"]:
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.links
    assert not tags.names & {"script", "link", "img", "iframe", "object", "base"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        root = ET.fromstring(drawing)  # an error names the place where it is not well-formed
        for element in root.iter():
            for name, value in element.attrib.items():
                assert "nan" not in value and "inf" not in value, (name, value)
                if name in ("width", "height"):
                    assert float(value) >= 0


def test_text_of_documents_is_masked_and_escaped(page: str) -> None:
    assert MAIL not in page and "&lt;EMAIL&gt;" in page
    assert "alert(" in page and "<script" not in page  # shown, as text
    assert "copy-" in page and "<b>;" not in page and re.search(r"copy-\d&lt;b&gt;", page)


def test_stages_stand_in_the_table_with_the_ledgers_numbers(page: str, ledger: dict[str, Any]) -> None:
    tags = Tags()
    tags.feed(page)
    rows = {row[0]: row for row in tags.rows if len(row) == 10}
    for stage in ledger["stages"]:
        total = stage["total"]
        lost = [sum(amount[unit] for amount in total["dropped"].values()) for unit in ("documents", "bytes")]
        expected = [total["in"]["documents"], total["kept"]["documents"], lost[0]]
        expected += [total["in"]["bytes"], total["kept"]["bytes"], lost[1], total["passed_on"]["bytes"]]
        assert [int(cell.replace(",", "")) for cell in rows[stage["name"]][1:8]] == expected
    watched = [stage for stage in ledger["stages"] if stage["name"] in _DROPPING]
    assert all(stage["total"]["dropped"] for stage in watched)
    for stage in watched:
        for reason, amount in stage["total"]["dropped"].items():
            said = (
                f"{amount['documents']:,} (" if amount["documents"] else f"{amount['bytes']:,} bytes out of documents"
            )
            assert f"<b>{reason}</b> {said}" in page


def test_the_flow_goes_on_from_stage_to_stage_without_a_gap(page: str, ledger: dict[str, Any]) -> None:
    chain = chain_of({stage["name"]: stage for stage in ledger["stages"]})
    names = [stage["name"] for stage in chain]
    *before, last, tokens, plan = names
    assert before == ["extract", "language", "score", "filter", "dedup", "decontaminate"]
    assert (last, tokens, plan) == ("documents", "tokens", "plan")
    for one, after in itertools.pairwise(chain):
        assert one["total"]["passed_on"] == after["total"]["in"]
    found = [int(number.replace(",", "")) for number in re.findall(r"<title>([\d,]+) go on</title>", page)]
    assert found == [stage["total"]["passed_on"][unit] for unit in ("documents", "bytes") for stage in chain]


def test_score_histograms_count_what_the_rules_count(run_dir: Path) -> None:
    rules = load(DataConfig, run_dir / "config.toml").rules
    drawn = {(one.rules, one.score): one for one in measures.scores(run_dir, rules)}
    assert set(drawn) == {(name, score) for name, one in rules.items() for score in one.bounds()}
    for stage in ("language", "score"):
        table = pa.concat_tables([read_table(run_dir / stage, shard) for shard in shards_of(run_dir / stage)])
        for (name, score), one in drawn.items():
            if (score == "language_score") == (stage == "language"):
                mine = table.filter(pa.array([set_name == name for set_name in table["rules"].to_pylist()]))
                reasons = broken(mine, {name: rules[name]})
                outside = sum(
                    reasons[f"{score}_{side}"].sum() for side in ("min", "max") if f"{score}_{side}" in reasons
                )
                assert one.outside.sum() == outside
                assert one.inside.sum() + one.outside.sum() + one.unknown == mine.num_rows
    assert drawn["english", "word_count"].outside.sum() >= 1
    assert drawn["english", "mean_word_length"].outside.sum() > 1


def test_languages_and_sizes_count_every_document(run_dir: Path, ledger: dict[str, Any]) -> None:
    stages = {stage["name"]: stage for stage in ledger["stages"]}
    found = measures.documents(run_dir, "decontaminate")
    extracted, kept = stages["extract"]["total"]["passed_on"], stages["language"]["total"]["kept"]
    assert [sum(column) for column in zip(*found.languages.values(), strict=True)] == [
        extracted["documents"],
        extracted["bytes"],
        kept["documents"],
    ]
    assert found.languages["fr"][0] == 1
    for source in ("prose", "code"):
        assert found.before[source].sum() == stages["extract"]["sources"][source]["passed_on"]["documents"]
        assert found.after[source].sum() == stages["decontaminate"]["sources"][source]["kept"]["documents"]
        assert (found.after[source] <= found.before[source]).all()


def test_the_largest_cluster_is_shown_with_its_text(run_dir: Path, page: str, ledger: dict[str, Any]) -> None:
    largest, by_size = measures.clusters(run_dir, count=1, shown=2)
    # The copies, and the text that they add a line to.
    assert largest[0].size == max(by_size) >= 4
    members = largest[0].members.rows()
    assert len(members) == 2 and all("alert(" in row["head"] or row["id"] for row in members)
    dropped = next(stage for stage in ledger["stages"] if stage["name"] == "dedup")["total"]["dropped"]
    assert sum((size - 1) * count for size, count in by_size.items()) == sum(
        amount["documents"] for amount in dropped.values()
    )
    assert f"cluster {largest[0].number}: {largest[0].size} documents" in page


def test_a_sample_depends_on_nothing_but_the_ids() -> None:
    rows = [{"source": "s", "id": str(number)} for number in range(1000)]
    forward, backward = samples.Smallest(5), samples.Smallest(5)
    for row in rows:
        forward.offer(row)
    for row in reversed(rows):
        backward.offer(row)
    assert forward.rows() == backward.rows()
    assert len(forward.rows()) == 5 and forward.rows() != rows[:5]
    assert len({int(row["id"]) // 250 for row in forward.rows()}) > 1  # from all over


def test_samples_are_dropped_for_their_reason(run_dir: Path) -> None:
    drawn = samples.drop_samples(run_dir, "filter", 3)
    table = pa.concat_tables([read_table(run_dir / "filter", shard) for shard in shards_of(run_dir / "filter")])
    verdicts = {(row["source"], row["id"]): row["verdict"] for row in table.to_pylist()}
    assert set(drawn) == set(verdicts.values()) - {""}
    for reason, rows in drawn.items():
        assert 0 < len(rows) <= 3 and all(verdicts[row["source"], row["id"]] == reason for row in rows)
    assert set(samples.drop_samples(run_dir, "extract", 3)) == {"bad_json"}
    (matched,) = samples.drop_samples(run_dir, "decontaminate", 3)["contaminated"]
    assert matched["context"] and matched["source"] == "prose"


def test_samples_say_which_score_broke_which_threshold(run_dir: Path, page: str) -> None:
    dropped = samples.drop_samples(run_dir, "filter", 3)
    rules = load(DataConfig, run_dir / "config.toml").rules
    told = 0
    for reason, rows in dropped.items():
        score, _, side = reason.rpartition("_")
        for row in rows:
            said = samples.broken_rule(run_dir, row, rules)
            name = said.partition("rules.")[2].split()[0]
            limit = getattr(rules[name].bounds()[score], side)
            value = float(said.split(" is ")[1].split(",")[0])
            assert value < limit if side == "min" else value > limit
            assert said.endswith(f"wants {'at least' if side == 'min' else 'at most'} {limit:g}")
            told += said in page
    assert told > 0


def test_a_narrow_screen_has_the_flow_as_a_list(page: str, ledger: dict[str, Any]) -> None:
    lists = re.findall(r'<div class="narrow">(.*?)</div></figure>|<div class="narrow">(.*?)</figure>', page)
    assert len(lists) == 2
    shown = "".join(lists[0])
    for stage in chain_of({one["name"]: one for one in ledger["stages"]}):
        assert f"<b>{stage['name']}</b> {stage['total']['in']['documents']:,} in" in shown
    assert "@media (max-width: 760px) { .wide { display: none; } .narrow { display: block; }" in page


def test_samples_of_cuts_show_what_went_and_never_personal_data(run_dir: Path, page: str) -> None:
    drawn = samples.cut_samples(run_dir, ["lines", "pii"], 3)
    assert set(drawn) == {"duplicate_line", "pii_email", "pii_ip"}
    lines = {
        json.loads(line)["id"]: json.loads(line)["text"]
        for name in ("prose", "code")
        for line in (run_dir.parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        if not line.endswith("cut")
    }
    for row in drawn["duplicate_line"]:
        shown = row["excerpt"]
        assert shown.gone and not shown.stands
        if MAIL not in lines[row["id"]] and " […] " not in shown.gone:
            assert f"{shown.before}{shown.gone}{shown.after}" in lines[row["id"]]
    mails = samples.cut_samples(run_dir, ["pii"], 1000)["pii_email"]  # others are in code
    (mail,) = [one for one in mails if one["id"] == "letter"]
    assert str(mail["excerpt"]).startswith("Write to [[<EMAIL>]] about")
    assert "<ins>&lt;EMAIL&gt;</ins>" in page and "<del>" in page and MAIL not in page


def test_mixture_and_bytes_per_token(run_dir: Path, page: str, ledger: dict[str, Any]) -> None:
    tags = Tags()
    tags.feed(page)
    rows = {row[0]: row for row in tags.rows if len(row) == 9}
    tokens = next(stage for stage in ledger["stages"] if stage["name"] == "tokens")
    for name, counts in tokens["sources"].items():
        assert int(rows[name][3].replace(",", "")) == counts["notes"]["tokens"]
        assert float(rows[name][4]) == pytest.approx(counts["kept"]["bytes"] / counts["notes"]["tokens"], abs=5e-4)
    assert [rows[name][5:7] for name in ("prose", "code", "all")] == [
        ["75", "75.00%"],
        ["25", "25.00%"],
        ["100", "100.00%"],
    ]


def test_a_run_that_is_partly_done_and_then_has_a_mixture_in_stages(config: Path, tmp_path: Path) -> None:
    here = f"run.dir={tmp_path}/run"
    headings: set[str] = set()
    for until, more in (
        ("extract", {"Stages", "Config"}),
        ("score", {"Languages", "Sizes of documents"}),
        ("filter", {"Why documents were dropped", "Scores and thresholds"}),
        ("dedup", {"Duplicates"}),
        ("documents", set()),
        ("tokens", set()),
    ):
        assert run.main([str(config), here, "--until", until]) == 0
        assert report.main([str(config), here]) == 0
        tags = Tags()
        tags.feed((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        headings |= more
        assert headings <= set(tags.headings), until
        assert "Tokens and mixture" not in tags.headings
    late = "mixture.stages.late={samples=20, seq_length=128, weights={code=1.0}}"
    assert run.main([str(config), here, "mixture.stages.general={}", late]) == 0
    assert report.main([str(config), here]) == 0
    tags = Tags()
    tags.feed((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    rows = [row[:3] for row in tags.rows if len(row) == 8 and row[0]]
    assert rows[-3:] == [["prose", "75", "75.00%"], ["code", "25", "25.00%"], ["code", "20", "100.00%"]]
    assert [row[5] for row in tags.rows if len(row) == 9 and row[0] in ("prose", "code", "all")][-3:] == [
        "45",
        "75",
        "120",
    ]


def test_the_page_is_the_runs_whatever_the_file_says_now(config: Path, run_dir: Path, page: str) -> None:
    assert report.main([str(config), "rules.english.word_count.min=10"]) == 0
    assert (run_dir / "report.html").read_text(encoding="utf-8") == page


def test_a_directory_without_a_run_is_one_sentence(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert report.main([str(config), f'run.dir="{tmp_path}"']) == 1
    assert "no data run has finished" in capsys.readouterr().err


def test_no_word_of_the_ledger_is_cut_in_80_columns(
    config: Path, ledger: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert report.main([str(config)]) == 0
    shown = capsys.readouterr().out.partition("/drops/")[0]
    assert "…" not in shown and max(len(line) for line in shown.splitlines() if line[:1] in "┏┃┡│└") <= 80
    words = set(re.findall(r"[\w/]+", shown))
    for stage in ledger["stages"]:
        reasons = [name for name, amount in stage["total"]["dropped"].items() if amount["documents"]]
        assert {stage["name"], *reasons[: 1 if len(reasons) < 4 else 0]} <= words


def test_alarms_stand_in_ledger_output_and_page_and_fail_if_asked(config: Path, run_dir: Path, capsys: Any) -> None:
    missed = ["alarms.expected={ short = 'word_count_min', french = 'word_count_min' }"]
    expected = "document 'french' should be dropped for word_count_min, and was dropped for language_unexpected"
    assert run.main([str(config), *missed]) == 0
    assert f"alarm: {expected}" in capsys.readouterr().out
    assert json.loads((run_dir / "ledger.json").read_text())["alarms"] == [expected]
    assert report.main([str(config)]) == 0
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<strong>1 alarm</strong>" in page and "document &#x27;french&#x27; should" in page
    assert run.main([str(config), *missed, "alarms.fail=true"]) == 1
    assert run.main([str(config), "alarms.fail=true"]) == 0  # nothing is left that alarms
    assert json.loads((run_dir / "ledger.json").read_text())["alarms"] == []


def test_recall_is_printed_by_source(config: Path, capsys: Any) -> None:
    assert recall.main([str(config), "--similar", "0.8"]) == 0
    said = capsys.readouterr().out
    (prose,) = [line.split("│")[1:-1] for line in said.splitlines() if "│ prose" in line]
    assert int(prose[1]) >= 10 and float(prose[3]) == 1.0  # five documents are nearly the same: ten pairs
    assert recall.main([str(config), "--similar", "1.0"]) == 0
    assert "dropped and not so similar to what stays" in capsys.readouterr().out  # near-duplicates are not equal
    with pytest.raises(ConfigError, match="--similar 'much'"):
        recall.main([str(config), "--similar", "much"])
