"""Merging: against peft and mergekit, protection, the written folder, and what goes wrong."""

import copy
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from fihelpers.models import files
from fihelpers.models.files import open_weights, write_weights
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.models.tensors import layout
from fihelpers.perturb import merge
from fihelpers.perturb.merge import Merger, merge_models
from fihelpers.perturb.merge_methods import (
    METHODS,
    Average,
    Dare,
    DareTies,
    FisherAverage,
    Method,
    Protection,
    TaskArithmetic,
    Ties,
    find_method,
)
from fihelpers.perturb.topshare import seed_of
from fihelpers.scores.store import Scores

State = dict[str, Tensor]
Trio = tuple[LanguageModel, LanguageModel, LanguageModel]


def merged_state(
    base: Any,
    a: Any,
    b: Any,
    method: str | Method = "average",
    protection: Protection | None = None,
    *,
    fishers: Any = None,
) -> State:
    return Merger(base, a, b, method, protection, fishers).state()


def expert(base: LanguageModel, seed: int, name: str, noise: float = 0.1) -> LanguageModel:
    """The base with every weight moved at random."""
    model = tiny_model("qwen2", base.network.dtype)
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(model.network.parameters(), base.network.parameters(), strict=True):
        step = torch.randn(p.shape, generator=generator, dtype=torch.float64) * noise
        p.data = (q.data.double() + step).to(p.dtype)
    return replace(model, name=name, sha256=str(seed) * 64)


def trio(dtype: torch.dtype = torch.float32) -> Trio:
    base = tiny_model("qwen2", dtype)
    return base, expert(base, 1, "first"), expert(base, 2, "second")


def state(model: LanguageModel) -> State:
    return {name: p.detach() for name, p in model.network.named_parameters()}


def scores(of: LanguageModel, seed: int = 0, **metadata: str) -> Scores:
    g = torch.Generator().manual_seed(seed)
    values = {n: torch.rand(p.shape, generator=g) for n, p in of.network.named_parameters()}
    return Scores(values, {"sha256": of.sha256, "measure": "random", **metadata})


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(v.equal(two[n]) for n, v in one.items())


def close(one: State, two: State, **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], **tolerance or {"rtol": 1e-5, "atol": 1e-7})


def by_tensor(models: Trio, merge: Callable[[list[Tensor], str], Tensor]) -> State:
    """theta_base plus what `merge` makes of the two displacements of each tensor."""
    base, a, b = map(state, models)
    return {n: v + merge([a[n] - v, b[n] - v], n) for n, v in base.items()}


def test_methods_equal_peft() -> None:
    models, w = trio(), torch.ones(2)
    arithmetic = merged_state(*models, TaskArithmetic(task_weight=0.6))
    close(arithmetic, by_tensor(models, lambda d, _: merge_utils.task_arithmetic(d, 0.6 * w)))
    for density in (0.05, 0.2, 0.77):
        made = merged_state(*models, Ties(0.6, density, "tensor"))
        close(made, by_tensor(models, lambda d, _, k=density: 0.6 * merge_utils.ties(d, w, k)))


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_equals_peft_with_the_same_draw(rescale: bool) -> None:
    models, w = trio(), torch.ones(2)

    def drop(deltas: list[Tensor], name: str) -> list[Tensor]:
        dropped = []
        for which, delta in enumerate(deltas):
            torch.manual_seed(seed_of(3, name, which))
            dropped.append(merge_utils.random_pruning(delta, 0.3, rescale))
        return dropped

    made = merged_state(*models, Dare(task_weight=0.5, density=0.3, rescale=rescale, seed=3))
    close(made, by_tensor(models, lambda d, n: 0.5 * merge_utils.task_arithmetic(drop(d, n), w)))

    def ties(deltas: list[Tensor], name: str) -> Tensor:
        entries = torch.stack(drop(deltas, name))
        return merge_utils.disjoint_merge(entries, merge_utils.calculate_majority_sign_mask(entries))

    dare_ties = DareTies(density=1.0, drop_density=0.3, rescale=rescale, seed=3)
    close(merged_state(*models, dare_ties), by_tensor(models, ties))


