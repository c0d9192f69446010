"""Takes the remedies out of messages of data runs, follows them to the letter, and tests that the error is gone."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import config_command
from configs.loader import ConfigError
from configs.tokenizer import TokenizerConfig
from data_pipeline import command
from data_pipeline.core import progress
from data_pipeline.provenance import document_samples, explain, recall, takedown, trace, verify, what_if
from data_pipeline.reading.ids import published_id
from data_pipeline.report import ledger_tables
from data_pipeline.tokens import tokenizer_training
from tests.data_runs import ROOT, data_config
from tests.shards import write_shard
from tests.small_sources import write_config

MIXTURE = "[mixture]\nseq_length = 32\nsamples = 40\nweights = { big = 1.0, small = 1.0 }\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a finished run's config with two sources, one of them small and with a number as its name."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, {"big": 40, "2024": 12}, MIXTURE.replace("small", "2024"))
    assert command.main([str(config)]) == 0
    return config


def outcome(main: Callable[[list[str]], int | None], args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command and returns the message with which it fails; "" if it succeeds."""
    capsys.readouterr()
    try:
        status = main(args)
    except ConfigError as error:
        return str(error)
    captured = capsys.readouterr()
    return captured.out + captured.err if status else ""


def found(pattern: str, message: str) -> re.Match[str]:
    match = re.search(pattern, message)
    assert match, message
    return match


