"""Chapter 08: its own cells on tiny models, and what its lab keeps, counts, compares and refuses."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from opening import NOTEBOOKS
from tiny import tiny_model

from fichapters import results
from fichapters.ch08 import lab
from fihelpers.influence import SaturationWarning, fi, saturated
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import linear_names
from fihelpers.perturb.quantize import Scheme, pack, pack_model
from fihelpers.scores.channels import score_activations
from fihelpers.scores.weights import score_weights
from fihelpers.trials import Kept, Trials, collect

SHARES = [0.1, 0.5]
KINDS = {"qwen2": "o_proj", "gpt2": "c_proj", "mixtral": "experts"}  # plain, stored turned, fused


@pytest.fixture(scope="module")
def p(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("task")
    for split in ("dev", "val", "test"):
        (folder / split).mkdir()
        for subject in ("one", "two"):
            lines = [f"w{i} w{i + 1} of {subject},w1,w2,w3,w{i + 4},{'ABCD'[i % 4]}\n" for i in range(8)]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return SimpleNamespace(
        MODEL="mini-lm",
        REVISION=None,
        TASK=str(folder),
        SUBJECTS=["one", "two"],
        SEEDS=2,
        SEED=0,
        N_CALIBRATION=3,
        N_TEST=4,
        MATRICES=["o_proj", "all"],
        BITS={"swept": [1, 2, 3], "tried": [1, 2], "full": [1, 2]},
        GROUPS=[4],
        KEPT={"rows": SHARES, "columns": 0.5},
        DEVICE="cpu",
        DTYPE="float32",
    )


def changed(p: SimpleNamespace, **settings: Any) -> SimpleNamespace:
    """The settings with others; those of a group by the group's name and theirs, as in BITS__full."""
    found = copy.deepcopy(vars(p))
    for name, value in settings.items():
        group, _, key = name.partition("__")
        found[group] = {**found[group], key: value} if key else value
    return SimpleNamespace(**found)


