"""The documentation's own scripts are importable, and its pages split into their fenced blocks."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "docs")]
