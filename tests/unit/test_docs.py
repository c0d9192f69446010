"""Everything that README, CHANGELOG and docs/ name exists: links, paths, modules, classes, commands, options, keys.

Nothing is run: commands are looked up in `cli.COMMANDS`, options in the source of the command's module, keys in the
schemas. The output of commands, as shown in the pages, is not checked.
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import cli
from configs.data import DataConfig
from configs.kinds import SCHEMAS
from configs.loader import ConfigError, validate
from configs.presets import filled_in
from configs.reference import explain
from configs.sft import SFTConfig
from configs.train import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES, WIDTH = 94, 120
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Endings of dotted names in backticks that are files, not config keys.
FILE_ENDINGS = ("json", "jsonl", "toml", "html", "model", "jinja", "parquet", "safetensors", "zst", "idx", "py", "md")
FOREIGN = ("torch", "megatron", "deepspeed")  # packages whose dotted names are not config keys
LAUNCHERS = {
    "pretrain.train": "train",
    "posttrain.sft": "sft",
    "posttrain.rm": "rm",
    "posttrain.dpo": "dpo",
    "posttrain.grpo": "grpo",
    "posttrain.distill": "distill",
    "posttrain.sample": "sample",
    "export.generate": "generate",
    "export.chat": "chat",
}
PLACEHOLDERS = ("CONFIG", "RUN", "LIST", "FOLDER")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Page:
    """A page: its prose without code blocks, and its code blocks as (language, text)."""

    prose: str
    blocks: tuple[tuple[str, str], ...]

    @property
    def inline(self) -> list[str]:
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    def commands(self) -> Iterator[list[str]]:
        """Yields the words of every command in blocks and backticks, without comments."""
        lines = [line for language, text in self.blocks if not language for line in _joined(text)]
        for line in [*lines, *self.inline]:
            if re.match(r"(\$ )?(trivium|torchrun|mpirun|srun|sbatch|python -m|make) ", line):
                yield shlex.split(line.removeprefix("$ "), comments=True)


@cache
def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    return Page(FENCE.sub("", text), tuple((m[1], m[2]) for m in FENCE.finditer(text)))


def _joined(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", text).splitlines()


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page).prose):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name} links to {target}, and {there.name} has no such heading"


@each_page
def test_paths_and_modules_exist(page: Path) -> None:
    words = [word for code in read(page).inline for word in code.split()]
    words += [word for language, text in read(page).blocks if not language for word in text.split()]
    for word in words:
        assert _is_there(word.strip(",;:()")), f"{page.name} names {word}, and there is no such file or module"


@cache
def _top_level() -> frozenset[str]:
    return frozenset(path.name for path in ROOT.iterdir() if path.name != "runs")


def _is_there(word: str) -> bool:
    """Returns False for a path or module of this repository that does not exist, True for all other words."""
    first = re.split(r"[/.]", word)[0]
    if re.fullmatch(r"[\w.\-]+(/[\w.\-*]+)*/?", word) and "/" in word and first in _top_level():
        return any(ROOT.glob(word.rstrip("/")))
    if re.fullmatch(r"\w+\.(py|sh|md)", word):
        return any(ROOT.glob(word)) or any((ROOT / "docs").glob(word))
    if re.fullmatch(r"\w+(\.\w+)+", word) and first in _top_level() and (ROOT / first / "__init__.py").is_file():
        module, _, held = word.rpartition(".")
        return _module(word) is not None or re.search(rf"\b{held}\b", _text(_module(module))) is not None
    return True


def _module(name: str) -> Path | None:
    """Returns the file of a module or package of this repository, None if there is none."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _text(file: Path | None) -> str:
    return file.read_text(encoding="utf-8") if file else ""


@each_page
def test_classes_exist(page: Path) -> None:
    for word in read(page).inline:
        if re.fullmatch(r"([A-Z][a-z]+){2,}", word):
            assert word in _classes(), f"{page.name} names {word}, and there is no such class"


@cache
def _classes() -> frozenset[str]:
    packages = [name for name in _top_level() if (ROOT / name / "__init__.py").is_file() and name != "tests"]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for name in packages for path in (ROOT / name).rglob("*.py"))
    return frozenset(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))


@each_page
def test_commands_exist_with_their_options_and_keys(page: Path) -> None:
    for words in read(page).commands():
        _check(words, f"{page.name}: {shlex.join(words)}")


