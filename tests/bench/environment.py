"""Environments of peers that cannot be installed beside Trivium.

One sees the packages of the environment that the benchmark runs in, torch among them; what is installed into it comes
first on its path and changes nothing elsewhere.
"""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


class NoPeer(Exception):
    """Error for a peer that cannot be used here; the message says why."""


def environment_of(name: str, folder: Path, packages: Sequence[str], trial: str) -> Path:
    """Makes the environment of a peer, unless it is there, and returns its Python.

    `packages` are arguments of pip, and `trial` is Python code that must run there. Raises NoPeer if either fails.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        Path(own.stdout.strip(), "benchmark.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for argv in (["-m", "pip", "install", "-qq", *packages], ["-c", trial]):
        done = subprocess.run([str(python), *argv], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NoPeer(f"{name} cannot be used here: {said}")
    return python
