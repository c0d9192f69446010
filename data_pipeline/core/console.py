"""Makes the console that the data commands print tables to, and prints sentences and warnings on it."""

import os

from rich.console import Console


def wide_console() -> Console:
    """Makes a console, 140 columns wide for the sake of tables if output is no terminal and COLUMNS is not set."""
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=140)


def say(sentence: str, console: Console) -> None:
    """Prints a sentence as it is: no word is taken for markup or highlighted, and no line is wrapped."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def warn(sentence: str, console: Console) -> None:
    """Prints "warning: " and the sentence, as `say` does."""
    say(f"warning: {sentence}", console)