def test_records_that_are_broken_are_allowed_as_the_message_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks 1 of 4 records of one source and 1 of 7 of the other; one remedy covers both."""
    config = write_config(tmp_path, {"big": 3, "other": 6}, "")
    for name in ("big", "other"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write("{\n")
    args = [str(config), "--until", "extract"]
    said = outcome(command.main, args, capsys)
    share = found(r"source big: 1 of 4 .*source other: 1 of 7 .*or raise (extract\.max_bad_share) to ([\d.]+)", said)
    assert outcome(command.main, [*args, f"{share[1]}={float(share[2]) - 0.002}"], capsys)
    assert not outcome(command.main, [*args, f"{share[1]}={share[2]}"], capsys)


def test_text_in_another_encoding_is_read_once_the_key_that_the_message_names_is_set(tmp_path: Path, capsys) -> None:
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю."
    for name, encoding in (("one", "cp1251"), ("two", "utf-16-le"), ("three", "shift_jis")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode(encoding))
        sources = {name: {"files": [f"{tmp_path}/{name}.txt"], "format": "text", "rules": {"any": "all"}}}
        args = [str(data_config(tmp_path / "data.toml", sources, rules={"all": {}})), "--until", "extract"]
        said = outcome(command.main, args, capsys)
        key = found(rf"set (sources\.{name}\.encoding), which is 'utf-8', to the one that they are in\n", said)[1]
        assert not outcome(command.main, [*args, f"{key}={encoding.replace('cp', 'windows-')}"], capsys)


@pytest.mark.parametrize("wrong", ["warc", "parquet"])
def test_a_source_of_another_format_is_read_once_its_format_is_corrected(tmp_path: Path, wrong: str, capsys) -> None:
    args = [str(write_config(tmp_path, {"big": 3, "other": 3}, "")), "--until", "extract"]
    said = outcome(command.main, [*args, f"sources.big.format={wrong}"], capsys)
    key = found(rf"repair the files or correct (sources\.big\.format), which is '{wrong}'\n", said)[1]
    assert not outcome(command.main, [*args, f"{key}=jsonl"], capsys)


def test_a_language_that_does_not_exist_is_refused_and_those_that_are_named_do(
    finished: Path, tmp_path: Path, capsys
) -> None:
    args = [str(finished), f"run.dir={tmp_path}/run", "--dry-run"]
    for wrong in ("english", "eng", "cn", "zh-Hans"):
        said = outcome(command.main, [*args, f"sources.big.rules={{'{wrong}'='big'}}"], capsys)
        told = rf"rules has '{wrong}', which is no language code of lid\.176; name one, such as (.+), or 'any' for all"
        named = found(told, said)[1].split(", ")
        for language in ("any", *named):
            assert not outcome(command.main, [*args, f"sources.big.rules={{{language}='big'}}"], capsys)


def test_stages_that_are_needed_are_all_named(finished: Path, tmp_path: Path, capsys) -> None:
    args = [str(finished), f"run.dir={tmp_path}/run"]
    said = found(
        r"by --stage (\S+), or all of it by (--until \w+)$", outcome(command.main, [*args, "--stage", "filter"], capsys)
    )
    assert said[1] == "extract,language,score"
    assert not outcome(command.main, [*args, "--stage", said[1]], capsys)
    assert not outcome(command.main, [*args, "--stage", "filter"], capsys)
    assert not outcome(command.main, [*args, *said[2].split()], capsys)
    said = found(r"--stage sieve: .* it has (.+)$", outcome(command.main, [*args, "--stage", "sieve"], capsys))
    assert not outcome(command.main, [*args, "--dry-run", "--stage", said[1].replace(", ", ",")], capsys)
    for option in (["--stage", "score"], ["--until", "score"]):
        assert "give one of them" in outcome(command.main, [*args, "--stage", "score", "--until", "score"], capsys)
        assert not outcome(command.main, [*args, *option], capsys)


@pytest.mark.parametrize("key", ["mixture", "mixture.stages.late"])
def test_a_mixture_of_too_little_text_is_mended_in_each_way(finished: Path, tmp_path: Path, key: str, capsys) -> None:
    """Follows each remedy; in stages it names the keys of the stage, which override those of the mixture."""
    folder = tmp_path / "run"
    shutil.copytree(finished.parent / "run", folder)
    stage = [] if key == "mixture" else [f"{key}.samples=400", f"{key}.max_epochs=2"]
    few = ["mixture.samples=400", "mixture.max_epochs=2", "mixture.weights={big=1.0,2024=1.0}", *stage]
    args = [str(finished), f"run.dir={folder}", *few]
    said = outcome(command.main, args, capsys)
    some = found(
        rf"2024 is to give .*?: at most ([\d.]+)% .*\. Lower ({key}\.samples) to ([\d,]+), lower the weight of 2024, "
        rf"raise ({key}\.max_epochs) to (\d+), or add",
        said,
    )
    share = float(some[1]) / 100
    for edits in (
        [f"{some[2]}={some[3].replace(',', '')}"],
        [f"{some[4]}={some[5]}"],
        [f"{key}.weights={{big={1 - share},2024={share}}}", f"{key}.epochs={{big=100}}"],
    ):
        assert not outcome(command.main, [*args, *edits, "--dry-run"], capsys), edits
    own = outcome(command.main, [*args, f"{key}.epochs={{2024=1}}"], capsys)
    some = found(rf"raise ({key}\.epochs\.2024) to (\d+)", own)
    assert not outcome(
        command.main, [*args, f"{key}.epochs={{2024={some[2]}}}", f"{key}.max_epochs=20", "--dry-run"], capsys
    )


def test_a_vocabulary_gets_the_size_that_the_message_says(tmp_path: Path) -> None:
    """Asks for a vocabulary that is too large for the text, and for one that is too small for its characters."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        english = json.loads(lines.readline())["text"][:8000]
    chinese = "".join(chr(0x4E00 + number) for number in range(900)) * 3

    def train(size: int) -> dict[str, Any]:
        settings = TokenizerConfig(vocab_size=size, character_coverage=1.0)
        return tokenizer_training.train([tmp_path / "a.jsonl.zst"], tmp_path / "out", settings)

    for text, size, remedy in (
        (english, 60_000, r"lower tokenizer\.vocab_size to (\d+), or give it more text"),
        (chinese, 400, r"raise tokenizer\.vocab_size to (\d+)"),
    ):
        write_shard(tmp_path / "a.jsonl.zst", [{"id": "a", "text": text, "metadata": {}}])
        with pytest.raises(ValueError) as refused:
            train(size)
        assert train(int(found(remedy, str(refused.value))[1]))
    write_shard(tmp_path / "a.jsonl.zst", [{"id": "a", "text": "ab ab", "metadata": {}}])
    with pytest.raises(
        ValueError, match=r"text; give it more text \(it says"
    ):  # no size that a config allows would work
        train(300)


