"""The measuring command: the peers compute the same thing, and the table says what was measured."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fichapters import bench, timed
from fihelpers.__main__ import main
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import open_model
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import load_task
from fihelpers.trials import collect

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
    seconds = timed.in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, {"a": 1, "b": 2}, 3
    )
    assert "".join(order) == "ab" * 4 and {len(s) for s in seconds.values()} == {3}


def test_a_row_pairs_the_rounds() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 2.0]}
    slower = timed.row("w", seconds, "ours", "peer", 1.5, None)
    assert (slower.ratio, slower.low, slower.high, slower.met) == (1.0, 0.5, 2.0, True)
    faster = timed.row("w", seconds, "ours", "peer", 1.5, None, faster=True)
    assert (faster.ratio, faster.low, faster.high, faster.met) == (1.0, 0.5, 2.0, False)


def test_the_table_and_its_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "Size", lambda: SMALL)
    out = tmp_path / "bench.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "long", "short", "gpu", "--rounds", "1", "--out", str(out)]) == 0
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
    assert list(kept["not measured"].values()) == ["no GPU"] and "on a GPU: not measured: no GPU" in shown
    assert set(kept["machine"]) == {"cpu", "cores", "threads", "load", "gpu", "torch", "python"}  # no name


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    rows = bench.memory(SMALL, 1, length=7, count=1)
    assert [r.goal for r in rows] == [1.15, None]
    assert all(r.peak_bytes is not None and r.peak_bytes > 0 for r in rows)


def test_bad_requests_are_named(capsys) -> None:
    assert main(["bench", "nope"]) == 1
    assert "unknown row 'nope'; known: long, short" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one round"):
        bench.bench(["long"], 0)


def test_the_top_share_takes_little_memory_and_says_so() -> None:
    time, memory = bench.topshare(SMALL, 1, count=10**6)
    assert time.peer == "full sort" and time.faster and time.seconds > 0
    assert memory.met and memory.goal == 1.0 and "6.5e+09 weights" in memory.note
    assert memory.peak_bytes is not None and 10**6 <= memory.peak_bytes < 10**8


def test_bytes_are_counted_at_their_peak() -> None:
    def work() -> None:
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        second = torch.zeros(3000, dtype=torch.float64)
        third = second + 1
        del second, third

    assert bench.extra_bytes(work) == pytest.approx(48_000, abs=500)


def test_an_evaluation_opens_and_tokenises_once(monkeypatch) -> None:
    """Of R rates and M measures, whatever they are."""
    (row,) = bench.evaluation(SMALL, 1, rates=2, measures=3, questions=4)
    assert row.note == "1 model opened, 4 prompts tokenised for 6 evaluations" and row.faster
    real = bench.Evaluator.__call__

    def forgetful(ask):
        ask.model._token_ids(["again"])
        return real(ask)

    monkeypatch.setattr(bench.Evaluator, "__call__", forgetful)
    with pytest.raises(RuntimeError, match="one model and 4 prompts were asked for, not"):
        bench.evaluation(SMALL, 1, rates=1, measures=2, questions=4)


@pytest.mark.parametrize("rates", [(0.01,), (0.01, 0.02, 0.05)])
def test_a_loop_of_trials_opens_no_model_and_tokenises_each_question_once(rates) -> None:
    """The calibration questions are tokenised once a calibration set; the rates add nothing."""
    model = open_model()
    ask = Evaluator(model, load_task("bundled", "law", "test", 6).examples)

    def tries(k):
        drawn = load_task("bundled", "law", "val", 3, k).examples
        scores = score_weights(model, drawn, ["SNIP"], only=linear_names(model.network))["SNIP"]
        for rate in rates:
            with zeroed(model, select(scores, rate)):
                yield {"rate": rate}, ask()

    with bench.counted() as calls:
        collect(ask, tries, sets=2)
    assert dict(calls) == {"tokenised": 2 * 3}


def test_a_network_on_a_gpu_is_measured_beside_its_products(monkeypatch) -> None:
    small = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    monkeypatch.setattr(bench, "_device_peak", lambda work, device: 10**6)
    rows = bench.large_network(small, 2, "cpu", length=6, count=2)
    assert len(rows) == 6 and [r.goal for r in rows] == [None, 1.0, None, None, 1.0, 1.1]
    products = rows[0]
    assert products.floor == 1.0 and products.ratio > 1 and "TFLOPS measured" in products.note
    assert rows[1].peer_seconds == 0.12 and rows[1].met == (rows[1].seconds <= 0.12)


def test_the_large_shape_has_the_weights_that_are_asked_for() -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(bench.LLAMA)
    weights = sum(network.get_parameter(name).numel() for name in linear_names(network))
    assert weights == bench.LLAMA_WEIGHTS == 6_476_005_376
