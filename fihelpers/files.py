"""Writing files so that a reader never meets half of one, and hashing the package's own."""

import hashlib
import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
COMPILED = "__pycache__"  # Python's code, and the loops that Numba compiles anew for each new use
LEFT_BEHIND = (".pyc", "~")  # how the names of other files end that no version of a folder holds


def package_sha256() -> str:
    """Hash of the package's own files: what was computed before they changed may no longer hold."""
    total = hashlib.sha256()
    for path in lasting_files(PACKAGE):
        total.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes())
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
