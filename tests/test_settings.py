"""Values that have to be in a list, and values that cannot be run: settled before anything runs."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opening import NOTEBOOKS, ROOT, Opened, run_until_opened, settled

from fichapters import runs
from fichapters.ch02 import lab as manifold
from fichapters.ch03 import lab as limits
from fichapters.ch09 import lab as merging
from fichapters.parameters import declared
from fichapters.runs import find_chapter
from fichapters.settings import JOINS, RULES, Rule, agreed
from fihelpers.__main__ import main
from fihelpers.models import language as models

PROFILES = sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))


def value_of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def with_value(settings: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The one parameter that is changed, as a caller gives it."""
    parameter, _, key = name.partition(".")
    return {parameter: {**copy.deepcopy(settings[parameter]), key: value} if key else value}


def joined() -> Iterator[tuple[str, str, str]]:
    for chapter, path in NOTEBOOKS.items():
        known = declared(path)
        for one, many in JOINS.items():
            if value_of(known, one) is not None and value_of(known, many) is not None:
                yield chapter, one, many


def ruled() -> Iterator[tuple[str, str]]:
    for chapter, path in NOTEBOOKS.items():
        known = declared(path)
        yield from ((chapter, name) for name in RULES if value_of(known, name) is not None)


def test_every_value_that_stands_for_one_of_a_list_is_known() -> None:
    """Each pair is there, and no other parameter of one value has a namesake that is a list."""
    found = set(joined())
    assert {(one, many) for _, one, many in found} == set(JOINS.items())
    for chapter, path in NOTEBOOKS.items():
        known = declared(path)
        for name, value in known.items():
            many = known.get(f"{name}S")
            if isinstance(many, list) and isinstance(value, int | float | str):
                assert (chapter, name, f"{name}S") in found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("chapter", "one", "many"), list(joined()))
def test_a_value_joins_its_list(chapter: str, one: str, many: str, profile: str) -> None:
    before = settled(chapter, {}, profile)
    was = value_of(before, one)
    new = 3 if one == "BITS.full" else 0.0153
    given = with_value(before, one, [*was[:-1], new] if isinstance(was, list) else new)
    after = settled(chapter, given, profile)
    values = value_of(after, many)
    assert new in values and values == sorted({*value_of(before, many), new})
    assert value_of(after, one) == value_of(given, one)
    same = {name for name, value in before.items() if after[name] != value}
    assert same <= {one.split(".")[0], many.split(".")[0]}
    assert settled(chapter, {name: after[name] for name in same}, profile) == after


@pytest.mark.parametrize(("chapter", "name"), list(ruled()))
def test_what_cannot_be_run_is_one_sentence(chapter: str, name: str) -> None:
    known, rule = declared(NOTEBOOKS[chapter]), RULES[name]
    default = value_of(known, name)
    bad: list[Any] = [[], default * 2] if isinstance(default, list) else []
    bad = bad[:1] if rule.repeats else bad
    if rule.above == 0 or rule.least >= 0:
        wrong = int(rule.least) - 1 if rule.least >= 0 else 0
        bad.append([wrong, *default[1:]] if isinstance(default, list) else wrong)
    if rule.most == 1:
        bad.append([*default[1:], 1.5] if isinstance(default, list) else 1.5)
        bad.append([*default[1:], float("nan")] if isinstance(default, list) else float("nan"))
    if rule.count:
        bad.append([*default, *default])
    assert bad
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{chapter}: the parameter {name} must ") as said:
            settled(chapter, with_value(known, name, value))
        assert "\n" not in str(said.value)


def test_a_rule_holds_where_the_notebooks_own_default_keeps_it() -> None:
    own = {"RATES": [0, 0.5], "SHARE": {"of": 1}, "SHARES": ["a", "b"], "BUDGET": 9, "BUDGETS": [2, 1]}
    assert agreed({**own, "RATES": [], "BUDGET": 5}, own) == {**own, "RATES": [], "BUDGET": 5}


