"""The script that predicts: what it writes, and what it says where it cannot."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import train
import valid
from annotation import read_csv, read_label_map
from config import load_config
from image import read_image
from record import find_records
from scripting import ROOT, SMALL, choose
from synthetic import draw_sample

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_valid_refuses_in_one_line(data, trained, tmp_path, capsys):
    broken = tmp_path / "broken.pkl"
    broken.write_bytes((trained / "latest.pkl").read_bytes()[:1000])
    for arguments, words in (
        (["nowhere.pkl"], "no such checkpoint"),
        ([str(broken)], "not a readable checkpoint"),
        ([str(trained / "latest.pkl"), "--input", "nowhere"], "no such file or folder"),
        ([str(trained / "latest.pkl"), "--dataset", "test", "--iou"], "none of the images has masks"),
    ):
        assert valid.main([*arguments, "--data", str(data), "--csv"]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
        assert not (tmp_path / "result.csv").exists()


def test_valid_writes_everything_at_once(data, trained, tmp_path, capsys):
    status = valid.main(
        ["--data", str(data), "--checkpoint-dir", str(trained), "--dataset", "valid", "--output", str(tmp_path / "out")]
        + ["--csv", "--iou", "--save", "--mask", "--label", "--set", "param.threshold=0.3"]
    )
    assert status == 0
    ids = sorted(folder.name for folder in (data / "valid").iterdir())
    runs = read_csv(tmp_path / "out" / "result.csv")
    assert sorted(runs) == ids
    for image_id in ids:
        labels = read_label_map(tmp_path / "out" / f"{image_id}.tif")
        assert np.array_equal(decode(runs[image_id], (48, 56)), labels)
        assert Image.open(tmp_path / "out" / f"{image_id}.png").size[0] > 100
        assert len(list((tmp_path / "out" / image_id / "masks").glob("*.png"))) == labels.max()
    table = (tmp_path / "out" / "iou.csv").read_text().splitlines()
    assert len(table) == 1 + len(ids) + 1 and table[-1].startswith("[all]")
    assert "mAP" in capsys.readouterr().out


def decode(runs: list[str], shape: tuple[int, int]) -> np.ndarray:
    """Run lengths -> label map, pixel by pixel and apart from the toolkit's own reader."""
    labels = np.zeros(shape, np.int32)
    for label, run in enumerate(runs, start=1):
        numbers = [int(word) for word in run.split()]
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            for position in range(start - 1, start - 1 + length):
                column, row = divmod(position, shape[0])
                assert labels[row, column] == 0, "a pixel in two nuclei"
                labels[row, column] = label
    return labels


def test_the_csv_has_a_row_for_an_image_without_nuclei(data, trained, tmp_path):
    command = ["--data", str(data), "--checkpoint-dir", str(trained), "--csv", "--set", "param.threshold=1"]
    assert valid.main(command) == 0
    lines = (tmp_path / "result.csv").read_text().splitlines()
    assert lines[0] == "ImageId,EncodedPixels"
    assert sorted(lines[1:]) == sorted(f"{folder.name}," for folder in (data / "test").iterdir())


