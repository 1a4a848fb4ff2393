import contextlib
import ctypes
import gc
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def trimmed():
    """What earlier tests freed goes back to the system: else what is measured finds room in it, and seems less."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
