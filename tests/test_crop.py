"""The script that cuts images."""

from __future__ import annotations

import shutil

import pytest

import crop
from scripting import run_script

pytestmark = pytest.mark.usefixtures("elsewhere")


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
