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
def plan(tmp_path: Path) -> lab.Plan:
    write_questions(tmp_path / "task")
    return lab.Plan(
        task=str(tmp_path / "task"),
        domains={"sums": ("sums",), "bones": ("bones",)},
        shares=(0.05, 0.2),
        wide=(0.5, 1.0),
        task_weights=(0.5, 1.0),
        densities=(0.3,),
        seeds=2,
        n_calibration=3,
        elsewhere={"neither domain": {"task": str(tmp_path / "task"), "subjects": ("bones",)}},
    )


@pytest.fixture
def bench(trio: Trio, plan: lab.Plan, tmp_path: Path) -> lab.Bench:
    return lab.Bench(*trio, plan, tmp_path / "cache")


def ids(examples: Sequence[Example]) -> set[str]:
    return {e.prompt for e in examples}


def test_no_question_serves_two_purposes(plan: lab.Plan) -> None:
    for domain in plan.domains:
        sets = [ids(lab.calibration_set(plan, domain, k)) for k in range(plan.seeds)]
        searched, tested = ids(lab.validation_set(plan, domain)), ids(lab.test_set(plan, domain))
        assert [len(s) for s in sets] == [3, 3] and len(searched) == 12 - 6 - (domain == "bones")
        every = [*sets, searched, tested]
        assert len(set().union(*every)) == sum(map(len, every))
        assert tested <= ids(load_task(plan.task, domain, "test").examples)


