"""A dialect as a config chooses it: by name, with settings that replace its own."""

import inspect
from dataclasses import replace
from functools import partial

from configs.loader import ConfigError
from configs.rl import PolicySection
from posttrain.algorithms.aggregation import Aggregation
from posttrain.algorithms.dialects import DIALECTS, Dialect

_PARAMETERS = {"clip_low": "low", "clip_high": "high", "dual_clip": "dual"}  # of policy losses, by config key


def chosen_dialect(name: str, settings: PolicySection, section: str) -> Dialect:
    """Returns the dialect `name` with the settings of [section] that are not left out.

    Raises ConfigError if the dialect's loss has no such setting.
    """
    dialect = DIALECTS[name]
    given = {key: getattr(settings, key) for key in _PARAMETERS if getattr(settings, key) is not None}
    known = inspect.signature(dialect.policy).parameters
    for key, value in given.items():
        if _PARAMETERS[key] not in known:
            raise ConfigError(
                f"{section}.{key} = {value} has no meaning in {section}.dialect = {name!r}, whose bounds are fixed; "
                "leave it out, or choose another dialect"
            )
    policy = partial(dialect.policy, **{_PARAMETERS[key]: value for key, value in given.items()})
    chosen = dialect.aggregation if settings.aggregation is None else Aggregation(settings.aggregation)
    return replace(dialect, policy=policy, aggregation=chosen)
