"""`trivium config`: the reference lists every key with its real type and default, and the printed configs work."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cli
from configs.config_command import main
from configs.kinds import SCHEMAS, schema_of
from configs.loader import ConfigError, plain, validate
from configs.reference import AS, LEFT_OUT, NAME, REQUIRED, explain, keys_of
from configs.starters import starter
from data_pipeline.command import main as data_run

ROOT = Path(__file__).resolve().parents[3]
# Optional sections, which a starter config leaves out, with their required keys.
ADDED: dict[str, dict[str, Any]] = {
    "data": {
        "decontaminate": {"files": ["x"]},
        "lines": {},
        "substrings": {},
        "pii": {},
        "canaries": {"one": {"source": "english", "text": "x", "reason": "kept"}},
        "alarms": {"stages": {"filter": {}}},
    },
    "tokenizer": {},
    "pretrain": {
        "init": {"run": "x"},
        "model": {
            "moe": {"num_experts": 4},
            "position": {"scaling": {"kind": "linear"}},
            "layer_pattern": ["local"],
            "kinds": {"local": {}},
        },
    },
    "sft": {},
    "rm": {},
    "dpo": {},
    "ppo": {},
    "grpo": {},
    "distill": {},
    "sample": {},
    "recipe": {},
    "export": {},
    "launch": {},
}
KINDS = {
    "train": "pretrain",
    "sft": "sft",
    "rm": "rm",
    "dpo": "dpo",
    "ppo": "ppo",
    "grpo": "grpo",
    "distill": "distill",
    "sample": "sample",
    "export": "export",
    "tokenizer train": "tokenizer",
} | {"recipe run": "recipe"}
NO_CONFIG = ("data trace", "data train-classifier", "data verify")
NAMES = {
    "sources": "english",
    "rules": "prose",
    "canaries": "one",
    "alarms.stages": "filter",
    "model.kinds": "local",
} | {"stages": "sft"}
DELTA = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8}
LATENT = {"kv_rank": 8, "nope_head_dim": 8, "rope_head_dim": 8, "v_head_dim": 8}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(other[key], dict)}
    return one | other | both


def paths(schema: dict[str, Any], node: dict[str, Any], path: str) -> Iterator[str]:
    """Returns the dotted names of all leaves of a JSON schema, which pydantic derives independently of `configs`."""
    options = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
    for option in options:
        if "$ref" in option:
            option = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
        if "properties" in option:
            for key, inner in option["properties"].items():
                yield from paths(schema, inner, f"{path}.{key}" if path else key)
        elif isinstance(option.get("additionalProperties"), dict) and "propertyNames" not in option:
            yield from paths(schema, option["additionalProperties"], f"{path}.{NAME}")
        else:
            yield path


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_reference_names_every_key(kind: str) -> None:
    tree = schema_of(kind).model_json_schema()
    leaves = set(paths(tree, tree, ""))
    assert len(leaves) > 10
    for leaf in leaves:
        said = explain(kind, leaf)
        bound = leaf.rpartition(".")[0]
        assert said.startswith((f"{leaf} = ", f"{leaf}.{NAME} = ", f"{bound} = {{ min = number, max = number }}")), leaf


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_defaults_shown_are_the_real_ones(kind: str) -> None:
    """Compares a config without a key with one that has the key set to the default that the reference shows."""
    schema = schema_of(kind)
    base = merged(tomllib.loads(starter(kind)), ADDED[kind])
    whole = base | (
        {"rules": {"prose": {}}} if kind == "data" else {}
    )  # a rule set that is used adds values of its own
    checked = 0
    for key in keys_of(schema):
        path = key.name.removesuffix(f".{NAME}")
        for section, name in NAMES.items():
            path = path.replace(f"{section}.{NAME}", f"{section}.{name}")
        if not key.kind or NAME in path or key.default.startswith(AS):
            continue
        *parents, leaf = path.split(".")
        base = whole
        if "latent" in parents:
            base = merged(whole, {"model": {"num_kv_heads": 6, "attention": {"latent": LATENT}}})
        if "delta" in parents:
            base = merged(whole, {"model": {"attention": {"delta": DELTA}}})
        if kind == "dpo" and parents[:1] in (["online"], ["task"]):  # in place of [data]
            base = {**{name: value for name, value in whole.items() if name != "data"}, "online": {}, "task": {}}
        if "verifiers" in parents:
            base = {**base, "task": {"kind": "verifiers", "verifiers": {"taskset": "game"}}}
        tree = merged({}, base)
        for parent in parents:
            tree = tree.get(parent, {})
        without = {name: value for name, value in tree.items() if name != leaf}
        if key.default == REQUIRED:
            with pytest.raises(ConfigError, match=rf"key '{path}' is missing"):
                validate(schema, put(base, parents, without))
            continue
        # One key of several is required, or others require it.
        if key.name in ("mixture.weights.NAME", "init.run", "teacher.run", "text.files", "model.layer_pattern"):
            continue
        value = {} if key.default == LEFT_OUT else tomllib.loads(f"{leaf} = {key.default}")
        assert validate(schema, put(base, parents, without)) == validate(schema, put(base, parents, without | value))
        if key.default == LEFT_OUT:
            node = plain(validate(schema, put(base, parents, without)))
            for parent in parents:
                node = node[parent]
            assert leaf not in node
        checked += 1
    assert checked > 5


def put(tree: dict[str, Any], parents: list[str], section: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the tree with one section replaced."""
    if not parents:
        return section
    return tree | {parents[0]: put(tree.get(parents[0], {}), parents[1:], section)}


