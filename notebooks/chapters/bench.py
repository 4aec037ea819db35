"""``python -m fihelpers bench``: what FI costs, beside simpler ways of computing the same, in one run.

Every row of the table sets a piece of work beside a peer that ran in turn with it, round by round, so that a
busy machine slows both; the ratio is the median over the rounds, with the smallest and the largest. The
floors count the multiplications of matrices alone (2 operations for each weight and token, 1 of them an
addition): a forward pass is one unit, and so is pulling a gradient back to the inputs or to the weights.
A ratio may lie on the far side of its floor, as the peer too does more than multiply: plain autograd writes
every gradient of a weight to memory, FI does not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fichapters.bench_pixels import bundled_rows
from fichapters.timed import Missing, Row, Work, in_turn, machine, row, table
from fihelpers.answers import Groups, letters
from fihelpers.data import write_atomically
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped
from fihelpers.models import language as models
from fihelpers.models.language import Batch, LanguageModel, left_padded, open_model
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.perturb.topshare import CHUNK, TopShare
from fihelpers.scores.hooks import frozen
from fihelpers.scores.weights import score_contexts
from fihelpers.tasks import Example, load_task

FILTER = Damped(1e-4)
CLASSES = Groups(tuple("ABCD"), ((1,), (2,), (3,), (4,)))
FI_UNITS = 2 * len(CLASSES.names) - 1  # one forward pass, K - 1 back to the inputs, K - 1 to the weights
JACOBIAN_UNITS = 3
BACKWARD_UNITS = 2 * len(CLASSES.names) + 1


@dataclass(frozen=True)
class Size:
    """A random Qwen2: by default one of 25 million weights in linear layers."""

    hidden: int = 512
    inner: int = 1536
    layers: int = 8
    heads: int = 8
    vocabulary: int = 1000

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        network = Qwen2ForCausalLM(config).eval()
        return LanguageModel(network, cast(PreTrainedTokenizerBase, None), "random Qwen2", None, "0" * 64)


@dataclass(frozen=True)
class Questions:
    """Random prompts of one length, as batches of one and as batches of several."""

    model: LanguageModel
    ids: list[list[int]]

    @classmethod
    def draw(cls, model: LanguageModel, length: int, count: int) -> Questions:
        vocabulary = int(model.network.config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        return cls(model, torch.randint(5, vocabulary, (count, length), generator=generator).tolist())

    def batches(self, size: int) -> list[Batch]:
        places = [range(i, min(i + size, len(self.ids))) for i in range(0, len(self.ids), size)]
        return [left_padded(p, [self.ids[i] for i in p], self.model.device) for p in places]


def fi_of_weights(questions: Questions, batch_size: int, save_memory: bool = False) -> dict[str, Tensor]:
    """Mean FI (damped) of every weight of a linear layer, by `score_weights`' engine."""
    model = questions.model
    contexts = [(b, torch.ones(len(b.index))) for b in questions.batches(batch_size)]
    examples = [Example(str(i), "random", "", tuple("ABCD"), None, "") for i in range(len(questions.ids))]
    scores = score_contexts(
        model,
        contexts,
        examples,
        ["FI"],
        FILTER,
        CLASSES,
        linear_names(model.network),
        save_memory=save_memory,
    )
    return dict(scores[f"FI {FILTER}"].values)


def jacobian_norm(questions: Questions) -> dict[str, Tensor]:
    """Mean absolute gradient of log P(y_hat), by plain autograd: one backward pass a sample, with `.grad`."""
    weights = _weights(questions.model)
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    with _asking(questions.model, weights):
        for batch in questions.batches(1):
            CLASSES.log_probs(questions.model.last_logits(batch))[0].max().backward()
            for name, w in weights.items():
                totals[name] += _taken(w).abs()
    return {name: total / len(questions.ids) for name, total in totals.items()}


