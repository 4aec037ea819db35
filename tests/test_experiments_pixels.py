"""Chapter 04 on a tiny model: the loop as its notebook has it, and what is read from its trials."""

import ast
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from opening import NOTEBOOKS
from tiny_vision import encode_png, save_vision_model
from torch import Tensor

from fichapters import results, tables
from fichapters.ch04 import draw, lab
from fichapters.noises import NOISES
from fihelpers.evaluate.questions import answer_images
from fihelpers.identity import identity
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.tasks import Example, image_prompt
from fihelpers.trials import Trials, collect

SIZE = 28
SETTINGS = {
    "SEED": 0, "DRAWS": 2, "BATCH": 4, "MASK_SHARES": [0.1, 1.0], "MASK_SHARE": 0.1, "MASK_PATCHES": [1, 99],
}  # fmt: skip

CONSTANTS = ("run", "p", "DAMPED", "MEASURES", "PIXELS", "PATCHES", "MASKS")  # of the notebook


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
def batches(model: VisionModel, examples: list[Example]) -> list[lab.Pictures]:
    return list(lab.batches_of(model, examples, 4))


@pytest.fixture(scope="module")
def names(model: VisionModel) -> dict[str, Any]:
    """What the notebook's own cells import and define: score, choose, ask, tries, tens and noises."""
    cells = nbformat.read(NOTEBOOKS["04_fragile_pixels"], as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    made: dict[str, Any] = {"__name__": "__main__", "model": model}
    run = SimpleNamespace(p=SimpleNamespace(**SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "begin", lambda name: run)
        for node in ast.parse(source.partition("check.")[0]).body:
            known = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in CONSTANTS
            if known or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
                exec(ast.unparse(node), made)
    return made


@pytest.fixture(scope="module")
def trials(names: dict[str, Any], batches: list[lab.Pictures]) -> Trials:
    return collect(names["ask"], names["tries"], sets=batches)


def test_every_picture_is_asked_under_every_mask(trials: Trials, names: dict[str, Any]) -> None:
    rows = trials.rows()
    masks = sum(len(masks) for masks in names["MASKS"].values())
    assert (
        len(rows) == 6 * (len(names["MEASURES"]) + 1) * masks
    )  # of the random measure the mean of its draws
    assert set(rows.kind) == {"count", "share", "patches"}
    assert set(rows.measure) == {lab.INTACT, *lab.FI, *lab.OTHERS}
    assert (rows.log_prob <= 0).all() and set(rows[rows.measure != "random"].correct) <= {0.0, 1.0}
    assert set(rows.correct) <= {0.0, 0.5, 1.0}
    # a mask over everything is the same picture for every measure
    whole = rows[
        ((rows.amount == 1.0) & (rows.kind == "share") | (rows.amount == 99)) & (rows.measure != lab.INTACT)
    ]
    assert (whole.groupby("id").log_prob.agg(np.ptp) < 1e-5).all()
    untouched = rows[rows.measure == lab.INTACT].groupby("id").log_prob
    assert (untouched.agg(np.ptp) < 1e-6).all()
    assert untouched.first().mean() == pytest.approx(trials.start("log_prob").mean())


def test_masks_are_of_the_size_that_was_asked_for(names: dict[str, Any], batches: list[lab.Pictures]) -> None:
    for measure, over in product(["FI damped 0.0001", "Grad-CAM", lab.FI_TOP], ("pixel", "patch")):
        maps = names["score"](batches[0], measure, over)
        assert maps.shape == (4, SIZE, SIZE) if over == "pixel" else (4, 2, 2)
        for kind, amount in names["MASKS"][over]:
            mask = names["choose"](maps, kind, amount, batches[0].images)
            expected = {
                "share": round(amount * SIZE**2),
                "count": amount,
                "patches": min(amount, 4) * lab.PATCH**2,
            }
            assert (mask.sum((1, 2)) == expected[kind]).all()


def test_gradients_that_are_used_once_are_not_kept(
    model: VisionModel, examples: list[Example], names: dict[str, Any], trials: Trials
) -> None:
    batches = list(lab.batches_of(model, examples, 4))
    once = collect(names["ask"], names["tens"], sets=batches)
    assert not any("grads" in vars(batch) for batch in batches)
    assert set(once.rows().measure) == {lab.INTACT, *lab.QUICK}
    ten = trials.where(kind="count")
    for measure in lab.QUICK:
        assert np.allclose(*(of.answers("log_prob", measure=measure) for of in (once, ten)), atol=1e-5)


def test_a_batch_is_known_by_its_model_and_its_examples(model: VisionModel, examples: list[Example]) -> None:
    batch, other = (next(lab.batches_of(model, part, 4)) for part in (examples, examples[1:]))
    known = identity(batch)
    assert known != identity(other)
    batch.likeliest.scores(["Jacobian norm"])
    assert identity(batch) == known == identity(next(lab.batches_of(model, examples, 4)))
    assert list(lab.batches_of(model, [], 4)) == []


def test_readings_of_the_trials(trials: Trials, examples: list[Example]) -> None:
    ten = trials.where(kind="count")
    table = lab.by_category(ten, examples, 0).set_index(["measure", "subject"])
    assert (table.n["random"] == [3, 3, 6]).all() and list(table.loc["random"].index) == ["one", "two", "all"]
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all()
    lost = table.accuracy["saliency", "all"] - ten.start().mean()
    assert table.difference["saliency", "all"] == pytest.approx(lost)
    draw.ten_pixels(table.reset_index()).canvas.draw()

    duels = lab.duels(trials.where(kind="share", amount=1.0), 0)
    assert len(duels) == len(lab.FI) * len(lab.OTHERS) and np.allclose(duels.difference, 0, atol=1e-5)
    draw.duels(duels, lab.duels(trials.where(kind="patches", amount=8), 0)).canvas.draw()
    guided = lab.random_and_guided([ten, trials.where(kind="patches", amount=8)], 0)
    assert set(guided[guided["first"] == "random"]["second"]) == {lab.INTACT} and (guided.n == 6).all()

    gains = lab.gains(trials.where(kind="share"), 0).set_index("measure")
    # two straight pieces, 0 to 0.1 and 0.1 to 1; at their ends all measures are alike
    middle = [trials.answers("log_prob", measure=m, kind="share", amount=0.1) for m in ("SNIP", "random")]
    assert gains.difference["SNIP"] == pytest.approx(0.5 * np.mean(middle[0] - middle[1]), abs=1e-5)
    left = trials.where(kind="share", amount=0.1)
    order = lab.from_fragile(left, "SNIP")
    known = left.where(measure="SNIP").rows().set_index("id").log_prob
    assert known[order].is_monotonic_increasing and len(order) in (int(trials.start().sum()), 6)


def test_a_pair_is_compared_on_every_picture_that_both_masked(
    model: VisionModel, trials: Trials, examples: list[Example], names: dict[str, Any]
) -> None:
    more = lab.batches_of(model, [replace(e, id=f"{e.id}b") for e in examples[:2]], 4)
    both = lab.pooled(trials, collect(names["ask"], names["tens"], sets=list(more))).where(kind="count")
    guided = lab.random_and_guided([both], 0).set_index("first")
    assert guided.n[lab.FI_TOP] == 6 and guided.n["FI exact"] == guided.n["random"] == 8
    right = both.rows().pivot_table(index="id", columns="measure", values="correct", aggfunc="first")
    for name in guided.index.drop("random"):
        pair = right[[name, "random"]].dropna().astype(float)  # the pictures that both masked
        less = tables.difference(pair[name], pair["random"], 0)
        assert np.allclose(guided.loc[name, ["difference", "low", "high"]].astype(float), less)


def test_maps_of_the_settings(batches: list[lab.Pictures], names: dict[str, Any]) -> None:
    maps = lab.describe(batches, names["score"])
    assert len(maps) == 6 * len(lab.SETTINGS)
    full = lab.saturation(maps, 0)
    # four classes: three channels can move all three others, one channel cannot
    assert full.at_ceiling["letters, pixels"] > 0.9 > full.at_ceiling["letters, single channels"]
    assert full.at_ceiling["letters, patches"] > 0.9 and np.isnan(full.at_ceiling["Jacobian norm, pixels"])
    assert full.held.between(0, 1).all()
    assert (full.held_low <= full.held).all() and (full.held <= full.held_high).all()
    things = lab.on_things(maps, 0)
    assert things.ratio["letters, pixels"] == pytest.approx(1, abs=0.05)
    assert (things.low <= things.ratio).all() and (things.ratio <= things.high).all()
    (one,) = lab.batches_of(batches[0].model, batches[0].examples[:1], 1)
    draw.setting_maps(one.images[0], lab.setting_maps(one, names["score"])).canvas.draw()


def test_the_drawn_things_are_found() -> None:
    found = lab.drawn_things(picture(0))
    assert found[5:11, 8:18].all() and found.sum() == 60


def test_patch_sums_keep_the_total_and_cut_smaller_patches_at_the_edges() -> None:
    maps = torch.arange(2.0 * 5 * 7).reshape(2, 5, 7)
    sums = lab.patch_sums(maps, 3)
    assert sums.shape == (2, 2, 3)
    assert torch.equal(sums.sum((1, 2)), maps.sum((1, 2)))
    assert sums[1, 1, 2] == maps[1, 3:, 6:].sum()


def test_a_map_of_captum_is_made_once_for_pixels_and_patches(
    names: dict[str, Any], batches: list[lab.Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(batch: lab.Pictures) -> torch.Tensor:
        made.append(len(batch.examples))
        return torch.ones(len(batch.examples), SIZE, SIZE)

    monkeypatch.setitem(lab.ATTRIBUTIONS, lab.GRAD_CAM, counted)
    batch = replace(batches[0])
    whole, patches = (names["score"](batch, lab.GRAD_CAM, over) for over in ("pixel", "patch"))
    assert whole.sum() == patches.sum() and len(made) == 1
    names["score"](replace(batch), lab.GRAD_CAM)
    assert len(made) == 2


def test_noises_have_the_loss_of_the_mask(names: dict[str, Any], batches: list[lab.Pictures]) -> None:
    mask = names["DAMPED"]
    found = collect(names["ask"], names["noises"], sets=batches)
    noise = found.rows()
    assert set(noise.change) == {lab.INTACT, mask, "random", *NOISES}
    for _, part in noise.groupby("id"):
        losses = part.set_index("change").loss
        assert losses[lab.INTACT] == 0
        assert np.allclose(losses[losses.index.isin(NOISES)], losses[mask], rtol=1e-3)
    assert (noise[noise.change == lab.INTACT].changed == 0).all()
    assert lab.noise_table(found, mask, 0).loc[mask, "mask_minus_this"] == 0
    assert np.allclose(noise.P, np.exp(noise.log_prob))
    pairs = [(change, lab.INTACT) for change in (mask, *NOISES)]
    draw.falls(found.compare(pairs, label="change", value="P")).canvas.draw()


def test_one_picture_under_growing_masks(batches: list[lab.Pictures]) -> None:
    case = lab.look_at(batches, "two/1", "Jacobian norm", (0, 3, 30), 0)
    assert case.example.id == "two/1"
    assert torch.equal(case.shown[0], batches[1].images[0])
    assert {n: int((image == 0).all(0).sum()) for n, image in case.shown.items()} == {0: 0, 3: 3, 30: 30}
    assert all(float(p.sum()) == pytest.approx(1) for p in case.probs.values())
    maps = {"one map": case.scores, "another": case.scores}
    probs = torch.stack([*case.probs.values()])
    draw.one_picture(case.example, maps, case.shown, probs).canvas.draw()


def test_the_typical_picture_is_one_of_the_right_ones(model: VisionModel, examples: list[Example]) -> None:
    outcome = answer_images(model, examples)
    right = replace(outcome, answer=outcome.predicted.clone())
    place = lab.typical(right)
    assert (right.log_prob <= right.log_prob[place]).sum() == 4  # the fourth of six
    assert lab.typical(replace(right, answer=(right.predicted + 1) % 4)) in range(6)  # none is right
    draw.gallery(examples, outcome).canvas.draw()


def test_the_draw_takes_as_many_of_each_category(examples: list[Example]) -> None:
    drawn, rest = lab.draw_pictures(examples, 2, 0)
    assert [e.subject for e in drawn] == ["one", "one", "two", "two"]
    assert {e.id for e in drawn} | {e.id for e in rest} == {e.id for e in examples}
    assert lab.draw_pictures(examples, 99, 0)[1] == []
