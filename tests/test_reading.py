"""How networks are read: what each prompt gives alone, in the smallest cases in which it once was not so."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import model_of
from tiny import WORDS, tiny_examples, tiny_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from fichapters.ch07.lab import framed
from fihelpers.answers import letters
from fihelpers.evaluate.questions import answer_all
from fihelpers.jobs.preflight import plan_scores
from fihelpers.models.generate import greedy, prompt_ids
from fihelpers.models.language import Framed, LanguageModel, in_chat, tokenize
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example


def asked(*prompts: str) -> list[Example]:
    return [Example(str(i), "words", p, tuple("ABCD"), 0, p) for i, p in enumerate(prompts)]


def alone(model: LanguageModel, prompts: list[str]) -> Tensor:
    """P of the letters by the network itself, one prompt at a time."""
    rows = [torch.tensor([[WORDS.index(w) for w in p.split()]]) for p in prompts]
    with torch.no_grad():
        logits = torch.cat([model.network(input_ids=ids, use_cache=False).logits[:, -1] for ids in rows])
    return letters(model.tokenizer).log_probs(logits).exp()


def together(model: LanguageModel, prompts: list[str]) -> Tensor:
    return answer_all(model, asked(*prompts), letters(model.tokenizer)).log_probs.exp()


SHARED = "w1 w2 w3 w4 w5 w6 w7 w8"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "cohere2", "bloom", "mpt", "falcon alibi"])
def test_padding_does_not_count_in_windows_and_distances(kind: str) -> None:
    model = model_of(kind)
    prompts = [f"{SHARED} w9", f"{SHARED} w10 w11 w12 w13"]
    prefix, batches = model.prefixed_batches(prompts)
    assert prefix.shape == (1, 8) and len(batches) == 1
    torch.testing.assert_close(together(model, prompts), alone(model, prompts), rtol=0, atol=1e-5)


def test_a_window_that_holds_the_padding_too_is_not_what_the_short_prompt_sees() -> None:
    """Window 8: the short prompt's last token sees itself and seven before, whatever it is asked beside."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = MistralConfig(
        vocab_size=len(WORDS), num_key_value_heads=1, sliding_window=8, head_dim=8, **shape
    )
    network = MistralForCausalLM(config).eval()
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    model = LanguageModel(network, tiny_model("llama").tokenizer, "window", None, "0" * 64)
    prompts = [f"{SHARED} w9", f"{SHARED} w10 w11 w12 w13"]
    network.config.sliding_window = None
    everything = alone(model, prompts)
    network.config.sliding_window = 8
    truth = alone(model, prompts)
    assert (truth - everything).abs().max() > 1e-3  # the window matters here
    torch.testing.assert_close(together(model, prompts), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_networks_that_take_no_notice_of_padding_get_none(kind: str) -> None:
    model, prompts = model_of(kind), ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w9 w8 w7"]
    assert not model.bears_padding
    assert model.chunks([[5] * 3, [5] * 6, [5] * 3], 8) == [[0, 2], [1]]
    torch.testing.assert_close(together(model, prompts), alone(model, prompts), rtol=0, atol=1e-5)
    name = next(n for n, p in model.network.named_parameters() if n.endswith("key.weight") or "q_proj" in n)
    one_by_one = score_weights(model, asked(*prompts), ["Jacobian norm"], only=[name], batch_size=1)
    batched = score_weights(model, asked(*prompts), ["Jacobian norm"], only=[name], batch_size=8)
    torch.testing.assert_close(batched["Jacobian norm"][name], one_by_one["Jacobian norm"][name])


def test_a_network_that_masks_padding_gets_full_batches() -> None:
    model = model_of("llama")
    assert model.bears_padding and model.continues
    assert model.chunks([[5] * 3, [5] * 6, [5] * 3], 8) == [[0, 2, 1]]


@pytest.mark.parametrize("kind", ["mamba", "jamba", "qwen3_next", "lfm2", "falcon_h1"])
def test_recurrent_networks_answer_write_and_are_foreseen(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    prompts = [f"{SHARED} w9", f"{SHARED} w10 w11 w12 w13"]
    torch.testing.assert_close(together(model, prompts), alone(model, prompts), rtol=0, atol=1e-5)
    assert greedy(model, prompts, 3) == [greedy(model, [p], 3)[0] for p in prompts]
    model.network.save_pretrained(tmp_path)
    estimate = plan_scores(tmp_path, lengths=[9, 12], measures=["FI"], batch_size=2, every=True)
    assert estimate.seconds is not None and estimate.seconds > 0


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "mpt"])
def test_padded_prompts_in_float64_get_their_own_answers(kind: str) -> None:
    model, prompts = model_of(kind, torch.float64), ["w1", "w4 w5 w6 w7 w8 w9", "w9 w8 w7"]
    torch.testing.assert_close(together(model, prompts), alone(model, prompts), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "name"), [("opt", "fc1.bias"), ("qwen2_moe", "shared_expert.up_proj.weight")]
)
@pytest.mark.parametrize("prompts", [["w1"], ["w1", "w2 w3 w4", "w5 w6 w7 w8 w9"]])
def test_layers_that_see_all_tokens_in_a_row_are_scored_as_by_autograd(
    kind: str, name: str, prompts: list[str]
) -> None:
    model = model_of(kind, torch.float64)
    whole = next(n for n, _ in model.network.named_parameters() if n.endswith(name))
    weight, truth = model.network.get_parameter(whole), 0
    for prompt in prompts:
        ids = torch.tensor([[WORDS.index(w) for w in prompt.split()]])
        log_p = letters(model.tokenizer).log_probs(model.network(input_ids=ids).logits[:, -1])[0]
        truth = truth + torch.autograd.grad(log_p[log_p.argmax()], weight)[0].abs() / len(prompts)
    found = score_weights(model, asked(*prompts), ["Jacobian norm"], only=[whole])["Jacobian norm"][whole]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-9)


