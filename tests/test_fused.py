"""The kernel of GPUs adds up what torch does. Where there is no GPU, Triton's interpreter runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tiles import MEASURED, by_torch, close, factors_of

from fihelpers.filters import Cut, Damped, Exact
from fihelpers.measures import MEASURES, Influence, Measure
from fihelpers.scores import weights
from fihelpers.scores.hooks import Factors
from fihelpers.scores.kernels.formulas import DAMPED, formula

ON_GPU = torch.cuda.is_available()
FILTERS: list[Measure] = [Influence(Exact()), Influence(Damped(1e-2)), Influence(Cut(0.1))]
REST = [m for m in MEASURED if not isinstance(m, Influence)]

# Triton is imported in processes of their own, as torch and others do more wherever they find it.
BEGIN = """
import sys, torch
sys.path.append(sys.argv[1])
import triton
sys.path.pop()
from fihelpers.scores.kernels import gpu as fused
"""

ADD = """
from fihelpers.scores.hooks import Factors
device = "cuda" if torch.cuda.is_available() else "cpu"
made = []
for (grads, x, start, top), value, shares, formulas in torch.load(sys.argv[2]):
    factors = Factors("", list(grads.to(device)), x.to(device), start, top.to(device), torch.arange(len(x)))
    totals = torch.zeros(len(formulas), *value.shape, device=device)
    sums = fused.add_measures(factors, value.to(device), shares, formulas, totals)
    made.append((totals.cpu(), sums.cpu()))
torch.save(made, sys.argv[3])
"""

SCORE = """
import json
from unittest import mock
sys.path.append(sys.argv[2])
from tiny import tiny_examples, tiny_model
from fihelpers.filters import Damped
from fihelpers.scores import weights
model, examples = tiny_model("qwen2", dtype=torch.float32), tiny_examples(3)
model.network.to("cuda" if torch.cuda.is_available() else "cpu")
found = []
for engine in (fused.add_measures, None):
    with mock.patch.object(weights, "_in_tiles", lambda *_: engine):
        found.append(weights.score_weights(model, examples, spectral=Damped(1e-4), batch_size=2))
for name, kernel in found[0].items():
    of_each = [json.loads(scores[name].metadata["per_example"]) for scores in found]
    assert all(abs(a - b) <= 1e-3 * b for a, b in zip(*of_each, strict=True)), name
    largest = max(float(v.max()) for v in found[1][name].values.values())
    for key, value in kernel.values.items():
        assert (value - found[1][name][key]).abs().max() <= 1e-3 * largest, (name, key)
"""

SPOIL = """
right = fused.add_by_torch
fused.add_by_torch = lambda *given: (right(*given), given[-1].mul_(1.01))
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
pointers = {"roots": "fp32", "shares": "fp32", "totals": "fp32", "sums": "fp64"}
sizes = ("samples", "tokens", "start", "out", "width")
for capability in (80, 90):
    for precision in ("bf16", "fp16", "fp32"):
        of_factors = dict.fromkeys(("grads", "x", "value"), precision)
        types = {name: f"*{of}" for name, of in (of_factors | pointers).items()}
        types |= dict.fromkeys(sizes, "i32")
        fixed = {"directions": 4, "turned": 3, "kinds": tuple(range(8)), "numbers": (0.1,) * 8}
        fixed |= {"rows": fused.ROWS, "columns": fused.COLUMNS, "steps": fused.STEPS}
        source = ASTSource(fused._add, types | dict.fromkeys(fixed, "constexpr"), fixed)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": fused.WARPS})
        assert made.asm["cubin"]