def test_lists_that_rise_are_sorted_and_the_given_ones_stay_as_they_are() -> None:
    given = [0.2, 0.05]
    assert settled("06_embedding_attacks", {"BUDGETS": given})["BUDGETS"] == [0.05, 0.2]
    assert given == [0.2, 0.05]
    pruning = {"test": 2, "top": [0.01], "bottom": [0.5], "compared": [0.2, 0.5]}
    assert settled("07_sparsification", {"PRUNING": pruning})["PRUNING"]["bottom"] == [0.2, 0.5]
    assert pruning["bottom"] == [0.5]


def test_rules_in_words() -> None:
    assert Rule(above=0, most=1).broken(0) == "be above 0 and at most 1"
    assert Rule(least=2).broken([2, 1]) == "be at least 2"
    assert Rule(count=2).broken([1]) == "hold 2 values" and Rule().broken([]) == "hold at least one value"
    assert Rule().broken(["a", "b", "a"]) == "hold each value once" and not Rule().broken(None)


def test_a_group_that_is_given_in_part_keeps_the_other_settings() -> None:
    usual = settled("07_sparsification", {})["TEXT"]
    assert settled("07_sparsification", {"TEXT": {"length": 9}})["TEXT"] == {**usual, "length": 9}
    smoke = settled("07_sparsification", {}, "smoke")["TEXT"]
    assert smoke["n_test"] == 4 and smoke["task"] == usual["task"]
    both = settled("07_sparsification", {"TEXT": {"length": 9}}, "smoke")["TEXT"]
    assert both == {**smoke, "length": 9}


