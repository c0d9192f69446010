"""`trivium chat`: a conversation on the terminal with a model trained on dialogues, with Trivium's own decoder.

torchrun --nproc-per-node 2 -m export.chat runs/demo/sft parallel.tp=2
"""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.cli import entrypoint
from configs.loader import ConfigError
from configs.sampling import split_keys
from configs.sampling_options import command_line, sampling_of
from export.generate import note_if_cut
from export.model_source import check_source
from launch.environment import is_main, report_to_torchrun

if TYPE_CHECKING:
    from export.text_model import TextModel, TextOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversation: /reset starts it over, /exit or the end of input ends it. Returns 0."""
    parser = command_line(
        "trivium chat",
        "Chats with a model trained on dialogues. /reset starts over, /exit ends.",
        "trivium chat runs/demo/sft --temperature 0.7",
    )
    parser.add_argument("--system", help="the system message")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for an answer with or without reasoning, if the chat template knows of both",
    )
    args = parser.parse_intermixed_args(argv)
    sampling_of(args)  # a mistake is told before torch is imported
    parallel = split_keys(args.overrides)
    check_source(args.source, args.step)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is typed in another encoding becomes U+FFFD

    from export.text_model import TextOptions, loaded

    with loaded(args.source, args.step, parallel, args.precision) as model:
        if model.codec.chat_template is None:
            raise ConfigError(f"{args.source} has no chat template; chat needs a run of `trivium sft` or later")
        model.codec.check_thinking(args.think)
        _converse(model, TextOptions.of(args), args.system)
    return 0


def _converse(model: "TextModel", options: "TextOptions", system: str | None) -> None:
    opening = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(opening)
    turn = 0
    while (text := model.of_main(_read() if model.is_main else None)) not in (None, "/exit"):
        if text == "/reset":
            messages = list(opening)
        if text in ("", "/reset"):
            continue
        messages.append({"role": "user", "content": text})
        try:
            prompt = model.codec.encode_chat(messages)
        except ValueError as error:
            messages.pop()
            other = "leave out --system" if system else "give a system message by --system"
            _say(model, f"the chat template refuses the dialogue: {error}; start over with /reset, or {other}")
            continue
        try:
            model.room(prompt)
        except ValueError as error:
            messages.pop()
            _say(model, f"the dialogue is too long: {error}; start over with /reset, or write a shorter message")
            continue
        answer: dict[str, Any] = {"role": "assistant", "content": _answer(model, prompt, options, key=str(turn))}
        if model.codec.thinking is False:  # as the prompt says, and as such answers are trained on
            answer["reasoning_content"] = ""
        messages.append(answer)
        turn += 1


def _say(model: "TextModel", sentence: str) -> None:
    """Prints a sentence on stderr, on one of the ranks."""
    if model.is_main:
        print(sentence, file=sys.stderr, flush=True)


def _read() -> str | None:
    """Returns the next line of input without spaces around it; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(model: "TextModel", prompt: list[int], options: "TextOptions", key: str) -> str:
    """Prints the model's answer to a prompt as it comes, and returns it.

    `key` gives each turn random numbers of its own, all from the one seed.
    """

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    (answer,) = model.continue_texts([prompt], options, [key], show if model.is_main else None)
    if model.is_main:
        print(flush=True)
        note_if_cut(answer, options.max_new_tokens, len(prompt))
    return answer.text


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
