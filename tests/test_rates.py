"""The rate of a run: a line through two times, and the operations that it is multiplied with."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_network

from fichapters.ch10.lab import FI, Shape, operations
from fihelpers.jobs import speed as rates
from fihelpers.jobs.speed import Rate, Work, matrices_of, measure_rate, shapes_of
from fihelpers.measures import find_measure

MEASURES = {m.name: m for m in (find_measure("FI"),)}


def clock(per_token: float, per_sample: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """An engine that takes a time in proportion to its work; the list gets the shapes of its batches."""
    now, seen = [0.0], []

    def accumulate(model, contexts, totals, *others, **options):
        for number, (batch, _) in enumerate(contexts):
            samples, tokens = batch.input_ids.shape
            seen.append((samples, tokens))
            matrices = sum(p.numel() for p in totals.parameters.values())
            work = Work(matrices, matrices, model.network.config.num_hidden_layers)
            now[0] += Rate(per_token, per_sample, 4).seconds(work, [(samples, tokens)])
            yield number

    monkeypatch.setattr(rates, "accumulate", accumulate)
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return seen


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gpt2"])
def test_the_rate_of_the_engine_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(2e-9, 7e-9, monkeypatch)
    config = tiny_network(kind).config
    state = torch.get_rng_state()
    rate = measure_rate(config, MEASURES, batch_size=3, tokens=20)
    assert state.equal(torch.get_rng_state())  # the seed of the run is as it was
    assert set(seen) == {(3, 5), (3, 20)}
    assert rate.per_token == pytest.approx(2e-9, rel=1e-6)
    # the check of the hooks is in every time here, and so in what does not grow with the tokens
    assert rate.per_sample == pytest.approx(7e-9, rel=3) and rate.per_sample > 7e-9


def test_of_a_large_model_a_small_batch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(1e-9, 1e-9, monkeypatch)
    monkeypatch.setattr(rates, "MOST", {"cpu": 1.0})
    measure_rate(tiny_network("llama").config, MEASURES, batch_size=8, tokens=30)
    assert set(seen) == {(1, 4), (1, 16)}


def test_the_engine_itself_is_timed() -> None:
    for save_memory in (False, True):
        rate = measure_rate(
            tiny_network("llama").config, MEASURES, batch_size=2, tokens=9, save_memory=save_memory
        )
        assert rate.per_token >= 0 and rate.per_sample >= 0 and rate.per_token + rate.per_sample > 0


@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.integers(1, 4), st.integers(5, 500))
def test_the_longer_time_is_always_met(short: float, long: float, few: int, many: int) -> None:
    """However noisy the times, the rate is not negative and foretells the longer one."""
    rate = rates._line(short, long, few, many, 3000, 2, 4)
    assert rate.per_token >= 0 and rate.per_sample >= -1e-15
    share = (1 + 4 / 7) / 2
    assert 3000 * (rate.per_sample + rate.per_token * many * share) == pytest.approx(long)


def test_tokens_are_weighed_as_the_operations_are() -> None:
    """Without the work on each weight, seconds go as the operations that chapter 10 counts."""
    rate = Rate(1.0, 0.0, 4)
    for layers in (2, 24):
        shape = Shape(512, 1536, layers, 8, 4, 10)
        counted = operations(shape, 100, FI)
        counted.pop("attention")
        found = rate.seconds(Work(shape.linear, shape.linear, layers), [(1, 100)])
        found -= rate.seconds(Work(shape.linear, shape.linear, layers), [])
        assert found == pytest.approx(sum(counted.values()) / 14, rel=0.1)


def test_what_is_not_scored_is_passed_through() -> None:
    rate, shapes = Rate(1.0, 0.5, 4), [(2, 50), (3, 60)]
    whole, none = (rate.seconds(Work(1000, scored, 4), shapes) for scored in (1000, 0))
    assert 0.5 < none / whole < 1
    ends = rate.seconds(Work(1000, 1000, 4, embedding=100, head=100), shapes)
    assert ends > whole


def test_shapes_are_those_of_the_batches() -> None:
    assert shapes_of([5, 9, 2, 4, 7], 2) == [(2, 4), (2, 7), (1, 9)]


def test_matrices_are_those_of_the_blocks() -> None:
    network = tiny_network("llama")
    found = matrices_of(network)
    assert "model.layers.1.mlp.up_proj.weight" in found and found["model.layers.1.mlp.up_proj.weight"] == 240
    assert not any(name.startswith(("lm_head", "model.embed")) or "norm" in name for name in found)
    with pytest.raises(ValueError, match="has no list of transformer blocks"):
        matrices_of(torch.nn.Linear(2, 2))
