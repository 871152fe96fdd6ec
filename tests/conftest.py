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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What only a GPU can show skips where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU of CUDA")
