"""Quantization: against torchao and by hand, packing, and protection."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_examples, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fichapters.ch08.lab import bits_per_weight
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb import quantize
from fihelpers.perturb.quantize import (
    BITS,
    Kept,
    Packed,
    Scheme,
    pack,
    pack_model,
    quantization_error,
    quantized,
    select_channels,
)
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.store import Scores

ORACLES = Path(sys.prefix) / "oracles"
SCHEMES = [
    Scheme(bits, mapping, group)
    for bits in BITS
    for mapping in ("symmetric", "asymmetric")
    for group in (None, 4)
    if bits > 1 or mapping == "symmetric"
]
TORCHAO = """
import sys, torch
from torchao.quantization.quant_primitives import (
    MappingType, choose_qparams_affine, dequantize_affine, quantize_affine)
weight, cases = torch.load(sys.argv[1])
found = []
for bits, mapping, group in cases:
    low = -2 ** (bits - 1) if mapping == "symmetric" else 0
    high, kind = low + 2**bits - 1, torch.int8 if mapping == "symmetric" else torch.uint8
    how = (1, group or weight.shape[1])
    scale, zero = choose_qparams_affine(
        weight, MappingType[mapping.upper()], how, kind, low, high, eps=2.0**-24,
        scale_dtype=torch.float16, zero_point_dtype=torch.int32)
    scale = scale.float()  # rounded to float16, as it is stored
    codes = quantize_affine(weight, how, scale, zero, kind, low, high)
    found.append(dequantize_affine(codes, how, scale, zero, kind, low, high))
torch.save(found, sys.argv[2])
"""


def weights(rows: int = 24, columns: int = 32, seed: int = 0) -> Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[3] = 0
    w[5] = w[5].abs()
    w[7, 0] = 30
    return w


SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
           "shared_expert_intermediate_size": 8, "intermediate_size_mlp": 24}  # fmt: skip
DENSE = ("llama", "mistral", "gpt_neox", "qwen2", "gpt2")
KINDS = (*DENSE, "mixtral", "gpt_oss", "llama4_text", "qwen2_moe")
# in the names of weights (..., in, out)
TURNED = {"gpt2": ".c_", "gpt_oss": ".experts.", "llama4_text": ".experts."}


def random_model(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A random model with biases and norms that do something."""
    known = CONFIG_MAPPING[kind]()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{k: v for k, v in (SHAPE | EXPERTS).items() if hasattr(known, k)})
    network = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return LanguageModel(network.to(dtype), tiny_model("llama").tokenizer, kind, None, "0" * 64)


def matrices(name: str, weight: Tensor, kind: str) -> list[Tensor]:
    """The matrices (out, in) that a weight is, one for each expert."""
    each = list(weight) if weight.dim() == 3 else [weight]
    return [m.T for m in each] if kind in TURNED and TURNED[kind] in name else each


def sixteen_bit_model(kind: str = "qwen2") -> LanguageModel:
    return random_model(kind, torch.float16)


def logits(model: LanguageModel) -> Tensor:
    """Of prompts together and each for itself."""
    prompts = [e.prompt for e in tiny_examples(5)]
    with torch.no_grad():
        return torch.cat([model.last_logits(b) for size in (5, 1) for b in model.batches(prompts, size)])


