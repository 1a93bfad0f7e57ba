"""Progress on stderr: a bar per step on a terminal, nothing otherwise; warnings always."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


class Reporter:
    """Shows what a command is doing. The quiet one (``Reporter(False)``) serves the Python API."""

    def __init__(self, visible: bool) -> None:
        self._visible = visible and sys.stderr.isatty()
        self._warns = visible
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, label: str) -> Iterator[Callable[[int, int | None], None]]:
        """Yield progress(done, total) for the step *label*."""
        if not self._visible:
            yield lambda done, total: None
            return
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread that wakes up beside a measurement
        with tqdm(
            desc=f"{label:28.28}",
            leave=False,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}",
        ) as bar:

            def progress(done: int, total: int | None) -> None:
                bar.total = total
                bar.n = done
                bar.refresh()

            yield progress

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        if self._warns:
            print(f"warning: {sentence}", file=sys.stderr)
