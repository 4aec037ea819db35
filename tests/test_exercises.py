"""Every exercise, as it stands in its chapter: the starter is not yet solved, the folded solution is."""

import ast
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from fichapters.ch01 import check as ch01
from fichapters.ch02 import check as ch02
from fichapters.ch03 import check as ch03
from fichapters.ch04 import check as ch04
from fichapters.ch05 import check as ch05
from fichapters.ch06 import check as ch06
from fichapters.ch07 import check as ch07
from fichapters.ch08 import check as ch08
from fichapters.ch09 import check as ch09
from fichapters.ch10 import check as ch10
from fichapters.ch12 import check as ch12
from fichapters.ch13 import check as ch13
from fichapters.exercises import NOT_YET, Verdict, Wrong, equal, exercise, number
from fichapters.runs import chapters
from fihelpers import influence

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = chapters(ROOT / "notebooks")
STARS = {"one star": 1, "two stars": 2, "three stars": 3}
HEADING = re.compile(r"### Exercise (\d) \((one star|two stars|three stars)\): \w")
SOLUTION = re.compile(
    r"<details>\n<summary>Solution of exercise (\d)</summary>\n\n```python\n(.*?)```\n\n.+\n\n</details>",
    re.DOTALL,
)
Names = dict[str, Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise as the notebook has it: its texts, and the code of the cells."""

    chapter: str
    question: str
    setup: str
    starter: str
    folded: str

    @property
    def number(self) -> int:
        return int(self._heading()[1])

    @property
    def stars(self) -> int:
        return STARS[self._heading()[2]]

    @property
    def given(self) -> list[ast.stmt]:
        """What the starter says before the check."""
        return ast.parse(self.starter).body[:-1]

    @property
    def check(self) -> ast.Call:
        """The call of the check, the starter's last line."""
        last = ast.parse(self.starter).body[-1]
        assert isinstance(last, ast.Expr) and isinstance(last.value, ast.Call), "end with the check"
        return last.value

    @property
    def answers(self) -> list[str]:
        """The names whose dots the reader replaces."""
        return [
            node.targets[0].id
            for node in self.given
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and any(isinstance(part, ast.Constant) and part.value is ... for part in ast.walk(node.value))
        ]

    @property
    def solution(self) -> str:
        found = SOLUTION.fullmatch(self.folded)
        assert found, f"fold the solution, with one block of code and a reason:\n{self.folded}"
        assert int(found[1]) == self.number
        return found[2]

    def names(self, solved: bool) -> Names:
        """What the names stand for when the reader comes to the check."""
        names: Names = {}
        exec(self.setup, names)
        exec(compile(ast.Module(self.given, []), self.chapter, "exec"), names)
        if solved:
            exec(self.solution, names)
        return names

    def verdict(self, names: Names) -> Verdict:
        found = eval(compile(ast.Expression(self.check), self.chapter, "eval"), names)
        assert isinstance(found, Verdict)
        return found

    def _heading(self) -> re.Match[str]:
        found = HEADING.match(self.question)
        assert found, f"begin with '### Exercise n (one star): ...':\n{self.question}"
        return found


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def exercises_of(path: Path) -> list[Exercise]:
    cells = nbformat.read(path, as_version=4).cells
    setup = "".join(cell.source for cell in cells if tagged(cell, "exercise-setup"))
    places = [place for place, cell in enumerate(cells) if tagged(cell, "exercise")]
    return [
        Exercise(path.stem, cells[i - 1].source, setup, cells[i].source, cells[i + 1].source) for i in places
    ]


EXERCISES = [found for path in NOTEBOOKS for found in exercises_of(path)]
each_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_exercise = pytest.mark.parametrize(
    "found", EXERCISES, ids=lambda found: f"{found.chapter[:2]}-{found.number}"
)


@each_chapter
def test_a_chapter_has_three_to_five_exercises_of_rising_difficulty(path: Path) -> None:
    found = exercises_of(path)
    assert 3 <= len(found) <= 5
    assert [e.number for e in found] == list(range(1, len(found) + 1))
    stars = [e.stars for e in found]
    assert stars == sorted(stars) and stars[0] == 1 and stars[-1] == 3


@each_chapter
def test_exercises_come_after_the_results_and_before_the_end(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    own = [place for place, cell in enumerate(cells) if tagged(cell, "exercise")]
    results = [place for place, cell in enumerate(cells) if "run.keep(" in cell.source]
    assert max(results) < min(own)
    assert max(own) + 1 < len(cells) - 1  # after the last solution something sums up
    assert not any(cell.cell_type == "code" for cell in cells[max(own) + 1 :])


@each_chapter
def test_every_check_of_a_chapter_is_asked_for_once(path: Path) -> None:
    module = importlib.import_module(f"fichapters.ch{path.stem[:2]}.check")
    checks = {
        name
        for name, value in vars(module).items()
        if hasattr(value, "__wrapped__") and value.__module__ == module.__name__
    }
    asked = [ast.unparse(found.check.func) for found in exercises_of(path)]
    assert sorted(asked) == sorted(f"check.{name}" for name in checks)
    assert f"from fichapters.ch{path.stem[:2]} import check" in exercises_of(path)[0].setup


@each_exercise
def test_the_prose_types_no_number_that_could_be_a_result(found: Exercise) -> None:
    prose = found.question + re.sub(r"```.*?```", "", found.folded, flags=re.DOTALL)
    assert not re.search(r"\d\.\d", prose), "give numbers in the code cell"


@each_exercise
def test_the_starter_is_not_yet_solved_and_the_solution_is(found: Exercise) -> None:
    assert found.answers
    assert found.verdict(found.names(solved=False)) == Verdict(False, NOT_YET)
    verdict = found.verdict(found.names(solved=True))
    assert verdict.solved, verdict.message
    assert verdict.message.startswith("Solved. ")


JUNK = ["text", "", float("nan"), float("inf"), -1.0, 0, 10**9, 0.123456, [], [0.5, 0.25], {}, {"s": 1.0}]
JUNK += [
    (1, -2, 3),
    {"a"},
    object(),
    np.ones(2),
    torch.zeros(()),
    torch.full((2, 2), 1e6),
    [["x"]],
    [object()],
]


@each_exercise
def test_a_wrong_answer_gets_a_hint_and_neither_a_crash_nor_the_solution(found: Exercise) -> None:
    names = found.names(solved=True)
    secrets = [text for name in found.answers if (text := telling(names[name])) and text not in found.starter]
    for name in found.answers:
        for junk in JUNK:
            verdict = found.verdict({**names, name: junk})
            assert not verdict.solved, f"{name} = {junk!r} is taken for right"
            assert verdict.message.startswith("Not quite. ") and len(verdict.message) > 25
            assert not [secret for secret in secrets if secret in verdict.message]


def telling(value: Any) -> str:
    """A right answer as a message would print it; "" for what a message may hold by chance."""
    single = isinstance(value, float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return f"{float(value):.3g}" if single and not float(value).is_integer() else ""


@each_exercise
def test_an_answer_filled_in_part_is_not_looked_at(found: Exercise) -> None:
    names = found.names(solved=True)
    for name in found.answers:
        for missing in (..., None, [1, ...], {"s": ..., "G": 1}, {...}):
            assert found.verdict({**names, name: missing}) == Verdict(False, NOT_YET)


P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
S = torch.tensor([0.05, 0.2, -0.9], dtype=torch.float64)
RAW = {"A": 0.12, "B": 0.54, "C": 0.06, "D": 0.03}
G = float((P * S**2).sum())
FI = float(S[0] ** 2 / G)
SHARES, CURVE = [0, 0.01, 0.02, 0.05, 0.1], [-0.2, -0.5, -0.8, -1.4, -1.6]
SIX = torch.tensor([0.3, -0.1, 0.02, -0.6, 0.05, 0.2], dtype=torch.float64)

THREE = (
    {"a": 0.004, "b": 0.3, "c": 0.05},
    {"a": 2e-5, "b": 0.2, "c": 0.005},
    {"a": 0.01, "b": 0.02, "c": 5.8},
)
SLIPS = [  # a check, what it is given, and a word of its hint
    (ch01.probability_of_b, (0.54, RAW), "other words"),
    (ch01.times_wider, (15, (9, 10), (135, 150)), "more questions"),
    (ch01.unseen_damage, ([0.9, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]), "sums to 1.200"),
    (ch01.unseen_damage, ([0.7, 0.1, 0.1, 0.1], [0.3, 0.4, 0.2, 0.1]), "accuracy notices"),
    (ch01.unseen_damage, ([0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]), "keeps 57%"),
    (ch02.free_gradient, (0.4 * 0.5 - 0.1 / 0.6, P, 0.4, -1.0), "sign"),
    (ch02.by_hand, (0.05**2 + 0.2**2 + 0.9**2, 0, 0, P, S), "probabilities out"),
    (ch02.by_hand, (G, 0.05**2, 0, P, S), "divide by the metric"),
    (ch02.by_hand, (G, FI, 1.5, P, S), "odds *for*"),
    (ch02.half_way, (1e-09, P, S), "too small"),
    (ch02.half_way, (1e9, P, S), "too large"),
    (ch02.other_units, ({"s": 100, "G": 1, "FI": 1},), "other way"),
    (ch02.other_units, ({"s": 0.01, "G": 0.01, "FI": 1},), "more than once"),
    (ch02.two_orders, ([[1.0, 0.01], [-0.5, 0.01]], P), "should be ahead"),
    (ch02.two_orders, ([[1.0, 1.0], [1.0, 0.9]], P), "10 times"),
    (ch03.largest_confidence, (2.5 / 3.5, 2.5), "*against*"),
    (ch03.flat_maps, (["x", "y"], {"x": (2, 1), "y": (4, 1)}), "can rank"),
    (ch03.flat_maps, (["x"], {"x": (2, 1), "y": (4, 3)}), "missing"),
    (ch03.filter_takes_over, (1e-06, *ch03.many_weights()), "share 1"),
    (ch03.filter_takes_over, (100.0, *ch03.many_weights()), "smaller"),
    (ch04.fewest_tokens, (5, 13, 3, 2), "no token"),
    (ch04.fewest_tokens, (4, 12, 3, 2), "still at the ceiling"),
    (ch04.mean_height, (float(np.mean(CURVE)), SHARES, CURVE), "evenly spaced"),
    (ch04.costly_pixel, (torch.full((3, 8, 8), 240.0),), "one colour"),
    (ch04.costly_pixel, (255 * torch.eye(8).expand(3, 8, 8),), "beside everything"),
    (ch05.odds_factor, (0.8 / 0.7, 0.7, 0.8), "odds against"),
    (ch05.bonferroni, (0.95 ** (1 / 20), 1, 20, 0.95), "Šidák"),
    (ch05.bonferroni, (0.99, 1, 20, 0.95), "too large"),
    (ch05.mean_of_ratios, ([2, 0.5, 1, 1],), "fall"),
    (ch05.controlled, ("any sentence does it",), "unrelated"),
    (ch06.one_token, (1 / 64, 64), "root"),
    (ch06.promise, (0.4 * 0.45**0.5, SIX, 8.0, 0.05, 2), "sign"),
    (ch06.best_moves, (0.2 * SIX, SIX, SIX, 1.0), "raises"),
    (ch06.best_moves, (-0.1 * SIX.sign(), SIX, SIX, 1.0), "of what is possible"),
    (ch06.what_the_control_says, ("the model is robust",), "size of the damage"),
    (ch07.words_shared, (2 / 6 + 1, "a b", "c a"), "too large"),
    (ch07.dispensable, (1.0, [-0.5, -0.5], P), "does not look at the weight"),
    (ch07.dispensable, (0.1, [1.0, -3.0], P), "half of it or more"),
    (ch08.stored_bits, (0.9 * 2 + 1.6, 2, 112, 0.1), "scales are stored"),
    (ch08.stored_bits, (2 + 16 / 112 + 1.6, 2, 112, 0.1), "instead of their codes"),
    (ch08.one_bit, ([0.1, -0.1], torch.tensor([0.3, 0.1])), "old minus new"),
    (ch08.one_bit, ([0.2, 0.2], torch.tensor([0.3, 0.1])), "rounded weights"),
    (ch08.one_bit, ([0.0, 0.2], torch.tensor([0.3, 0.1])), "*mean* magnitude"),
    (ch08.what_joint_says, ("the large weights",), "no weight enters"),
    (ch08.worth_keeping, ([0, 0], torch.eye(3), torch.eye(3), 1, 2), "named twice"),
    (ch09.same_as_average, (1.0, 0.0, 2.0, 5.0), "the sum, not the mean"),
    (ch09.put_back, (0.2, 0.1, 0.25), "stay merged"),
    (ch09.put_back, (0.175, 0.1, 0.25), "by neither"),
    (ch09.stage_two, (SIX[:2], SIX[:2], -SIX[:2], SIX[2:4], SIX[:2] > 0, SIX[:2] < 0), "without protection"),
    (ch09.stage_two, ([1, 2], SIX[:2], torch.ones(2), SIX[2:4], SIX[:2] < 1, SIX[:2] > 0), "entries are off"),
    (ch09.which_control, ("the base model",), "what merging brings"),
    (
        ch09.fair_to_both,
        ([1], torch.ones(2), torch.tensor([4.0, 9.0]), torch.tensor([0.1, 5.0]), 1),
        "for both",
    ),
    (ch12.headline, ("does not hold", {"exact": (0, 3, 3), "damped": (4, 1, 1)}), "setting says nothing"),
    (ch12.by_chance, (16.5, 330, 0.95), "other side"),
    (ch12.questions_needed, (960, 240, 0.04, 0.01), "root"),
    (ch12.still_hold, (2, [(0.001, 0.041), (0.02, 0.06)], 0.95), "before the correction"),
    (ch13.first_by, ("b", "c", *THREE), "the value of the weight plays no part"),
    (ch13.first_by, ("a", "b", *THREE), "multiply the score"),
    (ch13.finer_steps, (8, [0.1, -0.5, 3.0], 3), "both ladders have as many"),
    (ch13.finer_steps, (1 / 6, [0.1, -0.5, 3.0], 3), "the other way round"),
    (ch13.found, ((9, 0, 0), ch13.planted()), "another block"),
    (ch10.passes, (13, 6, 6), "a class too many"),
    (ch10.passes, (11, 5, 6), "there is a forward pass"),
    (ch10.largest_model, (40, 80, 2, 4), "no room for the scores"),
    (ch10.largest_model, (80 / 14, 80, 2, 4), "combined on the spot"),
    (ch10.fewest_tokens, (1.0, 1, 1, 4), "too large"),
    (ch10.fewest_tokens, (2 / 7, 1, 1, 4), "read *and* written"),
    (ch10.fewest_tokens, (4 / 9, 1, 1, 4), "one of them is free"),
    (ch10.without_gradients, ([0.2, -0.1], ch10.black_box()), "below zero"),
    (ch10.without_gradients, ([0.9, 0.9], ch10.black_box()), "ceiling"),
]


@pytest.mark.parametrize(("check", "given", "hint"), SLIPS)
def test_a_known_slip_gets_its_own_hint(
    check: Callable[..., Verdict], given: tuple[Any, ...], hint: str
) -> None:
    verdict = check(*given)
    assert not verdict.solved
    assert hint in verdict.message


@pytest.mark.filterwarnings("ignore::fihelpers.influence.SaturationWarning")
@pytest.mark.parametrize(("k", "dims"), [(2, 1), (4, 1), (4, 2), (4, 3), (9, 3), (9, 12)])
def test_the_count_of_flat_maps_is_what_the_measure_does(k: int, dims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(k, generator=generator, dtype=torch.float64) + 0.1
    grads = torch.randn(k, 50, dims, generator=generator, dtype=torch.float64)
    values = influence.fi(grads, probs, over=1)
    flat = bool(influence.saturated(values, probs).double().mean() > 0.5)
    assert ch03.flat_maps(["map"] if flat else [], {"map": (k, dims)}).solved


def test_numbers_are_read_from_what_a_notebook_holds() -> None:
    for value in (0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([[0.5]])):
        assert number(value) == 0.5
    for value in (True, "0.5", [0.5], np.ones(3), float("nan")):
        with pytest.raises(Wrong):
            number(value)


def test_a_number_with_three_digits_is_right_and_a_percentage_is_told() -> None:
    equal(0.333, 1 / 3, {})
    with pytest.raises(Wrong, match="percentage"):
        equal(33.3, 1 / 3, {})
    with pytest.raises(Wrong, match="wrong sign"):
        equal(-0.2, 1 / 3, {})
    equal(2.0, 2.0, {"a slip with the value of the truth says nothing": 2.0})


def test_a_fault_of_the_check_itself_is_not_hidden() -> None:
    @exercise
    def broken(answer: object) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken(1)
    assert not broken(...).solved


def test_a_message_is_wrapped_on_a_terminal_and_marked_up_on_a_page() -> None:
    shown = repr(Verdict(True, "word " * 60))
    assert max(map(len, shown.splitlines())) <= 96
    assert Verdict(False, "Not quite. See 1.5.")._repr_markdown_() == "**Not quite.** See 1.5."
    assert Verdict(False, NOT_YET)._repr_markdown_().startswith("**Not yet:** put")
