"""The parameters of a chapter: what its notebook declares, and what a profile or the caller sets instead.

Precedence: the caller (papermill's ``-p``), then the profile, then the notebook's own default. A name that
the notebook does not declare is an error, because papermill itself only warns.
"""

import ast
import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fichapters.settings import agreed

NOTEBOOKS = "[0-9][0-9]_*.ipynb"  # other notebooks in the folder are the reader's own
INJECTED = "# Parameters"  # the first line of the cell that papermill injects
EVERY_CHAPTER = "all"  # the section of a profile that holds for each chapter that declares its names
MINUTES = "minutes"  # the section that says how long chapters take; it names those that the profile runs
# parameters that may be None, each with an example of its other values
OR_NONE: Mapping[str, Any] = {"REVISION": "main", "LAYERS": [0], "N_IMAGES": 1, "N_QUESTIONS": 1}
# groups of settings whose names are not all in the default: what reads them checks them
FREE = ("DOMAINS", "OPTIONS")

Section = Mapping[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def declared(notebook: Path) -> dict[str, Any]:
    """Read the names and defaults in the cell of a notebook that is tagged ``parameters``.

    Raises ValueError if the notebook has not exactly one such cell, or a default is not a plain literal.
    """
    cells = _parameters_cells(notebook)
    if len(cells) != 1:
        raise ValueError(f"{notebook} has {len(cells)} cells tagged parameters; it needs exactly one.")
    return _literals(cells[0])


def executed(cells: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find the declared and the injected parameters among the cells that a kernel has executed, in order.

    Declared are the names of the cell that assigns PROFILE, injected those of the cell that papermill adds
    after it. Where cells were executed again the latest holds, as it does for the notebook's own variables.
    """
    injected: dict[str, Any] = {}
    for source in reversed(cells):
        if source.lstrip().startswith(INJECTED):
            injected = injected or _literals(source)
        elif "PROFILE" in _assignments(source):
            return _literals(source), injected
    raise ValueError("no executed cell assigns PROFILE; run the cell tagged parameters first.")


def spoken(text: str, default: Any) -> Any:
    """Read a value typed on the command line: as it stands where the default is text, otherwise as YAML."""
    return text if isinstance(default, str) else parse_yaml(text, f"the value {text!r}")


def profiles_folder() -> Path:
    """Return the folder of the profiles.

    It is ``FIHELPERS_PROFILES``, else ``profiles`` or ``notebooks/profiles`` in the working directory, else
    the checkout's ``notebooks/profiles``. Raises FileNotFoundError if none is there.
    """
    named = os.environ.get("FIHELPERS_PROFILES")
    checkout = Path(__file__).resolve().parents[1]
    usual = [Path("profiles"), Path("notebooks/profiles"), checkout / "profiles"]
    for folder in [Path(named)] if named else usual:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the folder of profiles was not found ({named or 'notebooks/profiles'}); run from a checkout, "
        "or set FIHELPERS_PROFILES."
    )


def read_profile(folder: Path, profile: str) -> dict[str, Section]:
    """Read ``{profile}.yaml``: sections ``all`` and names of chapters, each a mapping from name to value.

    Raises FileNotFoundError for an unknown profile, and ValueError for a file of another shape, a section
    that is no chapter, or a name under ``all`` that no chapter declares.
    """
    path = folder / f"{profile}.yaml"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if profile not in known:
        raise FileNotFoundError(f"unknown profile {profile!r}{nearest(profile, known)}")
    sections = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(sections, dict) or not all(isinstance(names, dict) for names in sections.values()):
        raise ValueError(f"{path} must hold sections (all, or a chapter's name) that map names to values.")
    notebooks = sorted(folder.parent.glob(NOTEBOOKS))
    chapters = [EVERY_CHAPTER, *(notebook.stem for notebook in notebooks)]
    names = {name for nb in notebooks for cell in _parameters_cells(nb) for name in _assignments(cell)}
    for section in [*sections, *sections.get(MINUTES, {})]:
        if section not in (*chapters, MINUTES):
            raise ValueError(f"{path} has a section {section!r}{nearest(section, chapters)}")
    for name, value in sections.get(EVERY_CHAPTER, {}).items():
        if name not in names:
            raise ValueError(f"{path} sets {name} to {value!r} for all{nearest(name, sorted(names))}")
    return sections


def read_minutes(folder: Path, profile: str) -> dict[str, int]:
    """The minutes that chapters take under a profile, on two quiet cores, in the order of its file.

    Raises what `read_profile` raises, and ValueError for a profile that does not say so.
    """
    minutes = read_profile(folder, profile).get(MINUTES)
    if not minutes:
        raise ValueError(
            f"the profile {profile!r} has no section {MINUTES!r}, so it says of no chapter to run."
        )
    return dict(minutes)


def settle(chapter: str, defaults: Section, profile: Mapping[str, Section], given: Section) -> dict[str, Any]:
    """Return one value for each declared name: the given one, else the profile's, else the default.

    A group of settings that is given in part keeps the others. Values that have to be in a list join it
    (:func:`fichapters.settings.agreed`). Raises ValueError for a name the chapter does not declare, a value
    of another type than the default's (an int may stand for a float, and a default of None takes anything,
    but for OR_NONE), settings in a group that the default's has not, what `agreed` refuses, and a profile
    that sets PROFILE.
    """
    own = profile.get(chapter, {})
    shared = {name: value for name, value in profile.get(EVERY_CHAPTER, {}).items() if name in defaults}
    for name, value in [*own.items(), *given.items()]:
        if name not in defaults:
            raise ValueError(f"{chapter} has no parameter {name} (given {value!r}){nearest(name, defaults)}")
    if "PROFILE" in {**shared, **own}:
        raise ValueError("a profile cannot set PROFILE; choose the profile with --profile or -p PROFILE.")
    settled = dict(defaults)
    for name, value in [*shared.items(), *own.items(), *given.items()]:
        whole = name in FREE or not (isinstance(value, dict) and isinstance(defaults[name], dict))
        settled[name] = value if whole else {**settled[name], **value}
    try:
        for name, value in settled.items():
            if not (value is None and name in OR_NONE):
                check_value(name, value, defaults[name])
        return agreed(settled, defaults)
    except ValueError as error:
        raise ValueError(f"{chapter}: {error}") from None


def check_value(name: str, value: Any, default: Any) -> None:
    """Raise ValueError for a value of another type than a default, or a setting of a group that is so."""
    wanted = f"of the type of its default {default!r}"
    if default is None and name in OR_NONE:
        default = OR_NONE[name]
        wanted = f"of the type of {default!r}, or null"
    if not _fits(value, default):
        raise ValueError(f"the parameter {name} must be {wanted}, not {value!r}.")
    if not isinstance(default, dict):
        return
    for key in value:
        if key not in default and name not in FREE:
            raise ValueError(
                f"the parameter {name} has no {key!r} (given {value[key]!r}){nearest(key, default)}"
            )
        if key in default:
            check_value(f"{name}.{key}", value[key], default[key])


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return (f"; did you mean {close[0]}?" if close else ".") + f" Known: {', '.join(known)}."


def _parameters_cells(notebook: Path) -> list[str]:
    """Sources of the cells tagged ``parameters`` (read as JSON: importing nbformat takes a second)."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{notebook} is not a notebook ({error!r}).") from error
    return ["".join(cell["source"]) for cell in tagged]


def _assignments(source: str) -> dict[str, ast.expr]:
    """Plain assignments ``NAME = value`` of a cell; none where it is not Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            found.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def _literals(source: str) -> dict[str, Any]:
    values = {}
    for name, node in _assignments(source).items():
        try:
            values[name] = ast.literal_eval(node)
        except ValueError:
            message = f"the parameter {name} must be a plain literal, not {ast.unparse(node)}."
            raise ValueError(message) from None
    return values


def parse_yaml(text: str, origin: str) -> Any:
    """Read YAML; raises ValueError, naming its origin, where it is none."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {str(error).splitlines()[0]}.") from error


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list) and all(
            not default or any(_fits(item, example) for example in default) for item in value
        )
    return isinstance(value, type(default))
