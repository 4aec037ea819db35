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
from fihelpers.identity import identity
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.tasks import Example, image_prompt
from fihelpers.trials import Kept, Trial, Trials

SIZE, PATCH = 24, 8
MEASURES = ("FI exact", lab.FI_TOP, lab.FI_SUMMED, "Jacobian norm", "Grad-CAM", "random")
FIVE, TENTH, WHOLE = lab.Mask("count", 5), lab.Mask("share", 0.1), lab.Mask("share", 1.0)
MASKS = [FIVE, TENTH, WHOLE, lab.Mask("patches", 2), lab.Mask("patches", 99)]


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
def trials(gallery: list[lab.Scored]) -> Trials:
    return lab.masked_by(gallery, MEASURES, MASKS, 0, draws=2, patch=PATCH)


def test_every_picture_is_asked_under_every_mask(trials: Trials) -> None:
    rows = trials.rows()
    assert len(rows) == 6 * (len(MEASURES) + 1) * len(MASKS)  # of the random measure the mean over its draws
    assert set(rows.kind) == {"count", "share", "patches"} and set(rows.measure) == {lab.INTACT, *MEASURES}
    assert (rows.log_prob <= 0).all() and set(rows[rows.measure != "random"].correct) <= {0.0, 1.0}
    assert set(rows.correct) <= {0.0, 0.5, 1.0} and set(rows["first"]) <= {0.0, 1.0}
    # a mask over everything is the same picture for every measure
    whole = rows[((rows.amount == 1.0) | (rows.amount == 99)) & (rows.measure != lab.INTACT)]
    assert (whole.groupby("id").log_prob.agg(np.ptp) < 1e-5).all()
    untouched = rows[rows.measure == lab.INTACT].groupby("id").log_prob
    assert (untouched.nunique() == 1).all() and untouched.first().mean() == trials.start("log_prob").mean()


def test_gradients_that_are_used_once_are_not_kept(model: VisionModel, examples: list[Example]) -> None:
    batches = list(lab.scored(model, examples, 4))
    once = lab.masked_by(batches, ["Jacobian norm"], [FIVE], 0, once=True)
    assert not any("grads" in vars(batch.letters) for batch in batches)
    again = lab.masked_by(batches, ["Jacobian norm"], [FIVE], 0)
    assert "grads" in vars(batches[0].letters)
    pd.testing.assert_frame_equal(again.rows(), once.rows())


def test_a_batch_is_known_by_its_model_and_its_examples(model: VisionModel, examples: list[Example]) -> None:
    batch, other = (next(lab.scored(model, part, 4)) for part in (examples, examples[1:]))
    known = identity(batch)
    assert known != identity(other)
    batch.scores("Jacobian norm")
    assert identity(batch) == known == identity(next(lab.scored(model, examples, 4)))
    weight = model.network.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(2)
        changed = identity(batch)
        weight.div_(2)
    assert changed != known == identity(batch)


def test_bad_values_are_named(gallery: list[lab.Scored]) -> None:
    with pytest.raises(ValueError, match="Unknown measure 'FI exat'"):
        lab.masked_by(gallery, ["FI exat"], [FIVE], 0)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        lab.masked_by(gallery, MEASURES, [lab.Mask("share", 1.5)], 0)


def test_tables_of_a_sweep(trials: Trials) -> None:
    table = lab.by_category(lab.at(trials, FIVE), "correct")
    assert table.loc[lab.INTACT, "all"] == pytest.approx(trials.start().mean())
    assert (table.n == 6).all() and {"one", "two", "all", "n"} == set(table)

    less = tables.against(lab.at(trials, TENTH), "random", 0)
    assert "random" not in less.index
    assert (less.log_prob_low <= less.log_prob).all() and (less.log_prob <= less.log_prob_high).all()
    full = tables.against(lab.at(trials, WHOLE), "random", 0)
    assert np.allclose(full.drop(index=lab.INTACT).log_prob, 0, atol=1e-5)

    curves = lab.curves(trials, "share")
    assert np.allclose(curves[curves.amount == 0].log_prob, trials.start("log_prob").mean())
    assert set(curves.measure) == set(MEASURES)
    areas = lab.areas(trials, "share", 0)
    assert areas.loc["random", "less_log_prob"] == 0 == areas.loc["random", "less_log_prob_high"]
    # two straight pieces: 0 to 0.1 and 0.1 to 1
    heights = curves[curves.measure == "Jacobian norm"].sort_values("amount").log_prob.to_numpy()
    expected = 0.05 * (heights[0] + heights[1]) + 0.45 * (heights[1] + heights[2])
    assert areas.loc["Jacobian norm", "log_prob"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"no trial has kind = 'share', amount = 0\.2"):
        lab.at(trials, lab.Mask("share", 0.2))


