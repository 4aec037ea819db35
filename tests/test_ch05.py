"""Chapter 05 on a tiny random model: its own loops, what it asks, measures, keeps and refuses."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from opening import NOTEBOOKS, settled
from tiny_vision import encode_png, random_image, save_vision_model

from fichapters import results
from fichapters.ch05 import lab
from fihelpers.data import data_folder
from fihelpers.models import vision
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores.pixels import pixel_batches
from fihelpers.tasks import Example, image_prompt
from fihelpers.trials import Kept
from fiminis.manifest import write_manifest

CHAPTER = "05_prompts_and_pixels"
SHIPPED = Path(__file__).resolve().parent.parent / "data" / "prompts.yaml"
OPTIONS = ("w1", "w2", "w3", "w4")
OWN = "w3 w1 w2"
Tables = dict[str, pd.DataFrame]


def example(i: int) -> Example:
    question = f"w{i} w5 w6"
    return Example(
        id=f"one/{i}", subject="one", prompt=image_prompt(question, OPTIONS), options=OPTIONS, answer=i % 4,
        question=question, image=encode_png(random_image(16, 16, seed=i)),
    )  # fmt: skip


EXAMPLES = [example(i) for i in range(4)]
PROMPTS = [
    lab.Prompt(lab.NONE, lab.CONTROL, lab.CONTROL, ""),
    *(lab.Prompt(f"{kind} 1", kind, lab.TRAINED, f"w{7 + k} w8 w9") for k, kind in enumerate(lab.COMPARED)),
    *(lab.Prompt(f"{kind} new 1", kind, lab.UNSEEN, f"w{17 + k} w2") for k, kind in enumerate(lab.COMPARED)),
    lab.Prompt("safe after", lab.CONTROL, lab.CONTROL, "w9 w8 w9", after=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return open_vision_model(str(save_vision_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the shipped instructions and nothing else."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(SHIPPED, folder)
    write_manifest(folder)
    monkeypatch.setenv("FIHELPERS_DATA", str(folder))
    return folder


def run(
    model: VisionModel, kept: Path, patch: pytest.MonkeyPatch, change: Callable[[str], str] = str
) -> tuple[dict[str, Any], Tables]:
    """The lesson's cells on the tiny model and pictures: its names, and the tables that it keeps."""
    tables: Tables = {}
    given = {"SUBJECTS": ["one"], "N_MAPS": 3, "N_ASKED": 4, "MASKED": [50]}
    p = SimpleNamespace(**settled(CHAPTER, given, "smoke"))
    stub = SimpleNamespace(p=p, kept=lambda name: Kept(kept, name, "about"), keep=tables.__setitem__)
    patch.setattr(results, "begin", lambda name: stub)
    patch.setattr(vision, "open_vision_model", lambda *_: model)
    patch.setattr(lab, "load_pictures", lambda *_: (EXAMPLES, []))
    patch.setattr(lab, "prompts", lambda own: [*PROMPTS, lab.Prompt(lab.OWN, lab.OWN, lab.UNSEEN, OWN)])
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOKS[CHAPTER], as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not any(tag.startswith(("param", "exercise")) for tag in tags):
            exec(compile(change(cell.source), CHAPTER, "exec"), names)
    return names, tables


@pytest.fixture(scope="module")
def lesson(
    model: VisionModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Tables]]:
    with pytest.MonkeyPatch.context() as patch:
        yield run(model, tmp_path_factory.mktemp("kept"), patch)


def test_prompts_name_every_wording_once(data: Path) -> None:
    known = lab.prompts(OWN)
    assert len({p.name for p in known}) == len({(p.text, p.after) for p in known}) == len(known)
    assert known[:-1] == lab.prompts() and known[-1].text == OWN
    assert set(lab.FIRSTS) < {p.name for p in known}
    named = {p.name: p.text for p in known}
    assert len(named["unrelated"].split()) == len(named["aggressive 1"].split())
    assert named["safe 1"].endswith("rather than the noise or potential masks")  # the earlier version's own
    for p in known:
        prompt = p.ask(EXAMPLES[0]).prompt
        assert p.text in prompt and prompt.endswith(EXAMPLES[0].prompt.partition("\n")[2])
        assert (prompt == EXAMPLES[0].prompt) == (p.name == lab.NONE)
        assert prompt.startswith(EXAMPLES[0].question) == (p.after or p.name == lab.NONE)
    (data_folder() / "prompts.yaml").write_text("neutral: {trained: [x], unseen: [y]}\n")
    with pytest.raises(ValueError, match="damaged"):
        lab.prompts()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"N_MAPS": 3}, "N_MAPS is 3, more than the 2 pictures of N_ASKED"),
        ({"MASKED": [2, 257]}, "MASKED holds 257, but the smallest picture has 256 pixels"),
    ],
)
def test_what_the_pictures_cannot_serve_is_refused(given: dict[str, Any], message: str) -> None:
    p = SimpleNamespace(**{"N_MAPS": 2, "N_ASKED": 2, "MASKED": [256]} | given)
    with pytest.raises(ValueError, match=message):
        lab.check(p, EXAMPLES)


def test_no_value_of_a_map_is_above_the_odds(lesson: tuple[dict[str, Any], Tables]) -> None:
    found = lesson[0]["found"]
    assert list(dict.fromkeys(found.prompt)) == [p.name for p in PROMPTS] + [lab.OWN] and len(found) == 9 * 3
    for way, ceiling in (("exact", "ceiling"), ("damped", "ceiling"), ("top", "top ceiling")):
        rows = found.dropna(subset=f"{way} max")
        assert (rows[f"{way} max"] <= rows[ceiling] * (1 + 1e-5)).all()
        assert (rows[f"{way} median"] <= rows[f"{way} max"]).all() and (rows[f"{way} held"] <= 1).all()
    assert set(found.prompt[found["top max"].notna()]) == set(lab.FIRSTS)
    pixels = lesson[0]["pixels"]
    assert set(pixels.groupby(["prompt", "classes", "measure"])["count"].sum()) == {3 * 16 * 16}