def with_long_context(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(kind, dtype)
    model.network.config.max_position_embeddings = 512
    if kind == "gpt2":  # whose positions are learned
        model.network.transformer.wpe.weight.data = torch.randn(512, 12, dtype=dtype)
    return model


@dataclass
class Lesson:
    """A run of the notebook's cells: its settings and place, what it named, and the tables that it kept."""

    p: SimpleNamespace
    folder: Path
    names: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def run_lesson(p: SimpleNamespace, model: LanguageModel, folder: Path) -> Lesson:
    """Run the cells before the exercises with a tiny model in the place of the bundled one."""
    found = Lesson(p, folder, {"__name__": "__main__"})
    own = SimpleNamespace(**{**vars(p), "PROFILE": "real"})  # its tables are drawn beside no others
    kept = {"kept": lambda name: Kept(folder, name, "about"), "keep": found.tables.__setitem__}
    run = SimpleNamespace(p=own, name="08_quantization", **kept)
    cells = nbformat.read(NOTEBOOKS["08_quantization"], as_version=4).cells
    end = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    code = [cell.source for cell in cells[:end] if cell.cell_type == "code"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "begin", lambda name: run)
        patch.setattr("fihelpers.open_model", lambda *_: model)
        patch.setattr(lab, "check", lambda *_: None)  # of the model by its name
        for source in code[1:]:
            exec(compile(source, "08_quantization", "exec"), found.names)
    return found


@pytest.fixture(scope="module", params=KINDS)
def lesson(
    request: pytest.FixtureRequest, p: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lesson]:
    kind, model = request.param, with_long_context(request.param)
    before = {n: w.clone() for n, w in model.network.named_parameters()}
    settings = changed(p, MATRICES=[KINDS[kind], "all"], GROUPS=[2])
    if kind != "qwen2":
        settings = changed(settings, SEEDS=1, KEPT__rows=[0.5])
    found = run_lesson(settings, model, tmp_path_factory.mktemp("kept"))
    assert all(w.equal(before[n]) for n, w in model.network.named_parameters())
    assert len(list(found.folder.iterdir())) == 1 + settings.SEEDS
    yield found


def test_everything_is_tried_in_every_set(lesson: Lesson) -> None:
    n, shares = lesson.names, len(lesson.p.KEPT["rows"])
    trials, main = n["trials"], list(n["MAIN"])
    others = len(n["CASES"]) - len(main)
    rows, columns, earlier = 14, 15, len(lab.EARLIER)
    assert len(trials) == lesson.p.SEEDS * (2 * (rows * shares + columns) + others * earlier * shares)
    tried = {(t.set, *t.labels.values()) for t in trials.tried}
    assert len(tried) == len(trials) and len(n["swept"]) == 2 * 3 * 2
    for name in ("magnitude", "error alone"):  # look at no question
        found = trials.answers("log_prob", case=main[1], axis="rows", keep=name, share=0.5)
        assert np.array_equal(found[0], found[-1])
    found = trials.answers("log_prob", case=main[1], axis="rows", keep="random", share=0.5)
    assert len(found) == 1 or not np.array_equal(*found)


def test_a_channels_score_is_what_its_name_says(lesson: Lesson) -> None:
    n = lesson.names
    model = n["model"]
    matrices, bits = list(n["MAIN"].values())[1]
    linear = linear_names(model.network)
    scores = score_weights(model, n["questions"], n["SCORED"], only=linear)
    scores |= score_activations(model, n["questions"], only=linear)
    for axis, along in (("rows", 1), ("columns", 0)):
        ranked = n["of_channels"](scores, matrices, bits, axis)
        plan = list(lab.plan(lesson.p, list(n["MAIN"])[1], axis, ranked))
        assert {score for _, score, _, _ in plan} <= set(ranked)
        assert {which for keep, _, which, _ in plan if "low" not in keep and keep != "random"} == {"top"}
        for name in linear:
            W = lab.matrix(model, name)
            error = (pack(W, Scheme(bits)).unpack() - W).square()
            metric = scores["Fisher diagonal"].rows(name)
            assert torch.allclose(ranked["information length"][name], (metric * error).sum(along))
            assert torch.allclose(ranked["error alone"][name], error.sum(along))
            assert {len(values[name]) for values in ranked.values()} == {W.shape[1 - along]}


def test_tables_of_the_lesson(lesson: Lesson) -> None:
    n, tables = lesson.names, lesson.tables
    cases, main = n["CASES"], list(n["MAIN"])
    won, high_low = tables["recovered_as_claimed"], tables["high_against_low"]
    assert len(won) == 2 * len(cases) and (won.recovered.notna() == won.lost).all()
    assert len(high_low) == 2 * 2 * len(cases) and (high_low.low <= high_low.high).all()
    assert set(high_low["filter"]) == {"exact", "damped 0.0001"}
    duels = tables["duels"]
    assert len(duels) == 2 * len(n["PAIRS"]) * len(main)
    more = tables["one_step_more"].set_index(["case", "share"])
    for case in main:
        matrices, bits = cases[case]
        finer = n["swept"].answers(matrices=matrices, bits=bits + 1, group=0).mean()
        kept = n["trials"].answers(case=case, axis="rows", keep="information length", share=0.5).mean()
        assert more.difference[case, 0.5] == pytest.approx(finer - kept)
    packed = pack_model(n["model"], n["NAMES"]["all"], Scheme(2))
    sweep = tables["without_protection"].set_index(["matrices", "bits", "group"])
    assert sweep.stored["all", 2, 0] == lab.bits_per_weight(packed)


def test_finished_sets_are_not_run_again(lesson: Lesson) -> None:
    written = {path: path.stat().st_mtime_ns for path in lesson.folder.iterdir()}
    again = run_lesson(lesson.p, lesson.names["model"], lesson.folder)
    assert {path: path.stat().st_mtime_ns for path in lesson.folder.iterdir()} == written
    for name, table in lesson.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


# --- the lab


def outcome(right: str, level: float = -1.0) -> Mapping[str, Any]:
    correct = [letter == "1" for letter in right]
    return {"correct": correct, "log_prob": [level - 0.1 * i for i in range(len(right))]}


@pytest.fixture
def swept() -> Trials:
    def tries(_: int) -> Any:
        for bits, right in {1: "100000", 2: "110000", 4: "111110"}.items():
            yield {"matrices": "m", "bits": bits, "group": 0, "stored": bits + 0.5}, outcome(right, -9)

    return collect(lambda: outcome("111110"), tries)


@pytest.fixture
def trials() -> Trials:
    def tries(k: int) -> Any:
        for case in ("m, 1 bit", "m, 4 bit"):
            for keep in (*lab.FILTERS, *lab.LOW, lab.LENGTH):
                for share in SHARES:
                    about = {"case": case, "axis": "rows", "keep": keep, "share": share, "stored": 16 * share}
                    yield about, outcome(f"11{int(keep not in lab.LOW)}{k}{int(share > 0.2)}0", -k - share)

    return collect(lambda: outcome("111110"), tries, sets=2)


CASES = {"m, 1 bit": ("m", 1), "m, 4 bit": ("m", 4)}


def test_shares_are_averaged_before_channels_are_compared(swept: Trials, trials: Trials) -> None:
    mean = lab.over_shares(trials)
    assert len(mean) == 2 * 2 * 5  # sets, cases, scores
    one = mean.answers(case="m, 1 bit", keep="FI exact")
    assert one.tolist() == [[1, 1, 1, k, 0.5, 0] for k in (0, 1)]
    found = lab.compare(mean, [("FI exact", "FI exact, low half")], CASES, 0)
    accuracy = found[found.score == "accuracy"]
    assert accuracy.difference.tolist() == pytest.approx([1 / 6] * 2) and (accuracy.n == 6).all()
    assert (found[found.score == "log P"].difference == 0).all()
    same = lab.compare(mean, [("FI exact", "FI exact")], CASES, 0)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)
    assert len(lab.compare(mean, [("FI exact", "FI exact")], ["m, 1 bit"], 0)) == 2
    table = lab.high_against_low(mean, swept, CASES, 0)
    assert table.loss.tolist()[:2] == pytest.approx([4 / 6, 0]) and table.lost.tolist()[:2] == [True, False]
    with pytest.raises(ValueError, match="no trial has axis = 'columns'"):
        lab.compare(mean, [("FI exact", "random")], CASES, 0, "columns")


