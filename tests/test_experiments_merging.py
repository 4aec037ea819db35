"""Merging with protection on tiny models: who sees which questions, what is asked, counted and refused."""

from collections.abc import Sequence
from dataclasses import replace
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
from fichapters.ch09 import lab
from fichapters.claims import FAILS, HOLDS, OPEN
from fihelpers.perturb.merge import Merger
from fihelpers.perturb.merge_methods import FisherAverage, Protection, TaskArithmetic, Ties
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Kept, Trial, Trials

CHAPTER = "09_merging"
Trio = tuple[str, str, str]


def save(folder: Path, seed: int | None, base_seed: int = 0, kind: str = "qwen2") -> str:
    """A tiny model in a folder; with a seed, one fine-tuned (moved at random) from the base."""
    model = tiny_model(kind, torch.float32)
    generator = torch.Generator().manual_seed(base_seed)
    for p in model.network.parameters():
        if base_seed:
            p.data = torch.randn(p.shape, generator=generator)
        if seed is not None:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel()))
    model.network.config.max_position_embeddings = 512
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "base", None), save(folder / "one", 1), save(folder / "two", 2)


def write_questions(folder: Path) -> None:
    for split, n in {"dev": 2, "val": 12, "test": 7}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject, start in {"sums": 0, "bones": 9}.items():
            lines = [
                f"{split} w{(start + i) % 27} w{3 * i % 27} of {subject},w1,w2,w3,w{i + 4},{'ABCD'[i % 4]}\n"
                for i in range(n - (subject == "bones"))
            ]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))


