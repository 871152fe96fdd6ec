"""The script that tunes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import tune
import valid
from candidate import FEATURES
from confidence import Opinion, learn
from config import load_config
from division import recall_side
from helper import DEFAULT_WEIGHTS, fingerprint, load_checkpoint, save_checkpoint
from predict import load_segmenter

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_tune_keeps_what_it_finds_with_the_checkpoint(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("confidence.N_STEPS", 100)
    folder = shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(folder)]
    before = (folder / "best.pkl").read_bytes()
    assert tune.main([*command, "--dry-run"]) == 0
    assert "tuned on others" in capsys.readouterr().out
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


def test_an_opinion_that_helps_goes_with_the_checkpoint(data, trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(folder), "--set", "post.min_object_size=3"]
    command += ["--training-images", "0"]
    formed = Opinion(), np.ones(2)
    monkeypatch.setattr(tune, "form_opinion", lambda cases, config: formed)
    assert tune.main([*command, "--export", str(tmp_path / "small.pkl")]) == 0
    printed = capsys.readouterr().out
    assert "opinion of others" in printed and "second opinion: kept" in printed
    assert "param.threshold = 0.45" in printed and "min_object_size" not in printed
    for path in (folder / "best.pkl", tmp_path / "small.pkl"):
        segmenter = load_segmenter([path], load_config())
        assert segmenter.opinion is not None and segmenter.config.param.threshold == 0.45
        features = np.random.default_rng(0).normal(size=(5, len(FEATURES))).astype(np.float32)
        assert np.array_equal(segmenter.opinion.judge(features), formed[0].judge(features))
        plain = load_segmenter([path], load_config(overrides=["post.policy=ws"]))
        assert plain.opinion is None and plain.config.post.min_object_share > 0
    shown = ["--data", str(data), "--geojson", "--output", "out", "--set", "post.min_quality=0"]
    assert valid.main([str(tmp_path / "small.pkl"), *shown]) == 0
    features = [json.loads(path.read_text())["features"] for path in sorted((tmp_path / "out").glob("*.geojson"))]
    said = [f["properties"]["measurements"]["expected quality"] for image in features for f in image]
    assert len(features) == 2 and all(0 <= value <= 1 for value in said)

    assert tune.main([str(DEFAULT_WEIGHTS.parent / "small.pkl"), *command]) == 2
    assert "ships with the toolkit and is not changed" in capsys.readouterr().err
    assert tune.main([*command, "--export", str(folder / "best.pkl")]) == 2
    assert "is what is tuned" in capsys.readouterr().err

    monkeypatch.setattr(tune, "form_opinion", lambda cases, config: (Opinion(), np.zeros(2)))
    assert tune.main(command) == 0
    assert "second opinion: none is kept" in capsys.readouterr().out
    assert load_segmenter([folder / "best.pkl"], load_config()).opinion is None


def test_rules_that_are_worse_on_others_are_not_kept(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "wants_opinion", lambda config: False)
    monkeypatch.setattr(tune.Tuner, "search", lambda tuner: (*tuner.start[1:], ("param.threshold", 0.123)))
    for worse, kept in ((0.1, 0.5), (0.0, 0.123)):
        path = shutil.copy(trained / "best.pkl", tmp_path / "best.pkl")
        monkeypatch.setattr(tune.Tuner, "cross_validate", lambda tuner, by=worse: tuner.scores(tuner.start) - by)
        assert tune.main([str(path), "--data", str(data)]) == 0
        assert ("0.123" in capsys.readouterr().out) == (kept == 0.123)
        assert load_segmenter([path], load_config()).config.param.threshold == kept


def test_an_opinion_may_be_learned_from_training_images(data, trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "c")
    monkeypatch.setattr("confidence.N_STEPS", 20)
    monkeypatch.setattr(tune, "form_opinion", lambda cases, config: None)
    taught = []

    def learn_and_tell(features, ious, seed):
        taught.append(len(ious))
        return learn(features, ious, seed)

    monkeypatch.setattr("tuning.learn", learn_and_tell)
    monkeypatch.setattr("tuning.judge", lambda case, config, opinion: 1.0)
    command = ["--data", str(data), "--checkpoint-dir", str(folder)]
    config = load_config()
    n_training = len(recall_side(data, config, load_checkpoint(folder / "best.pkl")["config"], "train"))
    assert n_training > 2
    for most in (n_training, 2):
        assert tune.main([*command, "--training-images", str(most)]) == 0
        printed = capsys.readouterr().out
        assert "opinion of training" in printed and "opinion of others" not in printed
        assert "second opinion: kept" in printed
    assert taught[0] == n_training and 1 <= taught[1] <= 2
    kept = load_segmenter([folder / "best.pkl"], config).opinion
    assert kept is not None and kept.std.min() > 0


def test_a_folder_without_training_images_is_tuned_on(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("confidence.N_STEPS", 20)
    shutil.copytree(data / "valid", tmp_path / "alone" / "valid")
    command = [str(trained / "best.pkl"), "--data", str(tmp_path / "alone"), "--dry-run"]
    assert tune.main(command) == 0
    said = capsys.readouterr()
    assert "tuned on others" in said.out and "opinion of training" not in said.out
    assert "no training images to learn of" in said.err


def test_what_was_found_for_one_network_holds_for_its_successor(data, trained, tmp_path, capsys):
    old, new = (shutil.copy(trained / f"{name}.pkl", tmp_path / f"{name}.pkl") for name in ("best", "latest"))
    state = load_checkpoint(new)
    bias = next(name for name in state["average"] if name.endswith("bias"))
    state["average"][bias] += 0.5  # trained on
    save_checkpoint(new, state)
    assert tune.main([str(new), "--like", str(old)]) == 2
    assert f"{old}: holds nothing that was found for it alone" in capsys.readouterr().err
    tuned = load_checkpoint(old)
    found = {"values": {"param.threshold": 0.321}, "scores": {"score": 0.5}}
    save_checkpoint(old, {**tuned, "tuned": {fingerprint([tuned]): found}})
    assert tune.main([str(new), "--like", str(old), "--dry-run"]) == 0
    assert "tuned" not in load_checkpoint(new)
    assert tune.main([str(new), "--like", str(old), "--export", str(tmp_path / "small.pkl")]) == 0
    for path in (new, tmp_path / "small.pkl"):
        assert load_segmenter([path], load_config()).config.param.threshold == 0.321
    state["config"]["pre"]["color_space"] = "lab"
    save_checkpoint(new, state)
    assert tune.main([str(new), "--like", str(old)]) == 2
    assert "another way to read images" in capsys.readouterr().err
    assert tune.main([str(new), str(old), "--like", str(old)]) == 2
    assert "several are named" in capsys.readouterr().err


def test_tune_refuses_in_one_line(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(trained)]
    for options, words in (
        (["--set", "dataset.cv_ratio=0", "--data", str(data / "train")], "no validation image"),
        (["nowhere.pkl"], "no such checkpoint"),
        (["--set", "post.policy=forest"], "leave it at auto"),
        (["--dry-run", "--export", "x.pkl"], "writes nothing"),
        ([str(trained / "best.pkl"), str(trained / "latest.pkl"), "--export", "x.pkl"], "several are named"),
        (["--training-images", "-1"], "wanted 0 or more"),
    ):
        assert tune.main([*command, *options]) == 2
        assert words in capsys.readouterr().err
