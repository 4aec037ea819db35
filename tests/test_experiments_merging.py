"""Merging with protection on tiny models: who sees which questions, what is asked, counted and refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from fichapters import dials
from fichapters.ch09 import draw, lab
from fichapters.claims import ENDINGS
from fihelpers.perturb.merge_methods import Average, FisherAverage, TaskArithmetic, Ties
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Kept, Trial, Trials

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


def write_questions(folder: Path, shift: int = 0) -> None:
    for split, n in {"dev": 2, "val": 12, "test": 7}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject, start in {"sums": 0, "bones": 9}.items():
            lines = [
                f"{split} w{(start + i) % 27} w{(3 * i) % 27} of {subject},w1,w2,w3,w{i + 4},"
                f"{'ABCD'[(i + (shift if split == 'test' else 0)) % 4]}\n"
                for i in range(n - (subject == "bones"))
            ]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))


@pytest.fixture
def p(trio: Trio, tmp_path: Path) -> SimpleNamespace:
    write_questions(tmp_path / "task")
    elsewhere = {"neither domain": {"task": str(tmp_path / "task"), "subjects": ["bones"]}}
    return SimpleNamespace(
        **dict(zip(("BASE", "MODEL_A", "MODEL_B"), trio, strict=True)),
        TASK=str(tmp_path / "task"),
        DOMAINS={"sums": ["sums"], "bones": ["bones"]},
        SHARES=[0.05, 0.2],
        TASK_WEIGHTS=[0.5, 1.0],
        OPTIONS={"densities": [0.3], "wide": [0.5, 1.0], "compared": 0.05, "elsewhere": elsewhere},
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


def test_no_question_serves_two_purposes(p: SimpleNamespace) -> None:
    for domain in p.DOMAINS:
        sets = [ids(lab.calibration_set(p, domain, k)) for k in range(p.SEEDS)]
        searched, tested = ids(lab.validation_set(p, domain)), ids(lab.test_set(p, domain))
        assert [len(s) for s in sets] == [3, 3] and len(searched) == 12 - 6 - (domain == "bones")
        every = [*sets, searched, tested]
        assert len(set().union(*every)) == sum(map(len, every))
        assert tested <= ids(load_task(p.TASK, domain, "test").examples)


def test_the_search_sees_no_test_question(
    experts: lab.Experts, p: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(task: str, subject: str, split: str) -> Any:
        asked.append(split)
        return load_task(task, subject, split)

    monkeypatch.setattr(lab, "load_task", load)
    search = lab.Search(experts)
    chosen = lab.choose(search)
    curves = lab.curve_settings(chosen)
    found = lab.peaks(search.curve(curves, (*p.SHARES, *p.OPTIONS["wide"])), curves)
    assert set(asked) == {"val"}

    write_questions(Path(p.TASK), shift=1)  # other right answers in the test split
    assert lab.choose(lab.Search(lab.Experts(p))) == chosen
    assert found.keys() >= {"average, FI exact, at the peak", "TIES I, all kept"}


def test_the_best_of_all_that_was_tried_is_chosen(
    experts: lab.Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between equals the first; gamma is tried again beside itself once the share is known."""
    search, liked = lab.Search(experts), {"share": 0.2, "task_weight": 1.0}

    def ask(asked: lab.Asked, k: int) -> dict[str, np.ndarray]:
        given = lab._described(asked)
        right = sum(given[name] == value for name, value in liked.items())
        return {"correct": np.arange(sum(search.exam.counts.values())) < right}

    monkeypatch.setattr(search.exam, "ask", ask)
    start = lab.Setting(TaskArithmetic(task_weight=0.5), by=lab.EXACT)
    chosen = search.best({"kept": start, "plain": replace(start, by="")})
    assert chosen["kept"] == replace(start, share=0.2, method=TaskArithmetic(task_weight=1.0))
    assert chosen["plain"].method == TaskArithmetic(task_weight=1.0)
    tried = search.table()
    assert tried[tried.name == "kept"].share.tolist() == [0.05, 0.2, 0.2, 0.2]
    assert tried[tried.name == "kept"].task_weight.tolist() == [0.5, 0.5, 0.5, 1.0]
    liked.clear()
    assert search.best({"none": start})["none"] == replace(start, share=0.05)


def test_the_test_questions_are_asked_once(experts: lab.Experts) -> None:
    final = lab.Final(experts)
    rows = final.exam.table(final.ask(lab.models_alone(experts.p.DOMAINS)))
    assert rows.name.tolist() == ["base", "sums expert", "bones expert"] and set(rows.n) == {13}
    with pytest.raises(RuntimeError, match="have been asked already"):
        final.ask({"average": lab.Setting()})