def fi_by_stored_gradients(questions: Questions) -> dict[str, Tensor]:
    """Mean FI by plain autograd: K backward passes a sample, of which every `.grad` is kept (method 1)."""
    weights = _weights(questions.model)
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    with _asking(questions.model, weights):
        for batch in questions.batches(1):
            log_p = CLASSES.log_probs(questions.model.last_logits(batch))[0]
            kept: list[dict[str, Tensor]] = []
            for k, one in enumerate(log_p):
                one.backward(retain_graph=k < len(log_p) - 1)
                kept.append({name: _taken(w) for name, w in weights.items()})
            for name, total in totals.items():
                total += _fi(torch.stack([grads[name] for grads in kept]), log_p.detach().exp())
    return {name: total / len(questions.ids) for name, total in totals.items()}


def fi_by_vmap(questions: Questions) -> dict[str, Tensor]:
    """Mean FI with torch.func: `jacrev` over the classes, `vmap` over the samples of one batch."""
    model, weights = questions.model, {n: w.detach() for n, w in _weights(questions.model).items()}
    ids = torch.tensor(questions.ids)
    bare = Batch(torch.zeros(1), ids[:1], torch.ones_like(ids[:1]), torch.arange(ids.shape[1])[None])

    def log_probs(chosen: Mapping[str, Tensor], prompt: Tensor) -> Tensor:
        logits = functional_call(
            model.network,
            dict(chosen),
            kwargs={"input_ids": prompt[None], "position_ids": bare.position_ids, "use_cache": False},
        ).logits[:, -1]
        return torch.stack([logits[0, list(t)].logsumexp(0) for t in CLASSES.tokens]).log_softmax(0)

    # the usual attention kernels have no rule for vmap
    with frozen(model.network), sdpa_kernel(SDPBackend.MATH):
        grads = vmap(jacrev(log_probs), (None, 0))(weights, ids)
        probs = vmap(log_probs, (None, 0))(weights, ids).exp()
    return {
        name: torch.stack([_fi(one, p) for one, p in zip(g, probs, strict=True)]).mean(0)
        for name, g in grads.items()
    }


def _fi(grads: Tensor, probs: Tensor) -> Tensor:
    metric = (probs[:, None, None] * grads * grads).sum(0)
    return grads[probs.argmax()].square() / (metric + FILTER.lam)


def _weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    named = dict(model.network.named_parameters())
    return {name: named[name] for name in linear_names(model.network)}


