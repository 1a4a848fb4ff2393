import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # textbook_ksvd.py, which only these tests and a benchmark use