def _check(words: list[str], where: str) -> None:
    """Checks one command line, with or without a launcher in front."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        for word in words[1:]:
            assert "=" in word or word in targets, f"{where}: the Makefile has no target {word}"
        return
    if "trivium" in words:
        arguments = words[words.index("trivium") + 1 :]
    elif "-m" in words and words[words.index("-m") + 1] in LAUNCHERS:
        at = words.index("-m") + 1
        arguments = [LAUNCHERS[words[at]], *words[at + 1 :]]
    else:
        return
    is_group = len(arguments) == 1 and any(name.startswith(f"{arguments[0]} ") for name in cli.COMMANDS)
    if arguments[:1] == ["COMMAND"] or arguments[0].startswith("-") or is_group:
        return
    name = next((" ".join(arguments[:n]) for n in (2, 1) if " ".join(arguments[:n]) in cli.COMMANDS), None)
    assert name, f"{where}: there is no such command"
    rest = arguments[len(name.split()) :]
    options = [word for word in rest if re.fullmatch(r"-{1,2}[a-z][\w-]*", word)]
    if name in ("launch", "doctor"):
        started = next((n for n, word in enumerate(rest) if word in SCHEMAS or word == "train"), len(rest))
        options = [word for word in rest[:started] if word.startswith("--")]
        if rest[started:]:
            _check(["trivium", *rest[started:]], where)
    for option in options:
        assert option in _source_of(name), f"{where}: {name} has no option {option}"
    if name == "config":
        if len(rest) > 1 and rest[0] != "--models":  # else the command is only mentioned
            assert rest[1] in SCHEMAS, f"{where}: there is no config {rest[1]}"
            assert all(_is_key(key, rest[1]) for key in rest[2:3] if key != ">"), f"{where}: {rest[1]} has no such key"
        return
    if name in ("launch", "doctor"):
        return
    kind = dict.fromkeys(("train", "prove", "rehearse", "drill", "generate", "chat"), "pretrain").get(
        name, name.split()[0]
    )
    for word in rest:
        if match := re.fullmatch(r"([a-z_]+(?:\.\w+)*)=.*", word):
            keys = [match[1], f"rules.{match[1]}"] if name == "data what-if" else [match[1]]
            assert any(_is_key(key, kind) for key in keys), f"{where}: {kind} has no key {match[1]}"


@cache
def _source_of(command: str) -> str:
    """Returns the source in which a command's options are defined: its module, and the modules of configs."""
    module = cli.COMMANDS[command][0].partition(":")[0]
    files = [ROOT.joinpath(*module.split(".")).with_suffix(".py"), *(ROOT / "configs").glob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files) + '"-h" "--help"'


@cache
def _is_key(key: str, *kinds: str) -> bool:
    for kind in kinds or tuple(SCHEMAS):
        try:
            explain(kind, key.removesuffix(".*"))
        except ConfigError:
            continue
        return True
    return False


@each_page
def test_keys_and_sections_exist(page: Path) -> None:
    for code in read(page).inline:
        key, _, _ = code.partition("=")
        key = key.strip()
        section = re.fullmatch(r"\[([a-z_]+(\.\w+)*)\]", key)
        if section:
            key = section[1]
        elif not re.fullmatch(r"[a-z_]+(\.([a-z]\w*|NAME|\*))+", key) or key.rpartition(".")[2] in FILE_ENDINGS:
            continue
        elif key.split(".")[0] in FOREIGN or (_top_level() & {key.split(".")[0]} and not _is_key(key.split(".")[0])):
            continue  # a module, which another test checks
        assert _is_key(key), f"{page.name} names {code}, and no config has the key {key}"


@each_page
def test_pieces_of_configs_fit_the_demos(page: Path) -> None:
    demo, pretrain, tuning = (
        tomllib.loads((ROOT / f"configs/{name}.toml").read_text(encoding="utf-8"))
        for name in ("data/demo", "pretrain/demo", "posttrain/demo_sft")
    )
    for language, text in read(page).blocks:
        piece = tomllib.loads(text) if language == "toml" else {}
        if piece.keys() & {"model", "init", "tracking"}:
            validate(PretrainConfig, filled_in({**pretrain, **piece}), origin=page.name)
        elif "task" in piece:
            validate(SFTConfig, {**tuning, **piece}, origin=page.name)
        elif piece:
            validate(DataConfig, _merged(demo, piece), origin=page.name)


def _merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(tree[key], more[key]) for key in tree.keys() & more.keys() if isinstance(tree[key], dict)}
    return {**tree, **more, **both}


def test_the_tree_names_folders_that_exist() -> None:
    """Looks up the folders of README's tree: a line begins with one, and others in it are inside it or at the root."""
    tree = next(text for language, text in read(README).blocks if not language and "data_pipeline/" in text)
    inside, named = ROOT, set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            inside = ROOT / line.split()[0]
            assert inside.exists(), f"the tree names {line.split()[0]}"
            named.add(inside.name)
        for folder in re.findall(r"(?<![\w/])[\w/]+/(?![\w*])", line):
            assert (inside / folder).is_dir() or (ROOT / folder).is_dir(), f"the tree names {folder} in {inside.name}/"
    packages = {name for name in _top_level() if (ROOT / name / "__init__.py").is_file()}
    assert packages <= named, f"the tree leaves out {packages - named}"
    rooms = {path.parent.name for path in (ROOT / "data_pipeline").glob("*/__init__.py")}
    assert all(f"{room}/" in tree for room in rooms), f"the tree leaves out one of {rooms}"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_lines_fit() -> None:
    """Measures every line of prose, except in tables, whose cells cannot be broken."""
    for page in PAGES:
        if page.name != "scale.md":  # its tables are printed by a command, with longer lines
            for line in read(page).prose.splitlines():
                assert len(line) <= WIDTH or line.startswith("|"), f"{page.name}: {line}"
