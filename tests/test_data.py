"""The data folder: found, and the same as was shipped."""

import json
from pathlib import Path

import pytest

from fihelpers import data
from fiminis.manifest import write_manifest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "mini").mkdir(parents=True)
    (tmp_path / "models" / "mini" / "config.json").write_text("{}")
    (tmp_path / "stories.txt").write_text("Once upon a time\n")
    write_manifest(tmp_path)
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path))
    return tmp_path


def test_the_environment_names_the_folder(folder: Path) -> None:
    assert data.data_folder() == folder.resolve()


def test_a_wrong_folder_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"FIHELPERS_DATA names .*none, which is not a folder"):
        data.data_folder()


def test_the_checkout_is_used_next_and_its_absence_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FIHELPERS_DATA", raising=False)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "fihelpers" / "data.py"))
    with pytest.raises(FileNotFoundError, match="set FIHELPERS_DATA"):
        data.data_folder()
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data")
    assert data.data_folder() == (tmp_path / "data").resolve()


def test_an_unchanged_file_passes_with_its_hash(folder: Path) -> None:
    path = folder / "stories.txt"
    assert data.check_file(path) == data.file_sha256(path)


def test_a_changed_byte_is_noticed_and_the_file_named(folder: Path) -> None:
    (folder / "stories.txt").write_text("Once upon a tine\n")
    with pytest.raises(ValueError, match=r"^stories\.txt is damaged"):
        data.check_file(folder / "stories.txt")


@pytest.mark.parametrize("relative", ["../outside.txt", "models/../../outside.txt"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, relative: str) -> None:
    with pytest.raises(ValueError, match="is not in the data folder"):
        data.check_file(folder / relative)


def test_a_file_that_is_not_listed_or_not_there_is_named(folder: Path) -> None:
    (folder / "new.txt").write_text("new")
    with pytest.raises(ValueError, match=r"new\.txt is not listed"):
        data.check_file(folder / "new.txt")
    (folder / "stories.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"stories\.txt is listed .* but missing"):
        data.check_file(folder / "stories.txt")


def test_a_folder_passes_only_whole_and_without_additions(folder: Path) -> None:
    model = folder / "models" / "mini"
    (model / ".hidden").write_text("ignored")
    data.check_folder(model)
    (model / "extra.json").write_text("{}")
    with pytest.raises(ValueError, match=r"models/mini/extra\.json is not listed"):
        data.check_folder(model)
    (model / "extra.json").unlink()
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"models/mini/config\.json"):
        data.check_folder(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), (json.dumps(["stories.txt"]), "must map relative paths")],
)
def test_a_broken_manifest_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=rf"manifest\.json.* {message}"):
        data.check_file(folder / "stories.txt")


def test_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        data.check_file(folder / "stories.txt")
