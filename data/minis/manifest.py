"""data/manifest.json: the SHA-256 of every file that ships."""

from __future__ import annotations

import json
from pathlib import Path

from fihelpers.data import MANIFEST, file_sha256, write_atomically

RESULTS = "results"  # made from the data by running the chapters, and compared by a test of its own


def write_manifest(data: Path) -> Path:
    """List every file below `data` but hidden ones and the committed results; return the manifest's path."""
    files = sorted(
        path
        for path in data.rglob("*")
        if path.is_file() and path.name != MANIFEST and not _passed_over(path.relative_to(data))
    )
    hashes = {path.relative_to(data).as_posix(): file_sha256(path) for path in files}
    manifest = data / MANIFEST
    write_atomically(manifest, (json.dumps(hashes, indent=1) + "\n").encode())
    return manifest


def _passed_over(relative: Path) -> bool:
    return relative.parts[0] == RESULTS or any(part.startswith(".") for part in relative.parts)
