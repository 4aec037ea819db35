"""What the values of parameters must keep, and how they agree, before anything runs.

Names mean the same in every chapter; "PRUNING.top" is the setting `top` of the parameter PRUNING. A rule
holds where the notebook's own default keeps it: a reader's own notebook may use a name for something else.
What depends on a task or a model is checked by the chapters themselves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# values that stand for one of a list: they join it, so that what is spoken of has been run
JOINS = {
    "SHARE": "SHARES",
    "MASK_SHARE": "MASK_SHARES",
    "BUDGET": "BUDGETS",
    "HEADLINE_RATE": "RATES",
    "PRUNING.compared": "PRUNING.bottom",
    "BITS.full": "BITS.tried",
}


@dataclass(frozen=True)
class Rule:
    """Where a number, or each of a list, must lie: above `above`, or at least `least`, and at most `most`.

    No list is empty, and none holds a value twice, but where `repeats`. count: of its values. rising: it is
    sorted, since the first and the last are spoken of.
    """

    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    count: int | None = None
    repeats: bool = False
    rising: bool = False

    def broken(self, value: Any) -> str:
        """What a value has to do instead; empty where it keeps the rule, or is None."""
        values = value if isinstance(value, list) else [] if value is None else [value]
        if isinstance(value, list) and len(value) != (self.count or max(1, len(value))):
            return f"hold {self.count} values" if self.count else "hold at least one value"
        if not all(isinstance(x, str) or self._holds(x) for x in values):
            low = f"above {self.above:g}" if self.above > -math.inf else f"at least {self.least:g}"
            return f"be {low}" + (f" and at most {self.most:g}" if self.most < math.inf else "")
        repeated = any(x in values[:place] for place, x in enumerate(values))
        return "hold each value once" if repeated and not self.repeats else ""

    def _holds(self, x: Any) -> bool:
        return isinstance(x, int | float) and self.above < x and self.least <= x <= self.most


_NAMES = {
    Rule(): "SUBJECTS TASK_WEIGHTS",
    Rule(count=2, repeats=True): "MATRICES",
    Rule(above=0): "BUDGET COMPONENTS.radius",
    Rule(above=0, rising=True): "BUDGETS BLIND.levels",
    Rule(least=1, rising=True): "COUNTS HELD",
    Rule(least=2, most=8): "WIDTHS",
    Rule(count=2): "EXPERT_SUBJECTS",
    Rule(above=0, most=1): """SHARE HEADLINE_RATE MASK_SHARE KEPT.rows KEPT.columns OPTIONS.compared
        OPTIONS.densities OPTIONS.wide COAR.ablated NONSENSE.shares NONSENSE.kept""",
    Rule(above=0, most=1, rising=True): """SHARES RATES MASK_SHARES PRUNING.top PRUNING.bottom
        TEXT.rates""",
    Rule(above=0, most=1, count=2, repeats=True): "PRUNING.compared",
    Rule(least=1): """N_CALIBRATION N_TEST N_LOOK N_DIRECTIONS N_CASES N_IMAGES N_SWEPT N_MAPS N_ASKED
        N_QUESTIONS SEEDS SPIKES DRAWS STEPS BATCH ROUNDS MASK_PATCHES MASKED BATCHES PRUNING.test BITS.tried
        TEXT.n_calibration TEXT.n_test TEXT.seeds TEXT.length TEXT.horizon TEXT.samples OPTIONS.validation
        LONG.tokens LONG.prompts SHORT.tokens SHORT.prompts GROWTH.tokens GROWTH.prompts BLIND.pixels
        COMPONENTS.neurons COAR.ablations COAR.held NONSENSE.n NONSENSE.n_test
        NONSENSE.tried N_DIGITS""",
    Rule(least=2): "GROWTH.classes GROWTH.rounds COAR.attributed NONSENSE.seeds",
    Rule(least=1, count=2, repeats=True): "N_ZEROED BITS.full",
    Rule(least=1, repeats=True): "BATCH_ROUNDS",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def agreed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what has to be in a list put into it, and lists that rise sorted.

    Raises ValueError for a value that breaks a rule of this module.
    """
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    for name, rule in RULES.items():
        default, value = _get(defaults, name), _get(made, name)
        if rule.broken(default) or (rule.rising and default and default != sorted(default)):
            continue
        broken = rule.broken(value)
        if broken:
            raise ValueError(f"the parameter {name} must {broken}, not {value!r}.")
        if rule.rising and value is not None:
            _set(made, name, sorted(value))
    for one, many in JOINS.items():
        missing = _missing(made, one, many)
        if missing and _get(made, many) is not None and not _missing(defaults, one, many):
            _set(made, many, sorted({*_get(made, many), *missing}))
    return made


def _missing(settings: Mapping[str, Any], one: str, many: str) -> list[Any]:
    """What `one` holds, or is, that the list `many` does not hold."""
    value, found = _get(settings, one), _get(settings, many)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [x for x in values if not (isinstance(found, list) and x in found)]


def _get(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a parameter, or of a setting in one; None where there is none."""
    parameter, _, key = name.partition(".")
    value = settings.get(parameter)
    return value.get(key) if key and isinstance(value, dict) else None if key else value


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    parameter, _, key = name.partition(".")
    if key:
        settings[parameter][key] = value
    else:
        settings[name] = value