def test_commands_are_told_what_to_do_about_a_run(finished: Path, tmp_path: Path, capsys) -> None:
    config = str(finished)
    none = f"run.dir={tmp_path}/none"
    for main, args in (
        (document_samples.main, [config, "--stage", "filter", "--kept"]),
        (recall.main, [config]),
        (what_if.main, [config, "word_count.min=9"]),
        (ledger_tables.main, [config]),
        (verify.main, [config]),
    ):
        told = found(r"run: trivium data run (\S+)", outcome(main, [*args, none], capsys))
        assert told[1] in ("CONFIG", config)
        assert not outcome(main, args, capsys)  # the commands work on the finished run
    said = found(r"those that do: (.+)$", outcome(document_samples.main, [config, "--stage", "plan"], capsys))
    for stage in said[1].split(", "):
        told = outcome(document_samples.main, [config, "--stage", stage], capsys)
        assert not told or re.search(r"dropped and cut nothing; see what it kept by --kept|switched off", told), told
        if "--kept" in told:
            assert not outcome(document_samples.main, [config, "--stage", stage, "--kept"], capsys)
    off = found(
        r"add a section \[(lines)\], and run it", outcome(document_samples.main, [config, "--stage", "lines"], capsys)
    )
    folder = tmp_path / "run"
    shutil.copytree(finished.parent / "run", folder)
    on = [config, f"run.dir={folder}", f"{off[1]}.max_copies=1"]
    assert not outcome(command.main, [*on, "--until", off[1]], capsys)
    assert not outcome(document_samples.main, [*on, "--stage", off[1], "--kept"], capsys)


@pytest.mark.parametrize(
    "file", ["extract/big/0000-0000.jsonl.zst", "tokenizer/tokenizer.model", "tokenizer/info.json", "dedup/stage.json"]
)
def test_a_damaged_file_that_a_stage_reads_is_made_anew_as_the_message_says(
    finished: Path, tmp_path: Path, file: str, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.parent / "run", folder)
    content = (folder / file).read_bytes()
    if file.endswith("stage.json"):
        damaged = b"{}"
    elif file.endswith(".json"):
        damaged = b"[" + b" " * (len(content) - 2) + b"]"  # of the same size
    else:
        half = len(content) // 2
        damaged = content[:half] + bytes([content[half] ^ 255]) * 8 + content[half + 8 :]
    (folder / file).write_bytes(damaged)
    args = [str(finished), f"run.dir={folder}", "mixture.samples=41"]
    args += ["rules.big.word_count.min=6"] if file.startswith("extract") else []
    said = " ".join(outcome(command.main, args, capsys).split())
    told = found(r"delete the folder (\S+) and run `trivium data run` again", said)[1]
    assert told == str(folder / file.split("/")[0])
    shutil.rmtree(told)
    assert not outcome(command.main, args, capsys)
    assert not outcome(verify.main, [str(folder)], capsys)


def test_a_damaged_file_is_made_anew_as_the_message_says(finished: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.parent / "run", folder)
    args = [str(finished), f"run.dir={folder}"]
    for stage in ("extract", "language", "dedup", "documents", "tokens", "plan"):
        file = next(
            path for path in sorted((folder / stage).rglob("*")) if path.is_file() and path.name != "stage.json"
        )
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        said = outcome(verify.main, [str(folder)], capsys)
        shutil.rmtree(found(r"delete the folder (\S+) and run `trivium data run` again", said)[1])
    assert not outcome(command.main, args, capsys)
    assert not outcome(verify.main, [str(folder)], capsys)


