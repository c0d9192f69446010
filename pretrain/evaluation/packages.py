"""The packages of the extra `eval`, without which tasks cannot be run."""

import importlib.util

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
