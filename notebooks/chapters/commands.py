"""The commands of the chapters: run one, run a grid of one, measure what FI costs."""

import argparse
from pathlib import Path
from typing import Any

BOOKS_PROFILE = "embedded"  # the profile whose pages and numbers the project shows


def add(commands: Any) -> None:
    """Add the commands to those of ``python -m fihelpers``."""
    _add_run(commands)
    _add_sweep(commands)
    _add_real(commands)
    _add_bench(commands)


def add_threads(command: argparse.ArgumentParser) -> None:
    """Add the option of all commands that run chapters."""
    command.add_argument(
        "--threads", type=int, help="CPU threads of each chapter (OMP_NUM_THREADS; 1 where several run)"
    )


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
    add_threads(run)
    run.set_defaults(command=_run)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="run one chapter with all combinations of some parameters")
    sweep.add_argument("chapter", help="its number or name, such as 7 or 07_sparsification")
    sweep.add_argument(
        "--grid", type=Path, required=True, help="YAML that maps parameters to lists of values"
    )
    sweep.add_argument("--profile", default=BOOKS_PROFILE, help="a file of notebooks/profiles (%(default)s)")
    sweep.add_argument("--scheduler", help="address of a dask scheduler (a local cluster)")
    sweep.add_argument(
        "--workers", type=int, help="processes of a local cluster (as many as cores and memory allow)"
    )
    sweep.add_argument("--retries", type=int, default=1, help="of a cell that fails (%(default)s)")
    sweep.add_argument("--out", type=Path, required=True, help="folder for the cells and the table")
    add_threads(sweep)
    sweep.set_defaults(command=_sweep)


def _add_real(commands: Any) -> None:
    real = commands.add_parser("real", help="run the chapters on a real language model, for hours")
    real.add_argument("chapters", nargs="*", help="numbers or names; all of the profile real by default")
    real.add_argument("--model", help="a GGUF file, a folder or a hub id (smollm2, see fetch)")
    real.add_argument("--task", help="cloze:FOLDER, a folder in the layout of MMLU, or a hub id (cloze)")
    real.add_argument("--subjects", nargs="+", help="of the task (geography culture business law)")
    real.add_argument("--out", type=Path, help="folder for the executed notebooks (build/runs/real)")
    add_threads(real)
    real.set_defaults(command=_real)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure what FI costs beside simpler ways of computing it")
    bench.add_argument(
        "rows",
        nargs="*",
        help="long, short, memory, half, pixels, topshare, gpu, chapters; by default all but the last",
    )
    bench.add_argument("--rounds", type=int, default=5, help="each piece of work is timed (%(default)s)")
    bench.add_argument("--out", type=Path, help="a JSON file for the table")
    bench.set_defaults(command=_bench)


def _run(options: argparse.Namespace) -> None:
    from fichapters import runs
    from fichapters.parameters import declared, spoken
    from fihelpers.threads import threads_for

    folder = runs.notebooks_folder()
    notebook = runs.find_chapter(folder, options.chapter)
    defaults = declared(notebook)
    parameters = {name: spoken(text, defaults.get(name)) for name, text in options.parameters}
    out = options.out or runs.runs_folder(folder, options.profile)
    threads = threads_for(asked=options.threads)
    print(runs.run_chapter(notebook, options.profile, parameters, out, threads))


def _sweep(options: argparse.Namespace) -> None:
    from fichapters import runs, sweeps

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
        threads=options.threads,
    )
    print(table)


def _real(options: argparse.Namespace) -> None:
    from fichapters import real_runs, runs
    from fichapters.kept import REAL
    from fihelpers.threads import threads_for

    folder = runs.notebooks_folder()
    subjects = options.subjects or [None]
    given = {"MODEL": options.model, "TASK": options.task}
    given |= {"SUBJECTS": options.subjects, "SUBJECT": subjects[0]}
    given = {name: value for name, value in given.items() if value}
    out = options.out or runs.runs_folder(folder, REAL)
    threads = threads_for(asked=options.threads)
    for notebook in real_runs.run(folder, out, given, options.chapters, threads):
        print(notebook)


def _bench(options: argparse.Namespace) -> None:
    from fichapters import bench

    bench.main(options.rows, options.rounds, options.out)
