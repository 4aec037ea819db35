"""Streamed weight scores against plain autograd, on tiny random models."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import tiny_examples, tiny_model
from torch import Tensor, nn

from fihelpers.answers import groups, letters
from fihelpers.filters import EXACT, Damped
from fihelpers.influence import SaturationWarning, fi
from fihelpers.measures import MEASURES, RANDOM
from fihelpers.models.language import LanguageModel
from fihelpers.scores import hooks, weights
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_contexts, score_weights

KINDS = ["qwen2", "llama", "gpt_neox", "gpt2"]


def autograd_class_grads(model: LanguageModel, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
    """Class gradients (K, *shape) of every parameter and P (K,), see `class_gradients`."""
    batch = model.batches([prompt])[0]
    log_p = letters(model.tokenizer).log_probs(model.last_logits(batch))[0]
    named = dict(model.network.named_parameters())
    return {name: class_gradients(log_p, p) for name, p in named.items()}, log_p.exp().detach()


@pytest.mark.parametrize("kind", KINDS)
def test_class_gradients_equal_autograd(kind: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(5)
    classes, parameters = letters(model.tokenizer), dict(model.network.named_parameters())
    batches = model.batches([example.prompt for example in examples], 2)
    with hooks.frozen(model.network):
        missed = hooks.missed_by_hooks(model, batches, classes, parameters)
    for batch in batches:
        truth = [autograd_class_grads(model, examples[i].prompt) for i in batch.index.tolist()]
        order = [[k for k in range(4) if k != int(probs.argmax())] for _, probs in truth]
        seen = dict.fromkeys(parameters, 0)
        with hooks.frozen(model.network):
            for block in hooks.class_grad_blocks(model, batch, classes, parameters, missed):
                for place, i in enumerate(range(len(truth))[block.samples]):
                    grads, probs = truth[i]
                    expected = grads[block.name][order[i]][:, block.rows]
                    torch.testing.assert_close(block.others[:, place], probs[order[i]], rtol=1e-10, atol=0)
                    torch.testing.assert_close(block.grads[:, place], expected, rtol=1e-5, atol=1e-12)
                    seen[block.name] += expected[0].numel()
        assert seen == {name: len(truth) * p.numel() for name, p in parameters.items()}


def norms_in_float64(network: nn.Module) -> None:
    """Let RMS norms compute in the type of their input; transformers' own compute in float32 always."""
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (  # type: ignore[method-assign]
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", [0.0, 2e-6])  # of norms in float32, as a part of the largest value
def test_every_measure_equals_autograd(kind: str, rounding: float) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    if not rounding:
        norms_in_float64(model.network)
    scores = score_weights(model, examples, [*MEASURES, "squared score"], batch_size=4)
    sums: dict[tuple[str, str], Tensor] = {}
    for example in examples:
        grads, probs = autograd_class_grads(model, example.prompt)
        for name, g in grads.items():
            value = model.network.get_parameter(name).detach()
            for key, measure in MEASURES.items():
                one = measure(g, probs, value=value)
                sums[key, name] = sums.get((key, name), 0) + one / len(examples)
    for (key, name), truth in sums.items():
        # a gradient that is zero but for rounding (a bias of keys, say) has no exact FI (method 1b.8)
        live = sums["Jacobian norm", name] > 1e-12
        if key != "random":
            ours = scores[key][name]
            atol = 1e-12 + rounding * float(truth.max())
            torch.testing.assert_close(ours[live], truth[live], rtol=1e-5, atol=atol, msg=f"{key} of {name}")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox"])
def test_float32_fi_equals_float64_norm_wise(kind: str) -> None:
    examples = tiny_examples(4)
    scores = score_weights(tiny_model(kind), examples, ["FI", "Jacobian norm"])
    exact = scores["FI exact"]
    model = tiny_model(kind)
    model.network.float()
    single = score_weights(model, examples, ["FI"])["FI exact"]
    largest = max(v.max() for v in exact.values.values())
    for name, value in exact.values.items():
        live = scores["Jacobian norm"][name] > 1e-12  # see above: the rest is zero but for rounding
        assert ((single[name] - value).abs() * live).max() < 1e-3 * largest


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("block", "rows"), [(1, 1), (64, 64), (700, 4), (2**19, 64)])
def test_batches_blocks_and_tiles_do_not_change_scores(batch_size, block, rows, monkeypatch) -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(7)
    whole = score_weights(model, examples, batch_size=7)
    monkeypatch.setattr(weights, "TILED", frozenset())
    monkeypatch.setattr(hooks, "BLOCK", block)
    monkeypatch.setattr(hooks, "ROWS", rows)
    parts = score_weights(model, examples, batch_size=batch_size)
    for key in whole:
        for name in whole[key].values:
            torch.testing.assert_close(parts[key][name], whole[key][name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missed", [False, True])
def test_saving_memory_does_not_change_scores(kind, missed) -> None:
    model, examples = tiny_model(kind), tiny_examples(5)
    if missed:  # a weight in a block that the hooks do not see
        block = hooks.transformer_blocks(model.network)[0]
        name = next(n for n, m in block.named_children() if "norm" in type(m).__name__.lower())
        setattr(block, name, Scaled(getattr(block, name), 12))
    usual = score_weights(model, examples, batch_size=3)
    saving = score_weights(model, examples, batch_size=3, save_memory=True)
    for key, scores in usual.items():
        for name, value in scores.values.items():
            torch.testing.assert_close(saving[key][name], value, rtol=1e-9, atol=1e-12)
        assert saving[key].metadata == scores.metadata
    assert not any("forward" in m.__dict__ for m in model.network.modules())


def test_saving_memory_takes_part_of_the_weights() -> None:
    model, examples = tiny_model("llama"), tiny_examples(3)
    only = ["model.layers.1.mlp.up_proj.weight"]
    usual = score_weights(model, examples, ["FI"], only=only)["FI exact"][only[0]]
    saving = score_weights(model, examples, ["FI"], only=only, save_memory=True)["FI exact"][only[0]]
    assert saving.equal(usual) and usual.max() > 0


def test_no_memory_is_saved_without_blocks() -> None:
    with pytest.raises(ValueError, match="Linear has no list of transformer blocks"):
        hooks.transformer_blocks(nn.Linear(2, 2))


def test_bfloat16_weights_are_scored_in_float32() -> None:
    examples = tiny_examples(4)
    rough = score_weights(tiny_model("llama", torch.bfloat16), examples, ["Jacobian norm"])["Jacobian norm"]
    model = tiny_model("llama", torch.bfloat16)
    model.network.float()  # the same weights
    fine = score_weights(model, examples, ["Jacobian norm"])["Jacobian norm"]
    for name, value in fine.values.items():
        assert rough[name].dtype == torch.float32
        assert (rough[name] - value).norm() < 0.05 * value.norm()


@pytest.mark.parametrize("save_memory", [False, True])
def test_the_model_is_left_as_it_was(save_memory) -> None:
    model = tiny_model("qwen2")
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    score_weights(model, tiny_examples(2), ["FI"], save_memory=save_memory)
    for name, p in model.network.named_parameters():
        assert p.equal(before[name]) and p.requires_grad and p.grad is None
    assert not any(m._forward_hooks for m in model.network.modules())


class Scaled(nn.Module):
    """Wraps a network's final norm and multiplies by a parameter of its own, which no leaf module owns."""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self.scale = norm, nn.Parameter(torch.full((size,), 1.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale


def test_parameters_that_hooks_miss_fall_back_to_autograd() -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(3)
    model.network.model.norm = Scaled(model.network.model.norm, 12)
    scores = score_weights(model, examples, ["FI"])
    truth = torch.zeros(12, dtype=torch.float64)
    for example in examples:
        grads, probs = autograd_class_grads(model, example.prompt)
        truth += fi(grads["model.norm.scale"], probs) / 3
    torch.testing.assert_close(scores["FI exact"]["model.norm.scale"], truth)
    assert truth.max() > 0


def test_a_weight_used_outside_its_module_falls_back_to_autograd() -> None:
    """The hooks see the norm's own call, not that its weight is used a second time."""
    model, examples = tiny_model("qwen2"), tiny_examples(3)
    norm = model.network.model.norm
    norm.register_forward_hook(lambda module, inputs, out: out * module.weight)
    scores = score_weights(model, examples, ["Jacobian norm"])["Jacobian norm"]["model.norm.weight"]
    truth = torch.zeros(12, dtype=torch.float64)
    for example in examples:
        grads, probs = autograd_class_grads(model, example.prompt)
        truth += grads["model.norm.weight"][probs.argmax()].abs() / 3
    torch.testing.assert_close(scores, truth)


@pytest.mark.parametrize("missed", [False, True])
def test_contexts_count_with_their_shares(missed: bool) -> None:
    """Two examples, the first of which has three contexts, spread over two batches."""
    model, examples = tiny_model("llama"), tiny_examples(4)
    if missed:  # parameters that fall back to autograd, sample by sample
        model.network.model.norm = Scaled(model.network.model.norm, 12)
    prompts = [e.prompt for e in examples]
    shares = torch.tensor([0.2, 0.5, 0.3, 1.0])
    batches = [replace(b, index=b.index // 3) for b in model.batches(prompts, 2)]
    order = torch.cat([b.index for b in model.batches(prompts, 2)])
    contexts = list(zip(batches, shares[order].split(2), strict=True))
    measures = ["FI damped 0.0001", "SNIP", "magnitude"]
    ours = score_contexts(model, contexts, examples[:2], measures, EXACT, letters(model.tokenizer))
    alone = [score_weights(model, [e], measures) for e in examples]
    for name, scores in ours.items():
        for key, value in scores.values.items():
            truth = sum(w * one[name][key] for w, one in zip(shares.tolist(), alone, strict=True)) / 2
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-10)
    each = [json.loads(one["SNIP"].metadata["per_example"])[0] for one in alone]
    expected = [sum(w * x for w, x in zip(shares.tolist(), each[:3], strict=False)), each[3]]
    assert json.loads(ours["SNIP"].metadata["per_example"]) == pytest.approx(expected, rel=1e-4)


def test_displacement_aware_values_follow_from_the_stored_means() -> None:
    model, examples = tiny_model("llama"), tiny_examples(3)
    scores = score_weights(model, examples, ["squared score"])
    assert set(scores) == {"squared score"}
    name = "model.layers.0.mlp.up_proj.weight"
    delta = 0.1 * torch.ones_like(scores["squared score"][name])
    change = torch.zeros_like(delta)
    for example in examples:
        grads, probs = autograd_class_grads(model, example.prompt)
        change += (grads[name][probs.argmax()] * delta).square() / 3
    torch.testing.assert_close(scores["squared score"][name] * delta**2, change)


def test_scores_are_saved_and_loaded_with_their_metadata(tmp_path) -> None:
    model = tiny_model("qwen2")
    scores = score_weights(model, tiny_examples(3), ["FI"], Damped(1e-4))["FI damped 0.0001"]
    scores.save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    assert back.metadata == scores.metadata
    assert back.metadata["spectral"] == "damped 0.0001" and back.metadata["n"] == "3"
    assert all(back[name].equal(scores[name]) for name in scores.values)
    assert set(scores.values) <= set(model.network.state_dict())
    per_example = json.loads(back.metadata["per_example"])
    total = sum(float(v.sum()) for v in scores.values.values()) / scores.numel()
    assert sum(per_example) / 3 == pytest.approx(total, rel=1e-4)
    with pytest.raises(FileNotFoundError, match="no scores at"):
        Scores.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "scores.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        Scores.load(tmp_path / "cut.safetensors")


def test_two_classes_warn_of_saturation() -> None:
    model = tiny_model("llama")
    two = groups(model.tokenizer, {"yes": ["A", "B"], "no": ["C", "D"]})
    with pytest.warns(SaturationWarning):
        score_weights(
            model, tiny_examples(2), ["FI"], answers=two, only=["model.layers.0.mlp.up_proj.weight"]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_weights(model, tiny_examples(2), ["FI"])


def test_random_scores_differ_between_tensors_and_seeds() -> None:
    model, examples = tiny_model("llama"), tiny_examples(2)
    scores = score_weights(model, examples, [RANDOM])["random"]
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not scores[a].equal(scores[b])
    again = score_weights(model, examples, [RANDOM])["random"]
    assert scores[a].equal(again[a])


def test_bad_input_is_named() -> None:
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="calibration set is empty"):
        score_weights(model, [])
    with pytest.raises(ValueError, match="Unknown measure 'Fi'"):
        score_weights(model, tiny_examples(1), ["Fi"])
    with pytest.raises(ValueError, match="no parameter 'nope'"):
        score_weights(model, tiny_examples(1), only=["nope"])
    model.network.lm_head.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="tiny-qwen2"):
        score_weights(model, tiny_examples(1))


def test_measures_without_data_need_no_gradients(monkeypatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(weights, "class_grad_blocks", None)
    monkeypatch.setattr(weights, "missed_by_hooks", None)
    found = score_weights(model, tiny_examples(2), ["magnitude"])
    assert list(found) == ["magnitude"]
    for name, p in model.network.named_parameters():
        assert found["magnitude"][name].equal(p.detach().abs())
