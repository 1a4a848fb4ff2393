import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # compressed.py, which makes models with structured layers
