"""What the tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripting import SMALL
from synthetic import write_dataset


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


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, where no config.ini of a developer lies."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder with six small labelled images for training, two for validation and two to predict."""
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", 6, 0), ("valid", 2, 1), ("test", 2, 2)):
        write_dataset(folder / name, n, seed, shape=(48, 56), masks=name != "test")
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> Path:
    """The checkpoint folder of two epochs."""
    import train  # here, since most tests need no torch

    folder = tmp_path_factory.mktemp("checkpoint")
    assert train.main(["--data", str(data), "--checkpoint-dir", str(folder), "--epoch", "2", *SMALL]) == 0
    return folder
