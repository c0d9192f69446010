"""The reward for another expression of an answer's digits: the answer "3*5+7" is as right as "7+5*3"."""

import ast
import operator
import re
from typing import Any

from posttrain.rewards.unscorable import Unscorable

LONGEST = 100  # characters of an expression that is still read
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def expression(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns 1 if the completion has the numbers of the answer, each as often, and the same value, else 0.

    Signs are +, - and *, and there may be parentheses, as in the task countdown.
    """
    try:
        right = value_of(str(answer))
    except ValueError:
        raise Unscorable("the answer is no expression of +, - and *") from None
    try:
        said = value_of(completion.strip())
    except ValueError:
        return 0.0
    return float(said == right and _numbers(completion) == _numbers(str(answer)))


def value_of(expression: str) -> int:
    """Returns the value of an expression of digits, +, -, * and parentheses. Raises ValueError for anything else."""
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9+\-*() ]+", expression):
        raise ValueError("not an expression")
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression") from None


def _evaluate(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_evaluate(left), _evaluate(right))
    raise ValueError("not an expression")  # signs, powers, calls


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"[0-9]+", text))
