"""Jinja chat templates, rendered as transformers renders them.

The environment is transformers': sandboxed and immutable, with `trim_blocks`, `lstrip_blocks`, `{% break %}`,
`raise_exception`, `strftime_now`, and a `tojson` that escapes no HTML. A block between `{% generation %}` and
`{% endgeneration %}` marks text that the model writes; unlike in transformers, it may also stand inside a macro.
Special tokens are given as variables (`bos_token`, `eos_token`, ...). Images and documents are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
# The keys under which data hold an assistant's reasoning; templates read the first, and some the second.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_MARKS = [(chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2)]  # characters that no text may have
_CUT = "CUT_HERE "  # its space tells whether the template trims a message


class TemplateRefusal(ValueError):
    """A dialogue that a chat template does not render, with the template's own words on why."""


class ChatTemplate:
    """A compiled chat template. Raises ValueError if it is not valid Jinja.

    `tokens` are special tokens by the names of their variables. `today` is the date that `strftime_now` tells; None for
    the clock's. `marks_answers` says whether it has generation blocks.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], today: date | None = None) -> None:
        self.source, self._tokens, self._today = source, dict(tokens), today
        self._environment = environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        try:
            self._template = environment.from_string(source)
            self.variables = find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            said = f"line {error.lineno}: {str(error.message).rstrip('.')}"
            raise ValueError(f"the chat template is not valid Jinja: {said}; correct it") from None
        except (RecursionError, SyntaxError):  # Python's limits for expressions, loops and indentation
            raise ValueError("the chat template is nested too deeply to be compiled; make it flatter") from None
        self.marks_answers = environment.answers.used  # type: ignore[attr-defined]

    def render(
        self,
        messages: Messages,
        open_answer: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """Returns the text of a dialogue and the spans [start, end) of its generation blocks, in characters.

        With `open_answer` an assistant's turn is opened at the end. Raises TemplateRefusal if the template fails.
        """
        given = [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        marks = self._marks(given)
        self._environment.answers.marks = marks  # type: ignore[attr-defined]
        try:
            text = self._template.render(
                **{**self._tokens, **variables},
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=open_answer,
            )
        except TemplateError as error:
            raise TemplateRefusal(str(error.message or type(error).__name__)) from None
        except (SecurityError, RecursionError, MemoryError, OverflowError, ArithmeticError) as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from None
        return _without_marks(text, marks) if marks else (text, [])

    def render_open(self, messages: Messages, **variables: Any) -> str:
        """Returns the text of a dialogue up to the end of its last message, which is left open, for a model to go on.

        Raises TemplateRefusal if the template fails, or does not write the end of the message as it is.
        """
        *before, last = (dict(message) for message in messages)
        text, _ = self.render([*before, {**last, "content": last["content"] + _CUT}], **variables)
        at = text.rfind(_CUT.strip())
        if at < 0:
            raise TemplateRefusal("the template drops the end of the message that is to be continued")
        return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()

    def knows(self, variable: str) -> bool:
        """Whether the template uses a variable that is given to it, such as `enable_thinking`."""
        return variable in self.variables

    def _marks(self, messages: Messages) -> tuple[str, str] | None:
        """Returns two characters that mark generation blocks, which no message contains; None without such blocks."""
        if not self.marks_answers:
            return None
        spelled = json.dumps(messages, ensure_ascii=False)
        free = next((pair for pair in _MARKS if not any(mark in spelled for mark in pair)), None)
        if free is None:
            raise TemplateRefusal("the messages contain all characters that could mark generation blocks")
        return free

    def _strftime_now(self, form: str) -> str:
        now = datetime.now()  # local time, as in transformers
        return (now if self._today is None else datetime.combine(self._today, now.min.time())).strftime(form)


class _GenerationBlocks(Extension):
    """The tag {% generation %}, whose blocks are written between two marks."""

    tags = {"generation"}  # noqa: RUF012  the type that Jinja declares
    used = False
    marks: tuple[str, str] | None = None

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.extend(answers=self)

    def parse(self, parser: Parser) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        begin, end = self.marks or ("", "")
        return f"{begin}{caller()}{end}"


class _Dict:
    """The `dict` of templates: a function, and not a class whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """The `namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        for name in (attributes := dict(*args, **kwargs)):
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace cannot have a name that begins with an underscore, as {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message whose reasoning has the names that templates read, whichever of them the data use."""
    found = next((message[key] for key in REASONING_KEYS if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """Returns the text without marks, and the spans between them. Raises TemplateRefusal if they are not in pairs."""
    pieces: list[str] = []
    spans: list[Span] = []
    at, begun = 0, None
    for part in re.split(f"([{marks[0]}{marks[1]}])", text):
        if part not in marks:
            pieces.append(part)
            at += len(part)
        elif (part == marks[0]) == (begun is None):
            if begun is not None:
                spans.append((begun, at))
            begun = at if part == marks[0] else None
        else:
            raise TemplateRefusal("the template has a generation block inside another, or cuts one")
    if begun is not None:
        raise TemplateRefusal("the template cuts the end of a generation block")
    return "".join(pieces), spans
