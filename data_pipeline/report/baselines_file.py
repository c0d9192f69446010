"""Reads the file that `trivium data baselines` writes, for reports that show its numbers beside a model's."""

import json
from pathlib import Path

from configs.files import file_sha256
from data_pipeline.core.integrity import STAGE_MANIFEST

FILE = "baselines.json"
ORDER = 5  # of the n-gram model
TITLES = {"ngram": f"{ORDER}-gram", "xz_after_training": "xz -9 after training text", "xz": "xz -9"}


def kept(run_dir: Path) -> dict[str, dict[str, float]]:
    """Returns the baselines of a data run by source; {} if they are damaged, or of other tokens than the present."""
    manifest, path = run_dir / "tokens" / STAGE_MANIFEST, run_dir / FILE
    if not (manifest.is_file() and path.is_file()):
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return dict(known["sources"]) if known["made_from"] == file_sha256(manifest) else {}
    except (ValueError, KeyError, TypeError):
        return {}
