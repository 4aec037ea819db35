"""The rate of a run, and the work that it is multiplied with."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_network

from fihelpers.jobs import preflight
from fihelpers.jobs import speed as rates
from fihelpers.jobs.speed import matrices_of, measure_rate, shapes_of
from fihelpers.measures import find_measure
from fihelpers.models.linear import linear_names

MEASURES = {m.name: m for m in (find_measure("FI"),)}


def clock(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """An engine that takes a time in proportion to its work; the list gets the shapes of its batches."""
    now, seen = [0.0], []

    def accumulate(model, contexts, totals, *others, **options):
        for number, (batch, _) in enumerate(contexts):
            samples, tokens = batch.input_ids.shape
            seen.append((samples, tokens))
            matrices = sum(p.numel() for p in totals.parameters.values())
            now[0] += seconds * samples * tokens * matrices * (1 + 4 / 7) / 2  # one of two blocks is the last
            yield number

    monkeypatch.setattr(rates, "accumulate", accumulate)
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return seen


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gpt2"])
def test_the_rate_of_the_engine_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(2e-9, monkeypatch)
    config = tiny_network(kind).config
    state = torch.get_rng_state()
    rate = measure_rate(config, MEASURES, batch_size=3, tokens=20)
    assert state.equal(torch.get_rng_state())  # the seed of the run is as it was
    assert set(seen) == {(3, 20)}
    assert rate == pytest.approx(2e-9, rel=1e-6)


def test_of_a_large_model_a_small_batch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(1e-9, monkeypatch)
    monkeypatch.setattr(rates, "MOST", {"cpu": 1.0})
    measure_rate(tiny_network("llama").config, MEASURES, batch_size=8, tokens=30)
    assert set(seen) == {(1, 16)}


def test_the_engine_itself_is_timed() -> None:
    for save_memory in (False, True):
        rate = measure_rate(
            tiny_network("llama").config, MEASURES, batch_size=2, tokens=9, save_memory=save_memory
        )
        assert rate > 0


def test_seconds_go_as_the_weights_and_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not scored are passed through, at about half the operations."""
    monkeypatch.setattr(preflight, "measure_rate", lambda *_, **__: 1e-6)
    network = tiny_network("llama")
    linear = linear_names(network)
    source = preflight.Source("tiny", network, 4, 0)
    few, many, none = (
        preflight.Scoring(source, tuple(names), lengths=[tokens] * 4, batch_size=2).seconds()
        for names, tokens in ((linear, 10), (linear, 20), (linear[:1], 10))
    )
    weights = sum(network.get_parameter(name).numel() for name in linear)
    assert few == pytest.approx(1e-6 * weights * 48) and many == pytest.approx(1e-6 * weights * 88)
    assert 0.5 < none / few < 0.7


def test_shapes_are_those_of_the_batches() -> None:
    assert shapes_of([5, 9, 2, 4, 7], 2) == [(2, 4), (2, 7), (1, 9)]


def test_matrices_are_those_of_the_blocks() -> None:
    network = tiny_network("llama")
    found = matrices_of(network)
    assert "model.layers.1.mlp.up_proj.weight" in found and found["model.layers.1.mlp.up_proj.weight"] == 240
    assert not any(name.startswith(("lm_head", "model.embed")) or "norm" in name for name in found)
    with pytest.raises(ValueError, match="has no list of transformer blocks"):
        matrices_of(torch.nn.Linear(2, 2))
