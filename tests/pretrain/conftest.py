import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # resuming.py, which several methods are held to
