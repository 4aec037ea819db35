"""Scores of channels: against plain autograd and by hand."""

import pytest
import torch
from test_pruning import fed
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fihelpers.answers import letters
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.channels import (
    channel_scores,
    displacement_scores,
    score_activations,
)
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.scores.pruning import score_pruning
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights

UP = "model.layers.0.mlp.up_proj.weight"
NAMES = [UP, "model.layers.1.self_attn.o_proj.weight"]
AXES = ["rows", "columns"]
OVER = {"rows": 1, "columns": 0}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_channels_of_turned_and_fused_weights_are_those_of_their_rows(kind: str, axis: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(3)
    names = linear_names(model.network)
    weights = score_weights(model, examples, ["squared score"], only=names)["squared score"]
    sums = channel_scores(weights, axis=axis)
    twos = {name: torch.full_like(value, 2.0) for name, value in weights.values.items()}
    moved = displacement_scores(weights, twos, axis)
    for name in names:
        rows = weights.rows(name)
        assert rows.shape[1] in (12, 20, 48)  # the inputs of every layer of these models
        torch.testing.assert_close(sums[name], rows.sum(OVER[axis]))
        torch.testing.assert_close(moved[name], 4 * sums[name])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_activations_of_experts_are_means_over_what_is_sent_to_them(kind: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = score_activations(model, examples, only=[name])
    inputs = fed(model, name, [e.prompt for e in examples])
    torch.testing.assert_close(found["mean input"][name], torch.cat(list(inputs.values())).abs().mean(0))
    hessian = found["Hessian diagonal"].rows(name).view(3, -1, 12)
    for expert, x in inputs.items():
        torch.testing.assert_close(hessian[expert], x.square().mean(0).expand_as(hessian[expert]))
    assert found["mean output"][name].shape == (hessian.shape[0] * hessian.shape[1],)


@pytest.mark.parametrize("axis", AXES)
def test_sums_and_means_of_channels(axis) -> None:
    values = {"a": torch.rand(3, 5), "b": torch.rand(4, 2), "norm": torch.rand(5)}
    scores = Scores(values, {"measure": "SNIP", "sha256": "x"})
    total, mean = channel_scores(scores, "sum", axis), channel_scores(scores, "mean", axis)
    assert set(total.values) == {"a", "b"}
    for name in total.values:
        torch.testing.assert_close(total[name], values[name].sum(OVER[axis]))
        torch.testing.assert_close(mean[name] * values[name].shape[OVER[axis]], total[name])
    assert total.metadata == {"measure": "SNIP", "sha256": "x", "axis": axis, "how": "sum"}
    assert set(channel_scores(scores, names=["b"]).values) == {"b"}


@pytest.mark.parametrize("axis", AXES)
def test_displacement_scores_are_the_mean_change_of_each_sample(axis) -> None:
    model, examples = tiny_model("llama"), tiny_examples(3)
    scores = score_weights(model, examples, ["squared score", "Fisher diagonal"], only=NAMES)
    g = torch.Generator().manual_seed(0)
    delta = {
        n: torch.randn(scores["squared score"][n].shape, generator=g, dtype=torch.float64) for n in NAMES
    }
    change = displacement_scores(scores["squared score"], delta, axis)
    length = displacement_scores(scores["Fisher diagonal"], delta, axis)
    truth = {n: [0.0, 0.0] for n in NAMES}
    classes = letters(model.tokenizer)
    for example in examples:
        log_p = classes.log_probs(model.last_logits(model.batches([example.prompt])[0]))[0]
        for name in NAMES:
            s = class_gradients(log_p, model.network.get_parameter(name))
            squares = (s * delta[name]).square()
            truth[name][0] = truth[name][0] + squares[log_p.argmax()].sum(OVER[axis]) / 3
            truth[name][1] = (
                truth[name][1] + (log_p.exp()[:, None, None] * squares).sum((0, 1 + OVER[axis])) / 3
            )
    for name in NAMES:
        torch.testing.assert_close(change[name], truth[name][0].detach())
        torch.testing.assert_close(length[name], truth[name][1].detach())
    assert change.metadata["measure"] == "predicted change"
    assert length.metadata["measure"] == "information length"
    assert change.metadata["axis"] == axis


def test_a_displacement_to_zero_gives_the_squares_of_snip() -> None:
    """For one sample: SNIP^2 is the predicted change of zeroing (method 1b.4)."""
    model, examples = tiny_model("qwen2"), tiny_examples(1)
    scores = score_weights(model, examples, ["squared score", "SNIP"], only=NAMES)
    delta = {n: -model.network.get_parameter(n).detach() for n in NAMES}
    change = displacement_scores(scores["squared score"], delta)
    for name in NAMES:
        torch.testing.assert_close(change[name], scores["SNIP"][name].square().sum(1))


def activations(model: LanguageModel, name: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
    seen = []
    layer = model.network.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    for prompt in prompts:
        model.last_logits(model.batches([prompt])[0])
    handle.remove()
    return tuple(torch.cat([one[i].detach().flatten(0, 1) for one in seen]) for i in (0, 1))


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_activations_count_every_token_once_and_no_padding(kind, batch_size) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    names = linear_names(model.network)[:3]
    scores = score_activations(model, examples, only=names, batch_size=batch_size)
    for name in names:
        x, y = activations(model, name, [e.prompt for e in examples])
        torch.testing.assert_close(scores["mean input"][name], x.abs().mean(0))
        torch.testing.assert_close(scores["mean output"][name], y.abs().mean(0))
        squares = x.square().mean(0).expand(y.shape[1], -1)
        torch.testing.assert_close(scores["Hessian diagonal"][name], squares)
    assert [scores[k].metadata.get("axis") for k in scores] == ["columns", "rows", None]


def test_the_hessian_diagonal_is_wandas_norm_and_predicts_the_change_of_the_output() -> None:
    model, examples = tiny_model("llama"), tiny_examples(6)
    hessian = score_activations(model, examples, only=[UP])["Hessian diagonal"]
    wanda = score_pruning(model, examples, ["Wanda"], only=[UP])["Wanda"][UP]
    weight = model.network.get_parameter(UP).detach()
    x, _ = activations(model, UP, [e.prompt for e in examples])
    torch.testing.assert_close(weight.abs() * (len(x) * hessian[UP]).sqrt(), wanda)
    delta = torch.zeros_like(weight)
    delta[:, 3] = torch.linspace(-1, 2, 20)  # of one column only, so that its diagonal is all there is
    change = displacement_scores(hessian, {UP: delta}, "rows")
    torch.testing.assert_close(change[UP], (x @ delta.T).square().mean(0))


def test_scores_of_channels_are_saved_with_their_axis(tmp_path) -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(2)
    for kind, scores in score_activations(model, examples, only=NAMES).items():
        scores.save(tmp_path / "scores.safetensors")
        back = Scores.load(tmp_path / "scores.safetensors")
        assert back.metadata == scores.metadata and back.metadata["measure"] == kind
        assert all(back[n].equal(scores[n]) for n in NAMES)


def test_bad_input_is_named() -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(2)
    scores = Scores({"a": torch.rand(3, 5), "norm": torch.rand(5)})
    with pytest.raises(ValueError, match="not 'row'"):
        channel_scores(scores, axis="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'max'"):
        channel_scores(scores, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scores for b"):
        channel_scores(scores, names=["a", "b"])
    with pytest.raises(ValueError, match="norm is no matrix"):
        channel_scores(scores, names=["norm"])
    with pytest.raises(ValueError, match="no matrix here"):
        channel_scores(Scores({"norm": torch.rand(5)}))
    with pytest.raises(ValueError, match="no scores for b"):
        displacement_scores(scores, {"b": torch.rand(3, 5)})
    with pytest.raises(ValueError, match=r"displacement of a is \(5, 3\)"):
        displacement_scores(scores, {"a": torch.rand(5, 3)})
    with pytest.raises(FloatingPointError, match="displacement of a"):
        displacement_scores(scores, {"a": torch.full((3, 5), float("nan"))})
    with pytest.raises(ValueError, match="calibration set is empty"):
        score_activations(model, [])
    with pytest.raises(ValueError, match="nope"):
        score_activations(model, examples, only=["nope"])
    model.network.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, x: (x[0] * float("inf"),))
    with pytest.raises((FloatingPointError, ValueError), match=r"NaN|never called"):
        score_activations(model, examples, only=NAMES)