def test_nothing_protected_equals_torchao(tmp_path: Path) -> None:
    """Its affine primitives, in a process of their own: what it registers and prints stays there."""
    if not (ORACLES / "torchao").is_dir():
        pytest.skip("torchao is not beside this environment, in its folder `oracles`")
    cases = [(b, m, g) for b in (2, 3, 4, 8) for m in ("symmetric", "asymmetric") for g in (None, 4, 16)]
    weight = weights()
    torch.save((weight, cases), tmp_path / "in.pt")
    environment = {**os.environ, "PYTHONPATH": str(ORACLES)}
    command = [sys.executable, "-c", TORCHAO, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for (bits, mapping, group), truth in zip(cases, torch.load(tmp_path / "out.pt"), strict=True):
        assert pack(weight, Scheme(bits, mapping, group)).unpack().equal(truth), (bits, mapping, group)


def test_levels_by_hand() -> None:
    weight = torch.tensor([[-3.0, -1.0, 0.0, 3.0], [0.0, 1.0, 2.0, 6.0]])
    # 2 bit symmetric: steps of 3 / 1.5 = 2 and 6 / 1.5 = 4, levels -2 .. 1, halves to even
    expected = [[-4.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 4.0]]
    assert pack(weight, Scheme(2)).unpack().tolist() == expected
    # 2 bit asymmetric: steps of 6 / 3 = 2; -3 is at -2 or -4, 0 at code round(1.5) = 2
    expected = [[-4.0, 0.0, 0.0, 2.0], [0.0, 0.0, 2.0, 6.0]]
    assert pack(weight, Scheme(2, "asymmetric")).unpack().tolist() == expected
    # 1 bit: sign times mean magnitude, 7 / 4 and 9 / 4; 0 counts as positive
    expected = [[-1.75, -1.75, 1.75, 1.75], [2.25] * 4]
    assert pack(weight, Scheme(1)).unpack().tolist() == expected
    # of what is not kept: 2 and 1 in groups of 2 columns, the last of which is kept
    halves = pack(weight, Scheme(1, group=2), kept=[3], axis="columns").unpack()
    assert halves.tolist() == [[-2.0, -2.0, 0.0, 3.0], [0.5, 0.5, 2.0, 6.0]]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits > 1], ids=str)
