"""Scores measure by measure are those of all at once, in as many passes as the memory asks for."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import tiny_model

from fihelpers.jobs import in_turn
from fihelpers.jobs.in_turn import fitting, score_in_turn
from fihelpers.measures import MEASURES, find_measure
from fihelpers.models.linear import linear_names
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

EXAMPLES = [Example(str(i), "s", f"w{i} w{i + 1}", (), None, f"w{i}") for i in range(4)]
NAMES = [*MEASURES]


def passes(monkeypatch: pytest.MonkeyPatch, free: float) -> list[list[str]]:
    """Makes so many bytes free; the measures of each pass are added to the list."""
    made: list[list[str]] = []

    def counted(model: Any, examples: Any, measures: Sequence[Any], **settings: Any) -> Any:
        made.append([m.name for m in measures])
        return score_weights(model, examples, measures, **settings)

    monkeypatch.setattr(in_turn, "score_weights", counted)
    monkeypatch.setattr(in_turn, "memory_free", lambda _: free)
    return made


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("scores_fit", [0, 1, 5, 100])
def test_scores_do_not_depend_on_the_passes(
    kind: str, scores_fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    linear = linear_names(model.network)
    expected = score_weights(model, EXAMPLES, NAMES, only=linear)
    measures = [find_measure(name) for name in NAMES]
    monkeypatch.setattr(in_turn, "memory_free", lambda _: 10**12)
    one = (
        fitting(model, EXAMPLES, measures[:2], linear)[1] - fitting(model, EXAMPLES, measures[:1], linear)[1]
    )
    everything, needed = fitting(model, EXAMPLES, measures, linear)
    assert everything == len(NAMES)
    least = needed - len(NAMES) * one  # what is needed beside scores
    made = passes(monkeypatch, (least + scores_fit * one + 1) / in_turn.FILLED)
    found = dict(score_in_turn(model, EXAMPLES, NAMES, only=linear))
    assert list(found) == NAMES == [name for names in made for name in names]
    assert len(made) == -(-len(NAMES) // max(1, min(scores_fit, len(NAMES))))
    assert len({len(names) for names in made[:-1]}) <= 1 and len(made[-1]) <= len(made[0])
    for name, scores in found.items():
        assert scores.metadata == expected[name].metadata
        assert all(torch.equal(scores[n], value) for n, value in expected[name].values.items())


def test_scores_are_let_go_one_after_the_other() -> None:
    model, earlier = tiny_model("qwen2"), None
    for _, scores in score_in_turn(model, EXAMPLES, NAMES[:4]):
        assert earlier is None or earlier() is None
        earlier = weakref.ref(scores)
        # nor do they keep those of their pass
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in scores.values.values())
        del scores


def test_what_is_asked_twice_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = passes(monkeypatch, 10**12)
    names = [name for name, _ in score_in_turn(tiny_model("qwen2"), EXAMPLES, ["FI", "SNIP", "FI exact"])]
    assert names == ["FI exact", "SNIP"] and made == [names]


def test_what_is_missing_is_said_as_without_turns() -> None:
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="calibration set is empty"):
        list(score_in_turn(model, [], ["SNIP"]))
    with pytest.raises(ValueError, match="Unknown measure 'FJ'"):
        list(score_in_turn(model, EXAMPLES, ["FJ"]))
    with pytest.raises(ValueError):
        list(score_in_turn(model, EXAMPLES, ["SNIP"], only=["nothing"]))
