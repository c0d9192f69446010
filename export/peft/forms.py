"""The methods of tuning that are written and read in PEFT's format."""

from typing import Any

from export.peft.adalora import AdaLoraForm
from export.peft.adapter import Form, PeftError
from export.peft.low_rank import LowRankForm
from export.peft.virtual_tokens import VirtualTokenForm

FORMS: tuple[Form, ...] = (
    LowRankForm(),
    AdaLoraForm(),
    VirtualTokenForm(("prompt",), "PROMPT_TUNING"),
    VirtualTokenForm(("p_tuning",), "P_TUNING"),
    VirtualTokenForm(("p_tuning_v2", "prefix"), "PREFIX_TUNING"),
)


def form_of_kind(kind: str) -> Form:
    """Returns the form of an `adapter.kind`. Raises PeftError if PEFT has no such method."""
    for form in FORMS:
        if kind in form.kinds:
            return form
    known = ", ".join(kind for form in FORMS for kind in form.kinds)
    raise PeftError(f"adapter.kind = {kind!r} does not exist in PEFT's format; train with one that does, {known}")


def form_of_config(config: dict[str, Any]) -> Form:
    """Returns the form of an adapter_config.json. Raises PeftError if Trivium has no such method."""
    named = config.get("peft_type")
    for form in FORMS:
        if named == form.peft_type:
            return form
    known = ", ".join(dict.fromkeys(form.peft_type for form in FORMS))
    raise PeftError(f"adapter_config.json: peft_type = {named!r} is not supported; supported are {known}")
