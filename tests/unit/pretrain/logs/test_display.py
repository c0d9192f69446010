"""The display of a run: a panel on a terminal of any width, and plain lines elsewhere."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from pretrain.logs import display
from pretrain.logs.display import Display, curve


def record(step: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 9.0 / step, "grad_norm": 0.5, "lr": 6e-4, "tokens_per_s": 4321.0, "memory_bytes": 2**31}
    return {"step": step, "tokens": 1000 * step, **numbers, "mfu": None, **more}


def test_lines_elsewhere_have_the_numbers_and_come_seldom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    plain = Display("demo", 10, 40)
    for step in range(11, 41):
        now += 2.0
        plain.update(record(step, mfu=0.31 if step > 20 else None), {"a": 1.0})
    plain.say("held out: code 1.5")
    plain.close()
    lines = capsys.readouterr().out.splitlines()
    # More than 10 seconds after the last, and at the end; 2 seconds a step.
    assert [line.split()[1] for line in lines[:-1]] == ["16/40", "22/40", "28/40", "34/40", "40/40"]
    assert lines[0] == ("demo 16/40 loss 0.5625  grad 0.50  lr 0.0006  4,321 tokens/s  2.00 GiB  48.0 s left")
    assert lines[1].endswith("4,321 tokens/s  MFU 31.0%  2.00 GiB  36.0 s left") and "left" not in lines[4]
    assert lines[-1] == "held out: code 1.5"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_panel_fits_the_terminal_and_stays_below_what_is_said(width: int) -> None:
    screen = io.StringIO()
    panel = Display("demo", 0, 40, Console(file=screen, force_terminal=True, width=width, height=30, color_system=None))
    for step in (1, 2, 20):
        sources = {"english": 2.0, "code": None}
        panel.update(record(step, reward=0.25, loss_by_source=sources), {"english": 300.0, "code": 100.0})
    panel.say("[step 20] held out")
    drawn = Console(file=io.StringIO(), width=width, color_system=None)
    drawn.print(panel.panel())
    lines = drawn.file.getvalue().splitlines()
    panel.close()
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("demo") and "[step 20] held out" in screen.getvalue()
    if width > 40:
        assert len(lines) == 4 and "20/40" in lines[0] and "50%" in lines[0] and "left" in lines[0]
        assert lines[1].startswith("  reward 0.250   loss 0.4500   grad 0.50   lr 0.0006")
        assert lines[2] == "  4,321 tokens/s   2.00 GiB   20k tokens"
        assert lines[3].rstrip() == "  english 75% loss 2.000   code 25%"


def test_a_run_that_goes_back_begins_its_estimate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    plain = Display("demo", 0, 1000)
    for step in (1, 2, 3, 1, 2):
        now += 5.0
        plain.update(record(step, loss=None, grad_norm=None), {})
    assert plain.seconds_left() == 5 * 998 and "loss not finite  grad not finite" in plain.line()


def test_the_curve_is_as_high_as_its_values() -> None:
    assert curve([1.0], 5) == "" and curve([2.0, 2.0], 5) == "▁▁"
    assert curve([0, 1, 2, 3, 4, 5, 6, 7], 8) == display.BLOCKS
    assert curve([8.0] * 50 + [0.0] * 50, 4) == "██▁▁"
