"""A progress bar for work of several phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Phase", "phases"]

Phase = Callable[[str, int], Callable[[int], None]]
"""Begins a phase of so many steps; gives what counts them."""


@contextmanager
def phases(is_wanted: bool) -> Iterator[Phase]:
    """A bar on standard error, if that is a terminal and rich is installed: a function that begins a phase of so many
    steps and gives the one that counts them."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        is_wanted = False
    if not is_wanted:
        yield lambda name, steps: lambda count: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def phase(name: str, steps: int) -> Callable[[int], None]:
            bar.reset(task, description=name, total=steps)
            return lambda count: bar.advance(task, count)

        yield phase
