"""Tiny random models and examples, made in memory."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fihelpers.models.language import LanguageModel
from fihelpers.tasks import Example

WORDS = ["<unk>", *"ABCD", *(f"w{i}" for i in range(27))]
SHAPE = {"vocab_size": len(WORDS), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip


def tiny_network(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, tie_word_embeddings=False))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, hidden_dropout=0.0, attention_dropout=0.0))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=3))
    if kind == "gpt_oss":  # its experts lie turned
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 6, "pad_token_id": None}
        return GptOssForCausalLM(GptOssConfig(**SHAPE, num_key_value_heads=1, **experts))
    shape = {"n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0, **shape))


def tiny_model(kind: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A random model with weights large enough that its gradients are not all alike."""
    network = tiny_network(kind).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data += (0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    model = LanguageModel(network, fast, f"tiny-{kind}", None, "0" * 64)
    model.chunks([[1], [1, 2]], 2)  # how it is to be read is found here, before a test watches its layers
    return model


def tiny_examples(n: int, seed: int = 0) -> list[Example]:
    """Word salads of three different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        " ".join(f"w{int(i)}" for i in torch.randint(27, (4 + k % 3,), generator=generator)) for k in range(n)
    ]
    return [Example(str(k), "tiny", p, tuple("ABCD"), k % 4, p) for k, p in enumerate(prompts)]
