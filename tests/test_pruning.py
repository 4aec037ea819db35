"""Published pruning scores: each on cases worked out by hand, and against plain autograd."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_examples, tiny_model
from torch import Tensor, nn

from fihelpers.answers import Top, letters
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores import hooks, pruning
from fihelpers.scores.pruning import METHODS, score_pruning
from fihelpers.scores.weights import score_weights

UP = "model.layers.0.mlp.up_proj.weight"


def inputs_of(model: LanguageModel, name: str, prompts: list[str]) -> Tensor:
    """The inputs X (tokens, in) of one layer, one prompt at a time, so that nothing is padded."""
    seen = []
    layer = model.network.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach()))
    for prompt in prompts:
        model.last_logits(model.batches([prompt])[0])
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in seen])


def feed(model: LanguageModel, x: Tensor) -> LanguageModel:
    """Let the first up projection read x (tokens, in) for a prompt of as many tokens."""
    layer = model.network.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, inputs: (x[None].to(inputs[0]),))
    return model


def by_hand(weight: list[list[float]], x: list[list[float]]) -> tuple[LanguageModel, list]:
    """A model whose up projection has these first weights and reads x (4 tokens, 2) as its first inputs."""
    model = tiny_model("llama")
    layer = model.network.model.layers[0].mlp.up_proj
    layer.weight.data.zero_()[:2, :2] = torch.tensor(weight, dtype=torch.float64)
    padded = torch.zeros(4, 12, dtype=torch.float64)
    padded[:, :2] = torch.tensor(x, dtype=torch.float64)
    return feed(model, padded), tiny_examples(1)


def test_wanda_is_magnitude_times_input_norm_by_hand() -> None:
    model, examples = by_hand([[1.0, -2.0], [-3.0, 0.5]], [[3, 0], [0, 0], [4, 1], [0, 0]])
    scores = score_pruning(model, examples, ["Wanda"], only=[UP])["Wanda"][UP]
    # ||x_1|| = 5, ||x_2|| = 1
    torch.testing.assert_close(scores[:2, :2], torch.tensor([[5.0, 2.0], [15.0, 0.5]], dtype=torch.float64))
    assert (scores[:, 2:] == 0).all()


def test_sparsegpt_is_the_squared_weight_over_the_inverse_by_hand() -> None:
    model, examples = by_hand([[1.0, -2.0], [-3.0, 0.5]], [[2, 1], [0, 1], [0, 0], [0, 1]])
    scores = score_pruning(model, examples, ["SparseGPT"], only=[UP])["SparseGPT"][UP]
    # X X^T = [[4, 2], [2, 3]]; lambda = .01 * (4 + 3) / 12 inputs; [H^-1]_11 = h_22 / det, and so on
    a, b, c = 4 + 0.07 / 12, 2, 3 + 0.07 / 12
    determinant = a * c - b * b
    expected = torch.tensor([[1, 4], [9, 0.25]], dtype=torch.float64) * torch.tensor(
        [determinant / c, determinant / a], dtype=torch.float64
    )
    torch.testing.assert_close(scores[:2, :2], expected)
    assert (scores[:, 2:] == 0).all()  # dead inputs: 1 / lambda must not make them count


def test_inputs_that_are_all_zero_need_no_weight() -> None:
    model, examples = by_hand([[1.0, -2.0], [-3.0, 0.5]], [[0, 0]] * 4)
    scores = score_pruning(model, examples, ["Wanda", "SparseGPT"], only=[UP])
    assert not scores["Wanda"][UP].any() and not scores["SparseGPT"][UP].any()


def test_with_inputs_at_right_angles_sparsegpt_ranks_like_wanda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "DAMPING", 1e-9)
    model = feed(tiny_model("llama"), torch.diag(torch.arange(1.0, 13.0))[:4])
    scores = score_pruning(model, tiny_examples(1), ["Wanda", "SparseGPT"], only=[UP])
    torch.testing.assert_close(scores["SparseGPT"][UP], scores["Wanda"][UP].square(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox"])
def test_every_layer_equals_its_explicit_formula(kind: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(7)
    names = linear_names(model.network)
    scores = score_pruning(model, examples, ["Wanda", "SparseGPT"], only=names, batch_size=4)
    for name in names:
        x = inputs_of(model, name, [e.prompt for e in examples])
        weight = model.network.get_parameter(name).detach()
        torch.testing.assert_close(scores["Wanda"][name], weight.abs() * x.norm(dim=0))
        gram = x.T @ x
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        expected = weight.square() / torch.linalg.inv(damped).diagonal()
        torch.testing.assert_close(scores["SparseGPT"][name], expected, rtol=1e-8, atol=1e-12)


def test_sparsegpt_is_the_error_that_the_best_repair_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without damping: the least squared error of the layer's output once the weight is gone."""
    monkeypatch.setattr(pruning, "DAMPING", 1e-13)
    model, examples = tiny_model("llama"), tiny_examples(6)
    scores = score_pruning(model, examples, ["SparseGPT"], only=[UP])["SparseGPT"][UP]
    x = inputs_of(model, UP, [e.prompt for e in examples])
    weight = model.network.get_parameter(UP).detach()
    for j in (0, 5, 11):
        others = torch.cat([x[:, :j], x[:, j + 1 :]], 1)
        repair = torch.linalg.lstsq(others, x[:, j : j + 1]).solution
        error = (x[:, j : j + 1] - others @ repair).square().sum()
        torch.testing.assert_close(scores[:, j], weight[:, j].square() * error, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox"])
def test_taylor_equals_autograd(kind: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    scores = score_pruning(model, examples, ["Taylor"], batch_size=4)["Taylor"]
    weights = {n: model.network.get_parameter(n) for n in scores.values}
    classes = letters(model.tokenizer)
    truth = {n: torch.zeros_like(w) for n, w in weights.items()}
    for example in examples:
        log_p = classes.log_probs(model.last_logits(model.batches([example.prompt])[0]))[0]
        grads = torch.autograd.grad(-log_p[example.answer], list(weights.values()))
        for (name, w), g in zip(weights.items(), grads, strict=True):
            truth[name] += (g * w.detach()).square() / len(examples)
    for name in weights:
        torch.testing.assert_close(scores[name], truth[name], rtol=1e-7, atol=1e-14)


def test_taylor_is_the_mean_square_of_snip_where_the_model_is_right() -> None:
    """With the predicted class as the right one, g is -s_y_hat: Taylor is the squared score times W^2."""
    model, examples = tiny_model("qwen2"), tiny_examples(5)
    open_ended = [replace(e, answer=None) for e in examples]
    names = linear_names(model.network)
    taylor = score_pruning(model, open_ended, ["Taylor"], only=names)["Taylor"]
    squared = score_weights(model, examples, ["squared score"], only=names)["squared score"]
    for name in names:
        weight = model.network.get_parameter(name).detach()
        torch.testing.assert_close(taylor[name], squared[name] * weight.square(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_padding_portions_and_blocks_change_nothing(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(7)
    names = linear_names(model.network)
    whole = score_pruning(model, examples, only=names, batch_size=7)
    monkeypatch.setattr(pruning, "HELD", 200)
    monkeypatch.setattr(hooks, "BLOCK", 64)
    parts = score_pruning(model, examples, only=names, batch_size=batch_size)
    for method in METHODS:
        for name in names:
            torch.testing.assert_close(parts[method][name], whole[method][name], rtol=1e-8, atol=1e-13)


def test_what_stands_at_padding_is_never_read() -> None:
    model, examples = (
        tiny_model("llama"),
        tiny_examples(3),
    )  # prompts of 4, 5 and 6 tokens: 3 of 18 are padding
    layer = model.network.model.layers[0].mlp.up_proj
    read = []
    layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[:2]))
    before = score_pruning(model, examples, ["Wanda", "SparseGPT"], only=[UP])
    assert set(read) == {(3, 6)}

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[:2, 0], x[0, 1] = 1e6, 1e6  # the shortest prompt comes first, padded on the left
        return (x,)

    layer.register_forward_pre_hook(spoil)
    after = score_pruning(model, examples, ["Wanda", "SparseGPT"], only=[UP])
    for method in before:
        assert after[method][UP].equal(before[method][UP])


def test_a_weight_shared_by_two_layers_counts_both() -> None:
    apart, shared, examples = tiny_model("llama"), tiny_model("llama"), tiny_examples(4)
    gate = UP.replace("up", "gate")
    for model in (apart, shared):
        mlp = model.network.model.layers[0].mlp
        mlp.gate_proj.weight.data.copy_(mlp.up_proj.weight.data)
    mlp.gate_proj.weight = mlp.up_proj.weight
    names = linear_names(shared.network)
    assert len(names) == len(linear_names(apart.network)) - 1
    (name,) = {UP, gate} & set(names)
    one = score_pruning(shared, examples, only=[name])
    two = score_pruning(apart, examples, only=[UP, gate])
    # both layers read the same inputs here, so X X^T and lambda double
    torch.testing.assert_close(one["Wanda"][name], two["Wanda"][UP] * 2**0.5)
    torch.testing.assert_close(one["SparseGPT"][name], two["SparseGPT"][UP] * 2)
    truth = torch.zeros_like(mlp.up_proj.weight)
    for example in examples:
        log_p = letters(shared.tokenizer).log_probs(shared.last_logits(shared.batches([example.prompt])[0]))
        (g,) = torch.autograd.grad(-log_p[0, example.answer], [mlp.up_proj.weight])
        truth += (g * mlp.up_proj.weight.detach()).square() / len(examples)
    torch.testing.assert_close(one["Taylor"][name], truth, rtol=1e-7, atol=1e-14)


def test_the_output_head_is_scored_unless_it_is_the_embedding_too() -> None:
    own, tied = tiny_model("llama"), tiny_model("qwen2")
    scores = score_pruning(own, tiny_examples(3), ["Wanda"])["Wanda"]
    assert set(scores.values) == {*linear_names(own.network), "lm_head.weight"}
    assert scores["lm_head.weight"].any()
    assert set(score_pruning(tied, tiny_examples(3), ["Wanda"])["Wanda"].values) == set(
        linear_names(tied.network)
    )
    with pytest.raises(ValueError, match=r"embed_tokens.weight' is no weight of linear layers"):
        score_pruning(tied, tiny_examples(3), only=["model.embed_tokens.weight"])


def test_plain_text_takes_the_models_own_choice() -> None:
    model = tiny_model("llama")
    texts = [replace(e, options=(), answer=None) for e in tiny_examples(3)]
    scores = score_pruning(model, texts, ["Taylor"], only=[UP])["Taylor"]
    truth = torch.zeros_like(scores[UP])
    for text in texts:
        log_p = Top(8).log_probs(model.last_logits(model.batches([text.prompt])[0]))
        (g,) = torch.autograd.grad(log_p[0, 0], [model.network.get_parameter(UP)])
        truth += (g * model.network.get_parameter(UP).detach()).square() / len(texts)
    torch.testing.assert_close(scores[UP], truth)
    assert scores.metadata["classes"] == "top 8 + rest" and scores.metadata["n"] == "3"


def test_the_model_is_left_as_it_was_and_half_precision_is_raised() -> None:
    model = tiny_model("qwen2", torch.bfloat16)
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    scores = score_pruning(model, tiny_examples(3))
    for name, p in model.network.named_parameters():
        assert p.equal(before[name]) and p.requires_grad and p.grad is None
    assert not any(m._forward_hooks for m in model.network.modules())
    for method in METHODS:
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in scores[method].values.values())
        assert all((v >= 0).all() for v in scores[method].values.values())


def fed(model: LanguageModel, name: str, prompts: list[str]) -> dict[int, Tensor]:
    """The inputs of each expert (tokens, in), from the library's own loop over the experts."""
    path, _, local = name.rpartition(".")
    experts = model.network.get_submodule(path)
    seen: dict[int, list[Tensor]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, index, _ = args
        for expert in range(len(module.down_proj)):
            x = hidden[(index == expert).any(-1)]
            if local == "down_proj":
                w, b = module.gate_up_proj[expert], getattr(module, "gate_up_proj_bias", None)
                x = x @ w + b[expert] if b is not None else x @ w.T
                x = module._apply_gate(x)
            seen.setdefault(expert, []).append(x.detach())

    handle = experts.register_forward_pre_hook(look)
    for prompt in prompts:
        model.last_logits(model.batches([prompt])[0])
    handle.remove()
    return {expert: torch.cat(parts) for expert, parts in seen.items()}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("local", ["gate_up_proj", "down_proj"])
def test_each_fused_expert_is_a_layer_that_reads_what_is_sent_to_it(kind: str, local: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    name = f"model.layers.1.mlp.experts.{local}"
    scores = score_pruning(model, examples, ["Wanda", "SparseGPT"], only=[name])
    weight = model.network.get_parameter(name).detach()
    weight = weight.transpose(1, 2) if kind == "gpt_oss" else weight
    for expert, x in fed(model, name, [e.prompt for e in examples]).items():
        found = {m: scores[m].rows(name).view(weight.shape)[expert] for m in scores}
        torch.testing.assert_close(found["Wanda"], weight[expert].abs() * x.norm(dim=0))
        hessian = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
        expected = weight[expert].square() / hessian.inverse().diagonal()
        torch.testing.assert_close(found["SparseGPT"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_taylor_of_every_linear_weight_is_that_of_autograd(kind: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(4)
    names = linear_names(model.network)
    scores = score_pruning(model, examples, ["Taylor"], only=names)["Taylor"]
    params = [model.network.get_parameter(n) for n in names]
    totals = [torch.zeros_like(p) for p in params]
    for example in examples:
        log_p = letters(model.tokenizer).log_probs(model.last_logits(model.batches([example.prompt])[0]))
        grads = torch.autograd.grad(-log_p[0, example.answer], params, materialize_grads=True)
        totals = [t + (g * p.detach()).square() / 4 for t, g, p in zip(totals, grads, params, strict=True)]
    for name, total in zip(names, totals, strict=True):
        torch.testing.assert_close(scores[name], total, rtol=1e-6, atol=1e-13)


def test_bad_input_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="calibration set is empty"):
        score_pruning(model, [])
    with pytest.raises(ValueError, match="Unknown pruning method 'wanda'; known: Wanda"):
        score_pruning(model, tiny_examples(1), ["wanda"])
    with pytest.raises(ValueError, match="'nope' is no weight"):
        score_pruning(model, tiny_examples(1), only=["nope"])
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        score_pruning(model, tiny_examples(1), only=["model.norm.weight"])
    model.network.extra = nn.Linear(3, 3)
    for method in ("Wanda", "SparseGPT"):
        with pytest.raises(ValueError, match=r"extra\.weight is never called"):
            score_pruning(model, tiny_examples(1), [method])
    model.network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="tiny-llama"):
        score_pruning(model, tiny_examples(1), only=[UP])


def test_of_tokens_in_a_row_the_padding_is_left_out() -> None:
    """Some layers flatten the tokens; what else they do to the places is refused but for single prompts."""
    model, examples = tiny_model("llama"), tiny_examples(3)
    truth = score_pruning(model, examples, ["Wanda"], only=[UP])["Wanda"][UP]
    layer = model.network.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].flatten(0, 1),))
    back = layer.register_forward_hook(lambda module, inputs, out: out.unflatten(0, (-1, 6)))
    torch.testing.assert_close(score_pruning(model, examples, ["Wanda"], only=[UP])["Wanda"][UP], truth)
    back.remove()
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][:-1],))
    layer.register_forward_hook(lambda module, inputs, out: torch.cat([out, out[:1]]).unflatten(0, (-1, 6)))
    with pytest.raises(ValueError, match="use batch_size=1"):
        score_pruning(model, examples, ["Wanda"], only=[UP])
