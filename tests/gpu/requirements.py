"""Writes requirements.txt and constraints.txt for `run.sh`: the project's packages, beside a torch that is there.

Usage: python requirements.py TORCH FOLDER, where TORCH is the version that is installed, or "". It stays. A torch other
than the project's own wants its own versions of a few packages, which are left free then. Needs nothing but Python.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Packages that torch depends on, and those whose newest versions need them.
_TORCHS = {
    "torch", "triton", "numpy", "setuptools", "sympy", "networkx", "fsspec", "filelock", "jinja2", "typing-extensions",
    "s3fs", "aiobotocore", "botocore", "boto3", "s3transfer", "numba", "llvmlite",
}  # fmt: skip


def name_of(requirement: str) -> str:
    """Returns the name of the package that a requirement asks for, as PyPI spells it."""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def write(torch: str, folder: Path) -> None:
    """Writes both files into `folder`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"]
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    if torch:
        wanted = [item for item in wanted if name_of(item) != "torch"]
        (own,) = (item for item in pinned if name_of(item) == "torch")
        if torch.partition("+")[0] != own.partition("==")[2]:
            pinned = [item for item in pinned if name_of(item) not in _TORCHS]
            pinned.append(f"torch=={torch.partition('+')[0]}")
    (folder / "requirements.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    (folder / "constraints.txt").write_text("\n".join(pinned) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
