"""Records: what is kept, what is refused, and how two sets of them compare."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WriteChapter
from tiny import tiny_network
from torch import nn

from fichapters.results import Chapter, begin, linear_share, load_results
from fihelpers.filters import Cut

MODEL = SimpleNamespace(name="mini", revision=None, sha256="ab" * 32)


@pytest.fixture
def glued(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a chapter has glued, by name."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: found.update({name: value}))
    return found


@pytest.fixture
def run(tmp_path: Path, glued: dict[str, Any]) -> Chapter:
    return Chapter("01_tiny", {"PROFILE": "smoke", "SEED": 3, "RATES": [0, 0.5]}, tmp_path)


def test_a_record_is_on_disk_at_once_and_glued(run: Chapter, tmp_path: Path, glued: dict[str, Any]) -> None:
    assert load_results(tmp_path) == {}
    accuracy = run.record(
        "accuracy", torch.tensor(0.75), 0.5, np.float64(0.9), n=4, model=MODEL, spectral=Cut(1e-3)
    )
    assert load_results(tmp_path) == {("01_tiny", "accuracy"): accuracy}
    count = run.record("count", np.int64(7), n=4, unit="weights")
    assert load_results(tmp_path)["01_tiny", "count"] == count
    assert glued == {
        "accuracy": 0.75,
        "accuracy_low": 0.5,
        "accuracy_high": 0.9,
        "accuracy_n": 4,
        "count": 7,
        "count_n": 4,
    }
    assert all(type(value) in (int, float) for value in glued.values())
    assert (accuracy.seed, accuracy.profile, accuracy.spectral) == (3, "smoke", "cut 0.001")
    assert (accuracy.model, accuracy.model_sha256, count.model) == ("mini", "ab" * 32, None)
    assert {"python", "fihelpers", "torch", "transformers", "machine"} == set(accuracy.versions)
    assert json.loads((tmp_path / "01_tiny.json").read_text())["parameters"]["RATES"] == [0, 0.5]


def test_a_name_recorded_again_replaces_the_number(run: Chapter, tmp_path: Path) -> None:
    run.record("x", 1, n=1)
    run.record("x", 2, n=1)
    assert [record.value for record in load_results(tmp_path).values()] == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": float("nan")}, "needs a finite number, not nan"),
        ({"value": "0.5"}, "needs a finite number, not '0.5'"),
        ({"value": 0.5, "high": float("inf")}, "needs a finite number, not inf"),
        ({"value": 0.5, "low": 0.6}, "0.5 lies outside its interval"),
        ({"value": 0.5, "n": 0}, "n = 0 things"),
        ({"value": 0.5, "name": "a:b"}, "'a:b' must consist of letters"),
        ({"value": 0.5, "name": "../a"}, "must consist of letters"),
    ],
)
def test_a_faulty_record_is_refused_and_changes_nothing(
    run: Chapter, tmp_path: Path, glued: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    run.record("good", 1.0, n=1)
    before = (tmp_path / "01_tiny.json").read_bytes(), dict(glued)
    with pytest.raises(ValueError, match=message):
        run.record(**{"name": "bad", "n": 1, **fields})
    assert ((tmp_path / "01_tiny.json").read_bytes(), glued) == before


def test_a_table_lies_beside_the_records(run: Chapter, tmp_path: Path) -> None:
    frame = pd.DataFrame({"rate": [0.0, 0.1], "accuracy": [0.9, 1 / 3]})
    run.table("curve", frame)
    run.table("named", frame.set_index("rate"))
    for name in ("curve", "named"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"01_tiny.{name}.csv"), frame)


def test_begin_settles_the_running_notebook(
    write_chapter: WriteChapter, glued: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chapter()
    cells = ['PROFILE = "embedded"\nSEED = 4\nN = 3', '# Parameters\nPROFILE = "smoke"']
    shell = SimpleNamespace(history_manager=SimpleNamespace(input_hist_parsed=cells))
    monkeypatch.setattr("fichapters.results.get_ipython", lambda: shell)
    run = begin("01_tiny")
    assert vars(run.p) == {"PROFILE": "smoke", "SEED": 4, "N": 2}
    run.record("x", 1, n=1)
    assert [record.seed for record in load_results(Path("results/smoke")).values()] == [4]
    cells[1] += "\nM = 3"
    with pytest.raises(ValueError, match=r"01_tiny has no parameter M .given 3."):
        begin("01_tiny")
    cells[:] = ['PROFILE = "embedded"']
    with pytest.raises(ValueError, match="must declare SEED"):
        begin("01_tiny")


def test_begin_outside_a_notebook_says_so() -> None:
    with pytest.raises(ValueError, match="outside a notebook"):
        begin("01_tiny")


def test_the_file_says_what_share_of_the_matrices_is_linear(run: Chapter, tmp_path: Path) -> None:
    run.record("x", 1, n=1, model=MODEL)
    network = tiny_network("gpt2")
    run.record("y", 1, n=1, model=SimpleNamespace(**vars(MODEL) | {"name": "gpt2", "network": network}))
    assert json.loads((tmp_path / "01_tiny.json").read_text())["models"]["gpt2"]["linear_share"] == 1.0
    network.extra = nn.ParameterDict({"A_log": nn.Parameter(torch.ones(12, 12))})
    share = linear_share(network)
    matrices = sum(p.numel() for n, p in network.named_parameters() if "h." in n and p.dim() == 2)
    assert share == pytest.approx(matrices / (matrices + 144))
