"""The script that tunes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import tune
from config import load_config
from helper import load_checkpoint
from predict import load_segmenter

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_tune_keeps_what_it_finds_with_the_checkpoint(data, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(folder)]
    before = (folder / "best.pkl").read_bytes()
    assert tune.main([*command, "--dry-run"]) == 0
    assert "tuned on other kinds" in capsys.readouterr().out
    assert (folder / "best.pkl").read_bytes() == before

    assert tune.main([*command, "--export", str(tmp_path / "small.pkl")]) == 0
    found = next(iter(load_checkpoint(folder / "best.pkl")["tuned"].values()))
    assert 0 <= found["scores"]["score"] <= 1
    assert (tmp_path / "small.pkl").stat().st_size < 0.2 * (folder / "best.pkl").stat().st_size
    segmenters = [load_segmenter([path], load_config()) for path in (folder / "best.pkl", tmp_path / "small.pkl")]
    for segmenter in segmenters:
        assert segmenter.config.param.threshold == found["values"]["param.threshold"]
        assert segmenter.config.post.min_object_size == found["values"]["post.min_object_size"]
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    one, other = (segmenter.probs(image)["semantic"] for segmenter in segmenters)
    assert np.abs(one - other).max() < 0.01
    set_by_user = load_config(overrides=["param.threshold=0.123"])
    assert load_segmenter([folder / "best.pkl"], set_by_user).config.param.threshold == 0.123
    both = load_segmenter([folder / "best.pkl", folder / "latest.pkl"], load_config())
    assert both.config.param.threshold == load_config().param.threshold  # that pair was not tuned


def test_tune_refuses_in_one_line(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(trained)]
    for options, words in (
        (["--set", "dataset.cv_ratio=0", "--data", str(data / "train")], "no validation image"),
        (["nowhere.pkl"], "no such checkpoint"),
        (["--dry-run", "--export", "x.pkl"], "writes nothing"),
        ([str(trained / "best.pkl"), str(trained / "latest.pkl"), "--export", "x.pkl"], "several are named"),
    ):
        assert tune.main([*command, *options]) == 2
        assert words in capsys.readouterr().err
