"""The measuring command: the peers compute the same thing, and the table says what was measured."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from conftest import WriteChapter
from tiny_vision import encode_png, random_image, save_vision_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fichapters import bench, peers
from fihelpers.__main__ import main
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models import language
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.scores.pixels import pixel_batches, score_pixels
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task
from fihelpers.trials import collect

SMALL = peers.Size(hidden=32, inner=48, layers=2, heads=2, vocabulary=40)


@pytest.fixture(scope="module")
def questions() -> peers.Questions:
    return peers.Questions.draw(SMALL.model(), 7, 5)


@pytest.mark.parametrize(("batch_size", "save_memory"), [(1, False), (16, False), (2, True)])
def test_every_way_gives_the_same_fi(batch_size, save_memory, questions) -> None:
    ours = peers.fi_of_weights(questions, batch_size, save_memory=save_memory)
    truth = peers.fi_by_stored_gradients(questions)
    largest = max(float(v.max()) for v in truth.values())
    assert set(ours) == set(truth) and largest > 0
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3 * largest)


def test_the_jacobian_norm_is_the_mean_absolute_gradient(questions) -> None:
    one = peers.Questions(questions.model, questions.ids[:1])
    found = peers.jacobian_norm(one)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = questions.model.network.get_parameter(name)
    log_p = peers.CLASSES.log_probs(questions.model.last_logits(one.batches(1)[0]))[0]
    truth = torch.autograd.grad(log_p.max(), weight)[0].abs()
    torch.testing.assert_close(found[name], truth)
    assert weight.grad is None and weight.requires_grad


def test_work_is_timed_in_turn() -> None:
    order: list[str] = []
    seconds = bench.in_turn({"a": (lambda: order.append("a"), 1), "b": (lambda: order.append("b"), 2)}, 3)
    assert "".join(order) == "ab" * 4 and seconds.shape == (3, 2)


def test_a_row_pairs_the_rounds() -> None:
    seconds = pd.DataFrame({"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 2.0]})
    found = [bench.beside("w", seconds, "ours", "peer", 1.5, faster=faster) for faster in (False, True)]
    assert [(r["ratio"], r["low"], r["high"]) for r in found] == [(1.0, 0.5, 2.0)] * 2
    assert [(r["goal"], r["met"]) for r in found] == [("<= 1.5", True), (">= 1.5", False)]


def test_the_table_and_its_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "Size", lambda: SMALL)
    out = tmp_path / "bench.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "long", "short", "gpu", "--rounds", "1", "--out", str(out)]) == 0
    shown, kept = capsys.readouterr().out, json.loads(out.read_text())
    *measured, missing = kept["rows"]
    assert [r["peer"] for r in measured] == [
        "Jacobian norm",
        "K backward passes, .grad kept",
        "K backward passes, .grad kept",
    ]
    assert all(r["seconds"] > 0 and r["low"] <= r["ratio"] <= r["high"] for r in measured)
    assert kept["machine"]["threads"] >= 1 and ">= 5" in shown
    assert kept["rows"][0]["floor"] == pytest.approx(14 / 6)
    assert missing["note"] == "not measured: no GPU" and "200 tokens: not measured: no GPU" in shown
    assert "nan" not in shown.lower() and "None" not in shown
    about = {"cpu", "vector unit", "cores", "threads", "load", "gpu", "torch", "python"}
    assert set(kept["machine"]) == about  # no name


def test_peaks_of_memory_lie_above_what_is_needed() -> None:
    blocks, once = bench.memory(SMALL, 1, length=7, count=1)
    assert blocks["goal"] == "<= 1.15" and "goal" not in once
    assert 1 <= blocks["ratio"] <= once["ratio"] and blocks["seconds"] > 0
    assert blocks["peak MB"] == pytest.approx(blocks["ratio"] * peers.least_bytes(SMALL.model()) / 1e6)


def test_three_measures_are_set_beside_the_jacobian_norm_and_what_they_need() -> None:
    time, memory = bench.three_measures(SMALL, 1, length=7, count=3)
    assert time["peer"] == "Jacobian norm" and time["goal"] == "<= 3" and time["seconds"] > 0
    assert memory["goal"] == "<= 1.15" and memory["ratio"] >= 1
    one, three = (peers.least_bytes(SMALL.model(), count) for count in (1, 3))
    assert memory["peak MB"] == pytest.approx(memory["ratio"] * three / 1e6) and one < three < 3 * one


def test_a_chapter_is_run_alone_and_beside_a_process_at_work(
    write_chapter: WriteChapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chapter()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu, busy = bench.chapters(SMALL, 1, "smoke")
    assert cpu["work"] == "CPU of 01_tiny" and 1 < cpu["seconds"] < 60 == cpu["peer seconds"] and cpu["met"]
    assert busy["peer"] == "alone" and busy["peer seconds"] > 1 and busy["goal"] == "<= 2.5"
    before = set(psutil.Process().children())
    with bench.at_work():
        (child,) = set(psutil.Process().children()) - before
        assert child.is_running()
    assert not child.is_running()


def test_bad_requests_are_named(capsys) -> None:
    assert main(["bench", "nope"]) == 1
    assert "unknown row 'nope'; known: long, short" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one round"):
        bench.bench(["long"], 0)


def test_the_top_share_takes_little_memory_and_says_so() -> None:
    time, memory = bench.topshare(SMALL, 1, count=10**6)
    assert time["peer"] == "full sort" and time["seconds"] > 0
    assert memory["met"] and memory["goal"] == "<= 1" and "6.5e+09 weights" in memory["note"]
    assert 1 <= memory["peak MB"] < 100


def test_bytes_are_counted_at_their_peak() -> None:
    def work() -> None:
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        second = torch.zeros(3000, dtype=torch.float64)
        third = second + 1
        del second, third

    assert peers.extra_bytes(work) == pytest.approx(48_000, abs=500)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the models opened ("opened") and the prompts tokenised for evaluation ("tokenised")."""
    calls: Counter[str] = Counter()
    network, tokens = language.open_network, LanguageModel._token_ids

    def opening(*arguments: Any, **options: Any) -> Any:
        calls["opened"] += 1
        return network(*arguments, **options)

    def tokenising(model: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
        calls["tokenised"] += len(prompts)
        return tokens(model, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "open_network", opening)
        patch.setattr(LanguageModel, "_token_ids", tokenising)
        yield calls


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

    with counted() as calls:
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
    assert [r.get("goal") for r in rows] == [None, "<= 1", None, None, "<= 1", "<= 1.1"]
    products, asked = rows[:2]
    assert products["floor"] == 1.0 and products["ratio"] > 1 and "TFLOPS measured" in products["note"]
    assert asked["peer seconds"] == 0.12 and asked["met"] == (asked["seconds"] <= 0.12)


def test_the_large_shape_has_the_weights_that_are_asked_for() -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(peers.LLAMA)
    weights = sum(network.get_parameter(name).numel() for name in linear_names(network))
    assert weights == peers.linear(peers.LLAMA) == 6_476_005_376


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    return open_vision_model(save_vision_model("qwen2_5_vl", folder))


def pictures(count: int) -> list[Example]:
    return [
        Example(f"t/{i}", "t", f"w{i}", tuple("abcd"), 0, f"w{i}", encode_png(random_image(16, 16, seed=i)))
        for i in range(count)
    ]


def test_peers_of_pixels_are_the_jacobian_norm(seeing: VisionModel) -> None:
    shown = pictures(3)
    ours = torch.stack(score_pixels(seeing, shown, ["Jacobian norm"])["Jacobian norm"])
    (batch,) = pixel_batches(seeing, shown)
    for peer in (peers.plain_jacobian, peers.captum_saliency):
        found = peer(batch)
        assert float((found - ours).abs().max()) < 1e-4 * float(ours.max())


def test_rows_of_pixels_are_consistent(seeing: VisionModel) -> None:
    rows = bench.pixel_rows(seeing, pictures(1), rounds=2)
    assert [r["peer"] for r in rows] == [bench.PLAIN, bench.SALIENCY] * len(peers.FILTERS)
    assert [r["work"] for r in rows[::2]] == [f"pixel FI {f}, batch 1" for f in peers.FILTERS]
    for row in rows:
        assert row["seconds"] > 0 and row["peer seconds"] > 0 and row["low"] <= row["ratio"] <= row["high"]
    assert (rows[0]["goal"], rows[0]["floor"], rows[0]["met"]) == ("<= 1.8", 2.0, rows[0]["ratio"] <= 1.8)
    assert "goal" not in rows[1]
    assert "met" not in bench.pixel_rows(seeing, pictures(2), rounds=1)[0]  # nothing is asked of batches of 2
    assert all(p.requires_grad for p in seeing.network.parameters())  # thawed again


def test_the_bundled_pictures_are_measured_in_both_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bench, "pixel_rows", lambda *arguments: asked.append(arguments) or [])
    bench.pixels(SMALL, 3)
    assert [(model.name, len(found), rounds) for model, found, rounds in asked] == [
        ("mini-vlm", 1, 3),
        ("mini-vlm", 32, 3),
    ]
