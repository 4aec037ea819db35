"""Choosing and zeroing weights, and putting them back."""

import pytest
import torch
from tiny import tiny_model

from fihelpers.perturb import sparsify
from fihelpers.perturb.sparsify import changed, linear_names, select, zeroed
from fihelpers.scores.store import Scores


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.rand(10, 20, generator=g), "b": 2 * torch.rand(300, generator=g)}


def picked(positions: dict[str, torch.Tensor], of: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([of[name].flatten()[index] for name, index in positions.items()])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.37, 0.5, 1.0])
def test_the_share_is_exact_and_the_order_right(share: float) -> None:
    values = scores()
    everything = torch.cat([v.flatten() for v in values.values()]).sort().values
    count = round(share * 500)
    top, bottom = picked(select(values, share), values), picked(select(values, share, "bottom"), values)
    assert top.sort().values.equal(everything[500 - count :])
    assert bottom.sort().values.equal(everything[:count])
    assert len(picked(select(values, share, "random"), values)) == count
    by_layer = select(values, share, scope="layer")
    assert [len(i) for i in by_layer.values()] == [round(share * 200), round(share * 300)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_by_row_each_row_gives_its_share(share: float) -> None:
    values = {"a": torch.rand(30, 20, generator=torch.Generator().manual_seed(0))}
    values["a"][10:20] = 0.5  # whole rows of equal scores
    values["a"][20:, ::2] = 0
    count = round(share * 20)
    for which in ("top", "bottom"):
        chosen = torch.zeros(600, dtype=torch.bool)
        chosen[select(values, share, which, scope="row")["a"]] = True
        chosen = chosen.view(30, 20)
        assert (chosen.sum(1) == count).all()
        for row, taken in zip(values["a"], chosen, strict=True):
            order = row.sort(descending=which == "top").values
            assert row[taken].sort(descending=which == "top").values.equal(order[:count])
        again = select(values, share, which, scope="row")["a"]
        other = select(values, share, which, scope="row", seed=1)["a"]
        assert chosen.flatten().nonzero()[:, 0].equal(again)
        assert other.equal(again) == (share in (0.0, 1.0))


def test_low_half_draws_below_the_median() -> None:
    values = scores()
    median = torch.cat([v.flatten() for v in values.values()]).sort().values[250]
    assert (picked(select(values, 0.3, "low half"), values) < median).all()
    assert len(picked(select(values, 0.5, "low half"), values)) == 250
    with pytest.raises(ValueError, match=r"\[0, 0.5\]"):
        select(values, 0.6, "low half")


def test_ties_are_settled_by_the_seed() -> None:
    tied = {"a": torch.zeros(1000)}
    tied["a"][:10] = 1
    chosen = [select(tied, 0.1, seed=s)["a"] for s in (0, 0, 1)]
    assert all(set(range(10)) <= set(c.tolist()) and len(c) == 100 for c in chosen)
    assert chosen[0].equal(chosen[1]) and not chosen[0].sort().values.equal(chosen[2].sort().values)
    assert chosen[0].max() > 500  # drawn over all tied weights, not the first rows


def test_zeroing_is_undone_bit_for_bit_even_after_an_error() -> None:
    network = tiny_model("qwen2").network
    names = linear_names(network)
    before = {n: p.clone() for n, p in network.named_parameters()}
    chosen = select({n: torch.rand(before[n].shape) for n in names}, 0.4, names=names)
    with pytest.raises(RuntimeError), zeroed(network, chosen):
        zeros = sum(int((p == 0).sum()) for p in network.parameters())
        assert zeros == sum(len(i) for i in chosen.values())
        for name, index in chosen.items():
            assert (network.get_parameter(name).flatten()[index] == 0).all()
        raise RuntimeError
    assert all(p.equal(before[n]) for n, p in network.named_parameters())


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox"])
def test_linear_layers_without_the_head(kind: str) -> None:
    network = tiny_model(kind).network
    names = linear_names(network)
    assert names and set(names) <= set(network.state_dict())
    assert not any("lm_head" in n or "embed" in n or "norm" in n for n in names)
    assert len(names) == 2 * (4 if kind == "gpt_neox" else 7)


def test_bad_input_is_named() -> None:
    values = scores()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            select(values, share)
    with pytest.raises(ValueError, match="no scores for c"):
        select(Scores(values), 0.1, names=["a", "c"])
    with pytest.raises(ValueError, match="NaN"):
        select({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="scope"):
        select(values, 0.1, scope="rows")  # type: ignore[arg-type]
    for which, given in [("low half", {"a": values["a"]}), ("top", values)]:
        with pytest.raises(ValueError, match="of a matrix, not"):
            select(given, 0.1, which, scope="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which"):
        select(values, 0.1, "highest")  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="another model"),
        zeroed(tiny_model("qwen2").network, {"x": torch.tensor([0])}),
    ):
        pass


def test_chosen_weights_are_changed_by_any_function_and_come_back() -> None:
    model = tiny_model("qwen2")
    name = linear_names(model.network)[0]
    weight = model.network.get_parameter(name)
    before = weight.detach().clone()
    with changed(model, {name: torch.tensor([0, 3])}, lambda w: -2 * w):
        flat = weight.detach().flatten()
        assert torch.equal(flat[[0, 3]], -2 * before.flatten()[[0, 3]]) and flat[1] == before.flatten()[1]
    assert torch.equal(weight, before)


@pytest.mark.parametrize("which", ["random", "low half"])
def test_a_few_of_very_many_are_drawn_without_an_order_of_all(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsify, "MANY", 100)
    values = scores()
    median = torch.cat([v.flatten() for v in values.values()]).median()
    hits = {name: torch.zeros(v.numel()) for name, v in values.items()}
    for seed in range(400):
        positions = select(values, 0.04, which, seed=seed)
        assert sum(map(len, positions.values())) == 20
        for name, index in positions.items():
            assert len(index.unique()) == len(index)
            hits[name][index] += 1
    free = torch.cat([v.flatten() for v in values.values()]) < (median if which == "low half" else 9)
    each = torch.cat([*hits.values()])
    expected = 400 * 20 / int(free.sum())
    assert (each[~free] <= expected * 1.8).all() and int((each[~free] > 0).sum()) <= 1  # the median itself
    assert (each[free] - expected).abs().max() < 5.5 * expected**0.5
