"""Golden numbers: what every chapter keeps, of one commit beside another, run on this machine.

    python tools/golden.py OLD [NEW] [--profile smoke] [--chapters 01 07] [--keep build/golden]

Both commits run every chapter with one thread and the compiled loops, each from its own files. Every table
is compared: whole numbers, selections and words equal, other numbers to a relative 1e-5.
Where a column differs in nothing but whole numbers or words, the list says so: that is what a flipped tie
looks like. Timings, memory, versions and hashes are left out. Runs are kept by commit; the exit
code is the number of differences, at most 99. "." stands for the files as they are.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "fihelpers": "fihelpers",
    "fichapters": "notebooks/chapters",
    "fibook": "book/bookmaker",
    "fiminis": "data/minis",
}
RELATIVE = 1e-5
ABSOLUTE = 1e-9  # where a sum of equal parts is nothing but rounding
LEFT_OUT = re.compile(  # timings, memory, versions, hashes, by the name of a column or a row
    r"second|minute|\bms\b|_ms|time|speed|ratio_of_time|memory|bytes|peak|_mb\b|_gb\b|sha256|version|machine",
    re.IGNORECASE,
)
COST = "10_"  # the chapter that times: only its names are compared


def run(commit: str, profile: str, chapters: Sequence[str], keep: Path) -> Path:
    """The folder with what every chapter of a commit kept; runs what is not there yet.

    Raises RuntimeError where a chapter fails, with its last words.
    """
    name = "files" if commit == "." else _git("rev-parse", "--short=10", commit)
    out = keep / f"{name}.{profile}"
    if commit == ".":
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        tree, rooms = _tree(commit, Path(folder)), Path(folder) / "rooms"
        wanted = [path.stem for path in sorted((tree / "notebooks").glob("[0-9]*.ipynb"))]
        wanted = [chapter for chapter in wanted if not chapters or chapter[:2] in chapters]
        todo = [chapter for chapter in wanted if not (out / f"{chapter}.json").is_file()]
        # the last chapter reads the others' tables
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda chapter: _run(tree, rooms, chapter, profile, out), todo[:-1]))
        for chapter in todo[-1:]:
            _run(tree, rooms, chapter, profile, out)
    return out


def differences(old: Path, new: Path) -> Iterator[str]:
    """One sentence for everything that is missing, unexpected or different."""
    before, after = _kept(old), _kept(new)
    for name in sorted(before | after):
        if name not in after:
            yield f"{name}: is missing"
        elif name not in before:
            yield f"{name}: was not there before"
        elif not name.startswith(COST):
            yield from _tables(name, pd.read_csv(old / name), pd.read_csv(new / name))


def _tables(name: str, old: pd.DataFrame, new: pd.DataFrame) -> Iterator[str]:
    gone, come = set(old.columns) - set(new.columns), set(new.columns) - set(old.columns)
    if gone or come:
        yield f"{name}: columns that went {sorted(gone)}, that came {sorted(come)}"
    if len(old) != len(new):
        yield f"{name}: {len(old)} rows before, {len(new)} now"
        return
    for column in old.columns:
        if column in new.columns and not LEFT_OUT.search(column):
            wrong = [
                i
                for i, (a, b) in enumerate(zip(old[column], new[column], strict=True))
                if not _same(a, b) and not _is_time(old.iloc[i])
            ]
            if wrong:
                kind = "a tie may have flipped" if _flips(old[column], new[column], wrong) else "values"
                shown = "; ".join(f"row {i}: {old[column][i]!r} → {new[column][i]!r}" for i in wrong[:3])
                yield f"{name}: {column}, {len(wrong)} of {len(old)} rows ({kind}): {shown}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float | np.floating) and isinstance(b, float | np.floating | int | np.integer):
        return bool(np.isclose(a, b, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True))
    return bool(a == b)


def _flips(old: pd.Series, new: pd.Series, wrong: Sequence[int]) -> bool:
    """Whether what differs are words, or digits for single answers."""
    return all(isinstance(old[i], str | int | np.integer) for i in wrong)


def _is_time(row: pd.Series) -> bool:
    return any(isinstance(value, str) and LEFT_OUT.search(value) for value in row)


def _kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.csv")}


def _tree(commit: str, folder: Path) -> Path:
    """The files of a commit in a folder, or the checkout; `rooms` in the folder leads to its packages."""
    tree = ROOT
    if commit != ".":
        tree = folder / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    (folder / "rooms").mkdir()
    for package, place in ROOMS.items():
        if (tree / place / "__init__.py").is_file():
            (folder / "rooms" / package).symlink_to(tree / place)
    return tree


def _run(tree: Path, rooms: Path, chapter: str, profile: str, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(rooms), "TQDM_DISABLE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fihelpers", "run", chapter[:2], "--profile", profile, "--out", str(out)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{chapter} of {tree}: {done.stderr.strip()[-600:]}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument(
        "new", nargs="?", default=".", help="a commit, or the files as they are (%(default)s)"
    )
    parser.add_argument("--profile", default="smoke", help="(%(default)s)")
    parser.add_argument("--chapters", nargs="*", default=[], help="such as 01 07 (all)")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "golden", help="folder for the runs")
    options = parser.parse_args()
    keep = options.keep.resolve()
    old, new = (run(c, options.profile, options.chapters, keep) for c in (options.old, options.new))
    found = list(differences(old, new))
    print("\n".join(found) or "every number is as it was")
    return min(99, len(found))


if __name__ == "__main__":
    sys.exit(main())