def test_prediction_goes_on_past_a_bad_image(data, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    good = next(data.glob("test/*/images/*.png"))
    shutil.copy(good, photos / "good.png")
    (photos / "bad.png").write_bytes(good.read_bytes()[:90])
    assert valid.main([str(trained / "latest.pkl"), "--input", str(photos), "--csv"]) == 3
    assert "bad.png" in capsys.readouterr().err
    assert list(read_csv(tmp_path / "result.csv")) == ["good"]


def test_the_split_of_training_is_the_split_of_validation(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data / "train", folder / "train")
    command = ["--data", str(folder), "--checkpoint-dir", str(tmp_path / "c")]
    assert train.main([*command, "--epoch", "1", *SMALL, "--set", "dataset.cv_ratio=0.4"]) == 0
    assert valid.main([*command, "--dataset", "valid", "--csv", "--output", "a"]) == 0
    assert valid.main([*command, "--dataset", "train", "--csv", "--output", "b"]) == 0
    parts = [set(read_csv(tmp_path / name / "result.csv")) for name in "ab"]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 6 and len(parts[0]) == 2


def test_a_further_list_makes_no_trained_image_validate(data):
    ids = sorted(folder.name for folder in (data / "train").iterdir())
    then = load_config(overrides=["dataset.cv_folds=2"])

    def choose_ids(side: str, *settings: str) -> set[str]:
        args = argparse.Namespace(input=None, data=data, dataset=side)
        return {r.id for r in valid.choose_records(args, load_config(overrides=list(settings)), then.to_dict())}

    trained, held = choose_ids("train"), choose_ids("valid")
    for name in sorted(held):
        assert choose_ids("valid", f"dataset.blacklist={name}") == held - {name}
    for name in sorted(trained):
        assert choose_ids("valid", f"dataset.blacklist={name}") == held
    assert trained | held == set(ids)


def test_an_ensemble_of_checkpoints(data, trained, tmp_path):
    checkpoints = [str(trained / "latest.pkl"), str(trained / "best.pkl")]
    assert valid.main([*checkpoints, "--data", str(data), "--csv", "--set", "valid.ensemble=vote"]) == 0
    assert (tmp_path / "result.csv").is_file()


@pytest.mark.parametrize("options", [["--save"], ["--label"]])
def test_no_result_replaces_an_image_it_is_of(trained, tmp_path, options, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    name = "a.png" if options == ["--save"] else "a.tif"
    Image.fromarray(draw_sample(0, (32, 32))[0]).save(photos / name)
    before = (photos / name).read_bytes()
    command = [str(trained / "latest.pkl"), "--input", str(photos), *options]
    assert valid.main([*command, "--output", str(photos)]) == 2
    assert "would be replaced by a result" in capsys.readouterr().err
    assert (photos / name).read_bytes() == before
    assert valid.main([*command, "--output", str(tmp_path / "out")]) == 0


def test_no_result_replaces_true_masks(data, trained, capsys):
    masks = sorted((data / "train").glob("*/masks/*"))
    before = [path.read_bytes() for path in masks]
    command = [str(trained / "latest.pkl"), "--data", str(data), "--dataset", "train", "--mask"]
    assert valid.main([*command, "--output", str(data / "train")]) == 2
    assert "would be replaced by a result" in capsys.readouterr().err
    assert [path.read_bytes() for path in masks] == before


def test_without_a_display_one_line_points_to_save(data, trained, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, str(ROOT / "valid.py"), "--data", str(data), "--checkpoint-dir", str(trained)]
    environment["MPLBACKEND"] = "agg"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "--save" in line]
    assert "mAP" not in done.stdout and "0 images in" in done.stdout  # nothing was done, nothing is summed up


def test_detectors_make_no_ensemble(data, tmp_path, capsys):
    folders = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "checkpoint")]
    small = choose("param.model=maskrcnn", "param.encoder_weights=none")
    assert train.main([*folders, *small, "--epoch", "1"]) == 0
    latest = str(tmp_path / "checkpoint" / "latest.pkl")
    assert valid.main([latest, latest, *folders, "--dataset", "valid", "--csv"]) == 2
    assert "no ensemble; name one checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["lab", "hed"])
def test_figures_show_the_colours_of_the_file(data, space):
    record = find_records(data / "valid")[0]
    config = load_config(overrides=[f"pre.color_space={space}", "pre.stretch=False", "valid.view_color_equalize=False"])
    labels = np.zeros((48, 56), np.int32)
    result = valid.Result(record, read_image(record.image, *config.pre.policy), {}, labels, None)
    shown = np.asarray(valid.draw(result, config).axes[0].images[0].get_array())
    assert np.array_equal(shown, read_image(record.image))
    assert not np.array_equal(shown, result.image)


def test_valid_streams_a_slide(trained, tmp_path, capsys):
    image = np.tile(draw_sample(0, (64, 64))[0], (3, 4, 1))
    tifffile.imwrite(tmp_path / "big.tif", image, tile=(64, 64), photometric="rgb")
    options = [
        "--set",
        "valid.slide_size=0.001",
        "--set",
        "valid.slide_block=128",
        "--input",
        str(tmp_path / "big.tif"),
    ]
    arguments = [str(trained / "latest.pkl"), "--output", "out", *options, *SMALL]
    assert valid.main(arguments) == 0
    said = capsys.readouterr().out
    labels = tifffile.imread("out/big_labels.tif")
    assert labels.shape == (192, 256) and f"{labels.max()} nuclei in 192 x 256 pixels, 4 blocks" in said
    assert len(json.loads(Path("out/big_nuclei.geojson").read_text())["features"]) == labels.max()
    assert valid.main([*arguments, "--label", "--geojson"]) == 0
    assert valid.main([*arguments, "--csv"]) == 2
    assert "--csv is for images held in memory" in capsys.readouterr().err
    (tmp_path / "stack.zarr").mkdir()
    (tmp_path / "stack.zarr" / "zarr.json").write_text("{}")
    assert valid.main([*arguments, "--input", str(tmp_path / "stack.zarr")]) == 3
    assert "refused: " in capsys.readouterr().err
