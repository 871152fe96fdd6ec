"""The script that prepares data, task by task."""

from __future__ import annotations

import numpy as np
import pytest

import prepare
from annotation import write_csv
from config import load_config
from division import load_split
from image import read_image, read_labels
from record import find_records, read_table
from synthetic import write_dataset

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_demo_draws_what_can_be_trained_on(tmp_path):
    assert prepare.main(["demo", "--images", "4", "--data", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("demo/train/*/images/*.png"))) == 4
    assert not list(tmp_path.glob("demo/test/*/masks"))


def test_demo_says_what_it_would_draw(tmp_path, capsys):
    command = ["demo", "--images", "4", "--data", str(tmp_path)]
    assert prepare.main([*command, "--dry-run"]) == 0
    assert "train: 4 images to draw" in capsys.readouterr().out and not (tmp_path / "demo").exists()
    assert prepare.main(command) == 0
    assert prepare.main([*command, "--dry-run"]) == 0
    assert "4 images to draw, 4 of them there already" in capsys.readouterr().out


def test_no_image_of_the_demo_is_called_like_another(tmp_path, caplog):
    assert prepare.main(["demo", "--images", "8", "--data", str(tmp_path)]) == 0
    ids = [path.name for path in tmp_path.glob("demo/*/*")]
    assert len(set(ids)) == len(ids) == 12
    train, valid = load_split(tmp_path / "demo", load_config().dataset)
    assert (len(train), len(valid)) == (8, 2) and "both sides" not in caplog.text


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


def test_the_loop_of_corrections_keeps_the_patient(tmp_path, capsys):
    """As docs/data.md has it, and what it must not do: take the table of an earlier removal."""
    write_dataset(tmp_path / "new", 3, shape=(40, 48))
    where = ["--data", str(tmp_path / "data")]
    add = ["add", str(tmp_path / "new"), "--source", "Lab", "--patient", "P7", "--to", "valid", *where]
    assert prepare.main(add) == 0
    first, second, _ = sorted(path.name for path in (tmp_path / "new").iterdir())
    for name in (first, second):
        capsys.readouterr()
        assert prepare.main(["remove", name, *where]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "back by" in line]
        table, _, command = line.partition(": their rows; back by: python prepare.py ")
    assert command == f"add {tmp_path / 'data' / 'removed-2' / 'valid'} --to valid"
    (tmp_path / "corrected").mkdir()
    (tmp_path / "new" / second).rename(tmp_path / "corrected" / second)
    (tmp_path / "corrected" / "dataset.csv").write_bytes((tmp_path / "data/removed/valid/dataset.csv").read_bytes())
    assert prepare.main(["add", str(tmp_path / "corrected"), "--to", "valid", *where]) == 3
    assert f"has no row '{second}'" in capsys.readouterr().err
    assert not (tmp_path / "data" / "valid" / second).exists()
    (tmp_path / "corrected" / "dataset.csv").write_bytes((tmp_path / table).read_bytes())
    assert prepare.main(["add", str(tmp_path / "corrected"), "--to", "valid", *where]) == 0
    assert read_table(tmp_path / "data" / "dataset.csv")[second]["patient"] == "P7"


def test_remove_names_what_was_made_from_an_image(tmp_path, capsys):
    write_dataset(tmp_path / "train", 2, shape=(40, 48))
    first, second = sorted(path.name for path in (tmp_path / "train").iterdir())
    (tmp_path / "dataset.csv").write_text(f"image_id,origin\n{second},{first}\n")
    command = ["remove", first, "--data", str(tmp_path)]
    assert prepare.main([*command, "--dry-run"]) == 0
    assert f"still there: {second}; --derived takes such along" in capsys.readouterr().out
    assert prepare.main([*command, "--derived"]) == 0
    assert "2 images moved" in capsys.readouterr().out


