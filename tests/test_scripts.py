"""The scripts, run as a user runs them: what they write, how they fail, and how they survive being killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import crop
import link
import prepare
import split
import train
import tune
import valid
from annotation import read_csv, read_label_map
from config import load_config
from helper import load_checkpoint
from predict import load_segmenter
from record import find_records, load_split
from synthetic import draw_sample, write_dataset

ROOT = Path(__file__).parent.parent
SMALL = [
    "--set", "param.model=unet", "--set", "DEFAULT.width=32", "--set", "train.n_batch=3", "--set", "train.n_cv_epoch=1",
    "--set", "train.n_worker=1", "--set", "train.precision=float32", "--set", "train.print_freq=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, where no config.ini of a developer lies."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with six small labelled images for training, two for validation and two to predict."""
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", 6, 0), ("valid", 2, 1), ("test", 2, 2)):
        write_dataset(folder / name, n, seed, shape=(48, 56), masks=name != "test")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The checkpoint folder of two epochs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    assert train.main(["--data", str(data), "--checkpoint-dir", str(folder), "--epoch", "2", *SMALL]) == 0
    return folder


def run_script(name: str, *args: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


# Training


def test_train_writes_its_checkpoints_and_log(trained):
    state = load_checkpoint(trained / "latest.pkl")
    assert state["epoch"] == 2
    assert json.loads((trained / "current.json").read_text()) == {"checkpoint": "latest.pkl", "epoch": 2}
    assert (trained / "best.pkl").is_file()
    assert list((trained / "log").glob("events*"))


def test_train_prints_the_progress_line(data, tmp_path, capsys):
    train.main(["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL])
    printed = capsys.readouterr().out
    assert "Grand new training ..." in printed
    assert "Epoch: [1][0/2]    Time: " in printed and "(io: " in printed
    assert "training  an epoch   each  validation" in printed
    assert "IoU(Semantic): " in printed and "Loss: " in printed


def test_a_trained_run_says_so(data, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL]
    for options in ([], ["--set", "train.n_epoch=2"]):
        assert train.main([*command, *options]) == 0
        assert "already" in capsys.readouterr().out
    assert train.main([*command, "--epoch", "1"]) == 0
    assert load_checkpoint(tmp_path / "c" / "latest.pkl")["epoch"] == 3


def test_starting_anew_sets_the_last_run_aside(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--no-resume", "--epoch", "1", *SMALL]
    assert train.main(command) == 0
    assert load_checkpoint(tmp_path / "c" / "latest.pkl")["epoch"] == 1
    assert load_checkpoint(tmp_path / "c" / "previous" / "latest.pkl")["epoch"] == 2


def test_fine_tuning_starts_from_the_weights(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", "--lr", "1e-9", *SMALL]
    assert train.main([*command, "--init", str(trained / "latest.pkl")]) == 0
    before = load_checkpoint(trained / "latest.pkl")["average"]
    after = load_checkpoint(tmp_path / "c" / "latest.pkl")["weights"]
    name = "outputs.semantic.weight"
    torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=0)


def test_fine_tuning_another_network_takes_what_fits(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL]
    assert train.main([*command, "--set", "param.model=caunet", "--init", str(trained / "latest.pkl")]) == 0
    assert "outputs.contour" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_settings_it_began_with(data, tmp_path):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c")]
    assert train.main([*command, *SMALL, "--epoch", "1", "--set", "pre.stretch=False"]) == 0
    assert train.main([*command, "--epoch", "1", "--set", "train.weight_decay=0.5"]) == 0
    state = load_checkpoint(tmp_path / "c" / "latest.pkl")
    assert (state["epoch"], state["model"], state["config"]["pre"]["stretch"]) == (2, "unet", False)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_another_network_does_not_resume(data, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL, "--set", "param.model=caunet"]
    assert train.main(command) == 2
    assert "--no-resume" in capsys.readouterr().err


def test_a_killed_run_resumes_to_the_same_end(data, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command = ["--data", str(data), "--epoch", "6", *SMALL, "--set", "param.dropout=0.2"]
    assert run_script("train.py", *command, "--checkpoint-dir", str(straight)).returncode == 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "train.py"), *command, "--checkpoint-dir", str(broken)]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / "current.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = load_checkpoint(broken / "latest.pkl")["epoch"]
    assert 1 <= done < 6, "killed too late to show anything"
    resumed = run_script("train.py", *command, "--checkpoint-dir", str(broken))
    assert resumed.returncode == 0 and f"Resuming after epoch {done}" in resumed.stdout
    a, b = (load_checkpoint(folder / "latest.pkl") for folder in (straight, broken))
    assert b["epoch"] == a["epoch"] == 6
    for name, value in a["weights"].items():
        assert torch.equal(value, b["weights"][name]), name


# What the user gets wrong


def _corrupt(folder: Path) -> None:
    image = next(folder.glob("train/*/images/*.png"))
    image.write_bytes(image.read_bytes()[:100])


def _resize_mask(folder: Path) -> None:
    mask = next(folder.glob("train/*/masks/*.png"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (_empty, [], "no image"),
        (_corrupt, [], "not a readable image"),
        (_resize_mask, [], "shape (9, 9), image is (48, 56)"),
        (None, ["--set", "train.n_epok=3"], "did you mean 'n_epoch'"),
        (None, ["--set", "param.model=camunett"], "did you mean 'camunet'"),
        (None, ["--set", "loss.semantic=bec"], "did you mean 'bce'"),
        (None, ["--set", "param.weight=bordr"], "did you mean 'border'"),
        (None, ["--set", "post.policy=wss"], "did you mean 'ws'"),
        (None, ["--set", "post.marker=contour"], "no head 'contour'"),
        (None, ["--set", "valid.test_time_augment=flip"], "did you mean 'flips'"),
        (None, ["--epoch", "-2"], "wanted more than 0"),
        (None, ["--set", "train.schedule=cosin"], "did you mean 'cosine'"),
        (None, ["--set", "train.device=cuda:99"], "cuda:99"),
        (None, ["--config", "nowhere.ini"], "nowhere.ini: no such file"),
        (None, ["--init", "nowhere.pkl"], "no such checkpoint"),
        (None, ["--set", "dataset.valid_ids=nowhere.txt"], "no such file"),
        (None, ["--set", "dataset.sub_category=Moon"], "no image passes the filter"),
        (None, ["--set", "unett.width=64"], "did you mean 'unet'"),
    ],
)
def test_train_refuses_in_one_line(spoil, options, words, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    if spoil:
        spoil(folder)
    status = train.main(["--data", str(folder), "--checkpoint-dir", str(tmp_path / "c"), *SMALL, *options])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "c").exists()


def test_a_typo_in_the_ini_names_file_section_and_key(data, tmp_path, capsys):
    (tmp_path / "config.ini").write_text("[train]\nn_epok = 3\n")
    assert train.main(["--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "config.ini" in error and "'n_epok' in section [train]" in error and "'n_epoch'" in error


def test_train_skips_bad_images_when_told_to(data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    _corrupt(folder)
    command = ["--data", str(folder), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL]
    assert train.main([*command, "--set", "dataset.on_bad=skip"]) == 3
    captured = capsys.readouterr()
    assert "5 training images" in captured.out and "skipped: " in captured.err


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
    assert valid.main([*arguments, "--csv"]) == 2
    assert "--csv is for images held in memory" in capsys.readouterr().err
    (tmp_path / "stack.zarr").mkdir()
    (tmp_path / "stack.zarr" / "zarr.json").write_text("{}")
    assert valid.main([*arguments, "--input", str(tmp_path / "stack.zarr")]) == 3
    assert "refused: " in capsys.readouterr().err


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


def test_an_error_is_no_traceback(tmp_path):
    done = run_script("train.py", "--set", "train.n_epoch=many", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "train.py: error: --set train.n_epoch=many: [train] n_epoch = many: "
        "Input should be a valid integer, unable to parse string as an integer"
    )


# Prediction


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


def test_an_ensemble_of_checkpoints(data, trained, tmp_path):
    checkpoints = [str(trained / "latest.pkl"), str(trained / "best.pkl")]
    assert valid.main([*checkpoints, "--data", str(data), "--csv", "--set", "valid.ensemble=vote"]) == 0
    assert (tmp_path / "result.csv").is_file()


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


def test_without_a_display_one_line_points_to_save(data, trained, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, str(ROOT / "valid.py"), "--data", str(data), "--checkpoint-dir", str(trained)]
    environment["MPLBACKEND"] = "agg"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "--save" in line]


def test_scripts_run_in_a_notebook(data, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    options = f"--data {data} --checkpoint-dir {tmp_path / 'c'}"
    cells = [
        f"%cd {ROOT}",
        f"%run train.py --epoch 1 {options} {' '.join(SMALL)}",
        "%matplotlib inline",
        f"%run valid.py {options}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=240).execute()
    assert (tmp_path / "c" / "latest.pkl").is_file()
    shown = [output for output in notebook.cells[-1].outputs if output.output_type == "display_data"]
    assert len(shown) == 2 and all("image/png" in output.data for output in shown)


# Preparation


def test_split_links_and_never_overwrites(data, tmp_path, capsys):
    source = shutil.copytree(data / "train", tmp_path / "stage1")
    command = [str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0.4"]
    assert split.main(command) == 0
    sides = [{folder.name for folder in (tmp_path / "data" / side).iterdir()} for side in ("train", "valid")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {folder.name for folder in source.iterdir()}
    image = next((tmp_path / "data" / "train").glob("*/images/*"))
    assert image.samefile(source / image.relative_to(tmp_path / "data" / "train"))
    assert split.main(command) == 2
    assert "not empty" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    assert len(list(source.glob("*/images/*"))) == 6


def test_crop_from_inside_the_data_folder(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "data" / "tissue")
    names = sorted(path.name for path in (tmp_path / "data" / "tissue").iterdir())
    table = tmp_path / "data" / "dataset.csv"
    table.write_text("image_id,sub_category\n" + "".join(f"{name},{name[:2]}\n" for name in names))
    command = ["crop.py", "tissue", "--step", "20", "--width", "32", "--only-category", names[0][:2]]
    dry = run_script(*command, "--dry-run", cwd=tmp_path / "data")
    assert dry.returncode == 0 and " to write, 0 were there already" in dry.stdout, dry.stderr
    assert not (tmp_path / "data" / "tissue_crop").exists()
    for line in (" written, 0 were there already", "0 pieces written, "):
        done = run_script(*command, cwd=tmp_path / "data")
        assert done.returncode == 0 and line in done.stdout, done.stderr
    pieces = {path.name for path in (tmp_path / "data" / "tissue_crop").glob("[!.]*")}
    assert pieces and {name.rsplit("_", 2)[0] for name in pieces} == {n for n in names if n[:2] == names[0][:2]}
    booked = {line.split(",")[0] for line in table.read_text().splitlines()} - {"image_id", *names}
    assert booked == pieces


def test_crop_refuses_in_one_line(data, tmp_path, capsys):
    source = shutil.copytree(data / "train", tmp_path / "tissue")
    for options, words in (
        (["--step", "0", "--width", "32"], "each must be above 0"),
        (["--step", "20", "--width", "32", "--csv", "absent.csv"], "absent.csv: no such file"),
        (["--step", "20", "--width", "32", "--only-category", "Moon"], "no image passes the filter"),
    ):
        assert crop.main([str(source), *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "tissue_crop").exists()
    image = next(source.glob("*/images/*.png"))
    image.write_bytes(b"no image")
    assert crop.main([str(source), "--step", "20", "--width", "32"]) == 3
    assert f"refused: {source.name}" in capsys.readouterr().err.replace(str(source), source.name)
    assert len(list((tmp_path / "tissue_crop").glob("[!.]*"))) > 5


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


def oversampled(tmp_path: Path, data: Path) -> tuple[Path, Path, list[str]]:
    """A source of eight images whose first two are one patient, split, with more images in it since."""
    source = shutil.copytree(data / "train", tmp_path / "data" / "source")
    names = sorted(names_in(source))
    kinds = [name[:2] for name in names]
    rows = [f"{name},{kind},{'p' if i < 2 else i}\n" for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    (tmp_path / "data" / "dataset.csv").write_text("image_id,sub_category,patient\n" + "".join(rows))
    assert split.main([str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0"]) == 0
    return source, tmp_path / "data", names


def test_oversampling_adds_copies_that_stay_with_their_patient(data, tmp_path, capsys):
    source, folder, names = oversampled(tmp_path, data)
    shutil.move(folder / "train" / names[2], folder / "valid" / names[2])
    command = [str(source), "--data", str(folder), "--oversample", "--set", "dataset.cv_ratio=0"]
    assert split.main([*command, "--dry-run"]) == 0 and names_in(folder / "train") == {*names} - {names[2]}
    one = ["--set", f"dataset.sub_category={names[0][:2]}"]
    assert split.main([*command, *one]) == 0 and split.main([*command, *one]) == 0
    assert split.main(command) == 0
    printed = capsys.readouterr().out
    first = [name for name in names if name[:2] == names[0][:2] and name != names[2]]
    copies = {f"{name}_copy{n}" for name in first for n in (1, 2, 3)} | {f"{name}_copy1" for name in names}
    copies -= {f"{names[2]}_copy{n}" for n in (1, 2, 3)}
    assert names_in(folder / "train") == ({*names} | copies) - {names[2]}
    assert names_in(folder / "valid") == {names[2]}
    assert "0 new images; 1 left alone" in printed
    image = next((folder / "train" / f"{names[0]}_copy1" / "images").iterdir())
    assert image.samefile(source / names[0] / "images" / image.name)
    config = load_config(overrides=["dataset.cv_ratio=0.5"])
    train, valid = load_split(folder, config.dataset.model_copy(update={"cv_folds": 2}))
    sides = [{record.id.split("_copy")[0] for record in side} for side in (train, valid)]
    assert not sides[0] & sides[1] and sum(names[0] in side or names[1] in side for side in sides) == 1


def test_new_images_join_the_side_of_their_patient(data, tmp_path):
    source, folder, names = oversampled(tmp_path, data)
    shutil.rmtree(folder / "train" / names[1])
    (folder / "valid").mkdir(exist_ok=True)
    shutil.move(folder / "train" / names[0], folder / "valid" / names[0])
    assert split.main([str(source), "--data", str(folder), "--oversample"]) == 0
    assert names_in(folder / "valid") == {names[0], names[1]}


def test_an_interrupted_oversampling_is_finished_first(data, tmp_path, monkeypatch, capsys):
    source, folder, names = oversampled(tmp_path, data)
    command = [str(source), "--data", str(folder), "--oversample"]
    monkeypatch.setattr(link, "finish_links", lambda folder: 0)  # killed right before the links are moved into place
    assert split.main(command) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert names_in(folder / "train") == {*names}
    assert split.main(command) == 0
    assert f"{len(names)} copies of an interrupted run" in capsys.readouterr().out
    wanted = {*names} | {f"{name}_copy1" for name in names}
    assert names_in(folder / "train") == wanted and not (folder / "train" / link.STAGE).exists()


def test_copies_of_label_maps_are_renamed(data, tmp_path):
    source = tmp_path / "data" / "source"
    for kind in ("images", "masks"):
        (source / kind).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(np.ones((20, 20), np.uint8)).save(source / kind / f"{name}.png")
    command = [str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0"]
    assert split.main(command) == 0 and split.main([*command, "--oversample"]) == 0
    records = find_records(tmp_path / "data" / "train")
    assert [record.id for record in records] == ["a", "a_copy1", "b", "b_copy1", "c", "c_copy1"]
    assert not any(record.problem for record in records)


def test_links_keep_an_image_without_nuclei(tmp_path):
    (tmp_path / "source" / "a" / "images").mkdir(parents=True)
    (tmp_path / "source" / "a" / "masks").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "source" / "a" / "images" / "a.png")
    command = [str(tmp_path / "source"), "--data", str(tmp_path), "--set", "dataset.cv_ratio=0"]
    assert split.main([*command, "--dry-run"]) == 0 and not (tmp_path / "train").exists()
    assert split.main(command) == 0
    assert find_records(tmp_path / "train")[0].masks == ()


def test_demo_draws_what_can_be_trained_on(tmp_path):
    assert prepare.main(["demo", "--images", "4", "--data", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("demo/train/*/images/*.png"))) == 4
    assert not list(tmp_path.glob("demo/test/*/masks"))


# Networks of every family


def choose(*settings: str) -> list[str]:
    """Small training with these settings on top."""
    return [*SMALL, *(part for text in ("DEFAULT.width=64", *settings) for part in ("--set", text))]


@pytest.mark.parametrize("name", ["lite_camunet", "colorunet", "distunet", "dcan", "msdnet", "maskrcnn"])
def test_every_family_goes_through_the_scripts(name, data, tmp_path, capsys):
    # Thresholds are low so that little training finds something.
    small = choose(f"param.model={name}", "valid.test_time_augment=none", "param.threshold=0.3", "post.min_score=0")
    if name == "msdnet":
        small += ["--set", 'param.options={"depth": 6, "width": 1}']
    folders = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "checkpoint")]
    assert train.main([*folders, *small, "--epoch", "1"]) == 0
    assert train.main([*folders, *small, "--epoch", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Resuming after epoch 1" in printed
    assert printed.count("Encoder weights: imagenet") == (name in ("lite_camunet", "maskrcnn"))  # not when resuming
    assert load_checkpoint(tmp_path / "checkpoint" / "latest.pkl")["epoch"] == 2
    wanted = ["--csv", "--iou", "--label", "--save", "--output", str(tmp_path / "out")]
    assert valid.main([*folders, *small, "--dataset", "valid", *wanted]) == 0
    nuclei = read_csv(tmp_path / "out" / "result.csv")
    assert any(nuclei.values())
    for id in (folder.name for folder in (data / "valid").iterdir()):
        assert (tmp_path / "out" / f"{id}.png").is_file()
        assert read_label_map(tmp_path / "out" / f"{id}.tif").max() == len(nuclei[id])


def test_fine_tuning_another_family(data, trained, tmp_path, capsys):
    start = ["--data", str(data), "--init", str(trained / "latest.pkl"), "--epoch", "1"]
    folder = ["--checkpoint-dir", str(tmp_path / "checkpoint")]
    assert train.main([*start, *folder, *choose("param.model=maskrcnn")]) == 2
    assert "none of its weights fits maskrcnn" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
    assert train.main([*start, *folder, *choose("param.model=colorunet")]) == 0
    assert "fresh: decoders.1" in capsys.readouterr().out


def test_fine_tuning_leaves_a_fitting_encoder_alone(data, tmp_path, capsys):
    small = [*choose("param.model=lite_camunet"), "--data", str(data), "--epoch", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main([*small, "--checkpoint-dir", str(first), "--set", "param.encoder_weights=none"]) == 0
    assert "Encoder weights" not in capsys.readouterr().out
    assert train.main([*small, "--checkpoint-dir", str(second), "--init", str(first / "latest.pkl")]) == 0
    printed = capsys.readouterr().out
    assert "Initialised" in printed and "Encoder weights" not in printed


def test_detectors_make_no_ensemble(data, tmp_path, capsys):
    folders = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "checkpoint")]
    small = choose("param.model=maskrcnn", "param.encoder_weights=none")
    assert train.main([*folders, *small, "--epoch", "1"]) == 0
    latest = str(tmp_path / "checkpoint" / "latest.pkl")
    assert valid.main([latest, latest, *folders, "--dataset", "valid", "--csv"]) == 2
    assert "no ensemble; name one checkpoint" in capsys.readouterr().err


def test_without_a_connection_nothing_is_begun(data, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    options = [*SMALL, "--set", "param.model=res_unet", "--checkpoint-dir", str(tmp_path / "checkpoint")]
    assert train.main(["--data", str(data), *options]) == 2
    assert "There are three choices" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


# Preparation


def test_add_and_remove_as_commands(tmp_path, capsys):
    write_dataset(tmp_path / "new", 2, shape=(40, 48))
    where = ["--data", str(tmp_path / "data")]
    assert prepare.main(["add", str(tmp_path / "new"), "--source", "Lab", "--sub", "Dim", "--dry-run", *where]) == 0
    assert "2 images would be added" in capsys.readouterr().out and not (tmp_path / "data").exists()
    assert prepare.main([*where, "add", str(tmp_path / "new"), "--source", "Lab", "--sub", "Dim"]) == 0
    assert "train: 2 images (Dim 2)" in capsys.readouterr().out
    assert prepare.main(["remove", "--source", "Lab", *where]) == 0
    assert "2 images moved to" in capsys.readouterr().out
    assert prepare.main(["add", str(tmp_path / "data" / "removed" / "train"), *where]) == 0


def test_add_says_what_it_wants(tmp_path, capsys):
    write_dataset(tmp_path / "new", 1, shape=(40, 48))
    assert prepare.main(["add", str(tmp_path / "new"), "--data", str(tmp_path / "data")]) == 2
    assert "--source" in capsys.readouterr().err
    assert prepare.main(["add", str(tmp_path / "nowhere"), "--source", "Lab"]) == 2
    write_dataset(tmp_path / "blank", 1, shape=(40, 48), masks=False)
    assert prepare.main(["add", str(tmp_path / "blank"), "--source", "Lab", "--data", str(tmp_path / "data")]) == 3
    assert "refused: " in capsys.readouterr().err


def test_verify_reports_and_bans(tmp_path, capsys):
    write_dataset(tmp_path / "train", 4, shape=(48, 48))
    where = ["--data", str(tmp_path), "--set", "dataset.cv_ratio=0", "--blacklist", str(tmp_path / "black.txt")]
    assert prepare.main(["verify", *where]) == 0
    assert "nothing wrong" in capsys.readouterr().out and (tmp_path / "verify.csv").read_text().count("\n") == 1
    image = sorted(tmp_path.glob("train/*/images/*.png"))[0]
    image.write_bytes(b"broken")
    assert prepare.main(["verify", *where, "--dry-run"]) == 3 and not (tmp_path / "black.txt").exists()
    assert prepare.main(["verify", *where]) == 3
    assert (tmp_path / "black.txt").read_text() == f"{image.stem}\n"


def test_stats_prints_draws_and_keeps_the_rest_of_the_settings(tmp_path, capsys):
    write_dataset(tmp_path / "data" / "train", 3, shape=(48, 48))
    (tmp_path / "mine.ini").write_text("; mine\n[train]\nn_epoch = 3 ; few\n")
    options = ["stats", "--data", "data", "--write-config", "mine.ini"]
    assert prepare.main([*options, "--dry-run"]) == 0
    assert (tmp_path / "mine.ini").read_text().count("\n") == 3 and not (tmp_path / "stats.png").exists()
    assert prepare.main(options) == 0
    assert "nuclei" in capsys.readouterr().out and (tmp_path / "stats.png").is_file()
    assert (tmp_path / "mine.ini").read_text().startswith("; mine\n[train]\nn_epoch = 3 ; few\n\n[pre]\nmean = [")
    settings = load_config("mine.ini")
    assert settings.train.n_epoch == 3 and all(0 < value < 1 for value in settings.pre.mean + settings.pre.std)
