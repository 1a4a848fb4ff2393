"""What both pillars of `weft compare` show of a study: one bar over all of it, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from weft.run.study import Row


class StudyBar:
    """A bar on a terminal; elsewhere whoever extends it prints a line for each row."""

    def __init__(self, *columns: ProgressColumn, total: int = 0) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self.console = Console(soft_wrap=True)
        self.bar: Bar | None = None
        self.done, self.total = 0, total
        if self.console.is_terminal:
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("study", total=total or None, text="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def stage(self, text: str) -> None:
        """Something without rows to count; not worth a line of its own."""
        if self.bar is not None:
            self.bar.update(self.task, text=text)


def conclude(rows: list[Row], output: Path, what: str) -> None:
    """Write the report and print the table of a study; `what` its rows are called."""
    from rich.console import Console

    from weft import report

    console = Console()
    report.html(output / "results.jsonl", output / "report.html")
    console.print(report.terminal_table(output / "results.jsonl"))
    failed = sum(row.get("status") == "failed" for row in rows)
    if failed:
        console.print(f"{failed} {what} failed; the report says why, and --retry-failed tries them again.")
    console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)
