"""`trivium generate`: continues prompts with the model of a run or checkpoint, with Trivium's own decoder.

torchrun --nproc-per-node 2 -m export.generate runs/demo/pretrain parallel.tp=2 --prompt "Call me"

A single prompt's text is printed as it comes; the texts of a file are written as JSONL. It is no server.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.cli import entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError
from configs.sampling import split_keys
from configs.sampling_options import command_line, sampling_of
from export.model_source import check_source
from export.prompt_file import encode_prompts, read_lines
from launch.environment import is_main, report_to_torchrun

if TYPE_CHECKING:
    from export.prompt_file import FilePrompt
    from export.text_model import Continuation, TextModel, TextOptions

BLOCKS = 8  # batches of a file that are continued between two writes


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each prompt with its continuation and returns 0."""
    parser = command_line(
        "trivium generate",
        "Continues prompts with a trained model.",
        'trivium generate runs/demo/pretrain --prompt "Call me" --max-new-tokens 64 --temperature 0.8',
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to continue; may be given many times")
    prompts.add_argument(
        "--prompts", metavar="FILE", type=Path, help='JSONL with {"prompt": ...} or {"messages": [...]} in each line'
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="JSONL for the texts of --prompts (default: print them)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts continued at once (default: 32)")
    args = parser.parse_intermixed_args(argv)
    sampling_of(args)  # a mistake is told before torch is imported
    parallel = split_keys(args.overrides)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size} is less than 1; give 1 or more")
    if args.output is not None:
        if args.prompts is None:
            raise ConfigError("--output is for the texts of --prompts FILE; redirect the output of --prompt")
        if args.output.is_dir():
            raise ConfigError(f"--output {args.output} is a folder; name a file in it")
        if args.output.exists() and args.prompts.exists() and args.output.samefile(args.prompts):
            raise ConfigError(f"--output {args.output} is the file of --prompts, which it would replace; name another")
        check_writable(args.output.parent, "--output's folder")
    check_source(args.source, args.step)
    lines = read_lines(args.prompts) if args.prompts is not None else []

    from export.text_model import TextOptions, loaded

    options = TextOptions.of(args, args.batch_size)
    with loaded(args.source, args.step, parallel, args.precision) as model:
        if args.prompts is not None:
            _continue_file(model, args, encode_prompts(args.prompts, lines, model), options)
        else:
            _continue_prompts(model, args.prompt, options)
    return 0


def _continue_prompts(model: "TextModel", texts: Sequence[str], options: "TextOptions") -> None:
    """Prints prompts and their continuations, a single one as it comes."""
    from export.text_model import keys_of

    prompts = []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"--prompt {text[:20]!r}... is not valid Unicode; give it in UTF-8") from None
        try:
            prompts.append(model.codec.encode_prompt(text))
        except ValueError as error:
            raise ConfigError(f"--prompt {text[:20]!r}: {error}") from None
        try:
            model.room(prompts[-1])
        except ValueError as error:
            raise ConfigError(f"--prompt {text[:20]!r}...: {error}; give a shorter one") from None
    keys, single = keys_of(prompts, Counter()), len(prompts) == 1
    if single and model.is_main:
        print(texts[0], end="", flush=True)
    show = _show if single and model.is_main else None
    found = model.continue_texts(prompts, options, keys, show)
    if not model.is_main:
        return
    for text, prompt, continuation in zip(texts, prompts, found, strict=True):
        print("" if single else text + continuation.text, flush=True)
        note_if_cut(continuation, options.max_new_tokens, len(prompt))
        if not single:
            print("-" * 40)


def _continue_file(
    model: "TextModel", args: argparse.Namespace, prompts: Sequence["FilePrompt"], options: "TextOptions"
) -> None:
    """Writes the record of each line, some batches at a time; with --output all at the end."""
    from export.text_model import keys_of

    seen: Counter[str] = Counter()
    records: list[str] = []
    for first in range(0, len(prompts), BLOCKS * options.max_rows):
        block = prompts[first : first + BLOCKS * options.max_rows]
        ids = [prompt.ids for prompt in block]
        found = model.continue_texts(ids, options, keys_of(ids, seen))
        lines = [prompt.record(continuation) for prompt, continuation in zip(block, found, strict=True)]
        if args.output is not None:
            records += lines
        elif model.is_main:
            print(*lines, sep="\n", flush=True)
    if args.output is not None and model.is_main:
        write_atomic(args.output, "".join(f"{record}\n" for record in records).encode())


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def note_if_cut(continuation: "Continuation", wanted: int, prompt_tokens: int) -> None:
    """Prints a note to stderr if a text was cut at the end of the model's context."""
    count = len(continuation.tokens)
    if continuation.ending == "context":
        context = prompt_tokens + count
        said = f"stopped after {count} of {wanted} new tokens, at the end of the model's context of {context} tokens"
        print(f"note: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
