"""No network, one thread a process (the suite runs one worker a core), and standard error as `weft` itself keeps it."""

import fcntl
import gc
import os
import sys
from collections.abc import Callable
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
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` fills once, however many workers share the run.

    Where it fails, it fails for all who ask: what it left half done is nothing to begin from, and its time is long.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        target = root / f"once-{name}"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                target.mkdir()
                make(target)
                (target / "done").touch()
            assert (target / "done").exists(), f"{name} failed, as was told where it was made"
        return target

    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "loom.jsonl"
    return tiny.write_jsonl(path, [{"text": text} for text in tiny.sentences(60)])