@pytest.mark.parametrize(
    ("chapter", "given", "message"),
    [
        ("1", ["SHARE", "'0.02'"], "the parameter SHARE must be of the type of its default 0.02, not '0.02'"),
        ("3", ["LAYERS", "[a]"], r"the parameter LAYERS must be of the type of \[0\], or null"),
        ("1", ["REVISION", "12"], "the parameter REVISION must be of the type of 'main', or null"),
        ("7", ["PRUNING", "{tops: 1}"], r"PRUNING has no 'tops' .given 1.; did you mean top\?"),
        ("7", ["PRUNING", "{top: 0.1}"], r"the parameter PRUNING.top must be of the type of its default \["),
        ("8", ["KEPT", "{rows: [0.6], columns: 2}"], "the parameter KEPT.columns must be above 0"),
        (
            "9",
            ["DOMAINS", "{math: math, health: [health]}"],
            "the parameter DOMAINS.math must be of the type",
        ),
        ("11", ["COAR", "{ablated: 0.1, ablation: 9}"], "did you mean ablations"),
        ("7", ["RATES", "[0.01, 0.01]"], "the parameter RATES must hold each value once"),
        ("7", ["SUBJECTS", "[]"], "the parameter SUBJECTS must hold at least one value"),
        ("8", ["MATRICES", "[all]"], "the parameter MATRICES must hold 2 values"),
    ],
)
def test_wrong_types_and_groups_are_refused_before_anything_runs(
    chapter: str,
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(runs, "execute", None)
    assert main(["run", chapter, "-p", *given, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_none_stands_for_all_where_the_notebook_says_so() -> None:
    for name, chapter in {"N_QUESTIONS": "06_embedding_attacks", "N_IMAGES": "04_fragile_pixels"}.items():
        assert settled(chapter, {name: None})[name] is None
    assert settled("03_what_fi_can_say", {"LAYERS": [0, -1], "REVISION": "abc"})["LAYERS"] == [0, -1]


def test_a_grid_is_refused_whole_before_any_cell_runs(tmp_path: Path) -> None:
    from fichapters.sweeps import cells_of

    notebook = find_chapter(ROOT / "notebooks", "1")
    with pytest.raises(ValueError, match="the parameter SHARE must be above 0 and at most 1, not 2"):
        cells_of(notebook, "smoke", {"SHARE": [0.01, 2]}, tmp_path)
    assert len(cells_of(notebook, "smoke", {"SHARE": [0.01, 0.5]}, tmp_path)) == 2


# --- what depends on a task is refused before a model is opened


OPENING = [chapter for chapter in NOTEBOOKS if chapter != "12_claims"]  # reads what others found


@pytest.mark.parametrize("chapter", OPENING)
def test_a_chapter_opens_its_model_first_of_all_that_takes_long(
    chapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Opened):
        run_until_opened(chapter, settled(chapter, {}, "smoke"), tmp_path, monkeypatch)


def refused() -> Iterator[tuple[str, str, Any, str]]:
    for chapter in OPENING:
        known = settled(chapter, {}, "smoke")
        for name, wrong, said in [
            ("SUBJECT", "alchemy", "alchemy"),
            ("SUBJECTS", ["alchemy"], "alchemy"),
            ("TASK", "no/such/task", "no/such/task"),
            ("DOMAINS", {"math": ["math"], "alchemy": ["alchemy"]}, "alchemy"),
            ("BATCHES", [1, 100_000], "lower n"),
            ("TEXT.task", "no/such/task", "no/such/task"),
            ("TEXT.n_calibration", 100_000, "lower n"),
            ("N_CALIBRATION", 100_000, "lower n|leave none"),
            ("N_TEST", 100_000, "lower n"),
            ("N_ASKED", 100_000, "lower n"),
            ("N_QUESTIONS", 100_000, "lower n"),
            ("PRUNING.test", 100_000, "lower n"),
            ("OPTIONS.choices", ["FI exakt"], "Nothing is protected by 'FI exakt'; did you mean FI exact"),
            ("OPTIONS.choices", ["FI damped x"], "Nothing is protected by 'FI damped x'"),
            ("OPTIONS.elected", "mean", "did you mean elect"),
            ("NONSENSE.n", 100_000, "lower n"),
            ("NONSENSE.bits", 5, "bits"),
            ("NONSENSE.bit", 2, "did you mean bits"),
            ("N_DIGITS", 400, "lower it"),
            ("SWEPT.heads", 5, "SWEPT needs"),
            ("LARGE", "Llama-9", "LARGE knows no 'Llama-9'"),
            ("HARDWARE", {"A100": [1, 2]}, "HARDWARE needs of 'A100' three numbers"),
            ("BITS.swept", [5], "bits must be one of"),
            ("KEPT.rows", [0.6], "not 0.6"),
        ]:
            takes_all = chapter == "09_merging" and name == "N_TEST"  # as many as there are
            if name.partition(".")[0] in known and not takes_all:
                yield chapter, name, wrong, said


@pytest.mark.parametrize(("chapter", "name", "wrong", "said"), list(refused()))
def test_what_a_task_does_not_have_is_said_before_a_model_is_opened(
    chapter: str, name: str, wrong: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_value(settled(chapter, {}, "smoke"), name, wrong)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        run_until_opened(chapter, settled(chapter, given, "smoke"), tmp_path, monkeypatch)
    assert "\n" not in str(error.value)


def test_protection_goes_by_fi_with_any_filter() -> None:
    options = {"densities": [0.5], "wide": [1.0], "compared": 0.05, "choices": ["FI damped 1e-2", "SNIP"]}
    p = SimpleNamespace(**settled("09_merging", {"OPTIONS": options}, "smoke"))
    assert merging.choices(p) == ("FI damped 0.01", "SNIP", *merging.FILTERS, merging.RANDOM)
    assert merging.score_of("FI damped 0.01") == "FI damped 0.01"
    assert merging.score_of("predicted change") == "squared score"
    for wrong in ("Wanda", "saliency", "FI damped 1 2"):
        with pytest.raises(ValueError, match=f"Nothing is protected by '{wrong}'"):
            merging.score_of(wrong)


def test_what_a_model_does_not_have_is_said_before_anything_is_run() -> None:
    model = models.open_model("mini-lm")
    depth = model.network.config.num_hidden_layers
    with pytest.raises(ValueError, match=f"no block 99: the network's {depth} blocks are 0 to {depth - 1}"):
        limits.look_at(model.network, [0, 99])
    for blocks in ([0], [-1], list(range(depth - 1))):
        with pytest.raises(ValueError, match=rf"the last block \({depth - 1}\) and an earlier one"):
            limits.look_at(model.network, blocks)
    assert limits.look_at(model.network, [0, -1])
    with pytest.raises(KeyError, match=r"has no weight 'model\.layer'"):
        manifold.weight_of(model, "model.layer")
