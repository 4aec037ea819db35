"""The other measures: hand-computed cases, relations between them, and what they ask for (method 3)."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fihelpers.filters import Cut, Damped, Exact, Spectral
from fihelpers.influence import fi
from fihelpers.measures import (
    FISHER,
    INFORMATION_LENGTH,
    JACOBIAN,
    MAGNITUDE,
    MEASURES,
    SALIENCY,
    SNIP,
    DataFree,
    Influence,
    Random,
    find_measure,
)

PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def grads(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g - (PROBS.reshape(3, *[1] * len(shape)) * g).sum(0)


def test_by_hand() -> None:
    s = torch.tensor([[0.7], [-0.5], [-1.0]], dtype=torch.float64)  # 0.5*0.7 - 0.3*0.5 - 0.2*1 = 0
    value = torch.tensor([2.0], dtype=torch.float64)
    assert float(JACOBIAN(s, PROBS)) == pytest.approx(0.7)
    assert float(SNIP(s, PROBS, value=value)) == pytest.approx(1.4)
    metric = 0.5 * 0.49 + 0.3 * 0.25 + 0.2
    assert float(FISHER(s, PROBS)) == pytest.approx(metric)
    assert float(INFORMATION_LENGTH(s, PROBS, value=-value)) == pytest.approx(4 * metric)
    assert float(fi(s, PROBS)) == pytest.approx(0.49 / metric)
    assert float(MAGNITUDE(s, PROBS, value=-value)) == 2
    # f = -log P: df(y_hat) = -0.7 < 0, so saliency is 0; with the signs turned it is 0.7 * 1.5
    assert float(SALIENCY(s, PROBS)) == 0
    assert float(SALIENCY(-s, PROBS)) == pytest.approx(0.7 * 1.5)


@pytest.mark.filterwarnings("ignore::fihelpers.influence.SaturationWarning")
def test_group_values() -> None:
    g, value = grads(4, 5), torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = torch.linalg.vector_norm
    torch.testing.assert_close(JACOBIAN(g, PROBS, over=1), norm(g[0], dim=1))
    torch.testing.assert_close(SNIP(g, PROBS, over=1, value=value), norm(g[0] * value, dim=1))
    torch.testing.assert_close(FISHER(g, PROBS, over=1), FISHER(g, PROBS).sum(1))
    torch.testing.assert_close(MAGNITUDE(g, PROBS, over=0, value=value), norm(value, dim=0))
    length = (PROBS[:, None] * (g * value).sum(2).square()).sum(0)
    torch.testing.assert_close(INFORMATION_LENGTH(g, PROBS, over=1, value=value), length)
    for name, measure in MEASURES.items():
        assert measure(g, PROBS, over=(0, 1), value=value).shape == (), name
        assert measure(g, PROBS, over=-1, value=value).shape == (4,), name
        assert measure(g, PROBS, value=value).shape == (4, 5), name


def test_snip_squared_is_fi_times_information_length_of_removal() -> None:
    g, value = grads(50), torch.linspace(-2, 2, 50, dtype=torch.float64)
    change = SNIP(g, PROBS, value=value).square()
    length = INFORMATION_LENGTH(g, PROBS, value=value)
    torch.testing.assert_close(change, fi(g, PROBS) * length)


@pytest.mark.parametrize(
    ("name", "text"),
    [("SNIP", "needs a value"), ("magnitude", "needs a value"), ("information length", "needs a value")],
)
def test_a_measure_that_lacks_what_it_needs_says_so(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MEASURES[name](grads(3), PROBS)


def test_registry() -> None:
    assert find_measure("FI", Damped(0.5)).name == "FI damped 0.5"
    assert find_measure("SNIP") is SNIP and find_measure(SNIP) is SNIP
    assert {n for n, m in MEASURES.items() if isinstance(m, DataFree)} == {"magnitude", "random"}
    with pytest.raises(ValueError, match="Unknown measure 'snip'; known: FI, FI exact"):
        find_measure("snip")


@given(
    spectral=st.one_of(
        st.builds(Exact, st.none() | st.floats(0, 10)),
        st.builds(Cut, st.floats(0, 10)),
        st.builds(Damped, st.floats(0, 1e6)),
    )
)
def test_fi_is_found_under_the_name_that_it_prints(spectral: Spectral) -> None:
    name = Influence(spectral).name
    assert find_measure(name).name == name
    assert type(find_measure(name).spectral) is type(spectral)  # type: ignore[attr-defined]


def test_fi_with_a_filter_of_no_table_is_that_filter() -> None:
    g = grads(6, 3)
    for name, spectral in {"FI damped 0.01": Damped(0.01), "FI cut 0.1": Cut(0.1)}.items():
        assert name not in MEASURES
        torch.testing.assert_close(find_measure(name)(g, PROBS), fi(g, PROBS, spectral=spectral))
    assert find_measure("FI damped 1e-4").name == "FI damped 0.0001"


@pytest.mark.parametrize(
    "name", ["FI damped -1", "FI foo", "FI ", "FI cut nan", "FI damped 1 2", "FI exact inf", "FI damped x"]
)
def test_a_filter_that_is_none_is_named(name: str) -> None:
    wrong = re.escape(name.partition(" ")[2])
    message = rf"^Unknown measure '{name}': unknown filter '{wrong}'; write exact, 'cut 0\.001' or"
    with pytest.raises(ValueError, match=message) as said:
        find_measure(name)
    assert "\n" not in str(said.value)


def test_random_is_seeded() -> None:
    g = grads(6, 3)
    assert Random(1)(g, PROBS).equal(Random(1)(g, PROBS))
    assert not Random(1)(g, PROBS).equal(Random(2)(g, PROBS))
    assert Random(1)(g, PROBS, over=1).shape == (6,)