def test_duels(trials: Trials) -> None:
    duels = lab.duels(trials, WHOLE, ["Jacobian norm", "random"], 0)
    assert len(duels) == 3 * 2  # three settings of FI were tried
    assert np.allclose(duels.difference, 0, atol=1e-5)
    assert tables.duel_grid(duels).shape == (3, 2)
    guided = lab.outcomes(trials, [FIVE, lab.Mask("patches", 2)], 0)
    assert set(guided[guided["first"] == "random"]["second"]) == {lab.INTACT}
    assert (guided.n == 6).all()


def test_a_pair_is_judged_on_every_picture_that_both_masked(model: VisionModel, trials: Trials,
                                                            examples: list[Example]) -> None:  # fmt: skip
    more = [replace(e, id=f"{e.id}b") for e in examples[:2]]
    others = lab.masked_by(lab.scored(model, more, 4), ["FI exact", "random"], [FIVE], 0)
    both = lab.pooled(trials, others)
    guided = lab.outcomes(both, [FIVE], 0).set_index("first")
    assert guided.n["Jacobian norm"] == 6 and guided.n["FI exact"] == guided.n["random"] == 8
    less = tables.against(lab.at(both, FIVE), "random", 0)  # the table of the page says the same
    shared = list(less.index.intersection(guided.index))
    assert {"FI exact", "Jacobian norm"} <= set(shared)
    ends = ["accuracy", "accuracy_low", "accuracy_high"]
    assert np.allclose(guided.loc[shared, ["difference", "low", "high"]], less.loc[shared, ends])


def test_maps_of_the_settings(gallery: list[lab.Scored], tmp_path: Path) -> None:
    maps = lab.describe(gallery, PATCH, Kept(tmp_path, "maps", None))
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
    ids = np.array(list("abcde"))  # e is wrong from the start

    def trial(measure: str, amount: float, correct: list[float], log_prob: list[float]) -> Trial:
        values = {"id": ids, "correct": correct, "first": correct, "log_prob": log_prob}
        labels = {"measure": measure, "kind": "count", "amount": amount, "fill": "black"}
        return Trial(0, labels, {name: np.array(of) for name, of in values.items()})

    found = Trials(
        [],
        [
            trial(lab.INTACT, 10, [1, 1, 1, 1, 0], [-0.1] * 5),
            trial("m", 10, [1, 0, 0, 1, 0], [-1.0] * 5),
            trial(lab.INTACT, 20, [1, 1, 1, 1, 0], [-0.1] * 5),
            trial("m", 20, [0, 0, 0, 1, 0], [-9, -2, -2, -3, -9]),
        ],
    )
    flips = lab.flip_counts(found)
    assert list(flips.id) == ["b", "c", "a", "d"]
    assert np.isnan(flips.flips_at.iloc[-1])
    assert lab.flipped(found.where(amount=10)).loc["m", "share"] == 0.5


def test_one_picture_under_growing_masks(gallery: list[lab.Scored]) -> None:
    counts = (3, 30)
    masks = [lab.Mask("count", count) for count in counts]
    flips = lab.flip_counts(lab.masked_by(gallery, ["Jacobian norm"], masks, 0))
    case = lab.look_at(gallery, flips, "Jacobian norm", counts, 0)
    assert case.example.id == flips.id.iloc[0]
    assert {n: int(mask.sum()) for n, mask in case.masks.items()} == {3: 3, 30: 30}
    assert all(float(p.sum()) == pytest.approx(1) for p in case.probs.values())
    assert case.shown in counts
    draw.case_figure(case).canvas.draw()


def test_noises_have_the_loss_of_the_mask(gallery: list[lab.Scored]) -> None:
    found = lab.noise_against_mask(gallery[:1], "Jacobian norm", 0.02, 0)
    noise = found.rows()
    assert set(noise.change) == {lab.INTACT, "Jacobian norm", "random", *lab.NOISES}
    for _, part in noise.groupby("id"):
        losses = part.set_index("change").loss
        assert losses[lab.INTACT] == 0
        assert np.allclose(losses[list(lab.NOISES)], losses["Jacobian norm"], rtol=1e-3)
    assert (noise[noise.change == lab.INTACT].changed == 0).all()
    table = lab.noise_table(found, "Jacobian norm", 0)
    assert table.loc["Jacobian norm", "mask_minus_this"] == 0


def test_figures(
    model: VisionModel, gallery: list[lab.Scored], examples: list[Example], trials: Trials
) -> None:
    draw.gallery(lab.shown(model, examples, 1)).canvas.draw()
    draw.setting_maps(gallery[0].images[0], lab.setting_maps(gallery[0], 0, PATCH)).canvas.draw()
    draw.deletion_curves(lab.curves(trials, "share"), {"all": MEASURES, "some": MEASURES[:2]}, "share", True)
    draw.area_dots({"pixels": lab.areas(trials, "share", 0)})


def test_the_draw_takes_as_many_of_each_category(examples: list[Example]) -> None:
    drawn, rest = lab.draw_pictures(examples, 2, 0)
    assert [e.subject for e in drawn] == ["one", "one", "two", "two"]
    assert {e.id for e in drawn} | {e.id for e in rest} == {e.id for e in examples}
    assert lab.draw_pictures(examples, 99, 0)[1] == []
