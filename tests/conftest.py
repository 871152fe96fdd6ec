"""What the tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nuclei_data() -> Path:
    """The folder of real data; a test that asks for it skips where there is none."""
    folder = os.environ.get("NUCLEI_DATA")
    if not folder:
        pytest.skip("NUCLEI_DATA names no folder of real data")
    if not Path(folder).is_dir():
        pytest.skip(f"NUCLEI_DATA = {folder}: no such folder")
    return Path(folder)
