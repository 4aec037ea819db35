"""What is kept for a user: within its limit, read again only when it changed, and gone when told so."""

import os
from pathlib import Path

import pytest

from fihelpers import cache
from fihelpers.__main__ import main
from fihelpers.data import file_sha256


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.HOME, str(tmp_path / "home"))
    return tmp_path / "home"


def settled(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def kept(home: Path, name: str, size: int, used: int) -> Path:
    folder = home / cache.MODELS / name
    settled(folder / "model.safetensors", b"0" * size)
    os.utime(folder, (used, used))
    return folder


def test_a_hash_is_read_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    path = settled(tmp_path / "weights", b"one")
    first = cache.kept_sha256(path)
    monkeypatch.setattr(cache, "file_sha256", lambda _: pytest.fail("read a second time"))
    assert cache.kept_sha256(path) == first == file_sha256(path)
    monkeypatch.setattr(cache, "file_sha256", file_sha256)
    stat = path.stat()
    path.write_bytes(b"two")  # as long, and dated back
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.kept_sha256(path) == file_sha256(path) != first


def test_a_hash_of_a_file_just_written_is_not_kept(tmp_path: Path, home: Path) -> None:
    cache.kept_sha256(settled(tmp_path / "weights", b"one"))
    assert not list((home / cache.HASHES).glob("*"))


def test_a_damaged_entry_is_read_over(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    path = settled(tmp_path / "weights", b"one")
    first = cache.kept_sha256(path)
    for entry in (home / cache.HASHES).glob("*"):
        entry.write_bytes(b"[]")
    assert cache.kept_sha256(path) == first


def test_the_model_not_used_for_longest_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, "1e-6")  # a thousand bytes
    old, older, new = kept(home, "old", 300, 200), kept(home, "older", 300, 100), kept(home, "new", 300, 300)
    cache.make_room(100)
    assert all(folder.is_dir() for folder in (old, older, new))
    cache.make_room(500)
    assert [folder.is_dir() for folder in (old, older, new)] == [False, False, True]
    with pytest.raises(OSError, match=f"set {cache.LIMIT} to more"):
        cache.make_room(1001)
    assert new.is_dir()


@pytest.mark.parametrize("said", ["nothing", "0", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, said)
    with pytest.raises(
        ValueError, match=f"{cache.LIMIT} must be a number of gigabytes above 0, not '{said}'"
    ):
        cache.make_room(1)


def test_a_full_disk_says_how_much_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 5})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=f"make room, or let {cache.HOME} name a folder"):
        cache.make_room(6)


def test_the_command_lists_and_empties(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept(home, "some", 2_500_000, 100)
    stays = settled(home / "notes.txt", b"the user's own")
    assert main(["cache"]) == 0
    assert "2.5 MB  models/some" in capsys.readouterr().out
    assert main(["cache", "--empty"]) == 0
    assert cache.contents() == {} and stays.is_file()