def test_the_chapter(
    experts: lab.Experts, p: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(name: str) -> Kept:
        return Kept(tmp_path / "kept", name, "")

    search = lab.Search(experts)
    chosen = lab.choose(search, kept)
    assert {"average", "TIES II, trimmed, FI exact", "DARE TIES"} < chosen.keys()
    assert set(search.table().task_weight.dropna()) == set(p.TASK_WEIGHTS)
    curves = lab.curve_settings(chosen)
    curve = search.curve(curves, (*p.SHARES, *p.OPTIONS["wide"]))
    assert curve.groupby("by").share.agg(set).to_dict() == {
        by: {0.05, 0.2, 0.5, 1.0} for by in (lab.EXACT, lab.DAMPED, lab.RANDOM)
    }
    asked = {**lab.models_alone(p.DOMAINS), **chosen, **lab.peaks(curve, curves), **lab.compared(p)}
    asked |= lab.expert_alone(p) | lab.conventions(chosen)
    final = lab.Final(experts)
    trials = final.ask(asked, kept("final"))
    counts, rows = final.exam.counts, final.exam.table(trials)
    assert counts == {"sums": 7, "bones": 6} and list(dict.fromkeys(rows.name)) == list(asked)
    assert rows.groupby("name")["set"].nunique()["DARE task"] == 2
    assert rows.groupby("name")["set"].nunique()["average by size of the weight"] == 1

    table = lab.table3(trials, lab.table_order(p.DOMAINS), counts, 0)
    assert list(table)[:5] == ["base", "sums expert", "bones expert", "average", "average, FI exact"]
    assert set(table) == {*lab.models_alone(p.DOMAINS), *chosen}
    for name, found in table.items():
        of = rows[rows.name == name]
        assert found.value["mean"] == pytest.approx(of["mean"].mean())
        assert found.value["sums"] == pytest.approx(of["sums"].mean())
    assert lab.as_text(table, trials).shape == (len(table), 6)

    paired = lab.paired(trials, p, counts)
    assert set(paired.by_log_p) <= set(ENDINGS.values()) and (paired.low <= paired.high).all()
    per_filter = paired[paired.measure == lab.EXACT].groupby("topic").size().to_dict()
    assert per_filter["protection helps"] == 7 and per_filter[lab.TOPICS["c23"]] == 4
    price = lab.price_of(trials, list(lab.expert_alone(p)), counts, 0)
    assert price.relative["A kept by random"] == 0 and "A kept by SNIP, its own domain" in price.index
    assert np.allclose(price["mean"], (price["sums"] + price["bones"]) / 2)
    draw.gamma_curves(search.table().query("by == ''"), list(counts), {"sums": 0.5, "bones": 0.5}, 13)
    draw.share_curves(curve, dict.fromkeys(lab.CURVES, 0.5), 13)
    draw.gains(paired.assign(label=paired["first"], by=paired["measure"]), "difference")

    def put(_: lab.Experts, asked: lab.Asked, k: int) -> None:
        assert (asked, k) == (lab.Alone("base"), 0), "finished work was done again"

    monkeypatch.setattr(lab.Experts, "put", put)
    again = lab.Final(experts)
    pd.testing.assert_frame_equal(again.exam.table(again.ask(asked, kept("final"))), rows)
    assert lab.choose(lab.Search(experts), kept) == chosen


def test_all_protected_is_the_merge_that_needs_no_scores(experts: lab.Experts) -> None:
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
        for name in experts.linear:
            plain = experts.merger(lab.everything(whole), 0).tensor(name)
            torch.testing.assert_close(experts.merger(whole, 0).tensor(name), plain)


def test_random_scores_are_drawn_apart_and_one_expert_can_be_kept_alone(experts: lab.Experts) -> None:
    shared = lab.overlap(experts, 0.2)
    assert 0 < shared.common["random"] < 0.5
    assert np.allclose(shared["put back"], 0.4 * (1 - shared.common), atol=1e-3)
    assert shared.index.tolist() == [by for by, (_, displaced) in lab.CHOICES.items() if not displaced]
    only = experts.merger(lab.Setting(by=lab.EXACT, share=0.2, only_a=True), 0)
    counted = {which: sum(int(mask.sum()) for _, mask in only.masks(which)) for which in ("a", "b")}
    total = sum(experts.weights["a"].layouts[name].numel() for name in experts.linear)
    assert counted == {"a": round(0.2 * total), "b": 0}


def test_calibration_decides_the_scores(experts: lab.Experts) -> None:
    own, other, neither = (
        experts.scores("a", 0, place)[lab.DAMPED] for place in (lab.OWN, lab.OTHER, "neither domain")
    )
    again = experts.scores("a", 1)[lab.DAMPED]
    name = experts.linear[0]
    values = [s[name] for s in (own, other, neither, again)]
    assert not any(values[0].equal(v) for v in values[1:])
    assert experts.scores("a", 0)[lab.STEP][name].equal(
        (experts.weights["a"].read(name) - experts.weights["base"].read(name)).abs()
    )


def test_scores_of_a_large_model_are_files(p: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = lab.Setting(FisherAverage(), by=lab.EXACT, share=0.2)
    small = lab.Experts(p)
    monkeypatch.setattr(lab, "IN_MEMORY", 100)
    large = lab.Experts(p)
    name = large.linear[0]
    assert large.merger(setting, 0).tensor(name).equal(small.merger(setting, 0).tensor(name))
    assert isinstance(large.scores("a", 0)[lab.EXACT], Path)
    pd.testing.assert_frame_equal(lab.overlap(large, 0.1), lab.overlap(small, 0.1))


def test_weights_are_kept_by_fi_with_any_filter(p: SimpleNamespace) -> None:
    p = changed(p, choices=["FI damped 1e-2"])
    experts = lab.Experts(p)
    assert lab.scored(p) == ("FI damped 0.01", lab.EXACT, lab.DAMPED, lab.RANDOM)
    assert list(lab.overlap(experts, 0.1).index) == list(lab.scored(p))
    setting = lab.compared(p)["average by FI damped 0.01"]
    protection = experts.merger(setting, 0).protection
    assert protection is not None
    scores = experts.scores("a", 0)["FI damped 0.01"]
    assert not isinstance(scores, Path) and scores.metadata["measure"] == "FI damped 0.01"


def test_differences_weigh_the_domains_alike() -> None:
    right = [("x", 0, [1, 1, 1, 1, 0, 0]), ("x", 1, [1] * 6), ("y", 0, [0] * 6)]
    values = [(n, k, np.array(found)) for n, k, found in right]
    trials = Trials([], [Trial(k, {"name": n}, {"correct": v, "log_prob": v}) for n, k, v in values])
    counts = {"first": 4, "second": 2}
    assert lab.difference(trials, [("x", "y")], counts, 0)[0] == pytest.approx(0.75)
    assert lab.difference(trials, [("x", "y")], counts, 0, "second")[0] == pytest.approx(0.5)
    assert lab.difference(trials, [("x", "y")], counts, 0, "first", "log_prob") == (1, 1, 1)
    assert lab.difference(trials, [("x", "y"), ("x", "x")], counts, 0)[0] == pytest.approx(0.375)
    found = lab.differences(trials, [("x", "y"), ("y", "x"), ("x", "x")], counts, 0, "first")
    assert found.difference.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="no trial has name = 'z'"):
        lab.difference(trials, [("x", "z")], counts, 0)


def test_a_relative_gain_is_that_of_the_means() -> None:
    rng = np.random.default_rng(0)
    b = (rng.random((3, 60)) < 0.5).astype(float)
    a = np.maximum(b, rng.random((3, 60)) < 0.4)
    gain, low, high = lab.relative_gain(a, b, 0)
    assert gain == pytest.approx(a.mean() / b.mean() - 1) and 0 < low < gain < high
    assert lab.relative_gain(b, b, 0) == (0, 0, 0)
    # nothing right counts as half an answer
    assert np.isfinite(lab.relative_gain(a, np.zeros_like(b), 0)).all()


def test_a_written_merge_is_the_one_in_memory(experts: lab.Experts) -> None:
    card, apart = lab.written(experts, lab.Setting(Average(), by=lab.EXACT, share=0.05))
    assert apart == 0 and "Protection: top 5 %" in card


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_models_that_store_other_names_than_they_load(kind: str, p: SimpleNamespace, tmp_path: Path) -> None:
    base, a, b = (save(tmp_path / str(seed), seed, kind=kind) for seed in (None, 1, 2))
    experts = lab.Experts(changed(p, BASE=base, MODEL_A=a, MODEL_B=b))
    sizes = {name: layout.numel() for name, layout in experts.weights["a"].layouts.items()}
    assert set(experts.linear) <= sizes.keys()
    assert sum(name.endswith("experts.gate_up_proj") for name in experts.linear) == 2 * (kind == "mixtral")
    search = lab.Search(experts)
    starts = {
        "average": lab.Setting(by=lab.EXACT),
        "Fisher average": lab.Setting(FisherAverage(), by=lab.STEP),
        "TIES": lab.Setting(Ties(), by=lab.PREDICTED, stages="I and II"),
    }
    assert {setting.share for setting in search.best(starts).values()} <= set(p.SHARES)
    _, apart = lab.written(experts, lab.Setting(by=lab.EXACT, share=0.1))
    assert apart == 0
    assert lab.displacements(experts)["weights"] == sum(sizes[name] for name in experts.linear)
    protected = experts.merger(lab.Setting(by=lab.EXACT, share=0.1, only_a=True), 0)
    experts.put(lab.Alone("a"), 0)
    first = {name: p.detach().clone() for name, p in experts.model.network.named_parameters()}
    for name, mask in protected.masks("a"):
        assert protected.tensor(name)[mask].equal(first[name][mask])


def test_options_that_are_not_given_have_their_usual_values(p: SimpleNamespace) -> None:
    p = changed(p, TASK="bundled-experts", DOMAINS={"math": ["math"], "health": ["health"]}, N_TEST=3)
    del p.OPTIONS["elsewhere"]
    lab.check(p)
    assert lab.options(p)["elsewhere"] == lab.ELSEWHERE and lab.choices(p) == tuple(lab.CHOICES)
    assert len(lab.test_set(p, "math")) == 3  # the bundled questions are there
    with pytest.raises(ValueError, match=r"no 'density'; did you mean densities\?"):
        lab.check(changed(p, density=[0.5]))
    del p.OPTIONS["wide"]
    with pytest.raises(ValueError, match="OPTIONS lacks 'wide'"):
        lab.check(p)


def test_bad_settings_and_models_are_named_before_anything_runs(p: SimpleNamespace, tmp_path: Path) -> None:
    lab.check(p)
    for change, text in [
        ({"SHARES": [0.1, 5.0]}, r"share must lie in \[0, 1\], not 5"),
        ({"SHARES": []}, "SHARES is empty"),
        ({"wide": [-0.1]}, "not -0.1"),
        ({"densities": [20.0]}, "density must lie"),
        ({"densities": []}, "densities is empty"),
        ({"SEEDS": 0}, "at least 1"),
        ({"SEEDS": 4}, "leave none of the 12 validation questions of sums"),
        ({"elect": "largest"}, "elect must be one of"),
        ({"choices": ["FI exakt"]}, "did you mean FI exact"),
        ({"DOMAINS": {"sums": ["sums"]}}, "Two domains are needed"),
        ({"DOMAINS": {"sums": ["sums"], "hearts": ["hearts"]}}, "hearts"),
        ({"elsewhere": {"few": {"task": p.TASK, "subjects": []}}}, "Of 'few' there are too few"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            lab.check(changed(p, **change))
    stranger = save(tmp_path / "stranger", None, base_seed=5)
    with pytest.raises(ValueError, match="was not fine-tuned from"):
        lab.Experts(changed(p, MODEL_B=stranger))


def test_a_dial_turns_through_the_curves(p: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    search = lab.Search(lab.Experts(changed(p, SEEDS=1)))
    settings = {"average, random": lab.Setting(by=lab.RANDOM)}
    curve = search.curve(settings, [0.1, 1.0])
    dial = dials.protection_dial(search, curve, settings)
    (positions,) = dial.groups
    assert [position["label"] for position in positions] == ["0 %", "10 %", "100 %"]
    plain = search.exam.accuracies(search.exam.ask(lab.Setting(), 0))
    for end in (positions[0], positions[-1]):  # with all protected by both it is the plain merge again
        shown = {bar["name"].split(" (")[0]: bar["value"] for bar in end["bars"]}
        assert shown == pytest.approx({domain: plain[domain] for domain in search.exam.counts}, abs=1e-4)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(dial, "send", sent.append)
    dial._answer(dial, {"options": ["average, random"], "value": 10}, [])
    assert sent[0]["position"]["bars"] == positions[1]["bars"]


def test_differences_are_shown_as_text() -> None:
    table = pd.DataFrame({"first": ["a"], "minus": ["b"], "difference": [0.1], "low": [-0.25], "high": [0.4]})
    shown = lab.as_lines(table, "minus")
    assert shown.loc["a"].tolist() == ["+0.100 [-0.250, +0.400]", "undecided", "b"]
