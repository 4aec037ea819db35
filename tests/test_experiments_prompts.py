"""Chapter 05's experiment on a tiny random model: what it asks, measures, keeps and refuses."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_vision import encode_png, random_image, save_vision_model

from fichapters.ch05 import draw, lab
from fichapters.ch05.wordings import load_wordings
from fihelpers.data import data_folder
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.perturb.pixels import top_pixels
from fihelpers.scores.pixels import pixel_batches
from fihelpers.tasks import Example, image_prompt
from fihelpers.trials import Kept
from fiminis.manifest import write_manifest

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "prompts.yaml"
OPTIONS = ("w1", "w2", "w3", "w4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return open_vision_model(str(save_vision_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the shipped instructions and nothing else."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(SHIPPED, folder)
    write_manifest(folder)
    monkeypatch.setenv("FIHELPERS_DATA", str(folder))
    return folder


def example(i: int) -> Example:
    question = f"w{i} w5 w6"
    return Example(
        id=f"one/{i}", subject="one", prompt=image_prompt(question, OPTIONS), options=OPTIONS, answer=i % 4,
        question=question, image=encode_png(random_image(16, 16, seed=i)),
    )  # fmt: skip


EXAMPLES = [example(i) for i in range(5)]
PROMPTS = [
    lab.Prompt(lab.NONE, lab.CONTROL, lab.CONTROL, ""),
    *(lab.Prompt(f"{kind} 1", kind, lab.TRAINED, f"w{7 + k} w8 w9") for k, kind in enumerate(lab.COMPARED)),
    *(lab.Prompt(f"{kind} new 1", kind, lab.UNSEEN, f"w{17 + k} w2") for k, kind in enumerate(lab.COMPARED)),
    lab.Prompt("safe after", lab.CONTROL, lab.CONTROL, "w9 w8 w9", after=True),
]


def test_instructions_are_checked_against_the_manifest(data: Path) -> None:
    known = load_wordings()
    assert list(known) == list(lab.COMPARED)
    assert known["aggressive"].v1 == known["aggressive"].trained[0] != "" == known["neutral"].v1
    texts = [t for w in known.values() for t in (*w.trained, *w.unseen)]
    assert len(set(texts)) == len(texts)
    (data_folder() / "prompts.yaml").write_text("neutral: {trained: [x], unseen: [y]}\n")
    with pytest.raises(ValueError, match="damaged"):
        load_wordings()


def test_prompts_name_every_wording_once() -> None:
    known = lab.prompts()
    assert len({p.name for p in known}) == len({(p.text, p.after) for p in known}) == len(known)
    assert [p.name for p in lab.firsts(known)] == list(lab.FIRSTS)
    v1 = {p.text for p in lab.firsts(known)}
    assert {w.v1 for w in load_wordings().values()} - {""} < v1
    unrelated = next(p for p in known if p.name == "unrelated")
    aggressive = next(p for p in known if p.name == "aggressive 1")
    assert len(unrelated.text.split()) == len(aggressive.text.split())
    for p in known:
        prompt = p.ask(EXAMPLES[0]).prompt
        assert p.text in prompt and prompt.endswith(EXAMPLES[0].prompt.partition("\n")[2])
        assert (prompt == EXAMPLES[0].prompt) == (p.name == lab.NONE)
        assert prompt.startswith(EXAMPLES[0].question) == (p.after or p.name == lab.NONE)


def test_corruption_changes_what_it_says() -> None:
    image = random_image(30, 30).clamp(1, 254)
    for name, amount in lab.conditions_of([1, 2], [0.1]).items():
        changed = lab.corrupted(image, name, amount, seed=3)
        mask = (changed != image).any(0)
        assert torch.equal(changed, lab.corrupted(image, name, amount, seed=3))
        if name == lab.INTACT:
            assert not mask.any()
        elif name.startswith(lab.SALT):
            assert int(mask.sum()) == 90 and set(changed[:, mask].unique().tolist()) == {0, 255}
        else:
            assert 0 < int(mask.sum()) <= amount * lab.PATCH**2 and (changed[:, mask] == 0).all()
    losses = lab.loss_table(EXAMPLES, lab.conditions_of([1], []), seed=0)
    assert losses.information_loss.tolist()[0] == 0 < losses.information_loss.tolist()[1]


def test_answers_under_prompts(model: VisionModel) -> None:
    conditions = lab.conditions_of([1], [0.3, 0.1])
    trials = lab.asked(model, EXAMPLES, PROMPTS, conditions=conditions)
    rows = trials.rows()
    assert len(rows) == len(conditions) * len(PROMPTS) * len(EXAMPLES)
    effects = lab.accuracies(trials.where(condition=lab.INTACT), 0)
    alone = lab.asked(model, EXAMPLES, PROMPTS)
    pd.testing.assert_frame_equal(lab.accuracies(alone, 0), effects)
    assert effects.log_chosen[1] == pytest.approx(
        (
            alone.where(prompt="neutral 1").rows().log_chosen - alone.where(prompt=lab.NONE).rows().log_chosen
        ).mean()
    )
    none = effects[effects.prompt == lab.NONE].iloc[0]
    assert none.log_prob == none.log_chosen == 0 and (effects.low <= effects.accuracy).all()
    table = lab.protection(rows, "log_prob", 0)
    assert (table[table.condition == lab.INTACT].extra == 0).all()
    direct = rows[rows.kind.isin(["safe", "neutral"]) & (rows.group == lab.TRAINED)]
    means = direct.groupby(["condition", "kind"]).log_prob.mean().unstack()
    found = table[table.kind == "safe"].set_index("condition").difference
    assert np.allclose(found, (means.safe - means.neutral)[found.index])
    extra = lab.extra_protection(rows, "log_prob", "safe", 0)[0]
    assert extra == pytest.approx(
        table[(table.kind == "safe") & (table.condition != lab.INTACT)].extra.mean()
    )
    draw.prompt_effects(effects)
    accuracy = lab.by_condition(rows, "correct", 0)
    assert list(dict.fromkeys(accuracy.condition)) == list(conditions) and (accuracy.n == len(EXAMPLES)).all()
    assert (accuracy.low <= accuracy.value).all() and (accuracy.value <= accuracy.high).all()
    draw.robustness(accuracy, lab.protection(rows, "correct", 0)).canvas.draw()


def test_maps_under_prompts(model: VisionModel, tmp_path: Path) -> None:
    letters = lab.scan_letters(model, EXAMPLES, PROMPTS, 1e-4, Kept(tmp_path, "letters", None))
    top = lab.scan_top(model, EXAMPLES, lab.firsts(PROMPTS))
    named = [part[part.prompt.isin(lab.FIRSTS)] for part in letters]
    first = lab.Scan(named[0], named[1])
    for scan, way in ((first, "exact"), (letters, "damped"), (top, "top")):
        columns = [f"{way} {stat}" for stat in ("least", "median", "q90", "q99", "max")]
        assert (np.diff(scan.pictures[columns].to_numpy()) >= 0).all()
        assert (scan.pictures[f"{way} max"] <= scan.pictures.ceiling * (1 + 1e-6)).all()
        counts = scan.bins[scan.bins.measure == way].groupby("prompt")["count"].sum()
        assert set(counts) == {len(EXAMPLES) * 16 * 16}
    batch = next(pixel_batches(model, [PROMPTS[1].ask(EXAMPLES[0])]))
    assert _slope(batch.grads.class_grads, batch.grads.probs) == pytest.approx(
        letters.pictures[letters.pictures.prompt == "neutral 1"]["slope mean"].iloc[0], rel=1e-4
    )
    scored, ranked = lab.with_shares(letters.pictures, "damped"), lab.with_shares(top.pictures, "top")
    assert (scored["damped share max"] <= 1 + 1e-6).all()
    table = lab.main_contrasts(scored, ranked, 0)
    assert set(table.family) == {len(table)} and (table.low <= table.factor).all()
    pooled, alone = (
        table[(table.group == g) & (table.statistic == "slope max")].factor for g in ("trained", "first")
    )
    assert np.allclose(pooled, alone)  # there is one trained wording of each kind here
    draw.contrast_forest(table, lab.LABELS)
    draw.distributions(top.bins, {"top": "top 8 + rest"})
    moved = lab.against_none(scored, ["ceiling"], 0)
    assert list(moved.prompt) == [p.name for p in PROMPTS[1:]]
    draw.wording_forest(moved, {"ceiling": "odds"})
    assert lab.odds_correlation(scored, "ceiling", "safe", 0)[0] == pytest.approx(1)
    assert lab.middle_picture(scored) in {e.id for e in EXAMPLES}
    assert len(list(tmp_path.glob("letters.*"))) == len(PROMPTS)  # an interrupted scan goes on with the next


def _slope(grads: torch.Tensor, probs: torch.Tensor) -> float:
    """Mean squared gradient of the difference of two logits, pair by pair."""
    total, weight = 0.0, 0.0
    for a in range(len(probs)):
        for b in range(a):
            pair = float(probs[a, 0] * probs[b, 0])
            total += pair * float((grads[a, 0] - grads[b, 0]).double().square().sum(0).mean())
            weight += pair
    return total / weight


def test_masking_the_top_pixels(model: VisionModel) -> None:
    trials = lab.mask_top(model, EXAMPLES, PROMPTS[3], 1e-4, [2, 200], 0)
    rows = trials.rows()
    assert len(rows) == len(lab.masks_of([2, 200])) * len(EXAMPLES)
    assert ((rows.before != rows.after) == (rows.flipped == 1)).all()
    table = lab.flip_table(trials, 0)
    assert (table.share == table.flips / len(EXAMPLES)).all() and (table.low <= table.share).all()
    draw.flip_bars(table)
    found = lab.case(model, EXAMPLES, PROMPTS[3], trials, 1e-4, 0)
    hidden = (found.shown != found.image).any(0)
    assert not (hidden & ~top_pixels(found.scores, 2)).any()
    assert found.row.p_before == pytest.approx(max(found.before), rel=1e-5)
    assert found.row.p_after == pytest.approx(found.after[int(found.row.before)], rel=1e-5)
    draw.show_case(found.image, found.scores, found.shown, found.before, found.after, OPTIONS)
    maps, limits = lab.maps_under(model, EXAMPLES[0], PROMPTS[:2], 1e-4)
    draw.map_frame(found.image, maps[lab.NONE], limits, lab.NONE)


def test_closeness(model: VisionModel) -> None:
    close = lab.closeness(model, EXAMPLES, PROMPTS)
    assert len(close) == len(PROMPTS) * len(EXAMPLES) and close.closeness.abs().max() <= 1 + 1e-6
    wide = close.pivot(index="picture", columns="prompt", values="closeness")
    assert not np.allclose(wide["safe 1"], wide[lab.NONE])
    letters = lab.scan_letters(model, EXAMPLES, PROMPTS, 1e-4)
    changes = lab.closeness_changes(close, letters.pictures, "damped mean")
    assert len(changes) == (len(PROMPTS) - 1) * len(EXAMPLES)
    for related in (changes, changes.assign(closer=changes.change)):
        table = lab.closeness_correlations(related, 0, resamples=50)
        assert table.correlation.abs().max() <= 1 + 1e-9
    assert np.allclose(table.correlation, 1)
    draw.closeness_scatter(changes)