def test_what_is_won_back_is_a_share_of_what_was_lost(swept: Trials, trials: Trials) -> None:
    settings = SimpleNamespace(KEPT={"rows": SHARES}, SEED=0)
    won = lab.won_back(trials, swept, CASES, settings)
    assert (won.share == 0.1).all()  # the one nearest to the claimed one
    assert won.recovered[:2].tolist() == pytest.approx([(3.5 - 1) / (5 - 1)] * 2)
    assert won.recovered[2:].isna().all() and not won.lost[2:].any()
    more = lab.one_step_more(trials, swept, {"m, 1 bit": ("m", 1)}, settings)
    assert more.difference.tolist() == pytest.approx([(2 - 3.5) / 6, (2 - 4.5) / 6])
    assert (more.unprotected == 2.5).all() and more.protected.tolist() == [1.6, 8.0]


def test_the_recovered_share() -> None:
    rng = np.random.default_rng(0)
    intact, plain = np.ones(40), (rng.random(40) < 0.3).astype(float)
    for kept, share in ((plain, 0), (intact, 1), ((intact + plain) / 2, 0.5)):
        assert lab.recovered_share(intact, plain, np.stack([kept, kept]), 0) == pytest.approx((share,) * 3)
    value, low, high = lab.recovered_share(intact, plain, (rng.random((3, 40)) < 0.6).astype(float), 0)
    assert low < value < high


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_arithmetic_of_published_sizes_is_that_of_packed_matrices(bits: int) -> None:
    shape, share = (40, 24), 0.25
    weight, scheme = torch.randn(shape), Scheme(bits)
    extra = pack(weight, scheme, range(10)).nbytes - pack(weight, scheme).nbytes
    assert lab.extra_bytes(shape, bits, share) == extra


