"""The parameters of a chapter: precedence, refusals, and where they are read from."""

from pathlib import Path
from typing import Any

import pytest
from conftest import WriteChapter

from fichapters.parameters import declared, executed, profiles_folder, read_profile, settle, spoken

DEFAULTS = {"PROFILE": "embedded", "SEED": 0, "N_TEST": 10, "RATES": [0, 0.5], "REVISION": None, "FAST": True}


def test_the_caller_goes_before_the_profile_and_the_profile_before_the_default() -> None:
    profile = {"all": {"SEED": 1, "N_TEST": 1, "OTHER": 1}, "07_x": {"N_TEST": 2}, "08_y": {"SEED": 9}}
    assert settle("07_x", DEFAULTS, {}, {}) == DEFAULTS
    assert settle("07_x", DEFAULTS, profile, {}) == {**DEFAULTS, "SEED": 1, "N_TEST": 2}
    assert settle("07_x", DEFAULTS, profile, {"N_TEST": 3})["N_TEST"] == 3
    assert settle("09_z", DEFAULTS, profile, {"SEED": 5}) == {**DEFAULTS, "SEED": 5, "N_TEST": 1}


@pytest.mark.parametrize("as_profile", [True, False])
def test_an_unknown_name_is_refused_with_its_value_and_the_nearest_name(as_profile: bool) -> None:
    wrong = {"N_TESTS": 12}
    with pytest.raises(
        ValueError, match=r"07_x has no parameter N_TESTS .given 12.; did you mean N_TEST\? Known: .*RATES"
    ):
        settle("07_x", DEFAULTS, {"07_x": wrong} if as_profile else {}, {} if as_profile else wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED", "0"),
        ("SEED", True),
        ("SEED", 0.5),
        ("RATES", 0.5),
        ("RATES", ["1e-3"]),
        ("FAST", 1),
        ("PROFILE", None),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"the parameter {name} must be of the type of its default"):
        settle("07_x", DEFAULTS, {}, {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("RATES", [1, 0.25]), ("RATES", []), ("REVISION", "abc"), ("FAST", False)]
)
def test_a_value_of_a_fitting_type_is_taken(name: str, value: Any) -> None:
    assert settle("07_x", DEFAULTS, {}, {name: value})[name] == value


def test_a_profile_cannot_change_the_profile() -> None:
    with pytest.raises(ValueError, match="cannot set PROFILE"):
        settle("07_x", DEFAULTS, {"all": {"PROFILE": "paper"}}, {})


def test_declared_reads_the_tagged_cell_alone(write_chapter: WriteChapter) -> None:
    path = write_chapter("SECRET = 5")
    assert declared(path) == {
        "PROFILE": "embedded",
        "SEED": 0,
        "N": 3,
        "RATES": [0, 0.5],
        "MODEL": "mini",
        "LIMIT": None,
    }
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match="has 0 cells tagged parameters"):
        declared(path)
    path.write_text("no notebook")
    with pytest.raises(ValueError, match="is not a notebook"):
        declared(path)


def test_the_latest_execution_holds() -> None:
    first, again = 'PROFILE = "smoke"\nSEED = 0', 'PROFILE = "smoke"\nSEED = 1'
    injected = "# Parameters\nSEED = 7\n"
    assert executed(["", first, injected, "begin()"]) == ({"PROFILE": "smoke", "SEED": 0}, {"SEED": 7})
    assert executed([first, injected, "1 +", again]) == ({"PROFILE": "smoke", "SEED": 1}, {})
    assert executed([first, injected, "# Parameters\nSEED = 8"])[1] == {"SEED": 8}
    with pytest.raises(ValueError, match="no executed cell assigns PROFILE"):
        executed(["SEED = 3", injected])
    with pytest.raises(ValueError, match="SEED must be a plain literal, not 1 \\+ x"):
        executed(['PROFILE = "smoke"\nSEED = 1 + x'])


def test_values_from_the_command_line() -> None:
    assert spoken("[0, 1e-3, .5]", [0.0]) == [0, 0.001, 0.5]
    assert spoken("12", "text") == "12"
    assert spoken("null", None) is None
    with pytest.raises(ValueError, match="the value '\\[0' is not valid YAML"):
        spoken("[0", [0.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all: {NN: 2}", "sets NN to 2 for all; did you mean N\\?"),
        ("01_tinny: {N: 2}", "has a section '01_tinny'; did you mean 01_tiny\\?"),
        ("N: 2", "must hold sections"),
        ("all: {N", "is not valid YAML"),
    ],
)
def test_a_faulty_profile_is_refused(write_chapter: WriteChapter, text: str, message: str) -> None:
    folder = write_chapter().parent / "profiles"
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_profile(folder, "mine")
    with pytest.raises(FileNotFoundError, match="unknown profile 'smok'; did you mean smoke\\?"):
        read_profile(folder, "smok")


def test_the_profiles_are_found(write_chapter: WriteChapter, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks = write_chapter().parent
    assert profiles_folder().resolve() == notebooks / "profiles"
    monkeypatch.chdir(notebooks)
    assert profiles_folder().resolve() == notebooks / "profiles"
    monkeypatch.setenv("FIHELPERS_PROFILES", "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"was not found \(elsewhere\)"):
        profiles_folder()
    Path("elsewhere").mkdir()
    assert profiles_folder() == Path("elsewhere")
