from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")
