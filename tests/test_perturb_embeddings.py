"""Attacks on embeddings: exactly the chosen dimensions, exactly the budget, against the prediction."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fihelpers.answers import Top
from fihelpers.perturb.embeddings import attack, top_dimensions
from fihelpers.scores.inputs import EmbeddingBatch, embedding_batches

KINDS = ("qwen2", "llama", "gpt_neox")
NORMS = ("l2", "linf")


def one_batch(kind: str = "qwen2", n: int = 5, **options: Any) -> EmbeddingBatch:
    dtype = options.pop("dtype", torch.float64)
    (batch,) = embedding_batches(tiny_model(kind, dtype), tiny_examples(n), **options)
    return batch


def some(batch: EmbeddingBatch, share: float = 0.1, measure: str = "SNIP") -> list[Tensor]:
    return [top_dimensions(scores, share) for scores in next(iter(batch.scores([measure]).values()))]


def moved(batch: EmbeddingBatch, perturbed: Tensor) -> list[Tensor]:
    """Flat positions of each prompt that are no longer bit for bit what they were; padding must be."""
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[
        perturbed.dtype
    ]
    changed = perturbed.view(bits) != batch.embeddings.view(bits)
    assert not any(one[:start].any() for one, start in zip(changed, batch.padding, strict=True))
    rows = zip(changed, batch.padding, strict=True)
    return [one[start:].flatten().nonzero()[:, 0] for one, start in rows]


def prompts(batch: EmbeddingBatch, values: Tensor) -> list[Tensor]:
    return [one[start:] for one, start in zip(values, batch.padding, strict=True)]


def allowed(batch: EmbeddingBatch, budget: float, norm: str) -> list[float]:
    """The absolute budget of each prompt, as `attack` states it."""
    if norm == "l2":
        return [budget * float(x.square().sum().sqrt()) for x in prompts(batch, batch.embeddings)]
    return [budget * float(x.square().mean().sqrt()) for x in prompts(batch, batch.embeddings)]


def spent(batch: EmbeddingBatch, perturbed: Tensor, norm: str) -> list[float]:
    changes = prompts(batch, perturbed - batch.embeddings)
    return [float(c.square().sum().sqrt() if norm == "l2" else c.abs().max()) for c in changes]


def against(batch: EmbeddingBatch, embeddings: Tensor) -> Tensor:
    """Plain autograd: the gradient of -log P(y_hat) of the intact prediction."""
    x = embeddings.detach().requires_grad_()
    loss = -batch.log_probs(x).gather(1, batch.grads.predicted[:, None]).sum()
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"direction": "random"}], ids=str)
def test_budget_zero_changes_nothing_bit_for_bit(
    norm: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = one_batch(dtype=dtype)
    batch.embeddings[0, -1] = -0.0  # which 0.0 equals, but not in its bits
    perturbed = attack(batch, some(batch), 0, norm=norm, **options)
    assert perturbed is not batch.embeddings
    assert all(len(positions) == 0 for positions in moved(batch, perturbed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("answers", [None, Top(3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"direction": "random"}], ids=str)
def test_exactly_the_chosen_dimensions_move_within_the_budget(
    kind: str, norm: Any, answers: Top | None, options: dict[str, Any]
) -> None:
    batch = one_batch(kind, answers=answers)
    batch.embeddings[:, -1, :6] = -0.0
    for share in (0.001, 0.2, 1.0):
        chosen = some(batch, share)
        for budget in (1e-3, 0.1, 2.0):
            perturbed = attack(batch, chosen, budget, norm=norm, **options)
            for positions, expected in zip(moved(batch, perturbed), chosen, strict=True):
                if "steps" not in options:
                    assert torch.equal(positions, expected)
                assert set(positions.tolist()) <= set(expected.tolist())  # steps may lead back
            for used, most in zip(spent(batch, perturbed, norm), allowed(batch, budget, norm), strict=True):
                assert used <= most * (1 + 1e-9)
                if "steps" not in options:
                    assert used == pytest.approx(most, rel=1e-9)


def test_one_step_goes_along_the_gradient_of_plain_autograd() -> None:
    for kind in KINDS:
        batch = one_batch(kind)
        chosen = some(batch)
        gradient = against(batch, batch.embeddings)
        for norm in NORMS:
            change = attack(batch, chosen, 0.3, norm=norm) - batch.embeddings  # type: ignore[arg-type]
            limits = allowed(batch, 0.3, norm)
            rows = zip(prompts(batch, change), prompts(batch, gradient), chosen, limits, strict=True)
            for delta, way, positions, most in rows:
                way = way.flatten()[positions]
                expected = most * (way / way.norm() if norm == "l2" else way.sign())
                found = delta.flatten()[positions]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * most)


@pytest.mark.parametrize("norm", NORMS)
def test_iterated_attacks_are_projected_gradient_steps_of_which_the_best_is_kept(norm: str) -> None:
    """An own loop over each prompt by itself, with the plain gradient, against the batched one."""
    batch, steps, budget = one_batch("llama", 4), 5, 0.4
    chosen = some(batch, 0.3)
    found = attack(batch, chosen, budget, norm=norm, steps=steps) - batch.embeddings  # type: ignore[arg-type]
    for row, (start, limit) in enumerate(zip(batch.padding, allowed(batch, budget, norm), strict=True)):
        places = start * 12 + chosen[row]
        change, tried = torch.zeros_like(batch.embeddings), []
        flat = change[row].view(-1)
        for stride in (limit, *[limit / 2] * (steps - 1)):  # 2.5 / 5
            way = against(batch, batch.embeddings + change)[row].flatten()[places]
            to = flat[places] + stride * (way / way.norm() if norm == "l2" else way.sign())
            if norm == "l2":
                to = to * min(1.0, limit / float(to.norm()))
            flat[places] = to.clamp(-limit, limit)
            log_p = batch.log_probs(batch.embeddings + change)[row, batch.grads.predicted[row]]
            tried.append((float(log_p.detach()), change[row].clone()))
        kept = min(tried, key=lambda pair: pair[0])[1]
        torch.testing.assert_close(found[row], kept, rtol=1e-3, atol=1e-3 * limit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [0.02, 0.3, 3.0])
def test_more_steps_never_do_worse_than_one(kind: str, norm: Any, budget: float) -> None:
    batch = one_batch(kind, 8)
    predicted = batch.grads.predicted[:, None]
    for share in (0.001, 0.2):  # of a single dimension, steps swing to and fro
        chosen = some(batch, share)
        one, four, ten = (
            batch.log_probs(attack(batch, chosen, budget, norm=norm, steps=steps)).gather(1, predicted)
            for steps in (1, 4, 10)
        )
        assert (four <= one + 1e-6).all()
        assert (ten <= one + 1e-6).all()
        assert share < 0.1 or budget < 1 or (ten < one - 1e-6).any()  # a corner may be the best there is


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_prediction_loses_and_more_than_by_a_random_direction(kind: str, norm: Any) -> None:
    batch = one_batch(kind, 8)
    chosen = some(batch, 0.2)
    predicted = batch.grads.predicted[:, None]

    def left(**options: Any) -> Tensor:
        perturbed = attack(batch, chosen, 0.02, norm=norm, **options)
        return batch.log_probs(perturbed).gather(1, predicted).detach()

    intact = batch.log_probs(batch.embeddings).gather(1, predicted).detach()
    assert (left() < intact).all()
    assert (left(steps=3) < intact).all()
    controls = torch.stack([left(direction="random", seed=seed) for seed in range(10)])
    assert (left() < controls.mean(0)).all()


def test_a_sure_prediction_is_attacked_in_the_right_direction() -> None:
    """P(y_hat) is 1 in float32, and beyond: the other classes have probability 0."""
    for factor in (1.0, 6.0, 1000.0):
        changes = []
        for dtype in (torch.float32, torch.float64):
            model = tiny_model("llama", dtype)
            model.network.lm_head.weight.data *= factor
            (batch,) = embedding_batches(model, tiny_examples(3))
            perturbed = attack(batch, [torch.arange(7)] * 3, 0.1)
            changes.append((perturbed - batch.embeddings).double())
        assert changes[1].flatten(1).norm(dim=1).min() > 0
        torch.testing.assert_close(changes[0], changes[1], rtol=1e-2, atol=1e-2 * float(changes[1].max()))


def test_random_directions_depend_on_the_seed_and_the_example_only() -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(4)
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for size, seed in ((4, 0), (2, 0), (1, 0), (4, 1)):
        for batch in embedding_batches(model, examples, batch_size=size):
            changed = attack(batch, [torch.arange(9)] * len(batch.index), 0.1, direction="random", seed=seed)
            rows = prompts(batch, changed - batch.embeddings)
            ways = {e.id: x.flatten()[:9] for e, x in zip(batch.examples, rows, strict=True)}
            found.setdefault((size, seed), {}).update(ways)
    for example in examples:
        for size in (2, 1):
            torch.testing.assert_close(found[size, 0][example.id], found[4, 0][example.id])
        assert not torch.allclose(found[4, 1][example.id], found[4, 0][example.id])
    assert not torch.allclose(found[4, 0]["0"] / found[4, 0]["0"].norm(),
                              found[4, 0]["3"] / found[4, 0]["3"].norm())  # fmt: skip


def test_half_precision_stays_half_precision() -> None:
    batch = one_batch(dtype=torch.bfloat16)
    for steps in (1, 3):
        perturbed = attack(batch, some(batch), 0.3, steps=steps)
        assert perturbed.dtype == torch.bfloat16
        used, most = spent(batch, perturbed.double(), "l2"), allowed(batch, 0.3, "l2")
        assert used == pytest.approx(most, rel=0.02) or steps > 1
        assert batch.log_probs(perturbed).isfinite().all()


def test_a_dimension_without_gradient_stays() -> None:
    batch = one_batch()
    batch.grads.class_grads[:, 1] = 0
    chosen = [torch.tensor([3, 8])] * 5
    found = moved(batch, attack(batch, chosen, 0.5))
    assert [len(positions) for positions in found] == [2, 0, 2, 2, 2]


BAD_POSITIONS = ([0, 0], [-1], [10**6], [], [0.5])


def test_attacks_that_make_no_sense_are_refused() -> None:
    batch = one_batch(n=2)
    chosen = some(batch)
    for budget in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"budget must be a finite number of at least 0, not {budget}"):
            attack(batch, chosen, budget)
    with pytest.raises(ValueError, match="unknown norm 'l1'; use one of l2, linf"):
        attack(batch, chosen, 0.1, norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown direction 'up'"):
        attack(batch, chosen, 0.1, direction="up")  # type: ignore[arg-type]
    for steps in (0, 1.5):
        with pytest.raises(ValueError, match=f"at least 1, not {steps}"):
            attack(batch, chosen, 0.1, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a random direction is the same at every step"):
        attack(batch, chosen, 0.1, steps=2, direction="random")
    with pytest.raises(ValueError, match="positions for 1 prompts of 2"):
        attack(batch, chosen[:1], 0.1)
    for bad in BAD_POSITIONS:
        with pytest.raises(ValueError, match="in example '0' must be one or more distinct whole numbers"):
            attack(batch, [torch.tensor(bad), chosen[1]], 0)


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"direction": "random"}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_budget_beyond_the_range_of_the_dtype_is_refused(norm: Any, options: dict[str, Any]) -> None:
    batch = one_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"beyond the range of torch\.float32; lower it"):
        attack(batch, some(batch), 1e39, norm=norm, **options)


def test_a_step_without_a_finite_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = one_batch()
    chosen = some(batch)
    original = EmbeddingBatch.log_probs
    steep = lambda self, x: original(self, x) + 0 * (x - x).sqrt().sum()  # noqa: E731
    monkeypatch.setattr(EmbeddingBatch, "log_probs", steep)
    with pytest.raises(FloatingPointError, match=r"gradients of an attack's step are NaN or infinite"):
        attack(batch, chosen, 0.1, steps=2)


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(1, 6),
    hidden=st.integers(1, 8),
    levels=st.integers(1, 9),
    share=st.floats(0, 1, exclude_min=True),
    data=st.data(),
)
def test_the_largest_of_the_region_are_chosen(
    tokens: int, hidden: int, levels: int, share: float, data: st.DataObject
) -> None:
    scores = torch.randint(levels, (tokens, hidden), generator=torch.Generator().manual_seed(levels)).float()
    marks = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    region = torch.tensor(marks)
    chosen = top_dimensions(scores, share, region=region)
    inside = region[:, None].expand(tokens, hidden).flatten()
    assert len(chosen) == max(1, round(share * int(inside.sum())))
    assert torch.equal(chosen, chosen.unique())  # ascending and distinct
    assert inside[chosen].all()
    rest = inside.clone()
    rest[chosen] = False
    assert not rest.any() or scores.flatten()[chosen].min() >= scores.flatten()[rest].max()


def test_ties_are_settled_by_a_seeded_draw() -> None:
    scores = torch.zeros(5, 8)
    scores[2, 3] = 1
    draws = [top_dimensions(scores, 0.25, seed=seed) for seed in range(40)]
    assert torch.equal(draws[7], top_dimensions(scores, 0.25, seed=7))
    assert all(19 in draw for draw in draws)  # the one that is no tie
    assert len(torch.cat(draws).unique()) == 40  # each of the others in some draw


def test_shares_and_regions_that_make_no_sense_are_refused() -> None:
    scores = torch.rand(4, 3)
    for share in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, not {share}"):
            top_dimensions(scores, share)
    for bad in (torch.rand(4), scores / 0, scores * torch.nan):
        with pytest.raises(ValueError, match="cannot be ranked"):
            top_dimensions(bad, 0.1)
    for region in (torch.zeros(4, dtype=torch.bool), torch.ones(5, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match="a region of these 4 tokens is boolean and marks at least one"):
            top_dimensions(scores, 0.1, region=region)