BEGINS = "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %} w9{% endif %}"
PLAIN = "{{ messages[0]['content'] }} w9"


@pytest.mark.parametrize("template", [BEGINS, PLAIN])
@pytest.mark.parametrize("adds", [False, True])
def test_a_chat_prompt_has_the_tokens_of_its_template(template: str, adds: bool) -> None:
    """Whether the template writes the first token or not, whether the tokenizer adds it to other texts."""
    model = tiny_model("llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend_tokenizer, unk_token="<unk>", bos_token="w26"
    )
    if adds:
        special = [("w26", WORDS.index("w26"))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="w26 $A", special_tokens=special
        )
    tokenizer.chat_template = template
    chat = replace(model, tokenizer=tokenizer)
    turn = [{"role": "user", "content": " w1 w2"}]
    encoded = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True)
    expected = list(encoded["input_ids"])
    prompt = in_chat(tokenizer, " w1 w2", "tiny")
    example = framed(chat, Example("0", "words", "Say: w1 w2", (), None, " w1 w2"))
    assert isinstance(prompt, Framed) and example.prompt == prompt
    assert tokenize(tokenizer, [prompt]) == [expected]
    assert prompt_ids(chat, [example.prompt]) == [tuple(expected)]
    assert chat.batches([prompt])[0].input_ids.tolist() == [expected]
    usual = [WORDS.index(w) for w in (["w26"] if adds else []) + ["w1"]]
    assert tokenize(tokenizer, [prompt, "w1"]) == [expected, usual]


def test_a_template_that_fails_names_the_model() -> None:
    tokenizer = tiny_model("llama").tokenizer
    tokenizer.chat_template = "{{ raise_exception('a system turn comes first') }}"
    with pytest.raises(ValueError, match=r"template of model 'tiny' fails.*a system turn comes first"):
        in_chat(tokenizer, "w1", "tiny")


THREADS = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny import tiny_examples, tiny_model
from fihelpers.scores.kernels import cpu as tiles
from fihelpers.scores.weights import score_weights

model, sizes = tiny_model("llama", torch.float32), []
pool = tiles.ThreadPoolExecutor
tiles.ThreadPoolExecutor = lambda n: sizes.append(n) or pool(n)
for n in (1, 2, 3):
    torch.set_num_threads(n)
    sizes.clear()
    score_weights(model, tiny_examples(3))
    assert torch.get_num_threads() == n, (n, torch.get_num_threads())
    assert max(sizes, default=1) == n, (n, sizes)
model.network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
torch.set_num_threads(1)
try:
    score_weights(model, tiny_examples(3))
except FloatingPointError:
    print("threads", torch.get_num_threads())
"""


def test_scoring_leaves_the_number_of_threads_alone() -> None:
    code = THREADS.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "threads 1\n"), done.stderr


def test_the_number_of_threads_changes_no_score() -> None:
    model, examples, before = tiny_model("qwen2"), tiny_examples(3), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(score_weights(model, examples, ["FI", "SNIP"]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for measure, scores in other.items():
            for name, value in scores.values.items():
                torch.testing.assert_close(value, found[0][measure][name], rtol=1e-6, atol=1e-12)
