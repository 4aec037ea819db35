"""Tiny random models of the architectures that transformers opens as language models.

`ARCHITECTURES` names them: a model type, or one with a word beside it for a setting that changes how tokens
are read. `LEFT_OUT` says why the others are not made. Vocabulary and tokenizer are those of `tiny`; windows
and chunks are shorter than the tests' prompts.
"""

from dataclasses import fields
from functools import cache
from typing import Any

import torch
from tiny import WORDS, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fihelpers.models.language import LanguageModel

Settings = dict[str, Any]

WINDOW = 8  # tokens that a layer with a window sees, and the length of a chunk

# by all names that configurations have for them: each takes those that it knows
SIZES: Settings = {
    "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "is_decoder": True,
    "hidden_size": 16, "embedding_size": 16, "d_model": 16, "n_embd": 16, "word_embed_proj_dim": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "rotary_dim": 4,
    "intermediate_size": 24, "intermediate_size_mlp": 24, "ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_ffn_dim": 24, "dff": 24, "ffn_hidden_size": 24,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW,
    "local_attention": 2 * WINDOW, "attention_chunk_size": WINDOW, "block_size": WINDOW,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 8, "shared_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 8, "index_head_dim": 8, "index_n_heads": 16,  # of many heads, scores of tokens are not tied
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_num_heads": 4,
    "n_mamba_heads": 4, "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_d_ssm": 32, "mamba_dt_rank": 4,
    "chunk_size": WINDOW, "mamba_chunk_size": WINDOW, "n_groups": 1, "use_mamba_kernels": False,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": len(WORDS),
}  # fmt: skip

ALL_HEADS: Settings = {"num_key_value_heads": 2}
LOCAL: Settings = {"layer_types": ["sliding_attention", "full_attention"]}
RECURRENT: Settings = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLVED: Settings = {"layer_types": ["conv", "full_attention"]}


def _each(kinds: str, own: Settings | None = None) -> dict[str, Settings]:
    return {kind: own or {} for kind in kinds.split()}


