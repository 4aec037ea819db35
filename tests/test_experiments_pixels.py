"""Chapter 04's experiment on a tiny model: what is masked, counted, kept and judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_vision import encode_png, save_vision_model
from torch import Tensor

from fichapters import tables
from fichapters.ch04 import draw, lab
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.tasks import Example, image_prompt

SIZE, PATCH = 24, 8
MEASURES = ("FI exact", lab.FI_TOP, lab.FI_SUMMED, "Jacobian norm", "Grad-CAM", "random")


def picture(seed: int) -> Tensor:
    """A coloured block of 6 x 10 pixels on paper of one colour."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, SIZE, SIZE), 230.0)
    image[:, 5:11, 8:18] = torch.randint(150, (3, 6, 10), generator=generator).float()
    return image


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    options = ("w1", "w2", "w3", "w4")
    return [
        Example(f"{subject}/{i}", subject, image_prompt(f"w{i} w9", options), options, i % 4, f"w{i} w9",
                encode_png(picture(i)))
        for subject in ("one", "two") for i in range(3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return open_vision_model(str(save_vision_model("qwen2_5_vl", tmp_path_factory.mktemp("vlm"))))


@pytest.fixture(scope="module")
def gallery(model: VisionModel, examples: list[Example]) -> list[lab.Scored]:
    return list(lab.scored(model, examples, 4))


@pytest.fixture(scope="module")
def plan() -> lab.Plan:
    return lab.Plan(MEASURES, (5,), (0.1, 1.0), (2, 99), PATCH, draws=2)


@pytest.fixture(scope="module")
def rows(gallery: list[lab.Scored], plan: lab.Plan, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return lab.run_sweep(gallery, plan, tmp_path_factory.mktemp("cache"))


def test_the_sweep_holds_every_change_of_every_picture(rows: pd.DataFrame) -> None:
    assert len(rows) == 6 * (1 + (len(MEASURES) + 1) * 5)  # the random measure is drawn twice
    assert set(rows.kind) == {lab.INTACT, "count", "share", "patches"}
    assert (rows.log_prob <= 0).all() and set(rows.correct) <= {0.0, 1.0}
    # a mask over everything is the same picture for every measure
    whole = rows[(rows.amount == 1.0) | (rows.amount == 99)]
    assert (whole.groupby("id").log_prob.agg(np.ptp) < 1e-5).all()


def test_finished_batches_are_not_made_again(
    gallery: list[lab.Scored], plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(plan, measures=("Jacobian norm",), shares=(), patches=())
    once = lab.run_sweep(gallery, small, tmp_path)
    monkeypatch.setattr(lab, "_sweep", lambda *a: pytest.fail("finished work was done again"))
    pd.testing.assert_frame_equal(lab.run_sweep(gallery, small, tmp_path), once)


def test_bad_plans_are_named(gallery: list[lab.Scored], plan: lab.Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown measure 'FI exat'"):
        lab.run_sweep(gallery, replace(plan, measures=("FI exat",)), tmp_path)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        lab.run_sweep(gallery, replace(plan, shares=(1.5,)), tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        lab.run_sweep([], plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tables_of_a_sweep(rows: pd.DataFrame) -> None:
    intact = rows[rows.measure == lab.INTACT]
    table = lab.by_category(rows, "count", 5, "correct")
    assert table.loc[lab.INTACT, "all"] == pytest.approx(intact.correct.mean())
    assert (table.n == 6).all()

    less = lab.against(rows, "share", 0.1, "random", 0)
    assert "random" not in less.index
    assert (less.log_prob_low <= less.log_prob).all() and (less.log_prob <= less.log_prob_high).all()
    full = lab.against(rows, "share", 1.0, "random", 0)
    assert np.allclose(full.drop(index=lab.INTACT).log_prob, 0, atol=1e-5)

    curves = lab.curves(rows, "share")
    assert np.allclose(curves[curves.amount == 0].log_prob, intact.log_prob.mean())
    areas = lab.areas(rows, "share", 0)
    assert areas.loc["random", "less_log_prob"] == 0 == areas.loc["random", "less_log_prob_high"]
    # two straight pieces: 0 to 0.1 and 0.1 to 1
    heights = curves[curves.measure == "Jacobian norm"].sort_values("amount").log_prob.to_numpy()
    expected = 0.05 * (heights[0] + heights[1]) + 0.45 * (heights[1] + heights[2])
    assert areas.loc["Jacobian norm", "log_prob"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"no share of 0\.2"):
        lab.wide(rows, "share", 0.2, "correct")


def test_duels(rows: pd.DataFrame) -> None:
    duels = lab.duels(rows, "share", 1.0, ["Jacobian norm", "random"], 0)
    assert len(duels) == 3 * 2  # three settings of FI were swept
    assert np.allclose(duels.difference, 0, atol=1e-5)
    assert tables.duel_grid(duels).shape == (3, 2)
    guided = lab.outcomes(rows, {"count": 5, "patches": 2}, 0)
    assert set(guided[guided["first"] == "random"]["second"]) == {lab.INTACT}
    assert (guided.n == 6).all()


def test_a_pair_is_judged_on_every_picture_that_both_masked(rows: pd.DataFrame) -> None:
    few = rows.id.unique()[:2]
    partly = rows[(rows.measure != "Jacobian norm") | rows.id.isin(few)]
    guided = lab.outcomes(partly, {"count": 5}, 0).set_index("first")
    assert guided.n["Jacobian norm"] == 2 and guided.n["FI exact"] == guided.n["random"] == 6
    less = lab.against(partly, "count", 5, "random", 0)  # the table of the page says the same
    shared = list(less.index.intersection(guided.index))
    assert {"FI exact", "Jacobian norm"} <= set(shared)
    ends = ["accuracy", "accuracy_low", "accuracy_high"]
    assert np.allclose(guided.loc[shared, ["difference", "low", "high"]], less.loc[shared, ends])


def test_maps_of_the_settings(gallery: list[lab.Scored], tmp_path: Path) -> None:
    maps = lab.describe(gallery, PATCH, tmp_path)
    assert len(maps) == 6 * len(lab.SETTINGS)
    full = lab.saturation(maps, 0)
    # four classes: three channels can move all three others, one channel cannot
    assert full.at_ceiling["letters, pixels"] > 0.9 > full.at_ceiling["letters, single channels"]
    assert full.at_ceiling["letters, patches"] > 0.9
    assert lab.at_ceiling(gallery) >= full.at_ceiling["letters, pixels"]
    assert full.held.between(0, 1).all()
    assert (full.held_low <= full.held).all() and (full.held <= full.held_high).all()
    assert np.allclose(maps.area, 60 / SIZE**2)
    things = lab.on_things(maps, 0)
    assert things.ratio["letters, pixels"] == pytest.approx(1, abs=0.05)
    assert (things.low <= things.ratio).all() and (things.ratio <= things.high).all()


def test_the_drawn_things_are_found() -> None:
    found = lab.drawn_things(picture(0))
    assert found[5:11, 8:18].all() and found.sum() == 60


def test_patch_sums_keep_the_total_and_cut_smaller_patches_at_the_edges() -> None:
    maps = torch.arange(2.0 * 5 * 7).reshape(2, 5, 7)
    sums = lab.patch_sums(maps, 3)
    assert sums.shape == (2, 2, 3)
    assert torch.equal(sums.sum((1, 2)), maps.sum((1, 2)))
    assert sums[1, 1, 2] == maps[1, 3:, 6:].sum()


def test_the_case_is_the_one_with_the_fewest_pixels_then_the_least_left_then_by_name() -> None:
    def line(id: str, kind: str, amount: float, correct: float, log_prob: float) -> dict[str, object]:
        measure = lab.INTACT if kind == lab.INTACT else "m"
        return {"id": id, "measure": measure, "kind": kind, "amount": amount, "correct": correct,
                "log_prob": log_prob, "draw": 0}  # fmt: skip

    rows = pd.DataFrame(
        [line(i, lab.INTACT, 0, c, -0.1) for i, c in zip("abcde", (1, 1, 1, 1, 0), strict=True)]
        + [line(i, "count", 10, c, -1) for i, c in zip("abcde", (1, 0, 0, 1, 0), strict=True)]
        + [
            line(i, "count", 20, c, p)
            for i, c, p in zip("abcde", (0, 0, 0, 1, 0), (-9, -2, -2, -3, -9), strict=True)
        ]
    )
    flips = lab.flip_counts(rows)
    assert list(flips.id) == ["b", "c", "a", "d"]  # e was wrong before
    assert np.isnan(flips.flips_at.iloc[-1])
    assert lab.flipped(rows, "count", 10).loc["m", "share"] == 0.5


def test_one_picture_under_growing_masks(gallery: list[lab.Scored], tmp_path: Path) -> None:
    plan = lab.Plan(("Jacobian norm",), counts=(3, 30))
    flips = lab.flip_counts(lab.run_sweep(gallery, plan, tmp_path))
    case = lab.look_at(gallery, flips, "Jacobian norm", plan.counts, 0)
    assert case.example.id == flips.id.iloc[0]
    assert {n: int(mask.sum()) for n, mask in case.masks.items()} == {3: 3, 30: 30}
    assert all(float(p.sum()) == pytest.approx(1) for p in case.probs.values())
    assert case.shown in plan.counts
    draw.case_figure(case).canvas.draw()


def test_noises_have_the_loss_of_the_mask(gallery: list[lab.Scored], tmp_path: Path) -> None:
    noise = lab.noise_against_mask(gallery[:1], "Jacobian norm", 0.02, 0, tmp_path)
    assert set(noise.change) == {lab.INTACT, "Jacobian norm", "random", *lab.NOISES}
    for _, part in noise.groupby("id"):
        losses = part.set_index("change").loss
        assert losses[lab.INTACT] == 0
        assert np.allclose(losses[list(lab.NOISES)], losses["Jacobian norm"], rtol=1e-3)
    assert (noise[noise.change == lab.INTACT].changed == 0).all()
    table = lab.noise_table(noise, "Jacobian norm", 0)
    assert table.loc["Jacobian norm", "mask_minus_this"] == 0


def test_figures(
    model: VisionModel, gallery: list[lab.Scored], examples: list[Example], rows: pd.DataFrame
) -> None:
    draw.gallery(lab.shown(model, examples, 1)).canvas.draw()
    draw.setting_maps(gallery[0].images[0], lab.setting_maps(gallery[0], 0, PATCH)).canvas.draw()
    draw.deletion_curves(lab.curves(rows, "share"), {"all": MEASURES, "some": MEASURES[:2]}, "share", True)
    draw.area_dots({"pixels": lab.areas(rows, "share", 0)})


def test_the_draw_takes_as_many_of_each_category(examples: list[Example]) -> None:
    drawn, rest = lab.draw_pictures(examples, 2, 0)
    assert [e.subject for e in drawn] == ["one", "one", "two", "two"]
    assert {e.id for e in drawn} | {e.id for e in rest} == {e.id for e in examples}
    assert lab.draw_pictures(examples, 99, 0)[1] == []
