"""Workers that tests start as processes are importable as modules too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