ARCHITECTURES: dict[str, Settings] = {
    # attention to all that came before
    **_each("apertus arcee bert biogpt bitnet cohere ctrl doge ernie4_5 falcon gemma glm glm4 gpt2"),
    **_each("gpt_bigcode gpt_neox gpt_neox_japanese gptj granite helium hunyuan_v1_dense internlm3 jais2"),
    **_each("llama nanochat nemotron olmo olmo2 openai-gpt opt persimmon phi phi3 qwen2 qwen3 roberta"),
    **_each("stablelm xglm"),
    **_each("diffllama minicpm3", ALL_HEADS),
    "codegen": {"n_head": 4},
    "falcon new": {"new_decoder_architecture": True, "num_kv_heads": 1},
    # decoders of translation and speech, and an encoder, most of which take no notice of padding
    **_each("bart marian roformer whisper"),
    # distances in the place of positions
    **_each("bloom mpt"),
    "falcon alibi": {"alibi": True},
    # windows, in all layers or in some
    **_each("ministral mistral starcoder2"),
    **_each("cohere2 cwm exaone4 gemma2 gemma3_text gemma4_text granite_swa", LOCAL),
    **_each("modernbert-decoder olmo3 smollm3", LOCAL),
    "gemma3n_text": {**LOCAL, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "qwen2 window": {"use_sliding_window": True, "max_window_layers": 1},
    # experts
    **_each("aria_text ernie4_5_moe flex_olmo glm4_moe granitemoe hunyuan_v1_moe jetmoe llama4_text"),
    **_each("minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe"),
    **_each("afmoe dots1 gpt_oss granitemoe_swa laguna mimo_v2_flash", LOCAL),
    **_each("deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa", ALL_HEADS),
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        **{"o_groups": 2, "o_lora_rank": 8},
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "longcat_flash": {**ALL_HEADS, "num_layers": 1, "zero_expert_num": 2, "expert_ffn_hidden_size": 8},
    # recurrent, alone or among layers of attention
    **_each("falcon_h1 falcon_mamba mamba rwkv"),
    **_each("granitemoehybrid minimax olmo_hybrid qwen3_5_text qwen3_next", RECURRENT),
    "bamba": {"attn_layer_indices": [1]},
    "inkling_text": {
        **{"d_rel": 4, "rel_extent": 16, "logits_mup_width_multiplier": 1.0},
        **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 8},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {**ALL_HEADS, **RECURRENT, "linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2": {**CONVOLVED, "block_multiple_of": 8},
    "lfm2_moe": {**CONVOLVED, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "moe", "mlp"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"num_heads": 4, "hidden_size": 128},  # its heads hold multiples of 16 numbers
    "zamba": {
        **{"n_mamba_heads": 2, "num_hidden_layers": 3},
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {**ALL_HEADS, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}

_BESIDE = "reads pictures or sound too; its text part is one of the others: "
_AS = "is put together of the parts of "
_OF = {
    _BESIDE + "gemma": "gemma3 gemma3n gemma4 gemma4_unified",
    _BESIDE + "qwen": "got_ocr2 moss_transcribe_diarize qwen3_5 qwen3_5_moe qwen4_exp",
    _BESIDE + "llama and the like": "dots3_note emu3 fuyu llama4 mllama moshi phi4_multimodal",
    "reads pictures or sound, text alone is not what it is made for": "git musicgen musicgen_melody trocr",
    "reads what another model has read": "gemma4_assistant gemma4_unified_assistant",
    "reads bytes, cut by a model of its own": "blt",
    "takes text in lengths of whole blocks only": "reformer",
    "is no smaller than a million weights": "cpmant",
    "reads in both directions, what comes after too": "xlnet xlm",
    "is slow, and cannot be read in float64": "inkling2_text prophetnet",
    "has n-grams of 20 million entries": "qwen4_exp_text",
    _AS + "bert": "bert-generation big_bird electra ernie megatron-bert rembert roc_bert",
    _AS + "roberta": "camembert data2vec-text roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    _AS + "bart": "bigbird_pegasus blenderbot blenderbot-small mbart mvp pegasus plbart",
    _AS + "gpt2": "gpt-sw3",
    _AS + "llama": "hrm_text iquestcoder seed_oss",
    _AS + "granite": "hyperclovax",
    _AS + "granitemoe": "granitemoeshared",
    _AS + "mistral": "ministral3",
    _AS + "gemma2": "vaultgemma",
    _AS + "gemma4_text": "gemma4_unified_text",
    _AS + "cohere2": "cohere2_moe cohere_compass_text",
    _AS + "deepseek_v3": "axk1 glm4_moe_lite youtu",
    _AS + "deepseek_v32": "axk2 dots3_note_text",
    _AS + "deepseek_v32 and deepseek_v4": "hy_v4",
    _AS + "glm4_moe": "solar_open",
    _AS + "minimax_m2": "hy_v3 minimax_m3_vl_text",
    _AS + "kimi_linear": "bailing_hybrid",
    _AS + "lfm2": "lfm3",
    _AS + "qwen3_next": "qwen3_5_moe_text",
    _AS + "qwen3_moe": "beam exaone_moe flint kolibri1 mellum",
}
LEFT_OUT = {kind: reason for reason, kinds in _OF.items() for kind in kinds.split()}


def configuration(kind: str) -> PreTrainedConfig:
    """The small configuration of an architecture."""
    made = CONFIG_MAPPING[kind.partition(" ")[0]]
    known = {field.name for field in fields(made)}

    def named(given: Settings) -> Settings:
        own = {name if name in known else made.attribute_map.get(name, name): v for name, v in given.items()}
        return {name: value for name, value in own.items() if name in known}

    return made(**{**named(SIZES), **named(ARCHITECTURES[kind])})


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model, its weights so far apart that its answers differ. Tests share it: none may change it."""
    torch.manual_seed(0)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(configuration(kind)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return LanguageModel(network.to(dtype), tiny_model("gpt2").tokenizer, kind, None, "0" * 64)