def test_the_global_trim_keeps_the_largest_of_the_whole_model() -> None:
    models = trio()
    base, a, b = map(state, models)
    names = list(base)
    deltas = [torch.cat([(x[n] - base[n]).flatten() for n in names]) for x in (a, b)]
    kept = [d * (d.abs() >= d.abs().kthvalue(len(d) - int(0.2 * len(d)) + 1).values) for d in deltas]
    merged = merge_utils.disjoint_merge(
        torch.stack(kept), merge_utils.calculate_majority_sign_mask(torch.stack(kept))
    )
    expected = merged.split([base[n].numel() for n in names])
    wanted = {n: base[n] + part.view_as(base[n]) for n, part in zip(names, expected, strict=True)}
    close(merged_state(*models, "TIES"), wanted)
    # Dropping comes before the trim, whose border then follows from what is left.
    dropped = merged_state(*models, DareTies(drop_density=0.1, density=0.2, trim="global"))
    no_trim = merged_state(*models, DareTies(drop_density=0.1, density=1.0))
    close(dropped, no_trim)


def test_the_papers_election_keeps_the_larger_entry() -> None:
    models = trio()
    made = merged_state(*models, Ties(density=1.0, elect="larger", task_weight=0.5))
    close(made, by_tensor(models, lambda d, _: 0.5 * torch.where(d[0].abs() >= d[1].abs(), d[0], d[1])))


def test_fisher_average_is_weighted_by_each_element_and_scale_free(monkeypatch: pytest.MonkeyPatch) -> None:
    models = trio(torch.float64)
    _, a, b = models
    f_a, f_b = scores(a, 1), scores(b, 2)
    norms = [torch.cat([v.flatten() for v in f.values.values()]).double().norm() for f in (f_a, f_b)]
    x, y = state(a), state(b)
    wanted = {}
    for n in x:
        one, two = f_a[n].double().clamp(1e-6) / norms[0], f_b[n].double().clamp(1e-6) / norms[1]
        wanted[n] = (one * x[n] + two * y[n]) / (one + two)
    made = merged_state(*models, "Fisher average", fishers=(f_a, f_b))
    close(made, wanted)
    scaled = Scores({n: 10 * v for n, v in f_b.values.items()}, f_b.metadata)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "FLOOR", 1e-30)
        free = [merged_state(*models, "Fisher average", fishers=(f_a, other)) for other in (scaled, f_b)]
    close(*free)
    alike = Scores({n: torch.ones_like(v) for n, v in f_a.values.items()})
    close(merged_state(*models, "Fisher average", fishers=(alike, alike)), merged_state(*models))
    some = Scores({"lm_head.weight" if "lm_head.weight" in x else next(iter(x)): next(iter(x.values()))})
    rest = list(x)[1:]
    partly = merged_state(*models, "Fisher average", fishers=(some, some))
    assert all(partly[n].equal(merged_state(*models)[n]) for n in rest)


MERGEKIT = [
    ("linear", {}, Average()),
    ("task_arithmetic", {"lambda": 0.6}, TaskArithmetic(task_weight=0.6)),
    ("ties", {"density": 0.3, "lambda": 0.6}, Ties(density=0.3, trim="tensor", task_weight=0.6)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")  # mergekit's own
@pytest.mark.parametrize(("name", "options", "method"), MERGEKIT)
def test_methods_equal_mergekit(
    tmp_path: Path, name: str, options: dict[str, object], method: Method
) -> None:
    mergekit = pytest.importorskip("mergekit")
    assert mergekit
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, a, b = saved(tmp_path, trio())
    options = dict(options)
    density = {"density": options.pop("density")} if "density" in options else {}
    own = [{"model": str(x), "parameters": {"weight": 1.0, **density}} for x in (a, b)]
    config = {"merge_method": name, "models": own, "dtype": "float32", "parameters": options}
    if name != "linear":
        config["base_model"] = str(base)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    theirs = {n: v for f in (tmp_path / "theirs").glob("*.safetensors") for n, v in load_file(f).items()}
    close(merged_state(base, a, b, method), theirs)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.protects])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_nothing_protected_is_the_plain_merge(name: str, scope: str) -> None:
    models = trio()
    _, a, b = models
    fishers = (scores(a), scores(b)) if name == "Fisher average" else None
    none = Protection(0.0, scores(a), scores(b), scope=scope)  # type: ignore[arg-type]
    plain = merged_state(*models, name, fishers=fishers)
    assert same(merged_state(*models, name, none, fishers=fishers), plain)
    # Both protected everywhere is the plain merge too: theta_A and theta_B cannot both come back.
    if name != "TIES":
        both = Protection(1.0, scores(a), scores(b), scope=scope)  # type: ignore[arg-type]
        assert same(merged_state(*models, name, both, fishers=fishers), plain)


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(task_weight=0.3), FisherAverage()], ids=str)
@pytest.mark.parametrize("displaced", [False, True])
def test_all_of_one_expert_protected_gives_it_back(method: Method, displaced: bool) -> None:
    base, a, b = trio()
    fishers = (scores(a), scores(b)) if isinstance(method, FisherAverage) else None
    for which, whole in (("scores_a", a), ("scores_b", b)):
        protection = Protection(1.0, displaced=displaced, **{which: scores(whole)})  # type: ignore[arg-type]
        assert same(merged_state(base, a, b, method, protection, fishers=fishers), state(whole))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("share", [0.03, 0.4])
