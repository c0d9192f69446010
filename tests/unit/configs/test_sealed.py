"""A file with a checksum of its values: after any change it either has the same values or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.sealed import CHECKPOINT, Format, SealError

FORMAT = Format("some-format", version=3, oldest=2)
VALUES: dict[str, Any] = {
    "step": 40,
    "samples": 1280,
    "ledger": {"prose": 1500.25, "代码": 1e-7},
    "balance": {"layers.0": [0.1, -2.5]},
    "none": None,
    "tuple": (1, 2),
}
READ = {"format": "some-format", "version": 3, **VALUES, "tuple": [1, 2]}


def test_what_is_written_is_read() -> None:
    content = FORMAT.write(VALUES)
    assert FORMAT.read(content, Path("f")) == READ
    assert FORMAT.write(json.loads(content)) == content, "written again, it is the same"
    moved = json.dumps(json.loads(content), sort_keys=True).encode()  # the checksum is of values, not of layout
    assert FORMAT.read(moved, Path("f")) == READ


def test_any_byte_that_changes_a_value_is_noticed() -> None:
    content = FORMAT.write(VALUES)
    refused = 0
    for i, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 4, ord("1"), ord("7")} - {byte}:
            damaged = content[:i] + bytes([other]) + content[i + 1 :]
            try:
                assert FORMAT.read(damaged, Path("run/f.json")) == READ
            except SealError as error:
                refused += 1
                assert str(error).startswith("run/f.json ")
    assert refused > 3 * len(content)  # all changes except some of white space
    for end in range(len(content) - 2):  # cut short by more than the last newline
        with pytest.raises(SealError, match="damaged"):
            FORMAT.read(content[:end], Path("f"))


def test_other_formats_and_versions() -> None:
    old = {"format": "some-format", "version": 2, "step": 1}  # a version before files had checksums
    assert FORMAT.read(json.dumps(old).encode(), Path("f")) == old
    with pytest.raises(SealError, match="its values do not match"):
        FORMAT.read(json.dumps(old | {"version": 3}).encode(), Path("f"))
    for version in (1, 4, "3", None):
        with pytest.raises(SealError, match="this code reads 2 to 3"):
            FORMAT.read(json.dumps(old | {"version": version}).encode(), Path("f"))
    with pytest.raises(SealError, match="'some-format': it is not a trivium-checkpoint file, or it is damaged"):
        CHECKPOINT.read(FORMAT.write(VALUES), Path("f"))
    with pytest.raises(SealError, match="has format None"):
        FORMAT.read(b"[]", Path("f"))