def test_the_slope_is_that_of_the_differences_of_logits(
    model: VisionModel, lesson: tuple[dict[str, Any], Tables]
) -> None:
    batch = next(pixel_batches(model, [PROMPTS[1].ask(EXAMPLES[0])]))
    grads, probs = batch.grads.class_grads.double(), batch.grads.probs[:, 0].double()
    total, weight = 0.0, 0.0
    for a in range(len(probs)):
        for b in range(a):
            pair = float(probs[a] * probs[b])
            total += pair * float((grads[a, 0] - grads[b, 0]).square().sum(0).mean())
            weight += pair
    found = lesson[0]["found"]
    one = found[(found.prompt == "neutral 1") & (found.id == EXAMPLES[0].id)]
    assert one["slope mean"].item() == pytest.approx(total / weight, rel=1e-4)


def test_shifts_are_paired_and_one_family(lesson: tuple[dict[str, Any], Tables]) -> None:
    found, table = lesson[0]["found"], lesson[1]["contrasts"]
    assert set(table.family) == {len(table)} == {50} and (table.low <= table.factor).all()
    pooled, alone = (
        table[(table.group == g) & (table.statistic == "slope max")].factor for g in ("trained", "first")
    )
    assert np.allclose(pooled, alone)  # there is one trained wording of each kind here
    odds = found.pivot(index="id", columns="prompt", values="ceiling")
    by_hand = np.exp(np.log(odds["safe 1"] / odds["neutral 1"]).mean())
    safe = table[(table.kind == "safe") & (table.group == "first") & (table.statistic == "ceiling")]
    assert safe.factor.item() == pytest.approx(by_hand)
    moved = lesson[1]["wordings"]
    assert list(dict.fromkeys(moved.prompt)) == [p.name for p in PROMPTS[1:]] + [lab.OWN]


def test_closeness_is_a_cosine_and_goes_with_itself(lesson: tuple[dict[str, Any], Tables]) -> None:
    names, tables = lesson
    near, found = names["near"], names["found"]
    assert near.abs().max().max() <= 1 + 1e-6 and not np.allclose(near["safe 1"], near[lab.NONE])
    assert (tables["closeness"].value.abs() <= 1).all() and set(tables["closeness"].n) == {8 * 3}
    same = found.assign(same=np.exp([near.loc[row.id, row.prompt] for row in found.itertuples()]))
    assert np.allclose(lab.closeness_correlations(near, same, "same", 0, resamples=20).value, 1)


def test_masks_are_counted(lesson: tuple[dict[str, Any], Tables]) -> None:
    names, tables = lesson
    table = tables["flips"]
    assert sorted({(row.over, row.count) for row in table[["over", "count"]].itertuples(index=False)}) == [
        ("patch", 2), ("pixel", 2), ("pixel", 50),
    ]  # fmt: skip
    assert set(table.prompt) == set(lab.FIRSTS) and (table.n == len(EXAMPLES)).all()
    assert (table.share == table.flips / table.n).all() and (table.low <= table.share).all()
    safe = {"prompt": "safe 1", "over": "pixel", "count": 2}
    pair = tables["flips_pairs"].set_index([*safe]).loc[tuple(safe.values())]
    shares = table.set_index([*safe, "measure"]).share
    damped, random = (shares[(*safe.values(), m)] for m in (names["DAMPED"], "random"))
    assert pair.difference == pytest.approx(damped - random)


def test_random_scores_belong_to_a_picture() -> None:
    images = [torch.zeros(3, 20, 30), torch.zeros(3, 15, 15)]
    for over, shapes in {"pixel": [(20, 30), (15, 15)], "patch": [(2, 3), (2, 2)]}.items():
        found = lab.random_scores(images, over, 14, 0)  # type: ignore[arg-type]
        assert [tuple(scores.shape) for scores in found] == shapes
        assert torch.equal(found[1], lab.random_scores([images[1]], over, 14, 1)[0])  # type: ignore[arg-type]


def test_readings_say_what_the_tables_say(lesson: tuple[dict[str, Any], Tables]) -> None:
    names, tables = lesson
    readings = tables["readings"].set_index(["reading", "measure"])
    assert (readings.low <= readings.value).all() and (readings.value <= readings.high).all()
    moved = tables["wordings"]
    line = readings.loc[("prompts and statistics that moved", names["DAMPED"])]
    assert line.value == ((moved.low > 1) | (moved.high < 1)).sum() and line.n == len(moved)


@pytest.mark.parametrize(
    ("old", "new", "table"),
    [
        ("scores.cpu().double().flatten()", "scores.cpu().double().flatten()[:99]", "contrasts"),
        ("return image * ~chosen", "return 255 - image * ~chosen", "flips"),
    ],
)
def test_a_line_that_a_reader_changes_changes_its_table(
    old: str, new: str, table: str, model: VisionModel, lesson: tuple[dict[str, Any], Tables],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    changed: list[bool] = []

    def change(source: str) -> str:
        changed.append(old in source)
        return source.replace(old, new)

    tables = run(model, tmp_path, monkeypatch, change)[1]
    assert any(changed)
    for name in ("contrasts", "flips"):
        assert tables[name].equals(lesson[1][name]) == (name != table), name
