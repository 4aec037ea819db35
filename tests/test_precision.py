"""Scores in bfloat16 against those in float32: a table that knows how far two rankings agree."""

import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from fichapters.ch03 import precision
from fichapters.ch03.precision import agreement_by_answer, precision_agreement
from fihelpers.data import data_folder
from fihelpers.filters import Damped
from fihelpers.models.language import open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import load_task

DAMPED = Damped(1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first block of the bundled model."""
    folder: Path = tmp_path_factory.mktemp("small")
    network = open_model().network
    network.model.layers = network.model.layers[:1]
    network.config.num_hidden_layers = 1
    network.config.layer_types = network.config.layer_types[:1]
    network.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_folder() / "models" / "mini-lm" / file, folder)
    return str(folder)


def test_agreement_is_that_of_the_scores(small: str) -> None:
    table = precision_agreement(small, None, "bundled", ["law", "culture"], 5, 3, DAMPED)
    examples = [
        e for subject, n in (("law", 3), ("culture", 2)) for e in load_task("bundled", subject, "val", n, 3)
    ]
    found = {}
    for dtype in ("bfloat16", "rounded", "float32"):
        model = open_model(small, dtype="float32" if dtype == "rounded" else dtype)
        if dtype == "rounded":
            for p in model.network.parameters():
                p.data = p.data.bfloat16().float()
        scores = score_weights(model, examples, ["FI"], DAMPED, only=linear_names(model.network))
        found[dtype] = scores["FI damped 0.0001"]
    assert [f"{name}.weight" for name in table.layer] == linear_names(model.network)
    for line in table.itertuples():
        a, b = (found[dtype][f"{line.layer}.weight"].flatten() for dtype in ("bfloat16", "float32"))
        assert not a.equal(b) and a.dtype == b.dtype == torch.float32
        k = round(0.01 * len(a))
        common = set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())
        assert line.weights == len(a)
        assert line.overlap == pytest.approx(len(common) / k)
        assert line.spearman == pytest.approx(spearmanr(a, b).statistic)
        assert 0.3 < line.overlap <= 1 and 0.9 < line.spearman < 1
        rounded = found["rounded"][f"{line.layer}.weight"].flatten()
        assert line.spearman_rounded == pytest.approx(spearmanr(rounded, b).statistic)
        common = set(rounded.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())
        assert line.overlap_rounded == pytest.approx(len(common) / k)


def test_the_same_scores_agree_and_opposite_ones_do_not(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = torch.arange(1000.0).view(50, 20)
    made = {"float32": Scores({"a.weight": ranks, "b.weight": ranks, "c.weight": ranks * 0})}
    made["bfloat16"] = Scores({"a.weight": 3 * ranks, "b.weight": -ranks, "c.weight": ranks})
    made[precision.ROUNDED] = made["float32"]
    monkeypatch.setattr(precision, "_scores", lambda name, revision, how, *others: made[how])
    table = precision_agreement(small, None, "bundled", ["law"], 1, 0, DAMPED).set_index("layer")
    assert table.loc["a"].tolist() == pytest.approx([1000, 1, 1, 1, 1])
    assert table.loc["b", "overlap"] == 0 and table.loc["b", "spearman"] == pytest.approx(-1)
    assert table.loc["c", ["spearman"]].isna().all()


def test_questions_whose_answer_moves_are_told_from_the_rest(small: str) -> None:
    asked = (small, None, "bundled", ["law", "culture"], 5, 3, DAMPED)
    table = agreement_by_answer(*asked)
    whole = table[table.asked == "all"].reset_index(drop=True)
    same = table[table.asked == "same answer"].reset_index(drop=True)
    assert (whole.questions == 5).all() and same.questions.nunique() == 1 and same.questions[0] <= 5
    known = precision_agreement(*asked)
    assert whole[list(known)].equals(known) or (whole.spearman - known.spearman).abs().max() < 1e-3
