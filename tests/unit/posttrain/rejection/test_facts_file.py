"""The file of facts that a run's samples depend on, if it is damaged."""

from pathlib import Path

import pytest

from configs.loader import ConfigError
from posttrain.rejection.samples import FACTS, FOLDER, recorded_facts


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"null", b"\xff"])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    assert recorded_facts(tmp_path) == {}
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / FACTS).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{FACTS} is damaged; remove {tmp_path / FOLDER} to sample anew"):
        recorded_facts(tmp_path)
