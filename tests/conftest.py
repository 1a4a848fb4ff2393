"""No network, one thread a process (the suite runs one worker a core), and standard error as `weft` itself keeps it."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before any library loads, as cli/main.py does

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, which makes models and data

import tiny


@pytest.fixture(autouse=True, scope="module")
def _imports_out_of_sight():
    """Collecting garbage, which trainers do after every run, takes a second among all that torch's imports make."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "loom.jsonl"
    return tiny.write_jsonl(path, [{"text": text} for text in tiny.sentences(60)])
