"""The scripts together, run as a user runs them."""

from __future__ import annotations

import pytest

import train
import valid
from annotation import read_csv, read_label_map
from helper import load_checkpoint
from scripting import ROOT, SMALL, choose, run_script

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_an_error_is_no_traceback(tmp_path):
    done = run_script("train.py", "--set", "train.n_epoch=many", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "train.py: error: --set train.n_epoch=many: [train] n_epoch = many: "
        "Input should be a valid integer, unable to parse string as an integer"
    )


def test_the_tour_runs_in_a_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    tour = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in tour.cells)
    smaller = {
        "%cd ..": f"%cd {ROOT}",
        "data/demo": str(tmp_path / "data" / "demo"),
        "checkpoint/demo": str(tmp_path / "checkpoint"),
        "prepare.py demo": f"prepare.py demo --images 8 --data {tmp_path / 'data'}",
        "--minutes 1": f"--epoch 1 {' '.join(SMALL)}",
    }
    assert all(any(text in cell.source for cell in tour.cells) for text in smaller)
    for cell in tour.cells:
        for text, wanted in smaller.items():
            cell.source = cell.source.replace(text, wanted)
    nbclient.NotebookClient(tour, timeout=240).execute()
    outputs = [cell.get("outputs", []) for cell in tour.cells]
    assert not any(output.output_type == "error" for of_cell in outputs for output in of_cell)
    assert (tmp_path / "checkpoint" / "latest.pkl").is_file()
    assert (tmp_path / "data" / "demo" / "predict" / "result.csv").is_file()
    shown = [[output for output in of_cell if output.output_type == "display_data"] for of_cell in outputs]
    assert [len(figures) for figures in shown if figures] == [2, 2]
    assert all("image/png" in figure.data for figures in shown for figure in figures)


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
