"""Writing files so that a reader never meets half of one, and hashing the package's own."""

import hashlib
import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def package_sha256() -> str:
    """Hash of the package's own files: what was computed before they changed may no longer hold."""
    sources = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    total = hashlib.sha256()
    for path in sources:
        total.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return total.hexdigest()


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
