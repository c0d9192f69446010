"""Words and sizes of the code: how docstrings begin and end, unique names of classes, and files that are not too long.

Reads every Python file that git tracks, and imports none of them.
"""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
WRONG_BEGINNING = re.compile(
    r"(Of|By|As|What|Where|How|In|For|With|From|When|Errors|The same|It|Those)(?![\w-])",
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# "Place" says that one thing stands for another; ranks have coordinates, documents locations, elements an index.
STANDS_FOR = re.compile(
    r"\b(in|takes?|taken|took|taking)([\s#]+(?!in\b)[\w'`.]+){0,5}?[\s#]+place\b|\bin-place\b", re.I
)
PLACE = re.compile(r"(?<![a-z])(?<!in_)(place[sd]?|placing)(?![a-z])|(?<!_)in_place", re.I)
OLD_NAMES = {"Workshop", "Lot", "Build", "Inputs", "Sums", "DeepSpeedUnit", "_Sign", "Start", "Place", "realms"}
OLD_NAMES |= {"probes", "stretch", "tells_of", "put_together"}


def definitions(tree: ast.Module) -> Iterator[Documented]:
    """Yields the module and every class and function in it."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, Documented):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            statements = getattr(node, block, ())
            left += statements if isinstance(statements, list) else ()  # the body of a lambda is an expression


def faults_of_docstring(text: str) -> Iterator[str]:
    """Yields the rules that a docstring breaks."""
    paragraph = re.split(r"\n\s*\n", text.strip())[0]
    if match := WRONG_BEGINNING.match(paragraph):
        yield f"begins with {match[0]!r}; begin with a verb or with what the thing is"
    if re.search(r"\bErrors:", text):
        yield "has 'Errors:'; write a sentence such as 'Raises ValueError if …'"
    if not paragraph.endswith((".", ":", "?", "…")):
        yield f"has a first paragraph that does not end as a sentence: {paragraph[-40:]!r}"


def read(file: str, source: str) -> tuple[list[str], dict[str, str]]:
    """Returns a sentence for each rule that a file breaks, and the line of each of its classes by the class's name."""
    faults, classes = [], {}
    lines = source.count("\n")
    if lines > MOST_LINES:
        faults.append(f"{file}:{MOST_LINES + 1}: the file has {lines} lines; divide it, {MOST_LINES} are the most")
    for node in definitions(ast.parse(source)):
        if not isinstance(node, ast.Module) and node.name in OLD_NAMES:
            faults.append(f"{file}:{node.lineno}: {node.name} is a name that was given up; take the field's word")
        if isinstance(node, ast.ClassDef):
            classes[node.name] = f"{file}:{node.lineno}"
        if text := ast.get_docstring(node, clean=False):
            faults += [f"{file}:{node.body[0].lineno}: the docstring {fault}" for fault in faults_of_docstring(text)]
    return faults, classes


@cache
def repository() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Returns what `read` finds in every tracked Python file, by the file's path."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [file for file in listed.stdout.splitlines() if (ROOT / file).is_file()]
    return {file: read(file, (ROOT / file).read_text(encoding="utf-8")) for file in paths}


def test_docstrings_are_sentences_and_files_are_not_too_long() -> None:
    faults = [fault for found, _ in repository().values() for fault in found]
    assert not faults, "\n" + "\n".join(faults)


def other_places(text: str) -> list[int]:
    """Returns the lines in which "place" says anything but that one thing stands for another."""
    left = STANDS_FOR.sub(lambda match: re.sub(r"[^\n]", "-", match[0]), text)
    return [left.count("\n", 0, match.start()) + 1 for match in PLACE.finditer(left)]


def test_place_has_one_meaning() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    own = Path(__file__).resolve()
    files = [ROOT / file for file in listed.stdout.splitlines() if ROOT / file != own and (ROOT / file).is_file()]
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in other_places(file.read_text("utf-8"))]
    assert not found, "say coordinates, location, index, folder or line in place of 'place':\n" + "\n".join(found)
    assert other_places("in place of x, takes\n# its place, in-place, replaced, placeholder") == []
    assert other_places("_place = 1\nin these places\nput in its place, a place\nPlace") == [1, 2, 3, 4]


def test_no_two_classes_have_the_same_name() -> None:
    lines = defaultdict(list)
    for _, classes in repository().values():
        for name, line in classes.items():
            lines[name].append(line)
    assert len(lines) > 100
    shared = [f"{' and '.join(found)}: classes of the same name {name}" for name, found in lines.items() if found[1:]]
    assert not shared, "rename one of the classes:\n" + "\n".join(shared)


def test_two_files_share_a_name_only_as_a_config_and_what_it_is_of() -> None:
    """Holds file names to one meaning; only adapters in PEFT's format (export/peft) share some with pretrain/model."""
    folders = defaultdict(list)
    for file in map(Path, repository()):
        if not file.name.startswith("__") and file.parts[0] != "tests":
            folders[file.name].append(file.parent.as_posix())
    shared = {name: found for name, found in folders.items() if found[1:]}
    assert shared and not {
        name: found for name, found in shared.items() if len(found) > 2 or not {"configs", "export/peft"} & {*found}
    }, "rename one of the files"


@pytest.mark.parametrize(
    ("docstring", "words"),
    [
        ("Of a module, its path.", "begins with 'Of'"),
        ("The same for pages.", "begins with 'The same'"),
        ("Errors: ValueError for a broken file.", "begins with 'Errors'"),
        ("Reads a file.\n\n    Errors: ValueError for a broken one.\n    ", "has 'Errors:'"),
        ("Reads a file", "does not end as a sentence: 'Reads a file'"),
    ],
)
def test_a_fault_is_named_with_its_file_and_line(docstring: str, words: str) -> None:
    faults, _ = read("some/file.py", f'import os\n\n\ndef load() -> None:\n    """{docstring}"""\n')
    assert faults[0].startswith("some/file.py:5: the docstring ") and words in faults[0]


def test_other_words_are_allowed() -> None:
    module = '"""In-line sums, by row:\n\n    total(x)\n"""\n'
    inner = 'if True:\n    class Its:\n        """Whether it is.\n\n        As said.\n        """\n'
    assert read("some/file.py", module + inner) == ([], {"Its": "some/file.py:6"})
    (fault,), _ = read("some/file.py", "\n" * 401)
    assert fault.startswith("some/file.py:401: the file has 401 lines")