@pytest.fixture
def p(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    write_questions(tmp_path / "task")
    monkeypatch.setattr(lab, "ELSEWHERE", (str(tmp_path / "task"), ["bones"]))
    return SimpleNamespace(
        **dict(zip(("BASE", "MODEL_A", "MODEL_B"), trio, strict=True)),
        TASK=str(tmp_path / "task"),
        DOMAINS={"sums": ["sums"], "bones": ["bones"]},
        SHARES=[0.05, 0.2],
        TASK_WEIGHTS=[0.5, 1.0],
        OPTIONS={"densities": [0.3], "wide": [0.5, 1.0], "compared": 0.05},
        SEEDS=2,
        N_CALIBRATION=3,
        N_TEST=None,
        SEED=0,
        DEVICE="cpu",
        DTYPE="float32",
    )


def changed(p: SimpleNamespace, **settings: Any) -> SimpleNamespace:
    """The settings with others; those in small letters are options."""
    own = {name: value for name, value in settings.items() if name.isupper()}
    given = {name: value for name, value in settings.items() if name.islower()}
    return SimpleNamespace(**{**vars(p), "OPTIONS": {**p.OPTIONS, **given}, **own})


@pytest.fixture
def experts(p: SimpleNamespace) -> lab.Experts:
    return lab.Experts(p)


def ids(examples: Sequence[Example]) -> set[str]:
    return {e.prompt for e in examples}


def scores(experts: lab.Experts, p: SimpleNamespace, which: str, k: int = 0, place: str = lab.OWN) -> Any:
    """As the notebook's `rank`."""
    questions = lab.calibration(p, which, k, place, experts.model)
    return experts.scores_of(which, questions, lab.wanted(p, place), 2 * k + "ab".index(which))


def merger(experts: lab.Experts, s: lab.Setting, p: SimpleNamespace) -> Merger:
    """As the notebook's `merge`, in set 0."""
    kept = fishers = None
    if isinstance(s.method, FisherAverage):
        fishers = tuple(scores(experts, p, which)["Fisher diagonal"] for which in "ab")
    if s.by:
        kept = Protection(s.share, *(scores(experts, p, which)[s.by] for which in s.protects), **s.how)
    return Merger(*experts.weights.values(), s.method, kept, fishers)


def run_chapter(
    p: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch, until: str = "### Exercise"
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """What the notebook keeps, and its names, run on tiny models up to a cell of Markdown."""
    tables: dict[str, pd.DataFrame] = {}
    own = SimpleNamespace(**{**vars(p), "PROFILE": "real"})  # its tables are drawn beside no others
    kept = {"kept": lambda name: Kept(folder, name, ""), "keep": tables.__setitem__}
    run = SimpleNamespace(p=own, name=CHAPTER, **kept)
    monkeypatch.setattr(results, "begin", lambda name: run)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOKS[CHAPTER], as_version=4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith(until):
            break
        if cell.cell_type == "code" and not cell.metadata.get("tags"):
            exec(compile(cell.source, CHAPTER, "exec"), names)
    return tables, names


def test_the_chapter(p: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, _ = run_chapter(p, tmp_path / "kept", monkeypatch)
    counts = {"sums": 7, "bones": 6}
    answers, paired, table = tables["answers"], tables["paired"], tables["table"]
    assert set(answers.n) == {13} and set(paired.by_log_p) <= {HOLDS, OPEN, FAILS}
    sets = answers.groupby("name")["set"].nunique()
    assert sets["DARE task"] == sets["average by random"] == 2 and sets["average by size of the weight"] == 1
    assert set(tables["search"].task_weight.dropna()) == set(p.TASK_WEIGHTS)
    curve = tables["curve"]
    assert curve.groupby("by").share.agg(set).to_dict() == {
        by: {0, 0.05, 0.2, 0.5, 1.0} for by in (*lab.FILTERS, lab.RANDOM)
    }
    assert (curve[curve.share == 0].difference == 0).all()
    back = curve[(curve.share == 1) & (curve.method != "TIES I")]
    assert (back.difference == 0).all() and len(back) == 5
    assert list(dict.fromkeys(table.name)) == lab.table_rows(p)
    for row in table.itertuples():
        own = answers[answers.name == row.name]
        assert row.accuracy == pytest.approx(own[row.domain].mean()) and row.low <= row.accuracy <= row.high
        assert row.n == counts.get(row.domain, 13)
    per_filter = paired[paired.measure == lab.EXACT].groupby("topic").size().to_dict()
    assert per_filter[lab.HELPS] == 7 and per_filter[lab.DOMAIN] == 4
    assert len(tables["choices"]) == 10 + 9 and set(tables["whose"].domain) == {*counts, "mean"}

    files = set((tmp_path / "kept").iterdir())
    assert len(files) == 1 + 1 + 1 + 2 + 2  # three steps of the search, and two sets of both others
    again, _ = run_chapter(p, tmp_path / "kept", monkeypatch)
    pd.testing.assert_frame_equal(again["answers"], answers)
    assert set((tmp_path / "kept").iterdir()) == files, "finished work was done again"


def test_by_hand_and_by_the_library(
    experts: lab.Experts, p: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, names = run_chapter(p, tmp_path / "kept", monkeypatch, until="One calibration set and one share")
    name = experts.linear[0]
    base, a, b = (weights.read(name) for weights in experts.weights.values())
    deltas = a - base, b - base
    models = experts.weights.values()
    task = Merger(*models, TaskArithmetic(0.3)).tensor(name)
    torch.testing.assert_close(base + names["task_arithmetic"](*deltas, 0.3), task)
    torch.testing.assert_close(base + names["average"](*deltas), Merger(*models).tensor(name))
    ties = Merger(*models, Ties(0.7, 0.4, trim="tensor")).tensor(name)
    torch.testing.assert_close(base + names["ties"](*deltas, 0.7, 0.4), ties)
    protected = merger(experts, lab.Setting(by=lab.DAMPED, share=0.05), p).tensor(name)
    torch.testing.assert_close(names["put_back"](name), protected)


def test_no_question_serves_two_purposes(p: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(task: str, subject: str, split: str, **given: Any) -> Any:
        loaded.append(split)
        return load_task(task, subject, split, **given)

    monkeypatch.setattr(lab, "load_task", load)
    searched = lab.questions(p, "val")
    sets = {which: [ids(lab.calibration(p, which, k)) for k in range(p.SEEDS)] for which in "ab"}
    assert set(loaded) == {"val"}
    asked = lab.questions(p, "test")
    for which, domain in zip("ab", p.DOMAINS, strict=True):
        assert [len(s) for s in sets[which]] == [3, 3]
        assert len(searched[domain]) == 12 - 6 - (domain == "bones")
        every = [*sets[which], ids(searched[domain]), ids(asked[domain])]
        assert len(set().union(*every)) == sum(map(len, every))
        assert ids(asked[domain]) <= ids(load_task(p.TASK, domain, "test").examples)
    assert sets["b"][1] == ids(lab.calibration(p, "a", 1, lab.OTHER))


def answered(right: dict[str, list[int]], sizes: tuple[int, int] = (4, 2)) -> lab.Results:
    values = {name: np.array(found) for name, found in right.items()}
    tried = [Trial(0, {"name": n}, {"correct": v, "log_prob": v}) for n, v in values.items()]
    example = Example("0", "x", "q", ("a", "b"), 0, "q")
    asked = dict(zip(("first", "second"), ([example] * n for n in sizes), strict=True))
    return lab.Results(Trials([], tried), asked, 0)


def test_the_best_of_all_that_was_tried_is_chosen(p: SimpleNamespace) -> None:
    """Between equals the first; gamma is tried again beside itself once the share is known."""
    plain = {row: lab.Setting(TaskArithmetic(0.5)) for row, _ in lab.ROWS.values()}
    asked = lab.to_protect(p, plain)
    assert len(asked) == 7 * 2 * 2 and asked[0][1].share == 0.05
    found = answered({str(i): [i == 1, i == 2, 0, 0, 0, 0] for i in range(len(asked))}).best(asked)
    assert found["average, FI exact"].share == 0.2 and found["average, FI damped 0.0001"].share == 0.05
    near = lab.nearby(p, {"kept": asked[1][1], "plain": plain["average"]})
    assert [(name, s.method.task_weight, s.share) for name, s in near] == [
        ("kept", 0.5, 0.2),
        ("kept", 1.0, 0.2),
    ]
    dare = lab.Setting(lab.Dare())
    pairs = [("x", "a"), ("y", plain["average"]), ("z", asked[0][1]), ("d", dare)]
    assert lab.of_set(pairs, 0) == pairs and [name for name, _ in lab.of_set(pairs, 1)] == ["z", "d"]
    assert lab.seeded(dare.method, 3).seed == 3 and lab.seeded(Ties(), 3) == Ties()  # type: ignore[attr-defined]


def test_differences_weigh_the_domains_alike() -> None:
    found = answered({"x": [1, 1, 1, 1, 0, 0], "y": [0] * 6})
    assert found.differences([("x", "y")]).difference[0] == pytest.approx(0.5)
    table = found.differences([("x", "y"), ("y", "x"), ("x", "x")], "first", "log_prob")
    assert table.difference.tolist() == [1, -1, 0] and set(table.n) == {4}
    assert table.low.tolist() == table.high.tolist() == [1, -1, 0]
    means = found.means().set_index("name")
    assert means["mean"].to_dict() == {"x": 0.5, "y": 0} and means["first"].x == 1
    assert found.accuracy(["x"]).set_index("domain").accuracy.to_dict() == {
        "first": 1,
        "second": 0,
        "mean": 0.5,
    }
    rows = {name: [1, 0, 0, 0, 0, 0] for name, _ in lab.ROWS.values()}
    rows |= {f"{row}, {by}": [1, 1, 0, 0, 0, 0] for row in lab.ROWS for by in lab.FILTERS}
    assert answered(rows).pooled().difference.tolist() == pytest.approx([0.125, 0.125])
    with pytest.raises(ValueError, match="no trial has name = 'z'"):
        found.differences([("x", "z")])


def test_other_weights_are_held_for_a_while(experts: lab.Experts) -> None:
    before = {name: value.clone() for name, value in experts.model.network.state_dict().items()}
    name = experts.linear[0]
    with experts.holding("a") as expert:
        assert expert.sha256 == experts.weights["a"].sha256
        assert expert.network.state_dict()[name].equal(experts.weights["a"].read(name))
    with pytest.raises(KeyError), experts.holding(lambda name: 0 * experts.weights["b"].read(name)) as zero:
        assert not zero.network.state_dict()[name].any()
        raise KeyError
    assert all(value.equal(before[name]) for name, value in experts.model.network.state_dict().items())


def test_all_protected_is_the_merge_that_needs_no_scores(experts: lab.Experts, p: SimpleNamespace) -> None:
    ties = Ties(density=0.3, task_weight=0.7)
    for setting in (
        lab.Setting(),
        lab.Setting(TaskArithmetic()),
        lab.Setting(ties, stages="I"),
        lab.Setting(ties, stages="II"),
        lab.Setting(ties, stages="II", whole=False),
        lab.Setting(ties, stages="I and II"),
    ):
        whole = replace(setting, by=lab.DAMPED, share=1.0)
        plain, protected = (merger(experts, s, p) for s in (lab.everything(whole), whole))
        for name in experts.linear:
            torch.testing.assert_close(protected.tensor(name), plain.tensor(name))


def test_random_scores_are_drawn_apart_and_one_expert_can_be_kept_alone(
    experts: lab.Experts, p: SimpleNamespace
) -> None:
    name = experts.linear[0]
    a, b = (scores(experts, p, which)[lab.RANDOM][name] for which in "ab")
    assert not a.equal(b)
    only = merger(experts, lab.Setting(by=lab.EXACT, share=0.2, protects="a"), p)
    counted = {which: sum(int(mask.sum()) for _, mask in only.masks(which)) for which in ("a", "b")}
    total = sum(experts.weights["a"].layouts[name].numel() for name in experts.linear)
    assert counted == {"a": round(0.2 * total), "b": 0}


def test_calibration_decides_the_scores(experts: lab.Experts, p: SimpleNamespace) -> None:
    name = experts.linear[0]
    drawn = [(0, lab.OWN), (0, lab.OTHER), (0, lab.NEITHER), (1, lab.OWN)]
    values = [scores(experts, p, "a", *which)[lab.DAMPED][name] for which in drawn]
    assert not any(values[0].equal(v) for v in values[1:])
    own, base = (experts.weights[which].read(name) for which in ("a", "base"))
    assert scores(experts, p, "a")[lab.STEP][name].equal((own - base).abs())
    assert scores(experts, p, "a")[lab.STEP] is scores(experts, p, "a")[lab.STEP]


def test_scores_of_a_large_model_are_files(p: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = lab.Setting(FisherAverage(), by=lab.EXACT, share=0.2)
    small = lab.Experts(p)
    name = small.linear[0]
    expected = merger(small, setting, p).tensor(name)
    monkeypatch.setattr(lab, "IN_MEMORY", 100)
    monkeypatch.setattr(lab, "SCORES_IN_MEMORY", 100)
    large = lab.Experts(p)
    assert isinstance(scores(large, p, "a")[lab.EXACT], Path)
    assert merger(large, setting, p).tensor(name).equal(expected)


def test_weights_are_kept_by_fi_with_any_filter(p: SimpleNamespace) -> None:
    p = changed(p, choices=["FI damped 1e-2"])
    assert lab.choices(p) == ("FI damped 0.01", lab.EXACT, lab.DAMPED, lab.RANDOM)
    found = scores(lab.Experts(p), p, "a")["FI damped 0.01"]
    assert found.metadata["measure"] == "FI damped 0.01"
    asked = lab.to_test(p, {row: lab.Setting() for row, _ in lab.ROWS.values()}, {})
    assert dict(asked)["average by FI damped 0.01"].share == 0.05


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_models_that_store_other_names_than_they_load(kind: str, p: SimpleNamespace, tmp_path: Path) -> None:
    base, a, b = (save(tmp_path / str(seed), seed, kind=kind) for seed in (None, 1, 2))
    p = changed(p, BASE=base, MODEL_A=a, MODEL_B=b)
    experts = lab.Experts(p)
    assert set(experts.linear) <= experts.weights["a"].layouts.keys()
    assert sum(name.endswith("experts.gate_up_proj") for name in experts.linear) == 2 * (kind == "mixtral")
    protected = merger(experts, lab.Setting(by=lab.EXACT, share=0.1, protects="a"), p)
    with experts.holding("a") as expert:
        first = {name: value.detach().clone() for name, value in expert.network.named_parameters()}
    for name, mask in protected.masks("a"):
        assert protected.tensor(name)[mask].equal(first[name][mask])
    shown = lab.displacements(experts)
    assert 0 < shown["equal signs"] < 1 and abs(shown.cosine) < 1


def test_options_that_are_not_given_have_their_usual_values(p: SimpleNamespace) -> None:
    p = changed(p, TASK="bundled-experts", DOMAINS={"math": ["math"], "health": ["health"]}, N_TEST=3)
    lab.check(p)
    assert lab.options(p)["elect"] == "mean" and lab.choices(p) == tuple(lab.CHOICES)
    assert len(lab.questions(p, "test")["math"]) == 3  # the bundled questions are there
    with pytest.raises(ValueError, match=r"no 'density'; did you mean densities\?"):
        lab.check(changed(p, density=[0.5]))
    del p.OPTIONS["wide"]
    with pytest.raises(ValueError, match="OPTIONS lacks 'wide'"):
        lab.check(p)


def test_bad_settings_and_models_are_named_before_anything_runs(
    p: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.check(p)
    for change, text in [
        ({"SEEDS": 4}, "leave none of the 12 validation questions of sums"),
        ({"elect": "largest"}, "elect must be one of"),
        ({"choices": ["FI exakt"]}, "did you mean FI exact"),
        ({"DOMAINS": {"sums": ["sums"]}}, "Two domains are needed"),
        ({"DOMAINS": {"sums": ["sums"], "hearts": ["hearts"]}}, "hearts"),
        ({"DOMAINS": {"sums": ["sums"], "bones": "bones"}}, "needs a list of subjects"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            lab.check(changed(p, **change))
    monkeypatch.setattr(lab, "ELSEWHERE", (p.TASK, []))
    with pytest.raises(ValueError, match="Of 'neither domain' there are too few"):
        lab.check(p)
    stranger = save(tmp_path / "stranger", None, base_seed=5)
    with pytest.raises(ValueError, match="was not fine-tuned from"):
        lab.Experts(changed(p, MODEL_B=stranger))