"""


@pytest.fixture
def folder() -> str:
    """Where Triton lies: beside torch on a machine with a GPU, else in the folder of what only tests need."""
    oracles = Path(sys.prefix) / "oracles"
    if not ON_GPU and not (oracles / "triton").is_dir():
        pytest.skip("Triton is not beside this environment, in its folder `oracles`")
    return str(oracles)


def run(program: str, *arguments: str, interpret: bool = not ON_GPU) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-c", BEGIN + program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


Case = tuple[Factors, list[Measure]]


def test_every_measure_is_that_of_torch(folder: str, tmp_path: Path) -> None:
    """Layers with less than a tile, a tile and more; one direction and several; padding; float16."""
    cases: list[Case] = [
        (factors_of(2, 37, 70, 130, start=3, dtype=torch.float32), [*FILTERS, *MEASURED]),
        (factors_of(1, 5, 4, 1, dtype=torch.float32), FILTERS),
        (factors_of(1, 33, 65, 129, 1, dtype=torch.float32), FILTERS),
        (factors_of(3, 64, 64, 128, 7, dtype=torch.float16), [MEASURES["Jacobian norm"], FILTERS[1]]),
    ]
    given, truths = [], []
    for factors, measures in cases:
        shares = torch.linspace(0.2, 1, len(factors.x))
        g, x = torch.stack(list(factors.grads)), factors.x
        value = torch.linspace(-1, 1, g.shape[-1] * x.shape[-1]).view(g.shape[-1], -1)
        formulas = [formula(m) for m in measures]
        given.append(((g, x, factors.start, factors.ceiling.float()), value, shares, formulas))
        exact = Factors(
            "", list(g.double()), x.double(), factors.start, factors.ceiling.double(), factors.index
        )
        truths.append(by_torch(exact, measures, shares))
    for (totals, sums), (of_torch, sums_of_torch) in zip(added(folder, tmp_path, given), truths, strict=True):
        close(totals, of_torch, 1e-4)
        close(sums, sums_of_torch, 1e-4)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_sums(spoiled: float, folder: str, tmp_path: Path) -> None:
    given = []
    for where in range(2):
        factors = factors_of(2, 5, 6, 7, directions=4, dtype=torch.float32)
        g, x = torch.stack(list(factors.grads)), factors.x
        if where:
            x[1, 2, 3] = spoiled
        else:
            g[:, 1, 2, 3] = spoiled
        formulas = [formula(m) for m in (*FILTERS[1:], *REST)]
        given.append(((g, x, 0, factors.ceiling.float()), torch.ones(6, 7), torch.ones(2), formulas))
    for _, sums in added(folder, tmp_path, given):
        assert sums[:, 0].isfinite().all() and not sums[:, 1].isfinite().any()


def added(folder: str, place: Path, given: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.save(given, place / "given.pt")
    run(ADD, folder, str(place / "given.pt"), str(place / "made.pt"))
    made: list[tuple[torch.Tensor, torch.Tensor]] = torch.load(place / "made.pt")
    return made


def test_scores_of_a_model_are_those_of_single_operations(folder: str) -> None:
    run(SCORE, folder, str(Path(__file__).parent))


def test_the_kernel_finds_itself_right(folder: str) -> None:
    device = "cuda" if ON_GPU else "cpu"
    formulas = [formula(m) for m in (*FILTERS, *REST)]
    run(f"fused.check(torch.device({device!r}), torch.float16, {formulas})", folder)


def test_a_wrong_kernel_is_found_out(folder: str) -> None:
    device = "cuda" if ON_GPU else "cpu"
    with pytest.raises(AssertionError, match="its scores differ from those of plain operations"):
        run(f"{SPOIL}fused.check(torch.device({device!r}), torch.float16, [(0, 1e-4)])", folder)


def test_the_kernel_is_translated_for_two_generations_of_gpus(folder: str) -> None:
    run(COMPILE, folder, interpret=False)


def test_where_the_kernel_cannot_run_torch_scores_the_layers() -> None:
    with pytest.warns(UserWarning, match="Linear layers are scored by single operations of torch"):
        assert weights._kernel(torch.device("cpu"), torch.float32, ((DAMPED, 1e-4),)) is None