@pytest.mark.parametrize(
    ("kind", "prefix", "line"),
    [
        ("pretrain", "optimizer.lr", "optimizer.lr = number > 0 (required)"),
        ("pretrain", "optimizer.betas", "optimizer.betas = [number, number] (default [0.9, 0.95])"),
        ("pretrain", "train.precision", 'train.precision = "fp32" | "bf16" | "auto" (default "auto")'),
        ("pretrain", "parallel.zero", "parallel.zero = 1 | 2 | 3 (default 1)"),
        ("pretrain", "train.dropout", "train.dropout = number >= 0 and < 1 (default 0.0)"),
        ("pretrain", "model.moe", "[model.moe] (left out)"),
        ("pretrain", "parallel.layers_per_stage", "parallel.layers_per_stage = list of integers (left out)"),
        ("export", "step", 'step = integer or string (default "latest")'),
        ("data", "sources.web.format", 'sources.NAME.format = "jsonl" | "warc" | "parquet" | "text" | "html" | "code"'),
        ("data", "sources.files", "sources.NAME.files = list of strings, 1 or more (required)"),
        ("data", "rules.word_count", "rules.NAME.word_count = { min = number, max = number } (left out)"),
        ("data", "mixture.stages.last.samples", "mixture.stages.NAME.samples = integer >= 1 (as mixture.samples)"),
        ("data", "canaries.one.text", "canaries.NAME.text = string or list of strings (required)"),
    ],
)
def test_one_key_can_be_asked_for(kind: str, prefix: str, line: str) -> None:
    said = explain(kind, prefix)
    assert said.startswith(line) and "\n    " in said
    assert ("\n[" not in said) and (said.count(" = ") < 10 or prefix == "model.moe")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--explain", "pretrian"], "there is no config 'pretrian'; choose one of: data, pretrain"),
        (["--new", "rewards"], "choose one of: data"),
        (["--explain", "pretrain", "lr"], "did you mean optimizer.lr?"),
        (["--explain", "pretrain", "optimiser.lr"], "did you mean optimizer.lr?"),
        (["--explain", "export", "xyzzy"], "its sections and keys begin with: run, out"),
        (["--new", "pretrain", "optimizer"], "leave out 'optimizer'"),
    ],
)
def test_what_is_not_there_is_told(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        main(arguments)
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_printed_config_is_one(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--new", kind]) == 0
    text = capsys.readouterr().out
    validate(schema_of(kind), tomllib.loads(text))
    lines = text.splitlines()
    keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert keys and all(lines[number - 1].startswith("# ") and lines[number - 1].endswith(".") for number in keys)


def test_the_printed_data_config_runs_on_the_demos_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "data.toml").write_text(starter("data"))
    assert data_run([str(tmp_path / "data.toml"), "--dry-run", f"run.dir={tmp_path}/run"]) == 0
    assert capsys.readouterr().out.count("would run") > 5


@pytest.mark.parametrize("command", [*KINDS, *(name for name in cli.COMMANDS if name.startswith("data "))])
def test_help_says_where_keys_are_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    said = capsys.readouterr().out
    kind = KINDS.get(command, "data") if " CONFIG " in said.partition("positional")[0] else ""
    assert bool(kind) == (command not in NO_CONFIG)
    assert not kind or (f"trivium config --explain {kind}\n" in said and f"trivium config --new {kind}\n" in said)


def test_the_first_config_of_pretraining_fits_the_plan_that_it_names() -> None:
    ours, demo = (
        tomllib.loads(text) for text in (starter("pretrain"), (ROOT / "configs/data/demo.toml").read_text("utf-8"))
    )
    assert ours["data"]["plan"] == f"{demo['run']['dir']}/plan"
    assert ours["model"]["vocab_size"] == demo["tokenizer"]["vocab_size"]
    assert ours["train"]["seq_length"] == demo["mixture"]["seq_length"]
