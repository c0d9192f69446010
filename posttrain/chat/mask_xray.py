"""The loss masks of fine-tuning data made visible: counts of all samples, and some of them token by token.

`describe` gives JSON values, which a run keeps in its folder for its report, and `printed` is what `trivium sft --show`
prints of them. Nothing is trained, and no ranks are joined.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console

from posttrain.chat.dialogues import Example
from posttrain.chat.format_interface import Chat, UntrainedEnd
from posttrain.records import Records, TooManySetAside
from pretrain.report.mask_page import visible

IN_REPORT = 6  # samples in a run's report
TOKENS = 2000  # the maximum number of tokens of a sample that are shown
_TRAINED = ("\x1b[30;42m", "\x1b[30;102m")  # two greens that take turns, so that tokens are told apart
_NOT_TRAINED, _PLAIN = "\x1b[2m", "\x1b[0m"
BEGIN, END = "{+", "+}"  # around what is trained, where there are no colours


def describe(examples: Mapping[str, Records[Example]], chat: Chat, count: int) -> dict[str, Any]:
    """Returns counts of all samples of each source, and `count` samples, spread evenly over sources and data."""
    shown = []
    for first, (name, found) in enumerate(examples.items()):
        share = len(range(first, count, len(examples)))
        shown += [described(chat, name, example) for example in _spread(found, share)]
    return {"sources": {name: _counts(found) for name, found in examples.items()}, "samples": shown}


def describe_fault(error: UntrainedEnd | TooManySetAside, chat: Chat, count: int) -> dict[str, Any]:
    """Returns what `describe` does, but of refused data: of the sample at fault, or of those that were read."""
    if isinstance(error, TooManySetAside):
        return describe({error.found.kind: error.found}, chat, count)
    example = error.sample and Example.of(error.location, error.location, error.sample)
    return {"sources": {}, "samples": [described(chat, "refused", example)] if example else []}


def described(chat: Chat, source: str, example: Example) -> dict[str, Any]:
    """Returns one sample: its location, what is to be known of it, and its first tokens, each a text and its weight."""
    return {
        "source": source,
        "location": example.location,
        "id": example.id,
        "tokens": len(example.tokens),
        "facts": facts(chat, example),
        "pieces": list(_pieces(chat, example)),
    }


def answer_ends(chat: Chat, example: Example) -> list[bool]:
    """Returns, for each run of trained tokens, whether it has a token that ends an answer."""
    runs = groupby(zip(example.tokens.tolist(), example.answer.tolist(), strict=True), key=lambda pair: pair[1])
    return [any(token in chat.stop_ids for token, _ in run) for trained, run in runs if trained]


def show(found: Mapping[str, Any]) -> None:
    """Prints what `describe` found, in colours on a terminal that has them, unless NO_COLOR is set."""
    console = Console()
    print(printed(found, colours=console.color_system is not None and not console.no_color))


def printed(found: Mapping[str, Any], colours: bool) -> str:
    """Returns what `describe` found as text for a terminal, in colours or with plain marks in their place."""
    parts = [_printed_sample(sample, colours) for sample in found["samples"]]
    if parts:
        parts.append("what is trained is green" if colours else f"what is trained is between {BEGIN} and {END}")
    parts += ["\n".join(f"{name}: {visible(summary(one))}" for name, one in found["sources"].items())]
    return "\n\n".join(part for part in parts if part)


def summary(counts: Mapping[str, Any]) -> str:
    """Returns the counts of a source in one line."""
    share = counts["trained"] / max(1, counts["tokens"])
    aside = ", ".join(f"{n} {reason} (first: {first})" for reason, (n, first) in counts["set_aside"].items())
    return (
        f"{counts['samples']:,} samples, {counts['tokens']:,} tokens, {counts['trained']:,} of them trained "
        f"({share:.1%}); {instability(counts)}; set aside: {aside or 'none'}"
    )


def instability(counts: Mapping[str, Any]) -> str:
    """Returns the number of a source's unstable samples in words, with the first of them."""
    first = f" (first: {counts['first_unstable']})" if counts["unstable"] else ""
    return f"{counts['unstable']} unstable{first}"


