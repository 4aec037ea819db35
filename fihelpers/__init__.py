"""First-order local influence (FI): which pieces of a model or of its input are fragile.

What a first experiment needs can be imported from here; each name is fetched from its module when it is first
used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fihelpers.evaluate.questions import Evaluator, answer_all
    from fihelpers.jobs.in_turn import score_in_turn
    from fihelpers.models.language import open_model
    from fihelpers.models.linear import linear_names
    from fihelpers.perturb.sparsify import changed, select, zeroed
    from fihelpers.scores.inputs import score_embeddings
    from fihelpers.scores.pixels import score_pixels
    from fihelpers.scores.weights import score_weights
    from fihelpers.tasks import load_task
    from fihelpers.trials import Kept, Trials, collect

__version__ = "0.1.0"

__all__ = [
    "Evaluator",
    "Kept",
    "Trials",
    "answer_all",
    "changed",
    "collect",
    "linear_names",
    "load_task",
    "open_model",
    "score_embeddings",
    "score_in_turn",
    "score_pixels",
    "score_weights",
    "select",
    "zeroed",
]

_HOMES = {
    "Evaluator": "evaluate.questions",
    "Kept": "trials",
    "Trials": "trials",
    "answer_all": "evaluate.questions",
    "changed": "perturb.sparsify",
    "collect": "trials",
    "linear_names": "models.linear",
    "load_task": "tasks",
    "open_model": "models.language",
    "score_embeddings": "scores.inputs",
    "score_in_turn": "jobs.in_turn",
    "score_pixels": "scores.pixels",
    "score_weights": "scores.weights",
    "select": "perturb.sparsify",
    "zeroed": "perturb.sparsify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
