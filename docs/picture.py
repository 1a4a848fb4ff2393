"""A figure of a committed report as a picture of its own, light or dark as its reader: docs/assets/pareto.svg

    python docs/picture.py                                   the loss on pycode against the memory of training
    python docs/picture.py --study sst2 --cost step_seconds  another comparison of docs/results, another axis

The figure is drawn by the report itself, in Chromium, which must be installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from weft.report.template import asset

DOCS = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def drawn(report: Path) -> str:
    """The page of a report after its script has run."""
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--window-size=1400,3000"]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *options, f"--user-data-dir={profile}", "--dump-dom", report.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def figure(page: str, cost: str) -> str:
    """The figure of the Pareto front as a whole SVG file, with the colours of the report's style sheet."""
    found = re.search(rf'<figure data-figure="pareto" data-cost="{cost}">.*?(<svg .*?</svg>)</div>', page, re.DOTALL)
    if found is None:
        sys.exit(f"the report has no Pareto front against {cost}")
    scheme = r"^:root \{.*?^\}|^@media \(prefers-color-scheme: dark\) \{.*?^\}"
    schemes = re.findall(scheme, asset("page.css"), re.MULTILINE | re.DOTALL)
    svg = found[1].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    paint = "svg { background: var(--paper) !important; }"
    return svg.replace("<style>", f"<style>{' '.join(schemes)} {paint} ", 1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="pycode")
    parser.add_argument("--cost", default="peak_bytes", help="trainable, peak_bytes, step_seconds or file_bytes")
    args = parser.parse_args()
    page = drawn(DOCS / "results" / args.study / "report.html")
    (DOCS / "assets" / "pareto.svg").write_text(figure(page, args.cost), encoding="utf-8")


if __name__ == "__main__":
    main()
