"""What holds for every architecture, property by property, on the tiny random models of `architectures`."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LEFT_OUT, model_of
from tiny import WORDS
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fihelpers.answers import letters
from fihelpers.evaluate.questions import answer_all
from fihelpers.models.generate import end_tokens, greedy
from fihelpers.models.language import LanguageModel, open_model, weights_sha256
from fihelpers.models.linear import linear_names
from fihelpers.perturb.merge import merge_models
from fihelpers.perturb.merge_methods import Protection
from fihelpers.perturb.quantize import (
    Scheme,
    pack_model,
    quantized,
)
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

LENGTHS = (1, 4, 6, 13, 6, 2)  # of the prompts, after what they share
NO_FACTORS = ("A_log", "bias")  # state decays, and what is added: they multiply nothing
FLOAT32 = ("xglm",)  # the library's mask overflows in float64
every = pytest.mark.parametrize("kind", ARCHITECTURES)


def test_every_architecture_is_tried_or_left_out_for_a_reason() -> None:
    """Of the library's version that the project is made with; another may know other ones."""
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    if f"transformers=={transformers.__version__}" not in constraints:
        pytest.skip(f"the list is not that of transformers {transformers.__version__}")
    tried = {kind.partition(" ")[0] for kind in ARCHITECTURES}
    assert not tried & set(LEFT_OUT)
    assert tried | set(LEFT_OUT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def texts(lengths: tuple[int, ...], shared: int = 0, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    start, *rests = (torch.randint(5, len(WORDS), (n,), generator=generator) for n in (shared, *lengths))
    return [" ".join(WORDS[i] for i in [*start, *rest]) for rest in rests]


def asked(prompts: list[str]) -> list[Example]:
    return [Example(str(k), "words", p, tuple("ABCD"), k % 4, p) for k, p in enumerate(prompts)]


def alone(model: LanguageModel, text: str, after: list[int] | None = None) -> Tensor:
    """The plain way: the logits of the network itself after one text and some more tokens."""
    ids = [WORDS.index(word) for word in text.split()] + (after or [])
    logits: Tensor = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@every
@pytest.mark.parametrize("shared", [0, 10])
def test_answers_are_those_of_each_prompt_alone(kind: str, shared: int) -> None:
    model = model_of(kind)
    prompts, classes = texts(LENGTHS, shared), letters(model.tokenizer)
    with torch.no_grad():
        truth = classes.log_probs(torch.stack([alone(model, p) for p in prompts]))
    assert (truth[1:] - truth[:-1]).abs().amax(1).min() > 1e-3
    for size in (1, 8):
        found = answer_all(model, asked(prompts), classes, batch_size=size).log_probs
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


def two_weights(model: LanguageModel, prompt: str) -> list[str]:
    """The names of a usual matrix and of something else, if any, on which the prompt's logits depend.

    Of that, what no linear layer owns goes first (fused experts, state decays), then norms, then biases.
    """
    network = model.network
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(alone(model, prompt)[1], list(named.values()), allow_unused=True)
    live = [n for n, g in zip(named, grads, strict=True) if g is not None and g.abs().max() > 1e-6]
    owner = {n: network.get_submodule(n.rpartition(".")[0]) for n in live}
    plain = [n for n in live if n.endswith("weight") and isinstance(owner[n], nn.Linear | Conv1D)]
    other = [n for n in live if n not in plain and not isinstance(owner[n], nn.Embedding)]
    other.sort(key=lambda n: (isinstance(owner[n], nn.Linear), -named[n].dim(), "norm" in n.lower()))
    return [plain[len(plain) // 2], *other[:1]]


@every
def test_scores_equal_autograd(kind: str) -> None:
    model = model_of(kind, torch.float32 if kind in FLOAT32 else torch.float64)
    prompts = texts((1, 4, 13, 4))
    names = two_weights(model, prompts[2])
    scores = score_weights(model, asked(prompts), ["Jacobian norm", "Fisher diagonal"], only=names)
    weights = [model.network.get_parameter(name) for name in names]
    truth = {key: [torch.zeros_like(p) for p in weights] for key in ("Jacobian norm", "Fisher diagonal")}
    for prompt in prompts:
        log_p = letters(model.tokenizer).log_probs(alone(model, prompt))
        grads = [torch.autograd.grad(x, weights, retain_graph=True, materialize_grads=True) for x in log_p]
        p = log_p.detach().exp()
        for i in range(len(weights)):
            truth["Jacobian norm"][i] += grads[int(p.argmax())][i].abs() / len(prompts)
            truth["Fisher diagonal"][i] += sum(q * g[i] ** 2 for q, g in zip(p, grads, strict=True)) / len(
                prompts
            )
    for key, values in truth.items():
        for name, value in zip(names, values, strict=True):
            assert value.max() > 0, name
            apart = (scores[key][name] - value).abs().max() / value.max()
            assert apart < 1e-4, f"{key} of {name} by {float(apart):.1e}"


@every
def test_linear_layers_cover_the_matrices(kind: str) -> None:
    network = model_of(kind).network
    ends = {network.get_input_embeddings(), network.get_output_embeddings()}
    matrices = {}
    for path, module in network.named_modules():
        for local, p in module.named_parameters(recurse=False):
            if module in ends or isinstance(module, nn.Embedding | nn.Conv1d):
                continue
            if p.dim() > 1 and min(p.shape) > 1 and not local.endswith(NO_FACTORS):
                matrices[f"{path}.{local}"] = p.numel()
    named = dict(network.named_parameters())
    matrices = {n: k for n, k in matrices.items() if n in named}
    names = linear_names(network)
    assert len(set(names)) == len(names) and set(names) <= set(matrices)
    share = sum(matrices[n] for n in names) / sum(matrices.values())
    assert share >= 0.95, sorted(set(matrices) - set(names))


@every
def test_greedy_text_is_that_of_rereading_everything(kind: str) -> None:
    model = model_of(kind)
    prompts, ends = texts((3, 9, 14, 9)), end_tokens(model)
    together = greedy(model, prompts, 4, batch_size=8)
    assert greedy(model, prompts, 4, batch_size=1) == together
    for prompt, response in zip(prompts, together, strict=True):
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 4 and not set(new) & set(ends):
                new.append(int(alone(model, prompt, new).argmax()))
        assert list(response.ids) == [token for token in new if token not in ends]


def saved(network: PreTrainedModel, folder: Path) -> Path:
    network.save_pretrained(folder)
    model_of("llama").tokenizer.save_pretrained(folder)
    return folder


@every
def test_an_average_keeps_what_is_protected(kind: str, tmp_path: Path) -> None:
    network = model_of(kind).network
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(5)
    for p in other.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    a, b = saved(network, tmp_path / "a"), saved(other, tmp_path / "b")
    first, second = (dict(n.named_parameters()) for n in (network, other))
    values = {name: torch.rand(p.shape, generator=generator) for name, p in first.items()}
    scores = Scores(values, {"sha256": weights_sha256(a, "a")})
    flat = torch.cat([v.flatten() for v in values.values()])
    border = flat.topk(round(0.1 * len(flat))).values[-1]
    out = merge_models(None, a, b, tmp_path / "out", "average", Protection(0.1, scores))
    merged = dict(open_model(out).network.named_parameters())
    assert merged.keys() == first.keys()
    for name, value in merged.items():
        mean = (first[name] + second[name]) / 2
        torch.testing.assert_close(value, torch.where(values[name] >= border, first[name], mean))


@every
def test_every_linear_weight_is_quantized_for_a_while(kind: str) -> None:
    whole = model_of(kind)
    users = Counter(p for m in whole.network.modules() for p in m.parameters(recurse=False))
    own = [n for n in linear_names(whole.network) if users[whole.network.get_parameter(n)] == 1]
    packed, text = pack_model(whole, own, Scheme(4)), texts((9,))[0]
    with torch.no_grad():
        intact = alone(whole, text)
        with quantized(whole.network, packed):
            cut = alone(whole, text)
        assert alone(whole, text).equal(intact)
    assert (intact - cut).abs().max() > 1e-3
