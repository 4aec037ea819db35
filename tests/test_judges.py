"""ROUGE-1, the judges, and the win rates."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.optimize import minimize, root
from scipy.special import expit
from tiny import tiny_model

from fichapters.ch07 import judges
from fichapters.ch07.judges import KEY, ApiJudge, LikelihoodJudge, length_controlled_win_rates, rouge1
from fihelpers.models.generate import Response, greedy


def _written(*texts: str) -> list[Response]:
    return [Response((), True, text) for text in texts]


def test_rouge_counts_shared_words() -> None:
    # 3 of the 4 words and 3 of the 5: precision 3/4, recall 3/5, F = 2/3
    assert rouge1(["The cat sat down"], ["a cat sat the mat"]) == pytest.approx([2 / 3])
    assert rouge1(["cats"], ["cat"]) == 0  # no stemming
    assert list(rouge1(["", "", "a b", "été"], ["", "a", "A, B!", "été"])) == [1, 0, 1, 1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from("abcd"), max_size=6), st.lists(st.sampled_from("abcd"), max_size=6))
def test_rouge_is_symmetric_blind_to_order_and_at_most_one(a: list[str], b: list[str]) -> None:
    one, two = " ".join(a), " ".join(b)
    (forth,), (back,) = rouge1([one], [two]), rouge1([two], [one])
    assert forth == pytest.approx(back) and 0 <= forth <= 1
    assert (forth == 1) == (sorted(a) == sorted(b))


def test_the_likelihood_judge_prefers_what_the_model_would_say() -> None:
    model = tiny_model("qwen2")
    prompts = ["w1 w2", "w3 w4 w5", "w6"]
    own = greedy(model, prompts, 4)
    others = [Response((5, 6, 7), False, "w1 w2 w3") for _ in prompts]
    judge = LikelihoodJudge(model, batch_size=2)
    forth, back = judge.prefer(prompts, own, others), judge.prefer(prompts, others, own)
    assert np.allclose(forth + back, 1) and (forth > 0.5).all()
    assert list(judge.prefer(prompts, own, own)) == [0.5] * 3


def test_likelihood_equals_the_models_own_probabilities() -> None:
    model = tiny_model("llama")
    model.network.generation_config.eos_token_id = 4
    answers = [Response((7, 9), True, "x"), Response((), True, ""), Response((8,), False, "y")]
    found = LikelihoodJudge(model).log_likelihood(["w1 w2"] * 3, answers)
    start = model.tokenizer("w1 w2")["input_ids"]
    for answer, value in zip(answers, found, strict=True):
        tokens, steps = list(start), []
        for token in [*answer.ids, *([4] if answer.ended else [])]:
            logits = model.network(input_ids=torch.tensor([tokens])).logits[0, -1]
            steps.append(float(logits.detach().log_softmax(-1)[token]))
            tokens.append(token)
        assert value == pytest.approx(np.mean(steps))


def test_a_likelihood_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    judge, answer = LikelihoodJudge(model), Response((5,), False, "w1")
    first = judge.log_likelihood(["w1"], [answer])
    monkeypatch.setattr(model.network, "forward", lambda **_: pytest.fail("read twice"))
    assert judge.log_likelihood(["w1", "w1"], [answer] * 2) == pytest.approx(list(first) * 2)


class Service:
    """A judge's service on this machine that prefers the longer answer; `states` are answered first."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.reply = ""
        self.asked: list[dict] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append({**body, "key": self.headers["Authorization"], "path": self.path})
                state = service.states.pop(0) if service.states else 200
                answer = json.dumps(service.answer(body["messages"][0]["content"])).encode()
                self.send_response(state)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, asked: str) -> dict:
        first, second = (asked.split(f"<answer_{i}>")[1].split("</answer")[0] for i in (1, 2))
        verdict = self.reply or ("0" if len(first) == len(second) else "12"[len(second) > len(first)])
        return {"choices": [{"message": {"content": f" {verdict}\n"}}]}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr(judges, "PAUSE", 0.001)
    running = Service()
    thread = threading.Thread(target=running.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


def test_a_judge_behind_an_api_is_asked_in_both_orders(service: Service) -> None:
    judge = ApiJudge(service.url, "judge-1")
    found = judge.prefer(["p"] * 4, _written("long", "b", "a", "ab"), _written("a", "long", "a", "cd"))
    assert list(found) == [1, 0, 0.5, 0.5]
    assert len(service.asked) == 6  # equal texts are not asked about
    assert {a["key"] for a in service.asked} == {"Bearer secret"}
    assert {(a["path"], a["model"], a["temperature"]) for a in service.asked} == {
        ("/v1/chat/completions", "judge-1", 0)
    }


def test_a_judge_that_always_names_the_first_has_no_say(service: Service) -> None:
    service.reply = "1"
    assert list(ApiJudge(service.url, "judge-1").prefer(["p"], _written("x"), _written("longer"))) == [0.5]


def test_a_reply_that_is_no_verdict_is_a_tie(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.reply = "I like both."
    with caplog.at_level(logging.WARNING):
        assert list(ApiJudge(service.url, "judge-1").prefer(["p"], _written("x"), _written("longer"))) == [
            0.5
        ]
    assert "no verdict" in caplog.text


def test_finished_verdicts_are_kept_and_a_rerun_continues(service: Service, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "verdicts.sqlite"
    prompts, a, b = ["p", "q", "r"], _written("ab", "abc", "a"), _written("a", "a", "ab")
    service.states = [200, 200, 200, 401]  # the second pair fails half-way
    with pytest.raises(ConnectionError, match=r"HTTP 401.*verdicts are kept"):
        ApiJudge(service.url, "judge-1", kept).prefer(prompts, a, b)
    before = len(service.asked)
    assert list(ApiJudge(service.url, "judge-1", kept).prefer(prompts, a, b)) == [1, 1, 0]
    assert len(service.asked) - before == 3
    assert list(ApiJudge(service.url, "judge-1", kept).prefer(prompts, a, b)) == [1, 1, 0]
    assert len(service.asked) - before == 3 and b"secret" not in kept.read_bytes()


def test_passing_failures_are_tried_again_and_lasting_ones_named(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.states = [429, 503]
    assert list(ApiJudge(service.url, "judge-1").prefer(["p"], _written("ab"), _written("a"))) == [1]
    assert len(service.asked) == 4
    monkeypatch.setattr(judges, "TRIES", 3)
    service.states = [500] * 9
    with pytest.raises(ConnectionError, match="HTTP 500"):
        ApiJudge(service.url, "judge-1").prefer(["p"], _written("ab"), _written("a"))
    assert len(service.asked) == 7


def test_a_judge_without_key_network_or_safe_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError, match=f"set the environment variable {KEY}"):
        ApiJudge("https://judge.example/v1", "judge-1")
    monkeypatch.setenv(KEY, "secret")
    for url in ("judge.example", "file:///etc/hosts", "http://judge.example/v1"):
        with pytest.raises(ValueError, match="address"):
            ApiJudge(url, "judge-1")
    monkeypatch.setattr(judges, "TRIES", 1)
    nobody = ApiJudge("http://127.0.0.1:9/v1", "judge-1")
    with pytest.raises(ConnectionError, match="check address, key and network"):
        nobody.prefer(["p"], _written("a"), _written("b"))


def _alone(p: object, a: object, b: ArrayLike) -> float:
    """The win rate at equal length of one setting, which says nothing of the prompts."""
    return float(length_controlled_win_rates(np.array([p]), np.array([a]), b).win_rates[0])


def test_a_single_setting_by_hand() -> None:
    # Half of a's answers are longer by 10 and win with .8, half are shorter by 10 and win with .2: only the
    # length speaks, so at equal length nobody wins.
    half = [10] * 20 + [0] * 20
    assert _alone([0.8] * 20 + [0.2] * 20, half, half[::-1]) == pytest.approx(0.5)
    # Preferences drawn without noise from the model itself, so often that the prior has no weight.
    lengths = np.array([30, 10, 25, 40] * 5000)
    others = np.array([10, 20, 20, 25] * 5000)
    difference = (lengths - others) / (lengths - others).std(ddof=1)
    preferences = expit(-0.7 + 1.1 * np.tanh(difference))
    found = _alone(preferences, lengths, others)
    assert found == pytest.approx(expit(-0.7), abs=1e-3)
    assert abs(found - preferences.mean()) > 0.01  # the lengths did matter


def test_a_single_setting_solves_its_equations() -> None:
    rng = np.random.default_rng(0)
    p, a, b = rng.random(40), rng.integers(1, 99, 40), rng.integers(1, 99, 40)
    quality = np.log(found := _alone(p, a, b)) - np.log(1 - found)
    t = np.tanh((a - b) / (a - b).std(ddof=1))
    # the second equation gives the weight of the length, by bisection; it then solves the first
    low, high = -5.0, 5.0
    for _ in range(80):
        middle = (low + high) / 2
        slope = (t * (expit(quality + middle * t) - p)).sum() + middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    assert (expit(quality + middle * t) - p).sum() == pytest.approx(0, abs=1e-6)


def test_a_single_setting_at_its_limits() -> None:
    assert _alone([0.2, 0.9], [5, 5], [5, 5]) == pytest.approx(0.55)  # no difference
    assert _alone([0, 0, 0], [1, 9, 3], [5, 5, 5]) == 0 and _alone([0.3], [4], [9]) == 0.3
    assert _alone([1, 1, 0, 0], [9, 8, 1, 2], [5, 5, 5, 5]) == pytest.approx(0.5)  # separated by length
    rng = np.random.default_rng(1)
    p, a, b = rng.random(30), rng.integers(1, 99, 30), rng.integers(1, 99, 30)
    assert _alone(1 - p, b, a) == pytest.approx(1 - _alone(p, a, b))


Sweep = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _sweep(settings: int = 30, prompts: int = 300, likes_length: float = 1.5, seed: int = 0) -> Sweep:
    """Preferences and lengths (M, N), others' lengths (N,), win rates at equal length, and difficulties.

    The preferences are the model's own, without noise. Where the others wrote much, winning is difficult.
    """
    rng = np.random.default_rng(seed)
    others = rng.integers(100, 3000, prompts)
    lengths = rng.integers(50, 1500, (settings, prompts))
    difficulty = rng.standard_normal(prompts) + np.tanh((1500 - others) / 900)
    quality = np.linspace(-4, 1, settings)
    gap = lengths - others
    x = np.tanh(gap / gap.std(1, ddof=1, keepdims=True))
    level = quality[:, None] + rng.uniform(0.8, 1.2, (settings, 1)) * difficulty
    return expit(level + likes_length * x), lengths, others, expit(level).mean(1), difficulty


def test_the_joint_fit_finds_what_the_preferences_were_drawn_from() -> None:
    p, a, b, truth, difficulty = _sweep()
    found = length_controlled_win_rates(p, a, b)
    assert found.fit == "jointly over 30 settings"
    assert np.abs(found.win_rates - truth).max() < 0.025
    assert np.corrcoef(found.difficulties, difficulty)[0, 1] > 0.95
    alone = np.array([_alone(*row, b) for row in zip(p, a, strict=True)])
    assert np.abs(alone - truth).max() > 0.05  # what the difficulties are there for


def test_the_joint_fit_solves_its_equations() -> None:
    p, a, b, *_ = _sweep(4, 20)
    found = length_controlled_win_rates(p, a, b)
    x = np.tanh((a - b) / (a - b).std(1, ddof=1, keepdims=True))

    # the difficulties by another method, as the least of the sum that the docstring describes
    def loss(values: np.ndarray) -> float:
        quality, weight, difficulty = np.split(values, [4, 8])
        q = expit(quality[:, None] + weight[:, None] * x + difficulty)
        priors = np.log(2 * np.pi) * 24 / 2 + (weight**2).sum() / 2 + (difficulty**2).sum() / 2
        return float(-(p * np.log(q) + (1 - p) * np.log(1 - q)).sum() + priors)

    least = minimize(loss, np.zeros(28), method="BFGS", options={"gtol": 1e-6}).x
    assert found.difficulties == pytest.approx(least[8:], abs=1e-4)
    # and the first setting's own fit, held to the mean weight
    terms = np.stack([np.ones(20), x[0], least[8:]], 1)
    centre, firm = [0, least[4:8].mean(), 1], np.array([0, 5, 1])

    def own(values: np.ndarray) -> np.ndarray:
        return terms.T @ (expit(terms @ values) - p[0]) + firm * (values - centre)

    quality, _, sensitivity = root(own, centre).x
    assert found.win_rates[0] == pytest.approx(expit(quality + sensitivity * least[8:]).mean(), abs=1e-5)


def test_the_joint_fit_knows_no_order_unit_or_side() -> None:
    p, a, b, *_ = _sweep(5, 40)
    found = length_controlled_win_rates(p, a, b)
    rng = np.random.default_rng(2)
    rows, columns = rng.permutation(5), rng.permutation(40)
    shuffled = length_controlled_win_rates(p[rows][:, columns], a[rows][:, columns], b[columns])
    assert shuffled.win_rates == pytest.approx(found.win_rates[rows], abs=1e-6)
    assert shuffled.difficulties == pytest.approx(found.difficulties[columns], abs=1e-5)
    in_other_units = length_controlled_win_rates(p, 7.0 * a, np.broadcast_to(7.0 * b, a.shape))
    assert in_other_units.win_rates == pytest.approx(found.win_rates, abs=1e-6)
    swapped = length_controlled_win_rates(1 - p, np.broadcast_to(b, a.shape), a)
    assert swapped.win_rates == pytest.approx(1 - found.win_rates, abs=1e-6)
    assert swapped.difficulties == pytest.approx(-found.difficulties, abs=1e-5)


def test_settings_that_say_nothing_have_no_part_in_the_fit() -> None:
    p, a, b, *_ = _sweep(5, 40)
    found = length_controlled_win_rates(p, a, b)
    constant = np.repeat([[0.0], [0.5], [1.0], [0.1]], 40, 1)
    with_constant = length_controlled_win_rates(np.vstack([p, constant]), np.vstack([a, a[:4]]), b)
    assert list(with_constant.win_rates[5:]) == [0, 0.5, 1, 0.1]  # as the intact model against itself
    assert list(with_constant.win_rates[:5]) == list(found.win_rates)
    assert with_constant.fit == found.fit == "jointly over 5 settings"
    # answers as long as the others' have nothing to control for, whatever the prompts
    equal = length_controlled_win_rates(p, np.vstack([b, a[1:]]), b)
    assert equal.win_rates[0] == pytest.approx(p[0].mean(), abs=1e-6)
    # wins and losses that are separated leave every number finite
    hard = (p > np.median(p, 0)).astype(float)
    rates = length_controlled_win_rates(hard, a, b).win_rates
    assert ((rates >= 0) & (rates <= 1)).all()


def test_two_settings_are_fitted_alone_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    p, a, b, *_ = _sweep(3, 40)
    p[2] = 0.5  # a setting that does not vary says nothing of the prompts
    found = length_controlled_win_rates(p, a, b)
    assert found.fit == "without difficulties: fewer than 3 settings" and not found.difficulties.any()
    assert "fewer than 3 settings" in caplog.text
    each = [_alone(*row, b) for row in zip(p, a, strict=True)]
    assert list(found.win_rates) == each


def test_what_cannot_be_fitted_at_equal_length_is_named() -> None:
    p, a, b, *_ = _sweep(3, 4)
    for bad, text in [
        ((np.where(p == p.max(), np.nan, p), a, b), "between 0 and 1, not nan; leave out a prompt"),
        ((p + 1, a, b), "between 0 and 1, not 1"),
        ((p, a[:2], b), r"lengths of the answers have the shape \(2, 4\).*in the shape \(3, 4\)"),
        ((p, a, b[:1]), r"compared with have the shape \(1,\).*in the shape \(3, 4\) or \(4,\)"),
        ((p, a, [1, np.inf, 1, 1]), "compared with have the shape .* finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            length_controlled_win_rates(*bad)


def test_win_rates_of_a_public_leaderboard(real_data: Path) -> None:
    """AlpacaEval 2 as published: all models, and each half of them."""
    folder = real_data / "alpaca_eval"
    rows = pd.read_parquet(folder / "preferences.parquet").drop_duplicates(["model", "prompt"])
    table = rows.pivot(index="model", columns="prompt").dropna(axis=1)  # prompts that all models answered
    p, a, b = (table[name].to_numpy(float) for name in ("preference", "length", "baseline_length"))
    published = pd.read_csv(folder / "leaderboard.csv").drop_duplicates("model").set_index("model")
    published = published.loc[table.index].length_controlled.to_numpy() / 100
    compared = ~table.index.isin(["NullModel", "gpt4_gamed"]) & (a.min(1) < a.max(1))
    every = np.arange(len(p))
    for chosen in (every, every[::2], every[1::2]):
        found = length_controlled_win_rates(p[chosen], a[chosen], b[chosen])
        ours, theirs = found.win_rates[compared[chosen]], published[chosen][compared[chosen]]
        assert np.median(np.abs(ours - theirs)) < 0.015
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99
