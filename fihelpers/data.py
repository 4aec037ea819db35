"""Where the shipped data lies, and whether it is what was shipped; hashes, and files written whole."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
PACKAGE = Path(__file__).resolve().parent
COMPILED = "__pycache__"  # Python's code, and the loops that Numba compiles anew for each new use
LEFT_BEHIND = (".pyc", "~")  # how the names of other files end that no version of a folder holds


def data_folder() -> Path:
    """Return the folder of the shipped data: ``FIHELPERS_DATA``, else the checkout's ``data/``.

    Raises FileNotFoundError if neither is there.
    """
    named = os.environ.get("FIHELPERS_DATA")
    if named:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"FIHELPERS_DATA names {named}, which is not a folder; correct it.")
        return Path(named).resolve()
    checkout = Path(__file__).resolve().parent.parent / "data"
    if not (checkout / MANIFEST).is_file():
        raise FileNotFoundError(
            "the data folder was not found: run from a checkout that has data/ beside fihelpers/, "
            "or set FIHELPERS_DATA to that folder."
        )
    return checkout


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path) -> str:
    """Compare one file of the data folder with the manifest and return its SHA-256.

    Raises ValueError if the file lies outside the data folder, is not listed, or was changed, and
    FileNotFoundError if it or the manifest is missing.
    """
    folder = data_folder()
    path = Path(path).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{path} is not in the data folder {folder}, so no hash is known for it.")
    relative = path.relative_to(folder).as_posix()
    expected = _manifest(folder).get(relative)
    if expected is None:
        raise ValueError(f"{relative} is not listed in {MANIFEST}; remove it or restore the data folder.")
    if not path.is_file():
        raise FileNotFoundError(f"{relative} is listed in {MANIFEST} but missing; restore the data folder.")
    found = file_sha256(path)
    if found != expected:
        raise ValueError(
            f"{relative} is damaged: its SHA-256 is {found[:12]}…, {MANIFEST} says {expected[:12]}…; "
            "restore the file."
        )
    return found


def check_folder(folder: Path) -> None:
    """Check every file below a folder of the data folder: none missing, none changed, none added.

    Files that :func:`lasting_files` leaves out are ignored. Raises what :func:`check_file` raises.
    """
    root = data_folder()
    folder = Path(folder).resolve()
    listed = {root / name for name in _manifest(root)}
    for path in sorted({*lasting_files(folder), *(path for path in listed if path.is_relative_to(folder))}):
        check_file(path)


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore the data folder.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the data folder.") from error
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise ValueError(f"{path} must map relative paths to SHA-256 strings; restore the data folder.")
    return entries


def package_sha256(*folders: Path) -> str:
    """Hash of the library's own files, or those of some folders: what was computed before they changed may
    no longer hold."""
    total = hashlib.sha256()
    for folder in folders or (PACKAGE,):
        for path in lasting_files(folder):
            total.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()


def lasting_files(folder: Path) -> list[Path]:
    """The files below a folder that belong to it, in order: those that git would ship.

    Left out is what running, downloading and editing leave there: hidden files and folders, compiled code,
    and copies that end in "~".
    """
    found = sorted(path for path in folder.rglob("*") if _lasts(path.relative_to(folder)))
    return [path for path in found if path.is_file()]


def _lasts(place: Path) -> bool:
    passing = any(part.startswith(".") or part == COMPILED for part in place.parts)
    return not passing and not place.name.endswith(LEFT_BEHIND)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: after a crash the old file, or none, is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name once all is written; after any error nothing is left.

    Raises FileExistsError where `out` is a file or a folder that is not empty, and OSError, in one sentence,
    where the disk is full or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is already there and not an empty folder; choose another one.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise _unwritten(out, error) from error
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except OSError as error:
        raise _unwritten(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritten(out: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(error.errno, f"{out} could not be written ({reason}) and nothing of it is left; make room")
