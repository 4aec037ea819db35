"""What is kept for a user from run to run: converted, fetched and fine-tuned models, and hashes of files.

It lies in the folder that FIHELPERS_HOME names, else in fihelpers/ of the user's cache. Its models
together take at most FIHELPERS_HOME_GB gigabytes, 20 by default: those not used for longest go first.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import zlib
from pathlib import Path

from fihelpers.data import file_sha256, write_atomically

log = logging.getLogger(__name__)

HOME, LIMIT = "FIHELPERS_HOME", "FIHELPERS_HOME_GB"
GIGABYTES = 20.0
MODELS, FILES, EXPERTS, HASHES = "models", "files", "experts", "hashes"
SETTLED = 2.0  # seconds after which a file's time tells that it was changed


def home() -> Path:
    """The folder of all that is kept; it may not be there yet."""
    named = os.environ.get(HOME)
    if named:
        return Path(named).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fihelpers"


def kept_sha256(path: Path) -> str:
    """The SHA-256 of a file, read once as long as its path, size and times stay the same."""
    path = path.resolve()
    stat = path.stat()
    stamp = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    entry = home() / HASHES / f"{zlib.crc32(str(path).encode()):08x}-{path.name}.json"
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        pass
    found = file_sha256(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        try:
            write_atomically(entry, json.dumps({"stamp": stamp, "sha256": found}).encode())
        except OSError as error:
            log.info("the hash of %s is not kept (%s)", path, error)
    return found


def make_room(size: int) -> None:
    """Drop models not used for longest until `size` more bytes stay within the limit.

    Raises OSError where the limit is lower than that, or the disk has no room for it.
    """
    allowed = int(limit() * 1e9)
    if size > allowed:
        raise OSError(
            errno.ENOSPC,
            f"the model takes {size / 1e9:.1f} GB and at most {limit():g} are kept; set {LIMIT} to more",
        )
    used = {path: _size(path) for path in _entries()}
    for path in sorted(used, key=lambda path: path.stat().st_mtime):
        if sum(used.values()) + size <= allowed:
            break
        log.warning("%s is dropped: more than %g GB of models would be kept", path, limit())
        _remove(path)
        del used[path]
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the model takes {size / 1e9:.1f} GB of {folder}, where {free / 1e9:.1f} are free; make room, "
            f"or let {HOME} name a folder on another disk",
        )


def limit() -> float:
    """Gigabytes of models that are kept. Raises ValueError for a setting that is no number above 0."""
    said = os.environ.get(LIMIT)
    try:
        found = GIGABYTES if said is None else float(said)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise ValueError(f"{LIMIT} must be a number of gigabytes above 0, not {said!r}.")
    return found


def contents() -> dict[str, int]:
    """Bytes of all that is kept, by place within the folder."""
    folder = home()
    found = {path.relative_to(folder).as_posix(): _size(path) for path in _entries()}
    hashes = _size(folder / HASHES)
    return {**found, HASHES: hashes} if hashes else found


def empty() -> None:
    """Remove all that is kept."""
    for name in (MODELS, FILES, EXPERTS, HASHES):
        shutil.rmtree(home() / name, ignore_errors=True)


def _entries() -> list[Path]:
    return sorted(path for name in (MODELS, FILES, EXPERTS) for path in (home() / name).glob("*"))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
