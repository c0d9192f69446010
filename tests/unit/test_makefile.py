"""Choice of the Python that `make` uses, tested with scripts in place of Python versions; no environment mixes two."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

# Answers the Makefile's questions as some Python version, perhaps without some modules, would; logs all other calls.
# `-m venv` makes an environment of copies of the script.
STAND_IN = """#!/bin/sh
[ "$1" = -c ] && exec {real} -c '
import importlib.util, sys
find, sys.version_info = importlib.util.find_spec, {version}
importlib.util.find_spec = lambda name: None if name in {lacks} else find(name)
exec(sys.argv[1])' "$2"
echo "{name} $@" >>{log}
[ "$2" != venv ] || {{ for last; do :; done; mkdir -p $last/bin; touch $last/pyvenv.cfg $last/of-{name}
for tool in python pip ruff mypy trivium; do cp "$0" $last/bin/$tool; done; }}
"""


class Machine:
    """A folder with the project's Makefile, and a PATH on which the only Pythons are scripts in their place."""

    def __init__(self, folder: Path):
        self.project, self.log = folder / "project", folder / "log"
        self.project.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.project)
        self.path = [folder / "first", folder / "second"]
        tools = folder / "tools"
        for directory in (*self.path, tools):
            directory.mkdir()
        for tool in ("make", "sh", "mkdir", "touch", "cp", "rm", "true"):
            (tools / tool).symlink_to(str(shutil.which(tool)))
        self.tools = tools

    def python(self, version: str, name: str = "", folder: int = 0, lacks: tuple[str, ...] = ()) -> Path:
        """Puts a Python of a version on PATH; "broken" is one that only fails, as pyenv's does if it is not active."""
        file = self.path[folder] / (name or f"python{version}")
        text = "#!/bin/sh\necho command not found >&2; exit 127\n"
        if version != "broken":
            numbers = (*map(int, version.split(".")), 1)
            name = f"{version}-{folder}"
            text = STAND_IN.format(
                real=sys.executable, version=numbers, lacks=json.dumps(lacks), name=name, log=self.log
            )
        file.write_text(text)
        file.chmod(0o755)
        return file

    def make(self, *words: str) -> subprocess.CompletedProcess[str]:
        path = ":".join(str(folder) for folder in (*self.path, self.tools))
        environment = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            ["make", *words], cwd=self.project, env=environment, capture_output=True, text=True, check=False
        )

    def calls(self) -> list[str]:
        """Returns the commands that the Pythons got since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def _all(machine: Machine) -> Path:
    for version in ("3.10", "3.11", "3.14", "3.12"):
        machine.python(version)
    return machine.python("3.13", folder=1)


def _behind_a_broken_one(machine: Machine) -> Path:
    machine.python("broken", "python3.13")
    machine.python("3.12")
    return machine.python("3.13", folder=1)


def _behind_one_without_pip(machine: Machine) -> Path:
    machine.python("3.13", lacks=("pip", "ensurepip"))
    machine.python("3.12", lacks=("venv",))
    return machine.python("3.11", folder=1)


def _ensurepip_is_enough(machine: Machine) -> Path:
    machine.python("3.11")
    return machine.python("3.12", lacks=("pip",))


def _under_the_name_python3(machine: Machine) -> Path:
    machine.python("3.12")
    return machine.python("3.13", "python3", folder=1)


def _whatever_its_name_says(machine: Machine) -> Path:
    machine.python("3.14", "python3.13")
    return machine.python("3.11")


@pytest.mark.parametrize(
    "install",
    [
        _all,
        _behind_a_broken_one,
        _behind_one_without_pip,
        _ensurepip_is_enough,
        _under_the_name_python3,
        _whatever_its_name_says,
    ],
)
def test_the_newest_python_that_can_is_taken(machine: Machine, install: Callable[[Machine], Path]) -> None:
    taken = install(machine)
    done = machine.make("python")
    assert done.returncode == 0 and done.stdout.rstrip().endswith(f": {taken}")


def test_none_that_can_is_told_in_a_sentence(machine: Machine) -> None:
    for version, lacks in (("3.10", ()), ("3.14", ()), ("3.13", ("pip", "ensurepip"))):
        machine.python(version, lacks=lacks)
    done = machine.make("install")
    assert done.returncode != 0 and not (machine.project / ".venv").exists()
    sentence = done.stderr.splitlines()[0]
    assert "3.11, 3.12 or 3.13 with pip" in sentence and "PATH has none" in sentence and "PYTHON=" in sentence


@pytest.mark.parametrize(
    ("version", "lacks", "message"),
    [
        ("3.10", (), "is Python 3.10"),
        ("3.14", (), "is Python 3.14"),
        ("3.12", ("pip", "ensurepip"), "is Python 3.12 without pip"),
        ("3.12", ("venv",), "is Python 3.12 without venv"),
        ("broken", (), "is not a Python that runs"),
    ],
)
def test_a_named_python_that_cannot_is_refused(
    machine: Machine, version: str, lacks: tuple[str, ...], message: str
) -> None:
    machine.python("3.13")
    named = machine.python(version, "mine", folder=1, lacks=lacks)
    for target in ("install", "test-python"):
        done = machine.make(target, f"PYTHON={named}")
        assert done.returncode != 0 and f"PYTHON={named} {message}" in done.stderr.splitlines()[0]
    assert not machine.calls()


def test_an_environment_is_kept_until_another_python_is_named(machine: Machine) -> None:
    environment = machine.project / ".venv"
    machine.python("3.11")
    assert machine.make("install").returncode == 0 and (environment / "of-3.11-0").exists()
    machine.calls()
    newer = machine.python("3.13")
    assert machine.make("install").returncode == 0 and not machine.calls()  # nothing is left to do

    done = machine.make("install", f"PYTHON={newer}")
    assert done.returncode == 0 and "is made again" in done.stdout
    assert (environment / "of-3.13-0").exists() and not (environment / "of-3.11-0").exists()
    assert any("install" in call and ".[dev]" in call for call in machine.calls())
    assert machine.make("install").returncode == 0 and not machine.calls()


@pytest.mark.parametrize("was", ["3.10", "3.14", "broken"])
def test_an_environment_that_is_of_no_use_is_made_anew(machine: Machine, was: str) -> None:
    """Makes an environment again that is of an unsupported Python, or of one that is no longer on the machine."""
    environment = machine.project / ".venv"
    (environment / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", ".installed", "left"):
        (environment / name).touch()
    shutil.move(machine.python(was), environment / "bin/python")
    machine.python("3.12")
    assert machine.make("install").returncode == 0
    assert (environment / "of-3.12-0").exists() and not (environment / "left").exists()


def test_other_versions_are_tested_beside_the_environment(machine: Machine) -> None:
    machine.python("3.11")
    assert machine.make("install").returncode == 0
    machine.calls()
    other = machine.python("3.13")
    assert "PYTHON=" in machine.make("test-python").stderr
    assert machine.make("test-python", f"PYTHON={other}").returncode == 0
    assert (machine.project / ".venv-3.13/of-3.13-0").exists() and (machine.project / ".venv/of-3.11-0").exists()
    calls = machine.calls()
    assert any("pytest" in call for call in calls) and all(call.startswith("3.13-0 ") for call in calls)
    assert machine.make("test-python", f"PYTHON={other}", "TESTS=tests/unit/configs").returncode == 0
    (call,) = machine.calls()
    assert call.startswith("3.13-0 ") and call.endswith(" tests/unit/configs")


def test_metadata_name_the_versions_that_make_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    (versions,) = [line.split(":=")[1].split() for line in makefile.splitlines() if line.startswith("SUPPORTED")]
    named = [line.rpartition(" ")[2] for line in project["classifiers"]]
    oldest, newest = (tuple(map(int, version.split("."))) for version in (versions[-1], versions[0]))
    assert named == versions[::-1]
    assert project["requires-python"] == f">=3.{oldest[1]},<3.{newest[1] + 1}"
