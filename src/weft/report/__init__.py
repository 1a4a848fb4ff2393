"""What a comparison found: one self-contained HTML page, and a table for the terminal.

    weft.report.html(Path("runs/study"), Path("runs/study/report.html"))
    rich.print(weft.report.terminal_table(Path("runs/study")))

Both read `results.jsonl` only, so that they work while the study runs, after an interruption, and years later.

The plots are Observable Plot's (on D3), taken from the installed package pyobsplot and inlined: 1.4 MB a report. Plot
draws SVG, so that marks can be counted, read aloud, restyled by the reader's colour scheme and printed sharp, and it
has marker shapes by method and small multiples. What else was measured: plotly.js as its wheel ships it 4.8 MB a
report; Bokeh 1.3 MB, drawn on canvas, where marks are pixels; Vega-Lite needs a 34 MB wheel to be inlined from Altair.
The page's Content-Security-Policy forbids every request, so that "works offline" is the browser's promise, not ours.
"""

from weft.report.page import html
from weft.report.table import terminal_table

__all__ = ["html", "terminal_table"]
