"""The packages of the extra `eval`, without which tasks cannot be run, and their settings."""

import importlib.util
import os
import sys

from configs.loader import ConfigError

PACKAGES = ("lm_eval", "sacrebleu", "rouge_score")


def need_packages(key: str) -> None:
    """Raises ConfigError, naming the option or key that asks for tasks, if a package is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{key} needs the package {missing[0]}, which is not installed; run: pip install 'trivium[eval]' (in the "
            "repository: pip install --constraint constraints.txt '.[eval]')"
        )


def stay_offline() -> None:
    """Keeps Hugging Face's libraries from the network, and their progress bars from a log; called before their import.

    What is set in the environment already stays.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