def test_weights_come_back_where_one_expert_alone_is_protected(scope: str, share: float) -> None:
    base, a, b = trio()
    s_a, s_b = scores(a, 1), scores(b, 2)
    plain, x, y = merged_state(base, a, b), state(a), state(b)
    made = merged_state(base, a, b, "average", Protection(share, s_a, s_b, scope))  # type: ignore[arg-type]

    def masks(s: Scores) -> State:
        if scope == "layer":
            borders = {n: v.flatten().sort(descending=True).values for n, v in s.values.items()}
            counts = {n: round(share * v.numel()) for n, v in s.values.items()}
            return {n: v >= borders[n][counts[n] - 1] if counts[n] else v > 1 for n, v in s.values.items()}
        flat = torch.cat([v.flatten() for v in s.values.values()]).sort(descending=True).values
        return {n: v >= flat[round(share * len(flat)) - 1] for n, v in s.values.items()}

    m_a, m_b = masks(s_a), masks(s_b)
    merger = Merger(base, a, b, "average", Protection(share, s_a, s_b, scope))  # type: ignore[arg-type]
    assert same(dict(merger.masks("a")), m_a) and same(dict(merger.masks("b")), m_b)
    for n in plain:
        only_a, only_b = m_a[n] & ~m_b[n], m_b[n] & ~m_a[n]
        assert made[n].equal(torch.where(only_a, x[n], torch.where(only_b, y[n], plain[n])))


def test_stage_one_exempts_from_the_trim() -> None:
    models = trio()
    base, a, b = models
    everything = Protection(1.0, scores(a), scores(b))
    untrimmed = merged_state(*models, Ties(density=1.0))
    assert same(merged_state(*models, "TIES", everything), untrimmed)
    one = merged_state(*models, Ties(density=0.0), Protection(0.3, scores(a)))
    wanted = {}
    masks = Protection(0.3, scores(a))
    x, y = state(base), state(a)
    assert masks.scores_a is not None
    flat = torch.cat([v.flatten() for v in masks.scores_a.values.values()])  # type: ignore[union-attr]
    border = flat.sort(descending=True).values[round(0.3 * len(flat)) - 1]
    for n, v in masks.scores_a.values.items():  # type: ignore[union-attr]
        wanted[n] = torch.where(v >= border, x[n] + (y[n] - x[n]), x[n])
    close(one, wanted)


@pytest.mark.parametrize("elect", ["mean", "larger"])
def test_stage_two_elects_what_one_expert_alone_protects(elect: str) -> None:
    models = trio(torch.float64)
    base, a, b = models
    method = Ties(density=0.2, elect=elect)  # type: ignore[arg-type]
    for stages in ("II", "I and II"):
        alone = Protection(1.0, scores(a), stages=stages)  # type: ignore[arg-type]
        close(merged_state(*models, method, alone), state(a))
    # Both everywhere: the ordinary election, after the trim (II) or without it (I and II).
    both = Protection(1.0, scores(a), scores(b), stages="II")
    assert same(merged_state(*models, method, both), merged_state(*models, method))
    both = replace(both, stages="I and II")
    assert same(merged_state(*models, method, both), merged_state(*models, replace(method, density=1.0)))
    # Taken after the trim, a protected entry is the trimmed one.
    trimmed = merged_state(*models, method, Protection(1.0, scores(a), stages="II", whole=False))
    zeros = {n: torch.zeros_like(v) for n, v in state(base).items()}
    only_a = merged_state(base, a, base, method)
    close({n: trimmed[n] - only_a[n] for n in zeros}, zeros, rtol=0, atol=1e-12)