def test_the_search_sees_no_test_question(
    bench: lab.Bench, plan: lab.Plan, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(task: str, subject: str, split: str) -> Any:
        asked.append(split)
        return load_task(task, subject, split)

    monkeypatch.setattr(lab, "load_task", load)
    search = lab.Search(bench)
    chosen = lab.choose(search)
    curves = lab.curve_settings(chosen)
    found = lab.peaks(search.curve(curves, (*plan.shares, *plan.wide)), curves)
    assert set(asked) == {"val"}

    write_questions(Path(plan.task), shift=1)  # other right answers in the test split
    again = lab.Bench(*trio, plan, tmp_path / "other cache")
    assert lab.choose(lab.Search(again)) == chosen
    assert found.keys() >= {"average, FI exact, at the peak", "TIES I, all kept"}


def test_the_test_questions_are_asked_once(bench: lab.Bench) -> None:
    final = lab.Final(bench)
    rows = final.ask(lab.models_alone(bench.plan.domains))
    assert rows.name.tolist() == ["base", "sums expert", "bones expert"] and set(rows.n) == {13}
    with pytest.raises(RuntimeError, match="have been asked already"):
        final.ask({"average": lab.Setting()})


def test_the_chapter(bench: lab.Bench, plan: lab.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    search = lab.Search(bench)
    chosen = lab.choose(search)
    assert {"average", "TIES II, trimmed, FI exact", "DARE TIES"} < chosen.keys()
    assert set(search.table().task_weight.dropna()) == set(plan.task_weights)
    curves = lab.curve_settings(chosen)
    curve = search.curve(curves, (*plan.shares, *plan.wide))
    assert curve.groupby("by").share.agg(set).to_dict() == {
        by: {0.05, 0.2, 0.5, 1.0} for by in (lab.EXACT, lab.DAMPED, lab.RANDOM)
    }
    asked = {**lab.models_alone(plan.domains), **chosen, **lab.peaks(curve, curves), **lab.compared(plan)}
    asked |= lab.expert_alone(plan) | lab.conventions(chosen)
    final = lab.Final(bench)
    rows = final.ask(asked)
    counts = final.exam.counts
    assert counts == {"sums": 7, "bones": 6}
    assert rows.groupby("name")["set"].nunique()["DARE task"] == 2
    assert rows.groupby("name")["set"].nunique()["average by size of the weight"] == 1

    table = lab.table3(rows, lab.table_order(plan.domains), counts, 0)
    assert list(table)[:5] == ["base", "sums expert", "bones expert", "average", "average, FI exact"]
    assert set(table) == {*lab.models_alone(plan.domains), *chosen}
    for name, found in table.items():
        of = rows[rows.name == name]
        assert found.value["mean"] == pytest.approx(of["mean"].mean())
        assert found.value["sums"] == pytest.approx(of["sums"].mean())
    assert lab.as_text(table, rows).shape == (len(table), 6)

    paired = lab.paired(rows, plan, counts, 0)
    assert set(paired.by_log_p) <= set(ENDINGS.values()) and (paired.low <= paired.high).all()
    per_filter = paired[paired.measure == lab.EXACT].groupby("topic").size().to_dict()
    assert per_filter["protection helps"] == 7 and per_filter[lab.TOPICS["c23"]] == 4
    price = lab.price_of(rows, list(lab.expert_alone(plan)), counts, 0)
    assert price.relative["A kept by random"] == 0 and "A kept by SNIP, its own domain" in price.index
    assert np.allclose(price["mean"], (price["sums"] + price["bones"]) / 2)
    draw.gamma_curves(search.table().query("by == ''"), list(counts), {"sums": 0.5, "bones": 0.5}, 13)
    draw.share_curves(curve, dict.fromkeys(lab.CURVES, 0.5), 13)
    draw.gains(paired.assign(label=paired["first"], by=paired["measure"]), "difference")

    monkeypatch.setattr(lab.Bench, "put", lambda *_: pytest.fail("finished work was done again"))
    pd.testing.assert_frame_equal(lab.Final(bench).ask(asked), rows)


def test_all_protected_is_the_merge_that_needs_no_scores(bench: lab.Bench) -> None:
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
        for name in bench.linear:
            plain = bench.merger(lab.everything(whole), 0).tensor(name)
            torch.testing.assert_close(bench.merger(whole, 0).tensor(name), plain)


def test_random_scores_are_drawn_apart_and_one_expert_can_be_kept_alone(bench: lab.Bench) -> None:
    shared = lab.overlap(bench, 0.2)
    assert 0 < shared.common["random"] < 0.5
    assert np.allclose(shared["put back"], 0.4 * (1 - shared.common), atol=1e-3)
    assert shared.index.tolist() == [by for by, (_, displaced) in lab.CHOICES.items() if not displaced]
    only = bench.merger(lab.Setting(by=lab.EXACT, share=0.2, only_a=True), 0)
    counted = {which: sum(int(mask.sum()) for _, mask in only.masks(which)) for which in ("a", "b")}
    total = sum(bench.weights["a"].layouts[name].numel for name in bench.linear)
    assert counted == {"a": round(0.2 * total), "b": 0}


def test_calibration_decides_the_scores(bench: lab.Bench) -> None:
    own, other, neither = (
        bench.scores("a", 0, place)[lab.DAMPED] for place in (lab.OWN, lab.OTHER, "neither domain")
    )
    again = bench.scores("a", 1)[lab.DAMPED]
    name = bench.linear[0]
    values = [s[name] for s in (own, other, neither, again)]
    assert not any(values[0].equal(v) for v in values[1:])
    assert bench.scores("a", 0)[lab.STEP][name].equal(
        (bench.weights["a"].read(name) - bench.weights["base"].read(name)).abs()
    )


def test_scores_of_a_large_model_are_files(
    trio: Trio, plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = lab.Setting(FisherAverage(), by=lab.EXACT, share=0.2)
    small = lab.Bench(*trio, plan, tmp_path / "small")
    monkeypatch.setattr(lab, "IN_MEMORY", 100)
    large = lab.Bench(*trio, plan, tmp_path / "large")
    name = large.linear[0]
    assert large.merger(setting, 0).tensor(name).equal(small.merger(setting, 0).tensor(name))
    assert isinstance(large.scores("a", 0)[lab.EXACT], Path)
    pd.testing.assert_frame_equal(lab.overlap(large, 0.1), lab.overlap(small, 0.1))


def test_weights_are_kept_by_fi_with_any_filter(trio: Trio, plan: lab.Plan, tmp_path: Path) -> None:
    bench = lab.Bench(*trio, replace(plan, choices=("FI damped 1e-2",)), tmp_path / "cache")
    assert bench.plan.scored == ("FI damped 0.01", lab.EXACT, lab.DAMPED, lab.RANDOM)
    assert list(lab.overlap(bench, 0.1).index) == list(bench.plan.scored)
    setting = lab.compared(bench.plan)["average by FI damped 0.01"]
    protection = bench.merger(setting, 0).protection
    assert protection is not None
    scores = bench.scores("a", 0)["FI damped 0.01"]
    assert not isinstance(scores, Path) and scores.metadata["measure"] == "FI damped 0.01"


def test_differences_weigh_the_domains_alike() -> None:
    rows = pd.DataFrame(
        [("x", 0, [1, 1, 1, 1, 0, 0]), ("x", 1, [1] * 6), ("y", 0, [0] * 6)],
        columns=["name", "set", "correct"],
    )
    rows = rows.assign(log_prob=rows.correct)
    counts = {"first": 4, "second": 2}
    assert lab.difference(rows, "x", "y", counts, 0)[0] == pytest.approx(0.75)
    assert lab.difference(rows, "x", "y", counts, 0, "second")[0] == pytest.approx(0.5)
    assert lab.difference(rows, "x", "y", counts, 0, "first", "log_prob") == (1, 1, 1)
    assert lab.pooled(rows, [("x", "y"), ("x", "x")], counts, 0)[0] == pytest.approx(0.375)
    found = lab.differences(rows, [("x", "y"), ("y", "x"), ("x", "x")], counts, 0, "first")
    assert found.difference.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="no setting 'z'; there are x, y"):
        lab.answers_of(rows, "z")


def test_a_written_merge_is_the_one_in_memory(bench: lab.Bench) -> None:
    card, apart = lab.written(bench, lab.Setting(Average(), by=lab.EXACT, share=0.05))
    assert apart == 0 and "Protection: top 5 %" in card


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_models_that_store_other_names_than_they_load(kind: str, plan: lab.Plan, tmp_path: Path) -> None:
    trio = (save(tmp_path / str(seed), seed, kind=kind) for seed in (None, 1, 2))
    bench = lab.Bench(*trio, plan, tmp_path / "cache")
    sizes = {name: layout.numel for name, layout in bench.weights["a"].layouts.items()}
    assert set(bench.linear) <= sizes.keys()
    assert sum(name.endswith("experts.gate_up_proj") for name in bench.linear) == 2 * (kind == "mixtral")
    search = lab.Search(bench)
    for name, setting in {
        "average": lab.Setting(by=lab.EXACT),
        "Fisher average": lab.Setting(FisherAverage(), by=lab.STEP),
        "TIES": lab.Setting(Ties(), by=lab.PREDICTED, stages="I and II"),
    }.items():
        assert search.protected(name, setting).share in plan.shares
    _, apart = lab.written(bench, lab.Setting(by=lab.EXACT, share=0.1))
    assert apart == 0
    assert lab.displacements(bench)["weights"] == sum(sizes[name] for name in bench.linear)
    protected = bench.merger(lab.Setting(by=lab.EXACT, share=0.1, only_a=True), 0)
    bench.put(lab.Alone("a"), 0)
    first = {name: p.detach().clone() for name, p in bench.model.network.named_parameters()}
    for name, mask in protected.masks("a"):
        assert protected.tensor(name)[mask].equal(first[name][mask])


def test_the_plan_of_a_chapter() -> None:
    settings = {
        "TASK": "bundled-experts", "DOMAINS": {"math": ["math"], "health": ["health"]}, "SHARES": [0.1],
        "TASK_WEIGHTS": [0.5], "SEEDS": 1, "N_CALIBRATION": 2, "N_TEST": 3, "SEED": 4,
        "OPTIONS": {"densities": [0.5], "wide": [], "compared": 0.1},
    }  # fmt: skip
    plan = lab.plan_of(SimpleNamespace(**settings))
    assert plan.elsewhere == lab.ELSEWHERE and plan.seed == 4 and plan.choices == tuple(lab.CHOICES)
    assert len(lab.test_set(plan, "math")) == 3  # the bundled questions are there
    settings["OPTIONS"]["density"] = [0.5]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"no 'density'; did you mean densities\?"):
        lab.plan_of(SimpleNamespace(**settings))


def test_bad_plans_and_models_are_named_before_anything_runs(
    trio: Trio, plan: lab.Plan, tmp_path: Path
) -> None:
    for change, text in [
        ({"shares": (0.1, 5.0)}, r"share must lie in \[0, 1\], not 5"),
        ({"wide": (-0.1,)}, "not -0.1"),
        ({"densities": (20.0,)}, "density must lie"),
        ({"densities": ()}, "densities is empty"),
        ({"seeds": 0}, "at least 1"),
        ({"seeds": 4}, "leave none of the 12 validation questions of sums"),
        ({"elect": "largest"}, "elect must be one of"),
        ({"choices": ("FI exakt",)}, "did you mean FI exact"),
        ({"domains": {"sums": ("sums",)}}, "Two domains are needed"),
        ({"domains": {"sums": ("sums",), "hearts": ("hearts",)}}, "hearts"),
        ({"elsewhere": {"few": {"task": plan.task, "subjects": ()}}}, "Of 'few' there are too few"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            lab.Bench(*trio, replace(plan, **change), tmp_path / "cache")  # type: ignore[arg-type]
    stranger = save(tmp_path / "stranger", None, base_seed=5)
    with pytest.raises(ValueError, match="was not fine-tuned from"):
        lab.Bench(trio[0], trio[1], stranger, plan, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_dial_turns_through_the_curves(
    trio: Trio, plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = lab.Search(lab.Bench(*trio, replace(plan, seeds=1), tmp_path / "cache"))
    settings = {"average, random": lab.Setting(by=lab.RANDOM)}
    curve = search.curve(settings, [0.1, 1.0])
    dial = dials.protection_dial(search, curve, settings)
    (positions,) = dial.groups
    assert [position["label"] for position in positions] == ["0 %", "10 %", "100 %"]
    plain = search.exam.row("average", lab.Setting(), 0)
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