def test_every_weight_goes_to_the_nearest_level(scheme: Scheme) -> None:
    weight = weights()
    packed = pack(weight, scheme)
    matrix, found = weight, packed.unpack()
    steps = packed.scales.float().repeat_interleave(matrix.shape[1] // packed.scales.shape[1], 1)
    zero = 2 ** (scheme.bits - 1) if packed.zeros is None else packed.zeros.float()
    ends = [(code - zero) * packed.scales.float() for code in (0, 2**scheme.bits - 1)]
    low, high = (e.repeat_interleave(matrix.shape[1] // e.shape[1], 1) for e in ends)
    assert ((found - matrix.clamp(low, high)).abs() <= 0.501 * steps).all()
    if scheme.mapping == "asymmetric":  # an end misses by the rounding of the zero and of the scale
        missed = 0.501 + 2**scheme.bits * 2.0**-11
        assert ((matrix - matrix.clamp(low, high)).abs() <= missed * steps).all()
    assert found[matrix == 0].abs().max() == 0


@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_bits_survive_packing(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = quantize._pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert bits * count <= 8 * len(packed) < bits * (count + 8)
    assert quantize._unpack_bits(packed, bits, count).equal(codes)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_protected_channels_are_exact_and_leave_the_ranges(scheme: Scheme, axis) -> None:
    weight = weights().half().float()
    kept = [7, 1, 20]
    packed = pack(weight, scheme, kept, axis)
    found, along = packed.unpack(), 0 if axis == "rows" else 1
    assert found.index_select(along, torch.tensor(kept)).equal(weight.index_select(along, torch.tensor(kept)))
    emptied = weight.index_fill(along, torch.tensor(kept), 0)
    rest = torch.tensor([i for i in range(weight.shape[along]) if i not in kept])
    if scheme.bits > 1:
        truth = pack(emptied, scheme).unpack()
        assert found.index_select(along, rest).equal(truth.index_select(along, rest))
    everything = pack(weight, scheme, range(weight.shape[along]), axis)
    assert everything.unpack().equal(weight)
    assert pack(weight, scheme, [], axis).unpack().equal(pack(weight, scheme).unpack())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_protection_is_the_identity_of_16_bit_weights(dtype) -> None:
    weight = weights().to(dtype)
    packed = pack(weight, Scheme(2), range(24))
    assert packed.kept_values is not None and packed.kept_values.dtype == dtype
    assert packed.unpack(dtype).equal(weight)


def test_the_error_is_what_quantization_adds() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = weights().to(dtype)
        error = quantization_error(weight, Scheme(4))
        assert error.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(weight.to(error) + error, pack(weight, Scheme(4)).unpack(error.dtype))
        assert error[4].abs().max() > 0
    sizes = [quantization_error(weights(), Scheme(bits)).norm() for bits in (2, 3, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sizes_are_those_of_the_tensors(scheme: Scheme) -> None:
    rows, columns = 24, 32
    plain = pack(weights(), scheme)
    groups = rows * (columns // (scheme.group or columns))
    scale = 3 if scheme.mapping == "asymmetric" else 2
    assert plain.nbytes == rows * columns * scheme.bits // 8 + scale * groups
    kept = pack(weights(), scheme, range(6), "rows")
    # codes and scales of 6 rows are saved, their weights and positions stored
    saved = 6 * columns * scheme.bits // 8 + 6 * scale * groups // rows
    assert plain.nbytes == kept.nbytes - 6 * (2 * columns + 4) + saved
    both = bits_per_weight({"plain": plain, "kept": kept})
    assert both == pytest.approx(8 * (plain.nbytes + kept.nbytes) / (2 * rows * columns))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_weight_is_packed_row_for_row(kind) -> None:
    model = random_model(kind)
    names = linear_names(model.network)
    assert any(kind in DENSE or model.network.get_parameter(n).dim() == 3 for n in names)
    scheme = Scheme(3, "asymmetric")
    packed = pack_model(model, names, scheme)
    before = {n: model.network.get_parameter(n).detach().clone() for n in names}
    alone = {n: [pack(m, scheme) for m in matrices(n, w, kind)] for n, w in before.items()}
    with quantized(model.network, packed):
        for n in names:
            now = model.network.get_parameter(n).detach().clone()
            for found, truth in zip(matrices(n, now, kind), alone[n], strict=True):
                assert found.equal(truth.unpack())
            turned = kind in TURNED and TURNED[kind] in n
            error = quantization_error(before[n], scheme, turned=turned)
            assert error.shape == before[n].shape and error.equal(now - before[n])
    stored = sum(m.nbytes for ms in alone.values() for m in ms)
    assert bits_per_weight(packed) == 8 * stored / sum(w.numel() for w in before.values())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_channels_of_fused_experts_are_those_of_all_of_them(kind) -> None:
    model = random_model(kind, torch.bfloat16)  # of which a kept channel keeps every bit
    name = next(n for n in linear_names(model.network) if n.endswith("gate_up_proj"))
    weight = model.network.get_parameter(name).detach().clone()
    out, inputs = matrices(name, weight, kind)[0].shape
    row, column = Kept("rows", {name: torch.tensor([out + 3])}), Kept("columns", {name: torch.tensor([5])})
    for kept, exact in ((row, lambda m: m[1][3]), (column, lambda m: torch.stack(m)[:, :, 5])):
        packed = pack_model(model, [name], Scheme(1), kept)
        assert packed[name].shape == (3 * out, inputs)
        with quantized(model.network, packed):
            now = model.network.get_parameter(name).detach().clone()
        assert exact(matrices(name, now, kind)).equal(exact(matrices(name, weight, kind)))
        assert not now.equal(weight)
    with pytest.raises(ValueError, match=f"no channel {3 * out} among {3 * out} rows"):
        pack_model(model, [name], Scheme(4), Kept("rows", {name: torch.tensor([3 * out])}))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_undone_and_nothing_is_lost_where_all_is_kept(kind, axis) -> None:
    model = sixteen_bit_model(kind)
    names = linear_names(model.network)
    before, intact = {n: p.clone() for n, p in model.network.named_parameters()}, logits(model)
    kept = Kept(axis, {names[0]: torch.tensor([1, 4]), names[2]: torch.tensor([0])})
    packed = pack_model(model, names, Scheme(3, "asymmetric", 4), kept)
    with pytest.raises(RuntimeError), quantized(model.network, packed):
        simulated = logits(model)
        raise RuntimeError
    assert all(p.equal(before[n]) for n, p in model.network.named_parameters())
    assert logits(model).equal(intact) and not simulated.equal(intact)
    everything = {n: torch.arange(p.shape[axis == "columns"]) for n, p in packed.items()}
    with quantized(model.network, pack_model(model, names, Scheme(1), Kept(axis, everything))):
        assert logits(model).equal(intact)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_a_file_is_quantized_for_a_while(kind, dtype, tmp_path) -> None:
    made = random_model(kind)
    made.network.save_pretrained(tmp_path / "tiny")
    made.tokenizer.save_pretrained(tmp_path / "tiny")
    model = open_model(tmp_path / "tiny", dtype=dtype)  # whose weights lie in memory as they lie in the file
    names, *others = linear_names(model.network)[:3], *linear_names(model.network)[3:]
    kept = Kept("columns", {names[1]: torch.tensor([2, 0])})
    packed = pack_model(model, names, Scheme(3, "asymmetric", 8), kept)
    packed |= pack_model(model, others, Scheme(1))
    intact, lying = logits(model), [p.data_ptr() for p in model.network.parameters()]
    with quantized(model.network, packed):
        simulated = logits(model)
    assert logits(model).equal(intact) and not simulated.equal(intact)
    assert [p.data_ptr() for p in model.network.parameters()] == lying


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"bits": 0}, "not 0"),
        ({"bits": 5}, "not 5"),
        ({"bits": 16}, "not 16"),
        ({"bits": 4, "mapping": "affine"}, "not 'affine'"),
        ({"bits": 1, "mapping": "asymmetric"}, "1 bit is a sign"),
        ({"bits": 4, "group": 0}, "at least 1 weight, not 0"),
    ],
)
def test_schemes_out_of_range(bad, message) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**bad)


def test_bad_matrices_are_named() -> None:
    weight = weights()
    with pytest.raises(ValueError, match="32 weights does not divide into groups of 5"):
        pack(weight, Scheme(4, group=5))
    with pytest.raises(ValueError, match="no channel 24 among 24 rows"):
        pack(weight, Scheme(4), [0, 24])
    with pytest.raises(ValueError, match="no channel -1 among 32 columns"):
        pack(weight, Scheme(4), [-1], "columns")
    with pytest.raises(ValueError, match="Channel 3 is kept twice"):
        pack(weight, Scheme(4), [3, 1, 3])
    with pytest.raises(ValueError, match="'both'"):
        pack(weight, Scheme(4), [3], "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        pack(torch.zeros(3), Scheme(4))
    with pytest.raises(FloatingPointError, match="NaN"):
        pack(weight.index_fill(0, torch.tensor([1]), float("nan")), Scheme(4))
    with pytest.raises(ValueError, match="1e\\+06 are beyond the scales"):
        pack(torch.full((2, 4), 1e6), Scheme(1))
    with pytest.raises(ValueError, match="1e\\+06 are beyond the range"):
        pack(torch.full((2, 4), 1e6), Scheme(8), [0, 1])


def test_bad_models_are_named() -> None:
    model = tiny_model("qwen2")
    names = linear_names(model.network)
    for unknown in ("nope", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        with pytest.raises(ValueError, match=f"no linear layer whose own weight is '{unknown}'"):
            pack_model(model, [*names, unknown], Scheme(4))
    with pytest.raises(ValueError, match=f"{names[0]}: A row of 12 weights"):
        pack_model(model, names, Scheme(4, group=5))
    with pytest.raises(ValueError, match=f"{names[1]}' are kept, but"):
        pack_model(model, names[:1], Scheme(4), Kept("rows", {names[1]: torch.tensor([0])}))
    scores = Scores({names[0]: torch.rand(12)}, {"axis": "rows", "sha256": "f" * 64})
    with pytest.raises(ValueError, match="scores of another model"):
        pack_model(model, names, Scheme(4), select_channels(scores, 0.5))
    with pytest.raises(ValueError, match="not of channels"):
        select_channels(Scores({names[0]: torch.rand(12, 12)}, {"axis": "rows"}), 0.5)
    with pytest.raises(ValueError, match="not of channels"):
        select_channels(Scores({names[0]: torch.rand(12)}), 0.5)
    foreign = {names[0]: pack(torch.rand(4, 4), Scheme(4))}
    with pytest.raises(ValueError, match="another model's"), quantized(model.network, foreign):
        pass
    with pytest.raises(ValueError, match="no quantized layers to measure"):
        bits_per_weight({})
    layers = model.network.model.layers
    layers[0].self_attn.o_proj.weight = layers[1].self_attn.o_proj.weight
    with pytest.raises(ValueError, match=f"'{names[3]}'; take names .* without those that two modules share"):
        pack_model(model, names, Scheme(4))


def test_packed_tensors_are_small_types() -> None:
    packed = pack(weights(), Scheme(4, "asymmetric"), [1], "columns")
    assert isinstance(packed, Packed)
    types = {name: tensor.dtype for name, tensor in packed.tensors().items()}
    assert types == {
        "codes": torch.uint8,
        "scales": torch.float16,
        "zeros": torch.uint8,
        "kept": torch.int32,
        "kept_values": torch.float16,
    }
