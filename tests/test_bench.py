"""The measuring command: the peers compute the same thing, and the table says what was measured."""

import json

import pytest
import torch

from fihelpers import bench
from fihelpers.__main__ import main

SMALL = bench.Size(hidden=32, inner=48, layers=2, heads=2, vocabulary=40)


@pytest.fixture(scope="module")
def questions() -> bench.Questions:
    return bench.Questions.draw(SMALL.model(), 7, 5)


@pytest.mark.parametrize("way", ["one by one", "in batches", "block by block", "vmap"])
def test_every_way_gives_the_same_fi(way, questions) -> None:
    ours = {
        "one by one": lambda: bench.fi_of_weights(questions, 1),
        "in batches": lambda: bench.fi_of_weights(questions, 16),
        "block by block": lambda: bench.fi_of_weights(questions, 2, save_memory=True),
        "vmap": lambda: bench.fi_by_vmap(questions),
    }[way]()
    truth = bench.fi_by_stored_gradients(questions)
    largest = max(float(v.max()) for v in truth.values())
    assert set(ours) == set(truth) and largest > 0
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3 * largest)


def test_the_jacobian_norm_is_the_mean_absolute_gradient(questions) -> None:
    one = bench.Questions(questions.model, questions.ids[:1])
    found = bench.jacobian_norm(one)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = questions.model.network.get_parameter(name)
    log_p = bench.CLASSES.log_probs(questions.model.last_logits(one.batches(1)[0]))[0]
    truth = torch.autograd.grad(log_p.max(), weight)[0].abs()
    torch.testing.assert_close(found[name], truth)
    assert weight.grad is None and weight.requires_grad


def test_work_is_timed_in_turn() -> None:
    order: list[str] = []
    seconds = bench.in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, {"a": 1, "b": 2}, 3
    )
    assert "".join(order) == "ab" * 4 and {len(s) for s in seconds.values()} == {3}


def test_a_row_pairs_the_rounds() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 2.0]}
    slower = bench.row("w", seconds, "ours", "peer", 1.5, None)
    assert (slower.ratio, slower.low, slower.high, slower.met) == (1.0, 0.5, 2.0, True)
    faster = bench.row("w", seconds, "ours", "peer", 1.5, None, faster=True)
    assert (faster.ratio, faster.low, faster.high, faster.met) == (1.0, 0.5, 2.0, False)


def test_the_table_and_its_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "Size", lambda: SMALL)
    out = tmp_path / "bench.json"
    assert main(["bench", "long", "short", "--rounds", "1", "--out", str(out)]) == 0
    shown, kept = capsys.readouterr().out, json.loads(out.read_text())
    assert [r["peer"] for r in kept["rows"]] == [
        "Jacobian norm",
        "K backward passes, .grad kept",
        "K backward passes, .grad kept",
        "torch.func vmap",
    ]
    assert all(r["seconds"] > 0 and r["low"] <= r["ratio"] <= r["high"] for r in kept["rows"])
    assert kept["machine"]["threads"] >= 1 and ">= 4" in shown
    assert kept["rows"][0]["floor"] == pytest.approx(14 / 6)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    rows = bench.memory(SMALL, 1, length=7, count=1)
    assert [r.goal for r in rows] == [1.15, None]
    assert all(r.peak_bytes is not None and r.peak_bytes > 0 for r in rows)


def test_bad_requests_are_named(capsys) -> None:
    assert main(["bench", "nope"]) == 1
    assert "unknown row 'nope'; known: long, short" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one round"):
        bench.bench(["long"], 0)
