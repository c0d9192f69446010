"""The console that data commands print to, wide enough for their tables, and warnings on it."""

import os

from rich.console import Console


def wide_console() -> Console:
    """A console that, where it is no terminal and COLUMNS is not set, is wide enough for the tables."""
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=140)


def warn(sentence: str, console: Console) -> None:
    """Prints a warning, a sentence that stays on one line however narrow the console is."""
    console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)
