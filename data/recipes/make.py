"""Makes the data of the recipes in configs/recipes: sorting, countdown, answers of a wanted form, and a calculator.

    python data/recipes/make.py --out /tmp/new     # the same bytes as the committed files, on every machine

Each problem has an answer that is written out directly, and one with the reasoning that leads to it; those for the
calculator are dialogues in which it is called, and others without an answer to learn from. All of it is computed
here, so every reasoning is right, step by step; no model and no person wrote any of it.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNT = 1500  # problems of each kind
TRIES = 3  # wrong expressions that a reasoning about countdown may try first
WORDS = (
    *("ship", "moon", "water", "house", "tree", "river", "light", "stone", "night", "bird", "fire", "road"),
    *("hand", "book", "wind", "door", "gold", "sea", "land", "king", "town", "ground", "morning", "summer"),
)


def main() -> None:
    """Writes the files of problems, pairs and dialogues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write into (default: this one)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    problems = {
        "sort": list(_distinct(sorting)),
        "countdown": list(_distinct(countdown)),
        "form": list(_distinct(form)),
    }
    for name, records in problems.items():
        write(out / f"{name}.jsonl.gz", records)
    write(out / "form_pairs.jsonl.gz", [pair(record) for record in problems["form"]])
    products = list(_distinct(product))
    write(out / "calculator.jsonl.gz", [{key: record[key] for key in ("prompt", "answer")} for record in products[::2]])
    write(out / "calculator_dialogues.jsonl.gz", [{"messages": record["messages"]} for record in products[1::2]])


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records as gzipped JSON lines, the same bytes for the same records."""
    text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _distinct(make: Any) -> Iterator[dict[str, Any]]:
    """Yields `COUNT` problems of different prompts, drawn with a seed that is the same on every machine."""
    seen: set[str] = set()
    number = 0
    while len(seen) < COUNT:
        record = make(random.Random(f"{make.__name__}/{number}"))
        number += 1
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            yield record


def problem(prompt: str, answer: Any, thoughts: str, direct: str, **others: Any) -> dict[str, Any]:
    """Returns a record: the prompt, also with each switch of thinking, and both kinds of right completions."""
    return {
        "prompt": prompt,
        "prompt_think": f"{prompt} /think",
        "prompt_no_think": f"{prompt} /no_think",
        "answer": answer,
        "direct": direct,
        "reasoned": f"<think>\n{thoughts}\n</think>\n{direct}",
        **others,
    }


def sorting(draw: random.Random) -> dict[str, Any]:
    """Returns the problem of sorting four digits; the reasoning takes the least digit that is left, again and again."""
    left = "".join(draw.choices("0123456789", k=4))
    prompt, answer, lines = f"Sort {left}", "".join(sorted(left)), []
    while left:
        least = min(left)
        rest = left.replace(least, "", 1)
        lines.append(f"{least} of {left}")
        left = rest
    return problem(prompt, answer, "\n".join(lines), answer)


def countdown(draw: random.Random) -> dict[str, Any]:
    """Returns the problem of making a number from three digits; the reasoning tries expressions until one is right."""
    while True:
        digits = [draw.randint(1, 9) for _ in range(3)]
        answer = expression(draw, digits)
        if (target := value(answer)) >= 0:
            break
    tried = [one for one in (expression(draw, digits) for _ in range(draw.randint(0, TRIES))) if value(one) != target]
    lines = [f"{one} is {value(one)}, no" for one in dict.fromkeys(tried)] + [f"{answer} is {target}, yes"]
    return problem(f"Make {target} of {' '.join(map(str, digits))}", answer, "\n".join(lines), answer)


def expression(draw: random.Random, digits: list[int]) -> str:
    """Returns the digits in a random order with random signs between them."""
    order = draw.sample(digits, k=len(digits))
    return str(order[0]) + "".join(f"{draw.choice('+-*')}{digit}" for digit in order[1:])


def value(text: str) -> int:
    """Returns the value of an expression that `expression` made."""
    return int(eval(text, {"__builtins__": {}}))


# Name of a form: the request, how two words look in it, and IFEval's instruction with its arguments.
FORMS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "list": ("as a list", "* {0}\n* {1}", "detectable_format:number_bullet_lists", {"num_bullets": 2}),
    "title": ("as a title", "<<{0} {1}>>", "detectable_format:title", {}),
    "quotes": ("in quotes", '"{0} {1}"', "startend:quotation", {}),
    "marked": (
        "with both marked",
        "*{0}* *{1}*",
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
    ),
}


def form(draw: random.Random) -> dict[str, Any]:
    """Returns the problem of writing two words in a wanted form, with instructions that can be checked as IFEval's."""
    name, words = draw.choice(sorted(FORMS)), draw.sample(WORDS, k=2)
    wording, look, instruction, arguments = FORMS[name]
    return problem(
        f"Write {words[0]} and {words[1]} {wording}",
        name,
        f"{words[0]} and {words[1]}, {wording}",
        look.format(*words),
        instruction_id_list=["keywords:existence", instruction],
        kwargs=[{"keywords": words}, arguments],
    )


def product(draw: random.Random) -> dict[str, Any]:
    """Returns the problem of multiplying two numbers, with a dialogue in which the model calls the calculator."""
    one, other = draw.randint(2, 99), draw.randint(2, 99)
    prompt, answer = f"Multiply {one} by {other}", str(one * other)
    turns = (prompt, f"<calculator>{one}*{other}</calculator>", f"<result>{answer}</result>", answer)
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return {"prompt": prompt, "answer": answer, "messages": messages}


def pair(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a pair: the right answer, and one in another form or with another word in place of the first."""
    draw = random.Random(f"pair/{record['prompt']}")
    words = record["kwargs"][0]["keywords"]
    if draw.random() < 0.5:
        other = draw.choice([name for name in sorted(FORMS) if name != record["answer"]])
        rejected = FORMS[other][1].format(*words)
    else:
        wrong = draw.choice([word for word in WORDS if word not in words])
        rejected = record["direct"].replace(words[0], wrong)
    return {"prompt": record["prompt"], "chosen": record["direct"], "rejected": rejected}


if __name__ == "__main__":
    main()