def facts(chat: Chat, example: Example) -> str:
    """Returns the counts of an example, whether ends of turns are trained, and whether longer dialogues change it."""
    ends, tokens, trained = answer_ends(chat, example), len(example.tokens), int(example.answer.sum())
    said = f"the end of the turn is trained in {sum(ends)} of {len(ends)} answers" if ends else "nothing is trained"
    stable = (
        f"unstable: {example.unstable}" if example.unstable else "stable: a longer dialogue begins with the same tokens"
    )
    return f"{tokens} tokens, {trained} trained ({trained / max(1, tokens):.0%}); {said}; {stable}"


def _counts(found: Records[Example]) -> dict[str, Any]:
    every = [*found.train, *found.heldout]
    unstable = [example for example in every if example.unstable]
    return {
        "samples": len(every),
        "tokens": sum(len(example.tokens) for example in every),
        "trained": sum(int(example.answer.sum()) for example in every),
        "unstable": len(unstable),
        "first_unstable": f"{unstable[0].location}, {unstable[0].unstable}" if unstable else None,
        "set_aside": {
            reason: [count, found.set_aside.first[reason]] for reason, count in sorted(found.set_aside.counts.items())
        },
    }


def _spread(found: Records[Example], count: int) -> list[Example]:
    """Returns some examples at even distances; if any example is unstable, at least one of these is."""
    every = found.train or found.heldout
    chosen = [every[i * len(every) // count] for i in range(count)] if count < len(every) else list(every)
    if chosen and not any(example.unstable for example in chosen):
        chosen[-1:] = [next((example for example in every if example.unstable), chosen[-1])]
    return chosen


def _pieces(chat: Chat, example: Example) -> Iterator[list[Any]]:
    """Yields [text, weight] of each token; a character of several tokens is in the last one's text."""
    names = {number: name for name, number in chat.tokenizer.added_ids.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    size = min(len(example.tokens), TOKENS)
    for token, weight in zip(
        example.tokens[:size].tolist(), example.answer[:size].astype(np.int64).tolist(), strict=True
    ):
        if token in names:
            yield [decoder.decode(b"", final=True) + names[token], weight]
            decoder.reset()
        else:
            # A tokenizer whose tokens stand for no bytes has at least a spelling of each.
            spelled = chat.tokenizer.bytes_of(token) or chat.tokenizer.id_to_piece(token).encode()
            yield [decoder.decode(spelled), weight]


def _printed_sample(sample: Mapping[str, Any], colours: bool) -> str:
    where = sample["location"]
    if sample["id"] != where:
        where = f"{where} (id {visible(sample['id'])})"
    left = sample["tokens"] - len(sample["pieces"])
    more = f"\n({left} more tokens)" if left else ""
    text = _coloured(sample["pieces"]) if colours else _marked(sample["pieces"])
    return f"{sample['source']}: {where}\n{visible(sample['facts'])}\n{text}{more}"


def _coloured(pieces: Sequence[Sequence[Any]]) -> str:
    shown = []
    for i, (text, weight) in enumerate(pieces):
        style = _TRAINED[i % 2] if weight else _NOT_TRAINED
        # A colour is begun anew on each line, so that it does not fill the rest of the line before.
        shown.append("\n".join(f"{style}{line}{_PLAIN}" if line else "" for line in visible(text).split("\n")))
    return "".join(shown)


def _marked(pieces: Sequence[Sequence[Any]]) -> str:
    runs = ((weight, "".join(visible(text) for text, _ in run)) for weight, run in groupby(pieces, key=lambda p: p[1]))
    return "".join(f"{BEGIN}{text}{END}" if weight else text for weight, text in runs)
