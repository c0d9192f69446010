"""The file of a run's rewinds, whole and damaged."""

import json
from pathlib import Path

import pytest

from configs.loader import ConfigError
from configs.train import SpikesConfig
from pretrain.health.rewind_history import FILE, Rewinds
from pretrain.run.dry_start import OneProcess

KNOWN = {"step": 4, "to_step": 2, "samples": [12, 16], "data": "d", "loss": None, "grad_norm": 9.0}


@pytest.mark.parametrize(
    "content", [b"", b"[{", b"3", b"null", b'"x"', b"\xff\xfe", b'[{"step": 4}]', b'[{"samples": 3}]']
)
def test_a_damaged_file_is_told_and_may_be_removed(tmp_path: Path, content: bytes) -> None:
    file, manifest = tmp_path / FILE, {"passed_over": [[0, 4]]}
    rewinds = Rewinds(SpikesConfig(), tmp_path, OneProcess(), "d")
    file.write_text(json.dumps([KNOWN]))
    rewinds.begin(manifest)
    assert rewinds.ranges == [(0, 4), (12, 16)]
    file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"rewinds\.json is damaged \(.*\); restore it, or remove it: the run may then"
    ):
        rewinds.begin(manifest)
    file.unlink()
    rewinds = Rewinds(SpikesConfig(), tmp_path, OneProcess(), "d")
    rewinds.begin(manifest)
    assert rewinds.ranges == [(0, 4)]
