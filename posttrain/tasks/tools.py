"""Tools that a model may call by writing <NAME>ARGUMENT</NAME>: a calculator, and Python in the sandbox."""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping

from pretrain.evaluation.sandbox import Limits, run_program

LONGEST = 200  # characters of an expression
MOST = 1000  # characters of a result
LARGEST = 1e15  # a number beyond it ends the calculation
PROGRAM = Limits(seconds=5.0, memory_bytes=2**30)
OPERATORS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}


def calculator(expression: str) -> str:
    """Returns the value of an expression of numbers, + - * / // % and parentheses, or what is wrong with it."""
    text = expression.strip()
    if len(text) > LONGEST or not re.fullmatch(r"[0-9.+\-*/%() ]+", text):
        return "error: not an expression of numbers, + - * / // % and parentheses"
    try:
        return f"{_value(ast.parse(text, mode='eval').body):.15g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: the number is too large"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an expression of numbers, + - * / // % and parentheses"


def python(program: str) -> str:
    """Returns what a program prints when it runs in the sandbox, and how it failed, if it did."""
    outcome = run_program(program, PROGRAM)
    said = [outcome.output.rstrip()] if outcome.output.strip() else []
    return "\n".join([*said, *([] if outcome.passed else [outcome.result])])[:MOST]


TOOLS: Mapping[str, Callable[[str], str]] = {"calculator": calculator, "python": python}


def call_in(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the (name, argument) of the last call of one of the tools in a text, None if there is none.

    A call reaches from <NAME> to the next </NAME>, and there are no calls inside it.
    """
    tags = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, names))})>", text))
    last_end = {tag[2]: tag.start() for tag in tags if tag[1]}
    call, opened = None, None
    for tag in tags:
        if opened is None:
            opened = tag if not tag[1] and tag.start() < last_end.get(tag[2], 0) else None
        elif tag[1] and tag[2] == opened[2]:
            call, opened = (opened[2], text[opened.end() : tag.start()]), None
    return call


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
    raise ValueError("not an expression")


def _bounded(value: float) -> float:
    if abs(value) > LARGEST:
        raise OverflowError
    return value