def test_displaced_scores_are_multiplied_by_the_squared_displacement() -> None:
    models = trio(torch.float64)
    a = models[1]
    for method in (Average(), Ties(density=0.3)):
        plain, x = merged_state(*models, method), state(a)
        values = {n: v.double() for n, v in scores(a).values.items()}
        squared = {n: v * (plain[n] - x[n]) ** 2 for n, v in values.items()}
        given = Protection(0.1, Scores(values, scores(a).metadata), displaced=True)
        by_hand = Protection(0.1, Scores(squared, scores(a).metadata))
        assert same(merged_state(*models, method, given), merged_state(*models, method, by_hand))
        assert not same(
            merged_state(*models, method, given),
            merged_state(*models, method, replace(given, displaced=False)),
        )


def saved(folder: Path, models: Trio) -> tuple[Path, Path, Path]:
    base, a, b = (folder / m.name for m in models)
    for model, path in zip(models, (base, a, b), strict=True):
        model.network.save_pretrained(path, max_shard_size="5KB" if model.name == "first" else "1GB")
        model.tokenizer.save_pretrained(path)
    return base, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_folder_is_a_model_that_says_how_it_was_made(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, a, b = saved(tmp_path, trio(dtype))
    assert len(list(a.glob("*.safetensors"))) > 1
    hashes = [open_weights(p).sha256 for p in (base, a, b)]
    own = scores(trio(dtype)[1])
    s = Scores(own.values, {**own.metadata, "sha256": hashes[1], "model": "first", "n": "64"})
    s.save(tmp_path / "scores.safetensors")
    method, protection = Ties(task_weight=0.6), Protection(0.05, tmp_path / "scores.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", 4000)
        out = merge_models(base, a, b, tmp_path / "new" / "merged", method, protection)
    assert len(list(out.glob("*.safetensors"))) > 1
    opened = open_model(out, dtype=str(dtype).removeprefix("torch."))
    assert opened.network.dtype == dtype
    expected = merged_state(base, a, b, method, Protection(0.05, s))
    assert same(state(opened), expected)
    card = (out / "README.md").read_text()
    total = sum(v.numel() for v in s.values.values())
    for part in (*hashes, str(method), f"{round(0.05 * total)} of {total}", "top 5 %", "random", "first"):
        assert part in card
    assert str(tmp_path) not in card
    one = merge_models(base, a, b, tmp_path / "one", method, protection)
    assert [p.name for p in one.glob("*.safetensors*")] == ["model.safetensors"]
    assert same(load_file(one / "model.safetensors"), expected)
    assert {p.name for p in one.iterdir()} >= {"config.json", "tokenizer.json", "README.md"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_transformers_opens_a_file_of_mixed_types(tmp_path: Path) -> None:
    base, *_ = saved(tmp_path, trio(torch.bfloat16))
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if "norm" in n)
    tensors = {n: v.float() if n == name else v for n, v in tensors.items()}
    tensors["odd"] = torch.ones(3, dtype=torch.uint8)
    layouts = {n: v.to("meta") for n, v in tensors.items()}
    write_weights(tmp_path, dict(sorted(layouts.items(), key=lambda x: x[1].nbytes)), tensors.__getitem__)
    assert same(load_file(tmp_path / "model.safetensors"), tensors)


def test_a_merged_model_answers_and_leaves_the_others_alone() -> None:
    models = trio()
    before = [{n: v.clone() for n, v in state(m).items()} for m in models]
    made = copy.deepcopy(models[0])
    made.network.load_state_dict(merged_state(*models), strict=False)
    assert same(state(made), merged_state(*models))
    assert all(same(state(m), old) for m, old in zip(models, before, strict=True))
    batch = made.batches(["w1 w2 w3"])[0]
    assert torch.isfinite(made.last_logits(batch)).all()


def test_the_settings_are_those_of_the_base_or_of_the_first_model(tmp_path: Path) -> None:
    base, a, b = saved(tmp_path, trio())
    config = json.loads((a / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (a / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="differ in rope_parameters"):
        merge_models(base, a, b, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    with pytest.warns(UserWarning, match="rope"):
        merge_models(None, a, b, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == config


def test_different_models_are_refused_by_their_first_difference() -> None:
    base, a, b = trio()
    x, y = state(a), state(b)
    name = "model.layers.1.mlp.up_proj.weight"
    b.network.get_submodule("model.layers.1.mlp.up_proj").weight = torch.nn.Parameter(y[name][:-1])
    with pytest.raises(ValueError, match=rf"differ in {name}: its shape is \[20, 12\] and \[19, 12\]"):
        merged_state(base, a, b)
    _, _, b = trio()
    b.network.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(x[name][:, 0])
    with pytest.raises(ValueError, match=r"up_proj.bias is not in 'tiny-qwen2'"):
        merged_state(base, a, b)
    with pytest.raises(ValueError, match=r"self_attn.q_proj.bias is not in 'tiny-llama'"):
        merged_state(base, a, tiny_model("llama", torch.float32))
    _, _, b = trio()
    b.network.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="different architectures: hidden_act is silu and gelu"):
        merged_state(base, a, b)
    _, _, b = trio()
    b.tokenizer.add_tokens(["extra"])
    assert merged_state(base, a, b)  # one more token is no contradiction
    other = tiny_model("qwen2", torch.float32).tokenizer
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"token 32 is 'another' and 'extra'"):
        merged_state(replace(base, tokenizer=other), a, b)


def test_another_base_is_noticed() -> None:
    base, a, b = trio()
    stranger = expert(base, 5, "stranger", noise=30.0)
    with pytest.raises(ValueError, match=r"'first' was not fine-tuned from 'stranger': model.embed_tokens"):
        merged_state(stranger, a, b, "TIES")
    assert merged_state(None, a, b)  # an average needs no base
    with pytest.raises(ValueError, match="needs the base"):
        merged_state(None, a, b, "task arithmetic")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    base, a, b = saved(tmp_path, trio())
    shards = sorted(a.glob("*.safetensors"))
    content = shards[1].read_bytes()
    for damage in (content[:-4], content[:5], b""):
        shards[1].write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{shards[1].name} of 'first' is damaged or cut off"):
            merge_models(base, a, b, tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks the weight file '{shards[1].name}'"):
        merge_models(base, a, b, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no model .*nowhere': give"):
        merge_models(base, tmp_path / "nowhere", b, tmp_path / "out")
    (tmp_path / "cut").write_bytes(b"12345")
    with pytest.raises(ValueError, match="cut of 'the scores' is damaged"):
        merged_state(base, base, b, "average", Protection(0.1, tmp_path / "cut"))
    with pytest.raises(FileNotFoundError, match="no scores at"):
        merged_state(base, base, b, "average", Protection(0.1, tmp_path / "absent"))
    tensors = load_file(b / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"merged model.norm.weight holds NaN"):
        merge_models(base, base, b, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-qwen2", "first", "second", "cut"}


def test_scores_of_another_model_are_refused() -> None:
    base, a, b = trio()
    with pytest.raises(ValueError, match=r"made for 'x' with hash 999999999999…, not for 'first'"):
        merged_state(base, a, b, "average", Protection(0.1, scores(replace(a, sha256="9" * 64), model="x")))
    with pytest.raises(ValueError, match=r"made for 'another model' with hash 2"):
        merged_state(base, a, b, "average", Protection(0.1, scores_a=scores(b)))
    with pytest.raises(ValueError, match=r"of nothing \[2\] do not fit 'second'"):
        merged_state(base, a, b, "average", Protection(0.1, None, Scores({"nothing": torch.ones(2)})))
    bad = scores(a)
    bad.values["model.norm.weight"][1] = float("inf")
    with pytest.raises(ValueError, match=r"scores of model.norm.weight hold NaN or infinite"):
        merged_state(base, a, b, "average", Protection(0.1, bad))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Protection(5, s), r"share must lie in \[0, 1\], not 5 \(k % is a hundredth of k\)"),
        (lambda s: Protection(float("nan"), s), "share must lie"),
        (lambda s: Protection(0.1), "needs scores"),
        (lambda s: Protection(0.1, s, scope="model"), "scope must be one of 'global', 'layer'"),
        (lambda s: Protection(0.1, s, stages="III"), "stages must be"),
        (lambda s: Ties(density=20), "density must lie"),
        (lambda s: Ties(trim="layer"), "trim must be"),
        (lambda s: Ties(elect="sum"), "elect must be"),
        (lambda s: TaskArithmetic(task_weight=float("inf")), "task_weight must be finite"),
        (lambda s: Dare(density=0.0), "nothing to rescale"),
        (lambda s: DareTies(drop_density=0.0), "nothing to rescale"),
        (lambda s: find_method("ties"), "Unknown merging method 'ties'; known: average"),
        (lambda s: merged_state(*trio(), "DARE task", Protection(0.1, s)), "No protection is defined"),
        (lambda s: merged_state(*trio(), "Fisher average"), "fishers="),
        (lambda s: merged_state(*trio(), fishers=(s, s)), "fishers="),
        (lambda s: merge_models(*trio(), "out"), "in memory cannot be written"),
        (lambda s: merged_state(*trio(), "average", Protection(0.1, Scores({}))), "of no weight"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make: Callable[[Scores], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(scores(trio()[1]))


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    base, a, b = saved(tmp_path, trio())
    (tmp_path / "out").mkdir()
    merge_models(base, a, b, tmp_path / "out")  # an empty folder is taken
    for taken in (tmp_path / "out", a, a / "config.json"):
        with pytest.raises(FileExistsError, match="already there"):
            merge_models(base, a, b, taken)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = saved(tmp_path, trio())
    before = sorted(p.name for p in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))  # the operating system stops the write half-way
    try:
        with pytest.raises(OSError, match=r"out could not be written .* nothing of it is left"):
            merge_models(base, a, b, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"could not be written \(the merged model needs"):
        merge_models(base, a, b, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bundled_models_merge_with_themselves(tmp_path: Path) -> None:
    out = merge_models("mini-lm", "mini-lm", "mini-lm", tmp_path / "same", "TIES")
    original, made = open_model("mini-lm"), open_model(out)
    assert same(state(made), state(original))
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 5000


MEMORY = """
import shutil
import sys
from pathlib import Path
from fihelpers.perturb.merge import merge_models
from fihelpers.perturb.merge_methods import Average, Protection, Ties

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def peak(folder, method, protection=None):
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest use so far
    out = merge_models(folder / "base", folder / "a", folder / "b", folder / "out", method, protection)
    shutil.rmtree(out)
    return status("VmHWM")

tiny, small, large = (Path(sys.argv[1]) / name for name in ("tiny", "small", "large"))
peak(tiny, Average())  # what is imported at the first merge does not count
before = status("VmRSS")
for folder in (small, large):
    print(peak(folder, Average()) - before)
print(peak(small, Ties(), Protection(0.1, small / "scores")) - before)
"""


def synthetic(folder: Path, layers: int, experts: bool) -> None:
    """Three models in bfloat16, and scores for a tensor of one of them.

    Of `layers` tensors of 16 MB, or of as many layers whose four experts are 48 MB, of which 32 are loaded as
    one tensor.
    """
    data = Path(__file__).parent.parent / "data" / "models" / "mini-lm"
    shapes = {f"layer.{i}.weight": (2048, 4096) for i in range(layers)}
    config, scored = AutoConfig.from_pretrained(data), layout((2048, 4096), torch.float32)
    name = "layer.0.weight"
    if experts:
        config = MixtralConfig(
            vocab_size=5000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, num_local_experts=4,
        )  # fmt: skip
        with torch.device("meta"):
            network = MixtralForCausalLM(config)
        shapes = {
            n: tuple(v.shape) for n, v in revert_weight_conversion(network, network.state_dict()).items()
        }
        name, scored = "model.layers.0.mlp.experts.gate_up_proj", layout((4, 4096, 1024), torch.float32)
    layouts = {n: layout(shape, torch.bfloat16) for n, shape in shapes.items()}
    most = max(one.numel() for one in layouts.values())
    base = torch.randn(most, generator=torch.Generator().manual_seed(0)).bfloat16()
    for which, values in {"base": base, "a": base * 1.5, "b": base + base.abs()}.items():
        config.save_pretrained(folder / which)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(data / file, folder / which / file)

        def make(name: str, values: Tensor = values) -> Tensor:
            return values[: layouts[name].numel()].view(layouts[name].shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "SHARD_BYTES", 10**8)
            write_weights(folder / which, layouts, make)
    save_file({name: torch.rand(scored.shape)}, folder / "scores")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads its memory as Linux tells it")
@pytest.mark.parametrize(("experts", "layers"), [(False, (1, 8, 32)), (True, (1, 2, 8))])
def test_memory_grows_with_the_largest_tensor_and_not_with_the_model(
    tmp_path: Path, experts: bool, layers: tuple[int, int, int]
) -> None:
    """A pair of 1 GB together against one of a quarter of that; a tensor has 16 MB, with experts 32.

    The highest use holds pages of mapped files too, which the kernel drops when it likes: runs of one merge
    differ by four tensors. One that holds its models would grow by 384 MB, with experts 288.
    """
    try:
        for name, count in zip(("tiny", "small", "large"), layers, strict=True):
            synthetic(tmp_path / name, count, experts)
        run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        small, large, ties = map(float, run.stdout.split())
        assert max(small, large, ties) < 320 * (1 + experts) and large < small + 96 * (1 + experts)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