def test_a_trace_finds_its_plan_from_any_folder_and_when_all_has_moved(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    plan = json.loads((finished.parent / "run/plan/plan.json").read_text())
    assert plan
    from data_pipeline.mixture.rows import Plan

    entry: dict[str, Any] = {
        "first_step": 0,
        "first_sample": 0,
        "global_batch_size": 4,
        "data": Plan.open(finished.parent / "run/plan").fingerprint,
        "plan": "runs/data/plan",
        "config": {"run": {"dir": "runs/train"}},
    }
    for home in (tmp_path / "a", tmp_path / "b"):
        shutil.copytree(finished.parent / "run", home / "runs/data")
        training = home / "runs/train"
        training.mkdir()
        (training / "history.json").write_text(json.dumps([entry]))
        monkeypatch.chdir(tmp_path)
        assert not outcome(trace.main, ["--run", str(training), "--step", "3"], capsys)
        monkeypatch.chdir(training)
        assert not outcome(trace.main, ["--run", ".", "--step", "3"], capsys)
        shutil.move(home / "runs/data/plan", home / "elsewhere")
        said = outcome(trace.main, ["--run", str(training), "--step", "3"], capsys)
        assert found(r"name the folder where it is now by (--plan)$", said)
        shutil.copytree(home / "elsewhere", home / "runs/data/other")
        assert not outcome(trace.main, ["--run", ".", "--step", "3", "--plan", str(home / "runs/data/other")], capsys)
        steps = found(
            r"make steps (\d+) to (\d+), 4 each; give one of these steps",
            outcome(trace.main, ["--run", ".", "--step", "99", "--plan", "../data/other"], capsys),
        )
        for step in steps.groups():
            assert not outcome(trace.main, ["--run", ".", "--step", step, "--plan", "../data/other"], capsys)
        shutil.rmtree(home)


def test_arguments_are_right_once_they_are_as_the_message_says(finished: Path, tmp_path: Path, capsys) -> None:
    config, folder = str(finished), tmp_path / "run"
    said = outcome(recall.main, [config, "--similar", "80"], capsys)
    assert recall.main([config, "--similar", found(r"such as ([\d.]+)$", said)[1], "--dry-run"]) == 0
    assert f"{finished.parent}/run that deduplication saw" in " ".join(capsys.readouterr().out.split())
    show = [config, "--stage", "documents", "--kept"]
    for option in ("-n", "--chars"):
        said = outcome(document_samples.main, [*show, option, "0"], capsys)
        assert not outcome(document_samples.main, [*show, option, found(r"give one, e\.g\. (\d+)$", said)[1]], capsys)
    shutil.copytree(finished.parent / "run", folder)
    said = outcome(verify.main, [str(folder), "run.workers=1"], capsys)
    assert "overrides such as run.workers=1 belong to a config" in said and said.endswith("is a folder; leave them out")
    assert not outcome(verify.main, [str(folder)], capsys)
    (folder / "tokens/notes.txt").write_text("mine")
    stray = found(r"damaged: (\S+) is not a file of the stage tokens; move it elsewhere", outcome(
        verify.main, [str(folder)], capsys
    ))  # fmt: skip
    shutil.move(stray[1], tmp_path / "elsewhere.txt")
    assert not outcome(verify.main, [str(folder)], capsys)
    said = outcome(command.main, [str(tmp_path)], capsys)
    (tmp_path / "data.toml").write_text(finished.read_text())
    assert found(r"config (\S+) is a directory; name a \.toml file in it$", said)[1] == str(tmp_path)
    assert not outcome(command.main, [str(tmp_path / "data.toml"), "--dry-run"], capsys)
    said = outcome(config_command.main, ["--new", "data", "run.dir"], capsys)
    assert "so leave out 'run.dir'" in said and not outcome(config_command.main, ["--new", "data"], capsys)


def test_a_list_of_documents_is_right_once_it_is_as_the_message_says(finished: Path, tmp_path: Path, capsys) -> None:
    """Takes down an empty list, and an id that two records of the input share."""
    file = tmp_path / "list.txt"
    args = [str(finished), str(file), "--out", str(tmp_path / "out"), "--dry-run"]
    assert "give a file with a document id or an address on each line" in outcome(takedown.main, args, capsys)
    file.write_text("# nothing yet\n")
    assert "names no document; write an id or an address on each line" in outcome(takedown.main, args, capsys)
    file.write_text("nosuch\nbig/none\n")
    said = outcome(takedown.main, args[:-1], capsys)
    assert "no plan is written; list ids as `trivium data sample`" in said and not (tmp_path / "out").exists()
    file.write_bytes("big/3é\n".encode("latin-1"))
    assert "is not valid utf-8 at byte 5; convert it to UTF-8" in outcome(takedown.main, args, capsys)
    for encoding in ("utf-8-sig", "utf-16", "utf-8"):
        file.write_text("big/3\r\n", encoding=encoding)
        capsys.readouterr()
        assert takedown.main(args) == 0 and "not found" not in capsys.readouterr().out
    out = tmp_path / "taken"
    out.mkdir()
    said = outcome(takedown.main, [*args[:3], str(out)], capsys)
    assert "exists already; name a new folder" in said
    assert not outcome(takedown.main, [*args[:3], str(tmp_path / "new")], capsys)

    texts = tmp_path / "twice"
    texts.mkdir()
    config = write_config(
        texts, {"big": 30}, MIXTURE.replace(", small = 1.0", "").replace("samples = 40", "samples = 5")
    )
    lines = (texts / "big.jsonl").read_text().replace('"big/4"', '"big/3"').replace('"big/5"', '" big/5 "')
    lines = lines.replace('"big/6"', '"big/6\\n"')
    (texts / "big.jsonl").write_text(lines)
    assert not outcome(command.main, [str(config)], capsys)
    capsys.readouterr()
    assert takedown.main([str(config), str(file), "--out", str(texts / "out"), "--dry-run"]) == 0
    told = found(r"2 records share this id; list the documents to be removed by their own ids: (.+)$", " ".join(
        capsys.readouterr().out.split()
    ))[1].split(", ")  # fmt: skip
    file.write_text("\n".join(told))
    assert takedown.main([str(config), str(file), "--out", str(texts / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"(?m)^{re.escape(one)}: (train|heldout)/big, ", shown) for one in told) and len(told) == 2
    # White space around a line counts where it belongs to an id; an id with a line end is known by its hash.
    padded = [" big/5 ", "big/7", published_id("big/6\n")]
    file.write_text(f" big/5 \n\tbig/7  \r\n{padded[2]}\n big/5\n")
    assert takedown.main([str(config), str(file), "--out", str(texts / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"(?m)^{re.escape(one)}: (train|heldout)/big, ", shown) for one in padded)
    assert "\nbig/5: not found" in shown
    said = outcome(explain.main, [str(config), "--id", "big/3"], capsys)
    named = found(
        r"the id of 2 records, whose documents have their locations added to it; name one of them: (.+)", said
    )
    assert [one.strip("'") for one in named[1].split(", ")] == told
    assert not any(outcome(explain.main, [str(config), "--id", one], capsys) for one in told)


def test_a_run_dir_that_another_run_holds_is_free_after_it_and_another_one_is_at_once(
    finished: Path, tmp_path: Path, capsys
) -> None:
    args, run_dir = [str(finished), "--until", "extract"], finished.parent / "run"
    hold = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint(flush=True)\ninput()"
    )
    other = [sys.executable, "-c", hold, str(run_dir / ".lock")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout and process.stdout.readline()
        said = outcome(command.main, args, capsys)
        assert f"at work in {run_dir}; wait for it, or give this one its own run.dir" in said
        assert not outcome(command.main, [*args, f"run.dir={tmp_path}/own"], capsys)
        process.communicate("\n")
    assert not outcome(command.main, args, capsys)


def test_progress_is_in_the_unit_that_fits() -> None:
    assert progress._how_far(0, 0) == "at work"
    assert progress._how_far(12, 900) == "12 of 900 bytes"
    assert progress._how_far(1_200, 64_000) == "1.2 of 64.0 kB"
    assert progress._how_far(5_000_000, 3_000_000) == "3.0 of 3.0 MB"
    assert progress._how_far(10**9, 2 * 10**12) == "0.0 of 2.0 TB"


def test_packages_that_messages_say_to_install_are_pinned_and_extras_exist() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = (ROOT / "pyproject.toml").read_text()
    commands = 0
    for path in (ROOT / "data_pipeline").rglob("*.py"):
        for install in re.findall(r"pip install (-c constraints\.txt [^,;)\"]+)", path.read_text()):
            commands += 1
            for name in shlex.split(install)[2:]:
                extra = re.fullmatch(r"\.\[(\w+)\]", name)
                assert re.search(rf"(?m)^{extra[1]} = ", project) if extra else name in pinned, (path, name)
    assert commands >= 3
