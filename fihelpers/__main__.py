"""``python -m fihelpers``: run a chapter or a grid, build the book, score weights, make what ships."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fihelpers import runs
from fihelpers.parameters import declared, spoken

BOOKS_PROFILE = "embedded"  # the profile whose pages and numbers the project shows
NO_BROWSER = "no Chromium or Chrome was found, so no page was opened."
CHECKOUT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an expected error is one sentence on stderr and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except ModuleNotFoundError as error:
        return _fail(f"the package {error.name} is missing; run pip install -e '.[book,test]'.")
    except KeyError as error:
        return _fail(error.args[0] if error.args else error)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        return _fail(error)
    return 0


def _fail(message: object) -> int:
    print(f"fihelpers: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fihelpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_build(commands)
    _add_sweep(commands)
    _add_score(commands)
    pdf = commands.add_parser("pdf", help="print one chapter of the built book as PDF")
    pdf.add_argument("chapter", help="its number or name, such as 7 or 07_sparsification")
    pdf.add_argument("--out", type=Path, help="the file to write (build/pdf/CHAPTER.pdf)")
    pdf.set_defaults(command=_pdf)

    minis = commands.add_parser("train-minis", help="make the bundled models again")
    minis.add_argument("which", choices=["lm", "vlm", "experts"])
    minis.set_defaults(command=_train_minis)

    bench = commands.add_parser("bench", help="measure what FI costs beside simpler ways of computing it")
    bench.add_argument(
        "rows", nargs="*", help="long, short, memory, pixels, topshare, evaluation, gpu; all by default"
    )
    bench.add_argument("--rounds", type=int, default=5, help="each piece of work is timed (%(default)s)")
    bench.add_argument("--out", type=Path, help="a JSON file for the table")
    bench.set_defaults(command=_bench)

    manifest = commands.add_parser("manifest", help="list the SHA-256 of every file in data/ again")
    manifest.set_defaults(command=_manifest)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run one chapter by papermill")
    run.add_argument("chapter", help="its number or name, such as 7 or 07_sparsification")
    run.add_argument("--profile", default=BOOKS_PROFILE, help="a file of notebooks/profiles (%(default)s)")
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter; the value is read as YAML, so a list is written '[0.01, 0.05]'",
    )
    run.add_argument("--out", type=Path, help="folder for the executed notebook (build/runs/PROFILE)")
    run.set_defaults(command=_run)


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="run every chapter that changed and build the book")
    build.add_argument("--profile", default=BOOKS_PROFILE, help="a file of notebooks/profiles (%(default)s)")
    build.add_argument("--check", action="store_true", help="open every page in a browser, and check sizes")
    build.add_argument("--keep-results", action="store_true", help="copy the numbers to data/results")
    build.add_argument("--jobs", type=int, default=1, help="chapters run at a time (%(default)s)")
    build.set_defaults(command=_build)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="run one chapter with all combinations of some parameters")
    sweep.add_argument("chapter", help="its number or name, such as 7 or 07_sparsification")
    sweep.add_argument(
        "--grid", type=Path, required=True, help="YAML that maps parameters to lists of values"
    )
    sweep.add_argument("--profile", default=BOOKS_PROFILE, help="a file of notebooks/profiles (%(default)s)")
    sweep.add_argument("--scheduler", help="address of a dask scheduler (a local cluster)")
    sweep.add_argument("--workers", type=int, default=2, help="processes of a local cluster (%(default)s)")
    sweep.add_argument("--retries", type=int, default=1, help="of a cell that fails (%(default)s)")
    sweep.add_argument("--out", type=Path, required=True, help="folder for the cells and the table")
    sweep.set_defaults(command=_sweep)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score", help="score every weight of a model; starts on many processes with torchrun"
    )
    score.add_argument("model", help="a bundled name, a folder, or a hub id")
    score.add_argument("task", help="bundled, a folder of questions, a .txt file of contexts, or a hub id")
    score.add_argument("--out", type=Path, required=True, help="the file to write (.safetensors)")
    score.add_argument("--measures", nargs="+", default=["FI"], metavar="NAME", help="(%(default)s)")
    score.add_argument(
        "--spectral", default="exact", help="the filter of FI, such as 'damped 0.0001' (%(default)s)"
    )
    # not --n: torchrun would take it, anywhere on the line, for the start of an option of its own
    score.add_argument("-n", type=int, help="so many examples, drawn with the seed (all)")
    score.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    score.add_argument("--subject", help="one subject of the task (all)")
    score.add_argument("--split", default="val", help="dev, val or test (%(default)s)")
    score.add_argument("--shots", type=int, default=0, help="solved questions before each (%(default)s)")
    score.add_argument("--revision", help="the commit of a model of the hub")
    score.add_argument("--dtype", default="float32", help="of the weights (%(default)s)")
    score.add_argument("--device", default="cpu", help="cuda gives each process its own GPU (%(default)s)")
    score.add_argument("--device-map", help="auto spreads a model that is too large over all GPUs")
    score.add_argument(
        "--save-memory",
        action="store_true",
        help="go through the model block by block, with one more forward pass (where only that fits)",
    )
    score.add_argument("--batch-size", type=int, default=16, help="examples at a time, at most (%(default)s)")
    score.add_argument(
        "--checkpoint-every",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="0: every batch (%(default)s)",
    )
    score.set_defaults(command=_score)


def _run(options: argparse.Namespace) -> None:
    folder = runs.notebooks_folder()
    notebook = runs.find_chapter(folder, options.chapter)
    defaults = declared(notebook)
    parameters = {name: spoken(text, defaults.get(name)) for name, text in options.parameters}
    out = options.out or _runs_folder(folder, options.profile)
    print(runs.run_chapter(notebook, options.profile, parameters, out))


def _build(options: argparse.Namespace) -> None:
    from fihelpers import book, publish

    shown = options.profile == BOOKS_PROFILE
    if options.keep_results and not shown:
        raise ValueError(f"--keep-results keeps the numbers of {BOOKS_PROFILE}, not of {options.profile}.")
    folder = runs.notebooks_folder()
    root = folder.parent
    out = _runs_folder(folder, options.profile)
    runs.run_all(folder, options.profile, out, options.jobs)
    if options.keep_results:
        runs.keep_results(out, root / "data" / "results")
        publish.draw_landing_picture(root / "book")
    pages = root / "book" / "_build" if shown else root / "build" / "book" / options.profile
    index = book.build_book(out, pages, root / "book")
    if options.check:
        _check_pages(index.parent)
    print(index)


def _sweep(options: argparse.Namespace) -> None:
    from fihelpers import sweeps

    notebook = runs.find_chapter(runs.notebooks_folder(), options.chapter)
    grid = sweeps.read_grid(options.grid)
    table = sweeps.sweep(
        notebook,
        options.profile,
        grid,
        options.out,
        scheduler=options.scheduler,
        workers=options.workers,
        retries=options.retries,
    )
    print(table)


def _score(options: argparse.Namespace) -> None:
    from fihelpers import scoring
    from fihelpers.influence import spectral_of
    from fihelpers.models import find_device, open_model
    from fihelpers.tasks import load_task

    spectral = spectral_of(options.spectral)
    for name in options.measures:
        scoring.measure_of(name, spectral)
    device = scoring.own_device(options.device, options.device_map)
    task = load_task(options.task, options.subject, options.split, options.n, options.seed, options.shots)
    with scoring.processes(find_device(device), len(task)) as team:
        foreseen = scoring.foresee(
            options.model,
            task,
            options.out,
            options.measures,
            spectral,
            revision=options.revision,
            device=device,
            device_map=options.device_map,
            dtype=options.dtype,
            batch_size=options.batch_size,
            save_memory=options.save_memory,
            team=team,
        )
        if team.first:
            print(foreseen, file=sys.stderr)
        model = open_model(
            options.model, options.revision, device, options.dtype, device_map=options.device_map
        )
        paths = scoring.score_task(
            model,
            task,
            options.out,
            options.measures,
            spectral,
            batch_size=options.batch_size,
            save_memory=foreseen.save_memory,
            checkpoint_every=options.checkpoint_every,
            team=team,
        )
    if team.first:
        print(*paths, sep="\n")


def _check_pages(html: Path) -> None:
    """Open the pages in a browser; without one, say so, or fail where FIHELPERS_REQUIRE_BROWSER is set."""
    from fihelpers import browser, publish

    findings = publish.check_sizes(html)
    chromium = browser.find_browser()
    if chromium is not None:
        findings += browser.check_pages(html, chromium)
    elif os.environ.get("FIHELPERS_REQUIRE_BROWSER"):
        raise FileNotFoundError(f"{NO_BROWSER} FIHELPERS_REQUIRE_BROWSER asks for one; install Chromium.")
    else:
        print(f"SKIPPED: {NO_BROWSER}", file=sys.stderr)
    if findings:
        raise ValueError("\n".join(["the pages have faults:", *findings]))


def _pdf(options: argparse.Namespace) -> None:
    from fihelpers import browser

    folder = runs.notebooks_folder()
    chapter = runs.find_chapter(folder, options.chapter).stem
    chromium = browser.find_browser()
    if chromium is None:
        raise FileNotFoundError("no Chromium or Chrome was found to print with; install one.")
    pages = folder.parent / "book" / "_build" / "html"
    target = options.out or folder.parent / "build" / "pdf" / f"{chapter}.pdf"
    print(browser.print_pdf(pages, f"chapters/{chapter}.html", target, chromium))


def _train_minis(options: argparse.Namespace) -> None:
    from fihelpers.minis import experts, lm, vlm

    make: dict[str, Callable[[Path], None]] = {"lm": lm.main, "vlm": vlm.main, "experts": experts.main}
    make[options.which](_data_folder())


def _bench(options: argparse.Namespace) -> None:
    from fihelpers import bench

    bench.main(options.rows, options.rounds, options.out)


def _manifest(options: argparse.Namespace) -> None:
    from fihelpers.minis.manifest import write_manifest

    print(write_manifest(_data_folder()))


def _data_folder() -> Path:
    """The folder to make data in; unlike the one to read from, it may lack its manifest."""
    folder = Path(os.environ.get("FIHELPERS_DATA") or CHECKOUT / "data")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {folder} is missing; run from a checkout or set FIHELPERS_DATA."
        )
    return folder


def _runs_folder(notebooks: Path, profile: str) -> Path:
    return notebooks.parent / "build" / "runs" / profile


if __name__ == "__main__":
    sys.exit(main())
