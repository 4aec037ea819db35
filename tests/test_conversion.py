"""Names and forms of stored tensors: architectures that rebuild them when loaded, and files that differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import merged_state
from tiny import WORDS, tiny_examples, tiny_model
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from fihelpers.models import files
from fihelpers.models.files import open_weights
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.merge import Merger, merge_models
from fihelpers.perturb.merge_methods import Average, Protection, TaskArithmetic, Ties
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights

State = dict[str, Tensor]

SIZE = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
          "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
          "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHORT = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8},
    "gpt2": SHORT,
    "gpt_neox": SIZE,
    "gptj": {**SHORT, "rotary_dim": 4},
    "opt": {**SIZE, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"vocab_size": len(WORDS), "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": SIZE,
    "phi": SIZE,
    "mamba": {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "olmoe": {**GROUPED, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 8},
    "deepseek_v3": {**SIZE, **LATENT, "head_dim": 4},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**GROUPED, "num_local_experts": 4},
    "jamba": {**GROUPED, "num_experts": 4, "mamba_dt_rank": 4, "mamba_d_state": 4, "expert_layer_period": 2,
              "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "xlm-roberta": {**SIZE, "is_decoder": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}  # fmt: skip


def network_of(kind: str, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**KINDS[kind], **more}))


def save(network: PreTrainedModel, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """The network with weights that differ a little from those of other seeds, and a tokenizer."""
    network = network.to(dtype)
    for name, p in network.named_parameters():
        base, step = (torch.Generator().manual_seed(k + len(name)) for k in (99, seed))
        value = 0.3 * torch.randn(p.shape, generator=base) + 0.1 * torch.randn(p.shape, generator=step)
        p.data = value.to(dtype)
    network.save_pretrained(folder)
    tiny_model("gpt2").tokenizer.save_pretrained(folder)
    return folder


def pair(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Path, Path]:
    a, b = (save(network_of(kind, **more), folder / f"{kind}-{x}", i, dtype) for i, x in enumerate("ab"))
    return a, b


def state_of(network: PreTrainedModel) -> State:
    saved = network.state_dict()
    return {
        **{name: p.detach() for name, p in network.named_parameters()},
        **{name: b for name, b in network.named_buffers() if name in saved},
    }


def scores_of(model: LanguageModel, seed: int = 0) -> Scores:
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(p.shape, generator=g) for name, p in model.network.named_parameters()}
    return Scores(values, {"sha256": model.sha256})


def mean_of(a: State, b: State, kept: State) -> State:
    """What an average should give, A's weights where `kept` holds; whole numbers are A's."""
    made = {}
    for name, value in a.items():
        mean = (0.5 * value.float() + 0.5 * b[name].float()).to(value.dtype)
        mean = mean if value.dtype.is_floating_point else value
        made[name] = torch.where(kept[name], value, mean) if name in kept else mean
    return made


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(value.equal(two[name]) for name, value in one.items())


def stored(folder: Path) -> State:
    return {n: v for file in sorted(folder.glob("*.safetensors")) for n, v in load_file(file).items()}


def logits(network: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        value: Tensor = network(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    return value


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("mixtral", torch.bfloat16)], ids=str
)
def test_an_architecture_is_merged_under_the_names_of_the_opened_model(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(kind, tmp_path, dtype)
    name = str(dtype).removeprefix("torch.")
    one, two = open_model(a, dtype=name), open_model(b, dtype=name)
    first, second = state_of(one.network), state_of(two.network)
    weights = open_weights(a)
    assert same({n: weights.read(n) for n in weights.layouts}, first) and not weights.extra
    protection = Protection(0.2, scores_of(one))
    kept = dict(Merger(None, a, b, "average", protection).masks("a"))
    wanted = mean_of(first, second, kept)
    assert sum(int(m.sum()) for m in kept.values()) == round(0.2 * sum(m.numel() for m in kept.values()))
    assert same(merged_state(None, a, b, "average", protection), wanted)
    assert same(merged_state(None, one, two, "average", protection), wanted)

    monkeypatch.setattr(files, "SHARD_BYTES", 6000)
    out = merge_models(None, a, b, tmp_path / "out", "average", protection)
    assert {n: v.shape for n, v in stored(out).items()} == {n: v.shape for n, v in stored(a).items()}
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    made = open_model(out, dtype=name)
    assert same(state_of(made.network), wanted)
    one.network.load_state_dict(wanted, strict=False)
    torch.testing.assert_close(logits(made.network), logits(one.network))


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "olmoe", "deepseek_v3"])
def test_scores_of_an_opened_model_protect_in_a_merge_of_files(kind: str, tmp_path: Path) -> None:
    a, b = pair(kind, tmp_path)
    one = open_model(a)
    found = score_weights(one, tiny_examples(3), ["SNIP"])["SNIP"]
    whole = {n for n, v in found.values.items() if v.dim() == 3}
    assert bool(whole) == (kind != "gpt_neox")
    found.save(tmp_path / "scores")
    for method in (Average(), TaskArithmetic(task_weight=0.3), Ties(density=1.0)):
        merger = Merger(a, a, b, method, Protection(0.3, tmp_path / "scores"))
        first = state_of(one.network)
        for name, mask in merger.masks("a"):
            assert name not in whole or mask.any()
            if not isinstance(method, Ties):  # there, protection decides trims and elections
                assert merger.tensor(name)[mask].equal(first[name][mask])


def change(source: Path, to: Path, edit: Callable[[State], State]) -> Path:
    """A copy of the folder with other stored tensors."""
    shutil.copytree(source, to)
    save_file(edit(stored(source)), to / "model.safetensors", metadata={"format": "pt"})
    return to


def with_head(tensors: State) -> State:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def head_alone(tensors: State) -> State:
    tensors = with_head(tensors)
    del tensors["model.embed_tokens.weight"]
    return tensors


def with_angles(tensors: State) -> State:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return {**tensors, **{name.format(i): torch.ones(4) for i in range(2)}}


def with_masks(tensors: State) -> State:
    masks = {
        f"gpt_neox.layers.{i}.attention.{name}": value
        for i in range(2)
        for name, value in {
            "bias": torch.ones(1, 1, 32, 32, dtype=torch.bool),
            "masked_bias": torch.tensor(-1e9),
            "rotary_emb.inv_freq": torch.ones(2),
        }.items()
    }
    return {**tensors, **masks}


def unprefixed(tensors: State) -> State:
    return {name.removeprefix("transformer.").removeprefix("model."): v for name, v in tensors.items()}


def as_on_the_hub(tensors: State) -> State:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    return {**unprefixed(tensors), **masks}


def as_in_memory(tensors: State) -> State:
    """Mixtral's experts as they are opened: one tensor for a layer's."""
    made = {n.replace("block_sparse_moe", "mlp"): v for n, v in tensors.items() if "experts" not in n}
    for i in range(2):
        name = f"model.layers.{i}.block_sparse_moe.experts."
        w1, w2, w3 = (torch.stack([tensors[f"{name}{j}.w{k}.weight"] for j in range(4)]) for k in (1, 2, 3))
        made[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], 1)
        made[f"model.layers.{i}.mlp.experts.down_proj"] = w2
    return made


FORMS = [
    ("llama", {"tie_word_embeddings": True}, with_head),
    ("llama", {"tie_word_embeddings": True}, head_alone),
    ("llama", {"tie_word_embeddings": True}, unprefixed),
    ("llama", {}, with_angles),
    ("gpt2", {}, unprefixed),
    ("gpt2", {}, as_on_the_hub),
    ("gpt_neox", {}, with_masks),
    ("mixtral", {}, as_in_memory),
]


@pytest.mark.parametrize(("kind", "more", "edit"), FORMS)
def test_forms_of_one_architecture_are_alike(
    kind: str, more: dict[str, Any], edit: Callable[[State], State], tmp_path: Path
) -> None:
    a, b = pair(kind, tmp_path, **more)
    other = change(a, tmp_path / "other", edit)
    assert stored(other).keys() != stored(a).keys()
    assert same(state_of(open_model(other).network), state_of(open_model(a).network))
    wanted = merged_state(None, a, b)
    assert wanted.keys() == state_of(open_model(a).network).keys()
    assert same(merged_state(None, other, b), wanted) and same(merged_state(b, other, b), wanted)
    assert same(merged_state(None, b, other), wanted)
    assert same(merged_state(None, open_model(b), other), wanted)
    assert same(state_of(open_model(merge_models(None, other, b, tmp_path / "out")).network), wanted)


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path: Path) -> None:
    a, b = pair("llama", tmp_path, tie_word_embeddings=True)
    apart = [
        change(
            x,
            tmp_path / f"{x.name}-apart",
            lambda t: {**t, "lm_head.weight": -t["model.embed_tokens.weight"]},
        )
        for x in (a, b)
    ]
    first, second = (state_of(open_model(x).network) for x in apart)
    assert "lm_head.weight" in first
    wanted = mean_of(first, second, {})
    assert same(merged_state(None, *apart), wanted)
    assert same(state_of(open_model(merge_models(None, *apart, tmp_path / "out")).network), wanted)
    for models in ((a, apart[0]), (apart[0], open_model(a))):
        message = r"lm_head.weight is not in 'llama-a', where it is tied to another weight"
        with pytest.raises(ValueError, match=message):
            merged_state(None, *models)


def test_what_the_opened_model_does_without_is_kept(tmp_path: Path) -> None:
    text = {**GROUPED, "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    sight = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 16,
             "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=sight)
    a, b = (save(Qwen3_5ForConditionalGeneration(config), tmp_path / x, i) for i, x in enumerate("ab"))
    one = open_model(a)
    weights = open_weights(a)
    assert weights.layouts.keys() - weights.extra == state_of(one.network).keys()
    assert weights.extra == {n for n in stored(a) if ".visual." in n} != frozenset()
    protection = Protection(0.1, scores_of(one))
    out = merge_models(None, a, b, tmp_path / "out", "average", protection)
    kept = dict(Merger(None, a, b, "average", protection).masks("a"))
    wanted = mean_of(state_of(one.network), state_of(open_model(b).network), kept)
    assert same(state_of(open_model(out).network), wanted)
    seen = [state_of(AutoModelForImageTextToText.from_pretrained(x)) for x in (a, b, out)]
    for name in (n for n in seen[0] if ".visual." in n):
        assert seen[2][name].equal(0.5 * seen[0][name] + 0.5 * seen[1][name])

    # What one of them lacks comes from the model of the settings.
    blind = change(b, tmp_path / "blind", lambda t: {n: v for n, v in t.items() if ".visual." not in n})
    half = stored(merge_models(None, a, blind, tmp_path / "half"))
    assert half.keys() == stored(a).keys()
    assert all(v.equal(stored(a)[n]) for n, v in half.items() if ".visual." in n)
    assert not any(".visual." in n for n in merged_state(None, blind, a))


def test_another_head_than_that_of_a_language_model(tmp_path: Path) -> None:
    for tied in (False, True):
        config = LlamaConfig(**GROUPED, tie_word_embeddings=tied, num_labels=3)
        a, b = (
            save(LlamaForSequenceClassification(config), tmp_path / f"{x}{tied}", i)
            for i, x in enumerate("ab")
        )
        out = merge_models(None, a, b, tmp_path / f"out{tied}")
        x, y, made = (state_of(LlamaForSequenceClassification.from_pretrained(f)) for f in (a, b, out))
        assert same(made, mean_of(x, y, {})) and "score.weight" in made


def test_an_unknown_architecture_keeps_its_stored_names(tmp_path: Path) -> None:
    a, b = pair("mixtral", tmp_path)
    for folder in (a, b):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    wanted = mean_of(stored(a), stored(b), {})
    assert same(merged_state(None, a, b), wanted)
    assert same(stored(merge_models(None, a, b, tmp_path / "out")), wanted)


def test_a_model_without_some_of_its_weights_is_named(tmp_path: Path) -> None:
    a, b = pair("mixtral", tmp_path)
    norm = change(a, tmp_path / "norm", lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"model 'norm' lacks 1 weights, model.norm.weight first"):
        merged_state(None, norm, norm)
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    gate_up = r"layers.1.mlp.experts.gate_up_proj of '{}' cannot be put together from .*0.w1.weight and "
    lacking = change(a, tmp_path / "lacking", lambda t: {n: v for n, v in t.items() if n != expert})
    with pytest.raises(ValueError, match=gate_up.format("lacking") + "6 more"):
        open_weights(lacking)
    torn = change(a, tmp_path / "torn", lambda t: {**t, expert: t[expert][:-1].clone()})
    with pytest.raises(ValueError, match=gate_up.format("torn") + "7 more"):
        merge_models(None, b, torn, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_sizes_and_architectures_are_refused(tmp_path: Path) -> None:
    a, _ = pair("mixtral", tmp_path)
    wider = save(network_of("mixtral", num_local_experts=5), tmp_path / "wider", 1)
    with pytest.raises(
        ValueError, match=r"'mixtral-a' and 'wider' differ in .*mlp.*: its shape is \[4,.* and \[5"
    ):
        merged_state(None, a, wider)
    words = save(network_of("mixtral", vocab_size=40), tmp_path / "words", 1)
    with pytest.raises(ValueError, match=r"differ in .*: its shape is \[32, 16\] and \[40, 16\]"):
        merged_state(None, a, words)
    neox, _ = pair("gpt_neox", tmp_path)
    with pytest.raises(
        ValueError, match=r"have different architectures: .* is not in '(mixtral|gpt_neox)-a'"
    ):
        merged_state(None, a, neox)
    phimoe = save(network_of("llama"), tmp_path / "llama", 1)
    mistral = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["mistral"](**KINDS["llama"], sliding_window=None)
    )
    with pytest.raises(ValueError, match="different architectures: LlamaForCausalLM and MistralForCausalLM"):
        merged_state(None, phimoe, save(mistral, tmp_path / "mistral", 1))