def test_a_folder_of_validation_images_counts_where_no_other_rule_divides(tmp_path, capsys):
    for seed, (name, to) in enumerate((("old", "valid"), ("new", "train"))):
        write_dataset(tmp_path / name, 1, seed, prefix=name, shape=(40, 48))
        command = ["add", str(tmp_path / name), "--source", "Lab", "--patient", "P7", "--to", to, "--data", "data"]
        status = prepare.main(command)
    assert status == 3 and "--to valid keeps them together" in capsys.readouterr().err
    assert prepare.main([*command, "--set", "dataset.cv_folds=2"]) == 0


def test_add_says_what_it_wants(tmp_path, capsys):
    write_dataset(tmp_path / "new", 1, shape=(40, 48))
    assert prepare.main(["add", str(tmp_path / "new"), "--data", str(tmp_path / "data")]) == 2
    assert "--source" in capsys.readouterr().err
    assert prepare.main(["add", str(tmp_path / "nowhere"), "--source", "Lab"]) == 2
    write_dataset(tmp_path / "blank", 1, shape=(40, 48), masks=False)
    assert prepare.main(["add", str(tmp_path / "blank"), "--source", "Lab", "--data", str(tmp_path / "data")]) == 3
    assert "refused: " in capsys.readouterr().err


def test_add_names_outlines_without_an_image(tmp_path, capsys):
    write_dataset(tmp_path / "new", 1, shape=(40, 48))
    (tmp_path / "corrected").mkdir()
    (tmp_path / "corrected" / "stranger.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    command = ["add", str(tmp_path / "new"), "--source", "Lab", "--data", str(tmp_path / "data")]
    assert prepare.main([*command, "--outlines", str(tmp_path / "corrected")]) == 3
    assert "stranger.geojson: outlines of stranger" in capsys.readouterr().err
    assert len(list((tmp_path / "data" / "train").iterdir())) == 1


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
    assert "[dataset] train_blacklist and valid_blacklist" in capsys.readouterr().out
    assert prepare.main(["verify", *where, "--dry-run"]) == 3
    assert "black.txt: 0 ids would be added" in capsys.readouterr().out


def test_settings_before_the_task_count_as_those_behind_it(tmp_path, capsys):
    write_dataset(tmp_path / "train", 4, shape=(48, 48))
    first, second, *_ = sorted(path.name for path in (tmp_path / "train").iterdir())
    settings = ["--set", f"dataset.blacklist={first},{second}", "--data", str(tmp_path), "verify", "--dry-run"]
    for cv_ratio, words in (("0", "2 images (2 train, 0 valid)"), ("0.5", "2 images (1 train, 1 valid)")):
        assert prepare.main([*settings, "--set", f"dataset.cv_ratio={cv_ratio}"]) == 0
        assert words in capsys.readouterr().out
    assert prepare.main([*settings[:2], *settings]) == 0


def test_verify_knows_images_that_a_filter_leaves_out(tmp_path, capsys):
    write_dataset(tmp_path / "train", 4, shape=(48, 48))
    records = find_records(tmp_path / "train")
    write_csv(tmp_path / "runs.csv", [(r.id, read_labels(r.masks, (48, 48))) for r in records])
    command = ["verify", "--data", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]
    assert prepare.main([*command, "--set", f"dataset.blacklist={records[0].id}"]) == 0
    printed = capsys.readouterr().out
    assert "runs.csv: 1 of its images are left out by the settings" in printed and "nothing wrong" in printed


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


def test_stats_settings_are_those_of_the_training_images(tmp_path):
    write_dataset(tmp_path / "train", 3, shape=(48, 48))
    write_dataset(tmp_path / "valid", 3, seed=9, prefix="v_", shape=(48, 48))
    for record in find_records(tmp_path / "valid"):
        record.image.write_bytes(find_records(tmp_path / "train")[0].image.read_bytes())
    assert prepare.main(["stats", "--data", str(tmp_path), "--write-config", "mine.ini"]) == 0
    settings = load_config("mine.ini")
    pixels = [read_image(r.image, *settings.pre.policy).reshape(-1, 3) / 255 for r in find_records(tmp_path / "train")]
    assert settings.pre.mean == pytest.approx(np.concatenate(pixels).mean(0), abs=1e-4)
    assert settings.pre.std == pytest.approx(np.concatenate(pixels).std(0), abs=1e-4)
