"""The Dockerfile's instructions, carried out in a clean Debian root: what they install works for an unprivileged user.

debootstrap makes the root, which stands for the base image; its Python is the system's. Each RUN line is run by /bin/sh
in a chroot, as the user and in the folder that the lines before it set. Settings of pip on this machine hold there too.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# What a base image with Python has; ensurepip is in python3-venv.
PACKAGES = "ca-certificates,python3,python3-dev,python3-venv"
SUITES = {"bookworm": "3.11", "trixie": "3.13"}
BARE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RUN_HERE = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
# Mounts what the words after the first name, each at its own path below the first, and then runs the rest.
MOUNT = """
root=$1; shift
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$(dirname "$root$1")"; touch "$root$1"; fi
  mount --bind "$1" "$root$1"
  shift
done
shift
exec "$@"
"""


@dataclass
class Image:
    """A root folder that instructions of the Dockerfile change, and what they have set for the next ones."""

    root: Path
    user: str = "root"
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": BARE_PATH})

    def run(self, words: list[str], seconds: float = 1500) -> str:
        """Runs a command in the root and returns its output."""
        variables = {"HOME": "/root" if self.user == "root" else f"/home/{self.user}", **self.variables}
        pip = settings_of_pip()
        enter = ["chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i"]
        enter += [f"{name}={value}" for name, value in {**pip, **variables}.items()]
        enter += ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", self.folder, *words]
        done = subprocess.run(
            [*RUN_HERE, "/bin/sh", "-ec", MOUNT, "sh", str(self.root), *paths_in(pip), "--", *enter],
            env={**os.environ, "PATH": SBIN},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}"
        return done.stdout

    def carry_out(self, name: str, value: str) -> None:
        """Carries out one instruction. Raises AssertionError for one that this test does not know."""
        value = value.replace("${PATH}", self.variables["PATH"])
        if name == "RUN":
            self.run(["/bin/sh", "-c", value])
        elif name == "USER":
            self.user = value
        elif name == "WORKDIR":
            self.folder = value
        elif name == "ENV":
            self.variables |= dict(word.split("=", 1) for word in shlex.split(value))
        elif name == "COPY":
            owner = re.fullmatch(r"--chown=(\w+:\w+) \. \.", value)
            assert owner is not None, value
            files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
            target = self.root / self.folder.lstrip("/")
            for file in filter(None, files.decode().split("\0")):
                if (ROOT / file).is_file():
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / file, target / file)
            user, self.user = self.user, "root"
            self.run(["chown", "--recursive", owner[1], self.folder])
            self.user = user
        else:
            assert name in ("ARG", "FROM", "CMD"), f"{name} {value}"


def instructions() -> Iterator[tuple[str, str]]:
    """Yields the name and value of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, value = line.partition(" ")
            yield name, value


def settings_of_pip() -> dict[str, str]:
    """Settings of pip on this machine, as variables of the environment."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    return {f"PIP_{key.upper().replace('-', '_')}": value.replace("\\n", " ") for key, value in found}


def paths_in(settings: dict[str, str]) -> list[str]:
    """Absolute paths of this machine that the settings name; pages of an index link to files beside its folder."""
    words = re.findall(r"(?<![\w/.-])/[\w./+-]+", " ".join(settings.values()))
    return sorted({os.path.normpath(path).removesuffix("/simple") for path in words if os.path.exists(path)})


@pytest.mark.parametrize("suite", SUITES)
def test_the_image_works_for_an_unprivileged_user(tmp_path: Path, suite: str) -> None:
    debootstrap = shutil.which("debootstrap", path=SBIN)
    if os.geteuid() != 0 or debootstrap is None:
        pytest.skip("a clean Debian root needs root and debootstrap (apt-get install debootstrap)")
    root = tmp_path / "root"
    made = subprocess.run(
        [debootstrap, "--variant=minbase", f"--include={PACKAGES}", suite, str(root)],
        env={**os.environ, "PATH": SBIN},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    try:
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        image, command = Image(root), []
        for name, value in instructions():
            image.carry_out(name, value)
            command = shlex.split(value.strip("[]").replace(",", " ")) if name == "CMD" else command
        assert "usage: trivium COMMAND" in image.run(command)
        who = (
            "import getpass, platform, torch; print(getpass.getuser(), platform.python_version(), torch.ones(1).item())"
        )
        user, version, total = image.run(["python", "-c", who]).split()
        assert (user, total) == ("trivium", "1.0") and version.startswith(SUITES[suite])
        sizes = "model.num_layers=1 train.steps=10"
        said = image.run(["trivium", "launch", "--dry-run", "train", "configs/pretrain/demo.toml", *sizes.split()])
        assert "pretrain.train" in said
    finally:
        shutil.rmtree(root, ignore_errors=True)
