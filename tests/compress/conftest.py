import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # models.py, which only these tests use
