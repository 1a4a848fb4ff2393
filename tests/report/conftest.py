import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the generator and the browser, which only these tests use

import synthetic

import weft.report


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished study of twelve methods."""
    folder = tmp_path_factory.mktemp("finished")
    synthetic.write(folder, synthetic.study(), synthetic.rows())
    weft.report.html(folder, folder / "report.html")
    return folder / "report.html"
