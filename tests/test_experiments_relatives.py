"""Chapter 11: components and their gates, relatives of FI on them, ranks, and calibration without sense."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_examples, tiny_model

from fichapters.ch11 import components, draw, lab
from fichapters.ch11.components import GATE_FI, JOINT, JOINT_DAMPED, Component
from fihelpers.evaluate.questions import Evaluator
from fihelpers.influence import ceiling
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import changed, zeroed
from fihelpers.trials import Trials, collect

EXAMPLES = tiny_examples(4)
ASKED = [lab.replace(e, prompt=e.prompt + lab.CUE) for e in EXAMPLES]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def parts(model: LanguageModel) -> list[Component]:
    return components.find_components(model, 8)


def log_probs(model: LanguageModel) -> torch.Tensor:
    """log P of the model as it is, (N, K)."""
    return Evaluator(model, EXAMPLES)().log_probs.double()


def test_components_are_all_columns_of_the_reading_matrices(
    model: LanguageModel, parts: list[Component]
) -> None:
    assert [str(c) for c in parts[:2]] == ["layer 0, head 0-5", "layer 0, head 6-11"]
    assert len({str(c) for c in parts}) == len(parts)
    for name in {c.weight for c in parts}:
        columns = [i for c in parts if c.weight == name for i in range(c.start, c.stop)]
        assert columns == list(range(model.network.get_parameter(name).shape[1]))
    with pytest.raises(ValueError, match="at least 1 neuron"):
        components.find_components(model, 0)
    with pytest.raises(ValueError, match="Llama or Qwen"):
        components.find_components(tiny_model("gpt2"), 8)


def positions(model: LanguageModel, part: Component) -> dict[str, torch.Tensor]:
    """As the lesson has them."""
    weight = model.network.get_parameter(part.weight)
    places = torch.arange(weight.numel()).view(weight.shape)
    return {part.weight: places[:, part.columns].flatten()}


def test_removed_components_are_zeroed_weights_and_come_back(
    model: LanguageModel, parts: list[Component]
) -> None:
    before = log_probs(model)
    with zeroed(model, positions(model, parts[0])), zeroed(model, positions(model, parts[-1])):
        broken = log_probs(model)
    with components.removed(model, [parts[0], parts[-1]]):
        assert torch.equal(log_probs(model), broken)
    assert (broken - before).abs().max() > 1e-5 and torch.equal(log_probs(model), before)


def test_joint_fi_is_the_odds_and_the_gates_are_slopes(model: LanguageModel, parts: list[Component]) -> None:
    found = components.whole_scores(model, EXAMPLES, parts)
    probs = log_probs(model).exp().T
    top = float(ceiling(probs).mean())
    np.testing.assert_allclose(found[JOINT], top, rtol=1e-6)
    assert (found[JOINT_DAMPED] < found[JOINT]).all() and (found[GATE_FI] <= top * (1 + 1e-9)).all()
    step, by_hand = 1e-2, []  # norms work in float32, whatever the model
    for part in parts:
        moved = []
        for factor in (1 + step, 1 - step):  # of what the component's gate lets through
            with changed(model, positions(model, part), lambda value, factor=factor: value * factor):
                moved.append(log_probs(model))
        s = (moved[0] - moved[1]) / (2 * step)  # (N, K)
        own = s.gather(1, probs.T.argmax(1, keepdim=True))[:, 0]
        by_hand.append((own**2 / (s**2 * probs.T).sum(1)).mean())
    torch.testing.assert_close(found[GATE_FI], torch.stack(by_hand), rtol=0.02, atol=1e-3)


def test_a_step_uphill_raises_the_loss_and_leaves_the_model(
    model: LanguageModel, parts: list[Component]
) -> None:
    before = log_probs(model)
    small, smaller = (components.sharpness(model, EXAMPLES, parts, radius) for radius in (1e-2, 5e-3))
    assert (small > 0).all()
    torch.testing.assert_close(small, 2 * smaller, rtol=0.1, atol=1e-4)
    assert torch.equal(log_probs(model), before)


SIZES = {"ablated": 0.1, "ablations": 30, "held": 8}


def test_attribution_leaves_the_model(model: LanguageModel, parts: list[Component]) -> None:
    before = log_probs(model)
    found, r2 = components.attribution(model, EXAMPLES, parts, 0, attributed=2, **SIZES)
    assert found.shape == (len(parts),) and len(r2) == 2 and r2.max() <= 1
    assert torch.equal(log_probs(model), before)


def test_attribution_finds_what_each_removal_costs(
    model: LanguageModel, parts: list[Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = torch.linspace(-0.2, 1, len(parts), dtype=torch.float64)
    out = torch.zeros_like(costs)

    @contextmanager
    def removed(_: LanguageModel, gone: Iterable[Component]) -> Iterator[None]:
        out[[parts.index(part) for part in gone]] = 1
        yield
        out.zero_()

    def ask() -> SimpleNamespace:
        return SimpleNamespace(log_prob=-0.3 - torch.stack([costs @ out, 3 * costs @ out]))

    monkeypatch.setattr(components, "removed", removed)
    monkeypatch.setattr(components, "Evaluator", lambda *_: ask)
    sizes = {**SIZES, "ablations": 4 * len(parts)}
    found, r2 = components.attribution(model, EXAMPLES, parts, 0, attributed=2, **sizes)
    # as many parts are out each time, so a constant more for each is the same as another intercept
    torch.testing.assert_close(found - found.mean(), 2 * (costs - costs.mean()))
    assert r2 == pytest.approx([1, 1])


def test_random_scores_are_the_same_for_a_seed_and_differ_by_matrix(model: LanguageModel) -> None:
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
    one, same, other = (components.random_scores(model, names, seed) for seed in (0, 0, 1))
    assert torch.equal(one[names[0]], same[names[0]])
    assert not torch.equal(one[names[0]], one[names[1]])
    assert not torch.equal(one[names[0]], other[names[0]])


def test_rank_agreement_is_spearmans_and_a_constant_has_none(parts: list[Component]) -> None:
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"a": rng.random(30), "flat": np.full(30, 0.17) + 1e-12 * rng.random(30)})
    falls = scores.a.to_numpy()[:, None] ** 3 + np.zeros((30, 4))
    found = lab.agreement(scores, falls, seed=0)
    assert found.table().agreement.tolist() == pytest.approx([1, 0])
    assert found.table().agreement.between(found.table().low, found.table().high).all()
    (duel,) = found.duels([("a", "flat")]).itertuples()
    assert (duel.difference, duel.low, duel.high, duel.n) == (pytest.approx(1), 1, 1, 30)
    b = rng.random(30)
    truth = scores.a.corr(pd.Series(b), method="spearman")
    assert lab.rank_agreement(scores[["a"]].to_numpy(), b)[0] == pytest.approx(truth)
    draw.score_and_damage(scores, falls, torch.arange(30) < 9, ["a", "flat"])


def test_examples_in_turn_are_of_all_subjects() -> None:
    assert lab.in_turn(EXAMPLES, 2) == [EXAMPLES[i] for i in (0, 2, 1, 3)]


def test_nonsense_keeps_the_words_or_the_length_and_the_cue(model: LanguageModel) -> None:
    for old, new in zip(ASKED, lab.nonsense(ASKED, lab.SHUFFLED, model, 0), strict=True):
        assert sorted(new.prompt.split()) == sorted(old.prompt.split())
        assert new.prompt.endswith(lab.CUE) and new.answer == old.answer
    assert not lab.nonsense(EXAMPLES, lab.SHUFFLED, model, 0)[0].prompt.endswith(lab.CUE)
    first, again = (lab.nonsense(ASKED, lab.TOKENS, model, seed) for seed in (0, 0))
    assert [e.prompt for e in first] == [e.prompt for e in again] != [e.prompt for e in ASKED]


def test_other_real_questions_are_others(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "load_task", lambda *drawn, **_: SimpleNamespace(examples=ASKED[: drawn[3]]))
    p = SimpleNamespace(TASK="any", SUBJECTS=["one", "two"], SEED=0, NONSENSE={"n": 4})
    made = lab.calibration_sets(model, p, 0)
    assert tuple(made) == lab.SOURCES and all(len(drawn) == 4 for drawn in made.values())
    assert made[lab.REAL] == [*ASKED[:2], *ASKED[:2]] and made[lab.OTHER] == [*ASKED[2:], *ASKED[2:]]


def test_common_positions() -> None:
    real = {"a": torch.tensor([1, 2, 3]), "b": torch.tensor([4])}
    assert lab.common(real, real)["overlap"] == 1
    chosen = {"a": torch.tensor([3, 4]), "b": torch.tensor([0, 4])}
    assert lab.common(chosen, real)["overlap"] == 0.5


def calibrated(sets: int) -> Trials:
    """Trials in which random tokens hurt a nat less than the others, and find fewer of the weights."""
    rng = np.random.default_rng(0)

    def tries(k: int) -> Iterator[tuple[dict[str, object], dict[str, np.ndarray]]]:
        for measure in ("SNIP", lab.EXACT):
            for source in (*lab.SOURCES, lab.RANDOM):
                labels = {"measure": measure, "source": source}
                found = 0.1 if source == lab.TOKENS else 0.6
                yield {**labels, "test": "overlap", "share": 0.1}, {"overlap": np.array([found])}
                for test in ({"test": "zero", "share": 0.1}, {"test": "protect", "share": 0.2}):
                    log_p = -2 + (source == lab.TOKENS) + 0.1 * rng.random(6)
                    yield {**labels, **test}, {"log_prob": log_p}

    return collect(None, tries, sets=sets)


def test_sense_and_nonsense_are_compared_with_random_weights_and_real_questions() -> None:
    p = SimpleNamespace(SEED=0, NONSENSE={"shares": [0.1], "kept": 0.2, "seeds": 3})
    trials, measures = calibrated(3), ["SNIP", lab.EXACT]
    table = lab.against(trials, p, measures)
    assert len(table) == 2 * 2 * 7 and (table.n == 6).all()
    tokens = table[(table.source == lab.TOKENS) & (table.minus == lab.REAL)]
    assert len(tokens) == 4 and tokens.low.between(0.9, tokens.difference).all()
    gaps = lab.overlap_gaps(trials, p, measures)
    assert gaps.difference.tolist() == pytest.approx([0, 0.5, 0, 0.5]) and (gaps.n == 3).all()
    for minus in (lab.RANDOM, lab.REAL):
        (axes,) = [draw.calibrations(table, minus).axes]
        titles = [ax.get_title(loc="left") or ax.get_title() for ax in axes]  # by the style, if one is set
        assert titles == ["10% zeroed", "20% protected"]


def test_the_digits_are_learnt_and_come_out_the_same_each_time() -> None:
    network, x, y = lab.train(60, 0, steps=60)
    assert x.shape == (60, 64) and x.min() >= 0 and x.max() == 1
    assert (network(x).argmax(1) == y).double().mean() > 0.8
    assert lab.train(60, 0, steps=60)[0](x).equal(network(x))


def test_digits_have_constant_exact_fi_and_units_that_matter() -> None:
    scores, falls = lab.digit_scores(lab.train(200, 0), 60, seed=0)
    assert falls.shape == (64, 140)
    exact = scores[lab.EXACT].to_numpy()
    np.testing.assert_allclose(exact, exact[0], rtol=1e-4)
    found = lab.agreement(scores, falls, seed=0)
    assert found.table().set_index("relative").agreement[lab.EXACT] == 0
    assert found.duels([(lab.LENGTH, lab.RANDOM)]).difference.item() > 0
    assert len(found.duels(lab.DIGIT_PAIRS)) == 5


def test_grad_cam_is_read_from_chapter_04(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = lab.against_grad_cam()
    assert gaps.measure.tolist() == [lab.EXACT, lab.DAMPED]
    assert gaps.difference.between(gaps.low, gaps.high).all()
    monkeypatch.setattr(lab, "of_run", lambda: lambda *_: pd.DataFrame())
    with pytest.raises(KeyError, match="run that chapter"):
        lab.against_grad_cam()
