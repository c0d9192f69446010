"""Helpers of the tests of lm-evaluation-harness: Trivium's model for it, its requests, and a mark that skips."""

import importlib.util
from typing import Any

import pytest

CONTEXT = 128
NEEDS_LM_EVAL = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed; it is one of the packages of: pip install '.[eval]'",
)


def make_lm(*args: Any, **kwargs: Any) -> Any:
    from pretrain.evaluation.harness_model import TriviumLM  # imports lm_eval, which no other worker should wait for

    return TriviumLM(*args, **kwargs)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, ("test", i, 1)) for i, args in enumerate(arguments)]  # type: ignore[arg-type]