def test_published_sizes() -> None:
    assert [lab.claimed(key) for key in ("share", "recovery", "memory", "gain")] == [0.05, 0.9, 0.1, 0.5]
    sizes = lab.published_sizes().set_index("matrices")
    weights = 0.05 * 28 * 3584 * 3584
    assert sizes.megabytes_4["o_proj"] == pytest.approx(1.5 * weights / 1e6, rel=0.01)
    assert sizes.megabytes_1["o_proj"] == pytest.approx(15 / 8 * weights / 1e6, rel=0.01)
    assert sizes.share["o_proj"] * sizes.megabytes_4["o_proj"] / 0.05 == pytest.approx(100)


@pytest.mark.parametrize(("kind", "layer"), list(KINDS.items()))
def test_one_matrix_is_seen_as_rows_and_put_back(kind: str, layer: str, p: SimpleNamespace) -> None:
    model = with_long_context(kind, torch.float64)
    name, question = lab.names_of(model, layer)[0], lab.drawn(p, "val", 1, 0)[0]
    W, before = lab.matrix(model, name), model.network.get_parameter(name).detach().clone()
    with lab.replaced(model, name, 2 * W):
        assert torch.equal(model.network.get_parameter(name), 2 * before)
    assert torch.equal(model.network.get_parameter(name), before)
    grads, probs = lab.gradients(model, question, name)
    assert grads.shape == (4, *W.shape) and float(probs.sum()) == pytest.approx(1)
    scores = score_weights(model, [question], ["Fisher diagonal"], only=[name])["Fisher diagonal"]
    metric = (probs[:, None, None] * grads.square()).sum(0)
    torch.testing.assert_close(metric.float(), scores.rows(name).float(), rtol=1e-4, atol=1e-7)


def test_joint_influence_of_a_row_is_its_ceiling_and_sums_differ(p: SimpleNamespace) -> None:
    model = with_long_context("qwen2", torch.float64)
    name = lab.names_of(model, "o_proj")[0]
    grads, probs = lab.gradients(model, lab.drawn(p, "val", 1, 0)[0], name)
    with pytest.warns(SaturationWarning):
        joint = fi(grads, probs, over=1)
    assert saturated(joint, probs).all()
    sums = fi(grads, probs).sum(1)
    assert sums.max() > 1.01 * sums.min()


def test_bad_settings_are_named_before_anything_runs(p: SimpleNamespace) -> None:
    measures = ["FI exact"]
    lab.check(p, measures)
    for change, text in [
        ({"BITS__swept": [1, 2, 5]}, "bits must be one of .* not 5"),
        ({"BITS__full": [1, 4]}, "compared at 4 bits; add them to BITS.tried"),
        ({"BITS__swept": [1, 3]}, "Without protection 2 bits"),
        ({"BITS__swept": [1, 2]}, "Without protection more than 2 bits"),
        ({"KEPT__rows": [0.1, 0.6]}, r"\(0, 0.5\].*not 0.6"),
        ({"KEPT__rows": []}, "not nothing"),
        ({"KEPT__columns": 0.0}, r"\(0, 0.5\].*not 0.0"),
        ({"N_TEST": 99}, "lower n"),
    ]:
        with pytest.raises(ValueError, match=text):
            lab.check(changed(p, **change), measures)
    model = with_long_context("qwen2")
    with pytest.raises(ValueError, match="no matrices 'p_proj'; known: all, q_proj"):
        lab.names_of(model, "p_proj")
