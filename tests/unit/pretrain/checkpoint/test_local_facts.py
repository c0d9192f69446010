"""The file that names a run's folder on the nodes' disks, whole and damaged."""

import re
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.run.dry_start import OneProcess


class Alone(OneProcess):
    rank = 0


def opened(run: Path, disk: Path) -> LocalDisk:
    mesh: Any = Alone()
    found = LocalDisk(mesh, run, str(disk))
    found.open()
    return found


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"3", b"null", b"\xff", b'{"run_hash": "a", "id": "b"}'])
def test_a_damaged_file_is_told_and_both_remedies_work(tmp_path: Path, content: bytes) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    first = opened(run, disk)
    first.begin(0)
    first.keep_facts()
    file = run / "local.json"
    assert opened(run, disk).path.parent == first.path.parent
    file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"local\.json is damaged; copy \S+ of a node over it, or remove it to"
    ) as told:
        opened(run, disk)
    (copy,) = disk.parent.glob(str(Path(re.findall(r"copy (\S+) of", str(told.value))[0]).relative_to(disk.parent)))
    file.write_bytes(copy.read_bytes())
    assert opened(run, disk).path.parent == first.path.parent
    file.unlink()
    assert opened(run, disk).path.parent != first.path.parent