@contextmanager
def _asking(model: LanguageModel, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """These weights alone ask for gradients."""
    with frozen(model.network):
        for weight in weights.values():
            weight.requires_grad_(True)
        yield


def _taken(weight: nn.Parameter) -> Tensor:
    grad, weight.grad = weight.grad, None
    return cast(Tensor, grad)


def long_prompts(size: Size, rounds: int, length: int = 128, count: int = 8) -> list[Row]:
    """FI of every linear weight, one prompt at a time, beside a Jacobian norm and stored gradients."""
    questions = Questions.draw(size.model(), length, count)
    works: dict[str, Work] = {
        "FI": lambda: fi_of_weights(questions, 1),
        "Jacobian norm": lambda: jacobian_norm(questions),
        "K backward passes, .grad kept": lambda: fi_by_stored_gradients(questions),
    }
    seconds = in_turn(works, dict.fromkeys(works, count), rounds)
    work, stored = f"FI of weights, {length} tokens, batch 1", "K backward passes, .grad kept"
    return [
        row(work, seconds, "FI", "Jacobian norm", 2.6, FI_UNITS / JACOBIAN_UNITS),
        row(work, seconds, "FI", stored, 1.4, BACKWARD_UNITS / FI_UNITS, faster=True),
    ]


def short_prompts(size: Size, rounds: int, length: int = 24, count: int = 64) -> list[Row]:
    """FI of every linear weight in batches of 16, beside stored gradients one prompt at a time, and vmap."""
    model = size.model()
    questions, few, pair = (Questions.draw(model, length, n) for n in (count, max(1, count // 8), 2))
    works: dict[str, Work] = {
        "FI": lambda: fi_of_weights(questions, 16),
        "K backward passes, .grad kept": lambda: fi_by_stored_gradients(few),
        "torch.func vmap": lambda: fi_by_vmap(pair),  # it holds K gradients of every sample at once
    }
    samples = dict(zip(works, (count, len(few.ids), len(pair.ids)), strict=True))
    seconds = in_turn(works, samples, rounds)
    work = f"FI of weights, {length} tokens, batches of 16"
    return [
        row(
            work, seconds, "FI", "K backward passes, .grad kept", 4.0, BACKWARD_UNITS / FI_UNITS, faster=True
        ),
        row(work, seconds, "FI", "torch.func vmap", None, None, faster=True),
    ]


def memory(size: Size, rounds: int, length: int = 128, count: int = 2) -> list[Row]:
    """Peak memory of weight scores beyond what Python and its libraries take, each in a fresh process."""
    questions = Questions.draw(size.model(), length, count)
    least = 2 * sum(w.numel() * w.element_size() for w in _weights(questions.model).values())
    least += sum(p.numel() * p.element_size() for p in questions.model.network.parameters()) - least // 2
    rows = []
    for save_memory, goal in ((True, 1.15), (False, None)):
        peaks = [_peak_of_child(size, length, count, save_memory) for _ in range(min(rounds, 3))]
        name = f"memory of FI of weights, {length} tokens, {'block by block' if save_memory else 'at once'}"
        ratios = [peak / least for _, peak in peaks]
        middle, taken = statistics.median(ratios), statistics.median(seconds for seconds, _ in peaks)
        peak = int(statistics.median(peak for _, peak in peaks))
        what = "weights + result"
        rows.append(Row(name, what, taken, 0.0, middle, min(ratios), max(ratios), goal, 1.0, peak_bytes=peak))
    return rows


def peak(size: Size, length: int, count: int, save_memory: bool) -> tuple[float, int]:
    """Seconds a sample and peak bytes of this process, beyond what it held before it made the model.

    Raises RuntimeError where the system does not tell the peak.
    """
    fi_of_weights(Questions.draw(Size(32, 64, 2, 2).model(), 8, 1), 1, save_memory)  # loads the libraries
    before = resident("VmRSS")
    questions = Questions.draw(size.model(), length, count)
    start = time.perf_counter()
    fi_of_weights(questions, 1, save_memory)
    return (time.perf_counter() - start) / count, resident("VmHWM") - before


def _peak_of_child(size: Size, length: int, count: int, save_memory: bool) -> tuple[float, int]:
    """`peak` in a fresh process, whose allocator gives back what is freed at once."""
    code = (
        "import json, torch; from fichapters.bench import Size, peak; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        f"print(json.dumps(peak({size!r}, {length}, {count}, {save_memory})))"
    )
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory could not be measured: {done.stderr.strip().splitlines()[-1]}")
    seconds, bytes_ = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), int(bytes_)


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise RuntimeError("this system does not tell a process's peak memory; use Linux.") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def pixels(size: Size, rounds: int) -> list[Row]:
    """FI of every pixel of the bundled pictures by each filter, beside one gradient of the prediction."""
    return bundled_rows(rounds)


def topshare(size: Size, rounds: int, count: int = 10**7, share: float = 0.01) -> list[Row]:
    """The exact top share of many scores with ties, beside a full sort; bytes beyond the scores themselves.

    The bytes are a mask of the tensor at hand and the pieces at work, however many tensors there are.
    """
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).abs_()
    scores = scores.mul_(2**16).round_().div_(2**16)  # with ties
    take = max(1, round(share * count))
    works: dict[str, Work] = {
        "ours": lambda: TopShare(["all"], lambda _: iter(scores.split(CHUNK)), take).mask("all"),
        "full sort": lambda: scores.sort(descending=True),
    }
    seconds = in_turn(works, dict.fromkeys(works, 1), rounds)
    work = f"exact top share of {count:g} scores"
    extra = extra_bytes(works["ours"])
    largest = max(LLAMA_MATRICES)
    bound = 2 * largest + max(0, extra - 2 * count)  # a mask is there twice while its pieces are joined
    note = f"for {LLAMA_WEIGHTS:.2g} weights in matrices of at most {largest:.2g}: {bound / 1e9:.2f} GB"
    return [
        row(work, seconds, "ours", "full sort", None, None, faster=True),
        Row(
            f"memory of the {work}",
            "2 GB",
            statistics.median(seconds["ours"]),
            0.0,
            extra / 2e9,
            extra / 2e9,
            extra / 2e9,
            1.0,
            None,
            peak_bytes=extra,
            note=note,
        ),
    ]


def extra_bytes(work: Work) -> int:
    """The most bytes of tensors that a piece of work holds at a time beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = most = 0
    events = [e for e in cast(Any, found.profiler).kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):  # allocations, and frees below zero
        held += event.nbytes()
        most = max(most, held)
    return most


def evaluation(size: Size, rounds: int, rates: int = 4, measures: int = 3, questions: int = 32) -> list[Row]:
    """Accuracy at R rates of M rankings: one model, its weights changed in place, prompts tokenised once.

    Beside it, a model opened and prompts tokenised for each of them. Raises RuntimeError where the first
    opens a model or tokenises more than once.
    """
    examples = load_task("bundled", n=questions).examples
    count = rates * measures
    names = linear_names(open_model().network)

    def sweep_of(ask: Evaluator, each: Sequence[int]) -> None:
        for number in each:
            scores = {n: torch.rand(p.shape) for n, p in ask.model.network.named_parameters() if n in names}
            with zeroed(ask.model.network, select(scores, 0.01 * (1 + number % rates), seed=number)):
                ask()

    def asking() -> Evaluator:
        model = open_model()
        return Evaluator(model, examples, letters(model.tokenizer))

    def once() -> None:
        with counted() as calls:
            sweep_of(asking(), range(count))
        if calls["opened"] != 1 or calls["tokenised"] != len(examples):
            raise RuntimeError(f"one model and {len(examples)} prompts were asked for, not {dict(calls)}.")

    def anew() -> None:
        for number in range(count):
            sweep_of(asking(), [number])

    works: dict[str, Work] = {"ours": once, "opened and tokenised for each": anew}
    seconds = in_turn(works, dict.fromkeys(works, count), rounds)
    made = row(
        f"evaluation, {rates} rates x {measures} measures, {len(examples)} questions",
        seconds,
        "ours",
        "opened and tokenised for each",
        None,
        None,
        faster=True,
    )
    return [replace(made, note=f"1 model opened, {len(examples)} prompts tokenised for {count} evaluations")]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the models opened ("opened") and the prompts tokenised for evaluation ("tokenised")."""
    calls: Counter[str] = Counter()
    network, tokens = models.open_network, LanguageModel._token_ids

    def opening(*arguments: Any, **options: Any) -> Any:
        calls["opened"] += 1
        return network(*arguments, **options)

    def tokenising(model: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
        calls["tokenised"] += len(prompts)
        return tokens(model, prompts)

    with (
        mock.patch.object(models, "open_network", opening),
        mock.patch.object(LanguageModel, "_token_ids", tokenising),
    ):
        yield calls


LLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LLAMA_MATRICES = {4096 * 4096: 4 * 32, 4096 * 11008: 3 * 32}
LLAMA_WEIGHTS = sum(size * count for size, count in LLAMA_MATRICES.items())
H100_SECONDS = 0.12  # asked for of a sample


def gpu(size: Size, rounds: int) -> list[Row | Missing]:
    """FI of every linear weight of a network of Llama-2-7B's shape, random bfloat16 weights, on a GPU."""
    if not torch.cuda.is_available():
        return [Missing("FI of weights, Llama-2-7B's shape, 200 tokens, on a GPU", "no GPU")]
    return [*large_network(LLAMA, rounds, "cuda")]


def large_network(
    config: LlamaConfig, rounds: int, device: str, length: int = 200, count: int = 4
) -> list[Row]:
    """Seconds a sample at once and block by block, beside the goal and beside its matrix products alone.

    The rate of matrix products is measured in the same rounds, on the largest matrix of the network; the
    second ratio, turned over, is the share of this rate that is reached. Peaks are of the device.
    """
    model = _random_network(config, device)
    questions = Questions.draw(model, length, count)
    weights = _weights(model)
    result = 4 * sum(w.numel() for w in weights.values())
    least = result + sum(p.numel() * p.element_size() for p in model.network.parameters())
    operations = FI_UNITS * 2 * length * sum(w.numel() for w in weights.values())
    matrix = max(weights.values(), key=torch.numel).detach()
    x = torch.randn(1024, matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
    works: dict[str, Work] = {
        "at once": lambda: fi_of_weights(questions, 1),
        "block by block": lambda: fi_of_weights(questions, 1, save_memory=True),
        "products": lambda: [x @ matrix.T for _ in range(32)],
    }
    samples = {"at once": count, "block by block": count, "products": 32}
    seconds = in_turn(works, samples, rounds)
    rate = [2 * len(x) * matrix.numel() / s for s in seconds["products"]]
    seconds["its products at the measured rate"] = [operations / r for r in rate]
    seconds[f"{H100_SECONDS} s a sample (asked of an H100)"] = [H100_SECONDS] * rounds
    rows = []
    for way in ("at once", "block by block"):
        shape = f"{config.num_hidden_layers} blocks of {config.hidden_size}"
        work = f"FI of weights, {shape}, {length} tokens, {way}"
        note = f"{statistics.median(rate) / 1e12:.0f} TFLOPS measured in products"
        rows += [
            replace(row(work, seconds, way, "its products at the measured rate", None, 1.0), note=note),
            row(work, seconds, way, f"{H100_SECONDS} s a sample (asked of an H100)", 1.0, None),
        ]
        peak = _device_peak(works[way], device)
        ratio, goal = peak / least, 1.1 if way == "block by block" else None
        taken = statistics.median(seconds[way])
        name = f"memory of {work}"
        rows.append(
            Row(name, "weights + result", taken, 0.0, ratio, ratio, ratio, goal, 1.0, peak_bytes=peak)
        )
    return rows


def _random_network(config: LlamaConfig, device: str) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LanguageModel(network, cast(PreTrainedTokenizerBase, None), "random Llama", None, "0" * 64)


def _device_peak(work: Work, device: str) -> int:
    """Peak bytes on a GPU while a piece of work runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


# What can be measured, by the name to ask for it.
ROWS: dict[str, Callable[[Size, int], Sequence[Row | Missing]]] = {
    "long": long_prompts,
    "short": short_prompts,
    "memory": memory,
    "pixels": pixels,
    "topshare": topshare,
    "evaluation": evaluation,
    "gpu": gpu,
}


def bench(only: Sequence[str] = (), rounds: int = 5, size: Size | None = None) -> list[Row | Missing]:
    """Measure the rows of these names, all by default. Raises ValueError for an unknown name or no round."""
    unknown = sorted(set(only) - set(ROWS))
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}.")
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}.")
    return [made for name in only or ROWS for made in ROWS[name](size or Size(), rounds)]


def main(only: Sequence[str], rounds: int, out: Path | None) -> None:
    """Print the table and the machine, and write both as JSON."""
    before = machine()
    rows = bench(only, rounds)
    print(table(rows))
    print(", ".join(f"{name} {value}" for name, value in before.items()))
    if out is not None:
        made = {
            "machine": before,
            "load after": machine()["load"],
            "rows": [asdict(r) | {"met": r.met} for r in rows if isinstance(r, Row)],
            "not measured": {r.work: r.why for r in rows if isinstance(r, Missing)},
        }
        write_atomically(out, (json.dumps(made, indent=1) + "\n").encode())
