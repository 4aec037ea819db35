"""The top share of values that are read in pieces, against sorting them all."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fihelpers.perturb.topshare import CHUNK, TopShare


def top_share(values: dict[str, Tensor], counts: int | dict[str, int], seed: int = 0) -> TopShare:
    """Reads seven values at a time."""

    def stream(name: str) -> Iterator[Tensor]:
        yield from values[name].split(7)

    dtype = max((v.dtype for v in values.values()), key=lambda d: d.itemsize)
    return TopShare(values, stream, counts, dtype, seed)


def chosen(values: dict[str, Tensor], counts: int | dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    top = top_share(values, counts, seed)
    return {name: top.mask(name) for name in values}


def signed(dtype: torch.dtype) -> dict[str, Tensor]:
    """Values of both signs over many orders of magnitude, neighbours in float included."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(200, generator=g, dtype=dtype) * 10 ** torch.randint(-30, 5, (200,), generator=g)
    near = 1 + torch.arange(90) * torch.finfo(dtype).eps
    return {
        "a": wide.to(dtype),
        "b": near.to(dtype),
        "c": -near.to(dtype),
        "none": torch.zeros(0, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 37, 190, 379, 380])
def test_over_all_tensors_the_largest_are_chosen(dtype: torch.dtype, count: int) -> None:
    values = signed(dtype)
    masks = chosen(values, count)
    picked = torch.cat([v[masks[n]] for n, v in values.items()]).sort(descending=True).values
    assert picked.equal(torch.cat(list(values.values())).sort(descending=True).values[:count])


def test_by_layer_each_tensor_gives_its_own_number() -> None:
    values = signed(torch.float32)
    counts = {"a": 20, "b": 90, "c": 0, "none": 0}
    for name, mask in chosen(values, counts).items():
        assert values[name][mask].sort().values.equal(values[name].sort().values[len(mask) - counts[name] :])
    assert top_share(values, counts).total == 110


@pytest.mark.parametrize("count", [10, 11, 57, 100, 209])
def test_ties_are_drawn_with_the_seed_and_spread_over_the_tensors(count: int) -> None:
    values = {"a": torch.zeros(100), "b": torch.full((100,), -0.0), "c": torch.ones(10)}
    masks, again, other = (chosen(values, count, seed) for seed in (0, 0, 1))
    assert masks["c"].all() and sum(int(m.sum()) for m in masks.values()) == count
    assert abs(int(masks["a"].sum()) - int(masks["b"].sum())) <= 1
    assert all(masks[n].equal(again[n]) for n in values)
    if 11 < count < 209:
        assert not masks["a"].equal(other["a"])
        assert masks["a"][50:].any() and masks["a"][:50].any()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3])
def test_of_ten_million_scores_with_ties_the_largest_are_chosen(share: float) -> None:
    """As by a full sort, in pieces, with scores of both signs, infinite ones and denormal ones."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(10**7, generator=g).mul_(8).round_().div_(8)  # about a hundred values
    scores[: 10**5] *= 1e-42  # below the smallest normal number
    scores[10**5 : 10**5 + 50] = torch.inf
    scores[-50:] = -torch.inf
    count = round(share * len(scores))
    mask = TopShare(["all"], lambda _: iter(scores.split(CHUNK)), count).mask("all")
    ranked = scores.sort(descending=True).values
    assert scores[mask].sort(descending=True).values.equal(ranked[:count])
    tied = scores == ranked[count - 1]
    assert int(tied.sum()) > 1000 and 0 < int((tied & mask).sum()) < int(tied.sum())


def test_denormal_values_are_ranked() -> None:
    tiny = torch.arange(1, 101, dtype=torch.float32) * 1.4e-45
    assert chosen({"a": tiny.flip(0)}, 30)["a"].nonzero()[:, 0].tolist() == list(range(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", ["positive", "negative", "smallest"])
def test_nan_is_refused(dtype: torch.dtype, bits: str) -> None:
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    infinity = torch.tensor(torch.inf, dtype=dtype).view(whole)
    nan = {
        "positive": torch.tensor(torch.nan, dtype=dtype),
        "negative": -torch.tensor(torch.nan, dtype=dtype),
        "smallest": (infinity + 1).view(dtype),
    }[bits]
    for sign in (1, -1):
        values = {"fine": torch.ones(3, dtype=dtype), "bad": sign * torch.arange(9, dtype=dtype)}
        values["bad"][4] = nan
        with pytest.raises(ValueError, match="The values of bad hold NaN"):
            chosen(values, 3)
        with pytest.raises(ValueError, match="The values of bad hold NaN"):
            chosen(values, {"fine": 1, "bad": 2})
