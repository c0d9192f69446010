"""Makes the console that the data commands print tables to, and prints warnings on it."""

import os

from rich.console import Console


def wide_console() -> Console:
    """Makes a console, 140 columns wide for the sake of tables if output is no terminal and COLUMNS is not set."""
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=140)


def warn(sentence: str, console: Console) -> None:
    """Prints "warning: " and the sentence on one line, without wrapping it at the console's width."""
    console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)
