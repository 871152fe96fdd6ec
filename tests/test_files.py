"""Files that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from files import is_filled, replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_takes_the_place_of_the_old_one(tmp_path, sync):
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with replacing(path, sync) as stage:
            stage.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure), replacing(path) as stage:
        stage.write_text("half")
        raise failure
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole(tmp_path):
    with replacing(tmp_path / "folder") as stage:
        stage.mkdir()
        (stage / "one").write_text("1")
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path / "folder") == ["one"]
    with pytest.raises(ValueError), replacing(tmp_path / "other") as stage:
        stage.mkdir()
        (stage / "one").write_text("1")
        raise ValueError
    assert names(tmp_path) == ["folder"]


def test_a_folder_with_files_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("1")
    with pytest.raises(OSError), replacing(tmp_path / "folder") as stage:
        stage.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["precious"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    with replacing(tmp_path / "a") as stage:
        stage.write_text("a")
    (tmp_path / "b").write_text("b")
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_a_folder_with_hidden_files_alone_is_not_filled(tmp_path):
    assert not is_filled(tmp_path / "absent") and not is_filled(tmp_path)
    (tmp_path / ".mark").touch()
    assert not is_filled(tmp_path)
    (tmp_path / "a").touch()
    assert is_filled(tmp_path)
