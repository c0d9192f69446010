"""Messages of errors and warnings: a test knows what each says, so that its remedy has been read and tried once.

Reads the code of the packages and of all tests, and imports none of it.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 20  # characters in a row that a message and a test share
OF_PROGRAMMERS = {"AssertionError", "NotImplementedError"}  # whose messages users never see
WARNS = {"warning", "warn", "failure"}  # functions whose arguments are a message
SAYS = {"print", "say", "_say"}  # functions whose arguments are a message if one begins with a word of ALARMS
ALARMS = ("warning: ", "error: ", "note: ")


def messages(file: str, source: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the line of each error, warning and note that users see, and the parts of its message without values.

    In configs/, whose functions return what is wrong to those that raise it, a returned sentence is a message too.
    """
    of_configs = file.startswith("configs/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Return) and node.value and of_configs:
            said = [node.value]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said = [] if _name(node.exc) in OF_PROGRAMMERS else node.exc.args
        elif isinstance(node, ast.Call) and _name(node) in WARNS | SAYS:
            said = node.args
        else:
            continue
        constants = [one for part in said for one in ast.walk(part)]
        texts = [one.value for one in constants if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if isinstance(node, ast.Call) and _name(node) in SAYS and not any(text.startswith(ALARMS) for text in texts):
            continue
        yield f"{file}:{node.lineno}", [text for text in texts if len(text) >= WINDOW and " " in text]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def windows(text: str) -> set[str]:
    return {text[start : start + WINDOW] for start in range(len(text) - WINDOW + 1)}


def strings(source: str) -> Iterator[str]:
    """Yields the strings of a test, those that are patterns without backslashes before characters as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= WINDOW:
            yield node.value
            if "\\" in node.value:
                yield re.sub(r"\\(.)", r"\1", node.value)


def unknown_to_tests() -> dict[str, str]:
    """Returns the messages that share no words with a test, by their lines."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tests = {file for file in files.split() if file.startswith("tests/")}
    said = [
        message
        for file in sorted(set(files.split()) - tests)
        for message in messages(file, (ROOT / file).read_text(encoding="utf-8"))
    ]
    wanted = set().union(*(windows(text) for _, texts in said for text in texts))
    known = set[str]()
    for file in tests - {"tests/unit/test_messages.py"}:
        for text in strings((ROOT / file).read_text(encoding="utf-8")):
            known |= wanted & windows(text)
    return {
        line: " … ".join(texts) for line, texts in said if texts and not any(windows(text) & known for text in texts)
    }


def test_a_test_knows_what_each_error_and_warning_says() -> None:
    new = [f"{line}: {said}" for line, said in unknown_to_tests().items()]
    assert not new, (
        f"no test has {WINDOW} characters in a row of these messages; add a row to a table of remedies (tests/**/"
        "test_*remedies.py) that is refused with these words, and goes on once it is as they say:\n" + "\n".join(new)
    )
