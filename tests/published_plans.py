"""Plans that take the place of earlier ones, as those of a data run that is run again do."""

from pathlib import Path
from typing import Any

from configs.loader import validate
from configs.mixture import MixtureConfig
from data_pipeline.core.stage import replace_folder
from data_pipeline.mixture.earlier import keep_plans
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import Plan


def without_plan(made: Path, folder: Path) -> Path:
    """Makes the folder of a data run that has the tokens and the tokenizer in `made`, but no plan yet; returns it."""
    folder.mkdir()
    for name in ("tokens", "tokenizer"):
        (folder / name).symlink_to(made / name)
    return folder


def publish(data: Path, samples: int = 12, **changes: Any) -> str:
    """Makes and publishes a new plan, as a data run does; returns its fingerprint, "" for a mixture in stages."""
    mixture = {"seq_length": 32, "weights": {"code": 0.6, "prose": 0.4}, "max_epochs": 9, "samples": samples, **changes}
    build_stages(data / "tokens", data / "tokenizer", data / "new", validate(MixtureConfig, mixture).plans())
    if (data / "plan").exists():
        keep_plans(data / "plan", data / "new")
    replace_folder(data / "new", data / "plan")
    return "" if "stages" in changes else Plan.open(data / "plan").fingerprint
