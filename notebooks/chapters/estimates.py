"""What quantizing or merging needs of memory and disk, estimated before anything is downloaded.

estimate_quantization("Qwen/Qwen2-7B", Scheme(4), dtype="bfloat16").check()
print(estimate_merge("mini-lm", "mini-math", "mini-health"))
"""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from fichapters.stored import packed_bytes
from fihelpers.jobs.preflight import (
    SCORE,
    Estimate,
    estimate_of,
    linear_of,
    narrower,
    source_of,
)
from fihelpers.models.language import find_dtype
from fihelpers.models.linear import as_rows, linear_names, turned_names
from fihelpers.perturb.merge_methods import Dare, Method, Ties, find_method
from fihelpers.perturb.quantize import Scheme
from fihelpers.perturb.topshare import CHUNK

WORK = 16 * CHUNK * 8  # bytes of the pieces that a merge works on


def estimate_quantization(
    model_name: str | PathLike[str],
    scheme: Scheme,
    *,
    share: float = 0.0,
    dtype: str = "float32",
    revision: str | None = None,
    layers: Collection[str] | None = None,
    device: str = "cpu",
    out: str | PathLike[str] | None = None,
) -> Estimate:
    """What it needs to quantize linear weights but a share of their rows, and to save the model below `out`.

    While it is packed, memory holds the model as it was as well. layers: as in `estimate_scores`, which says
    what is raised, and
    ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of kept rows must lie in [0, 1], not {share}.")
    source = source_of(model_name, revision)
    network, turned = source.network, turned_names(source.network)
    matrices = [as_rows(network.get_parameter(name), name in turned) for name in linear_of(source, layers)]
    packed = sum(packed_bytes(scheme, (len(m), m.shape[1]), round(share * len(m))) for m in matrices)
    others = source.parameters - sum(m.numel() for m in matrices)

    def memory(dtype: str) -> dict[str, int]:
        return {
            "weights": source.parameters * find_dtype(dtype).itemsize,
            "packed weights": packed,
            "one matrix at work": 4 * SCORE * max(m.numel() for m in matrices),
        }

    return estimate_of(
        f"quantizing {source.label} to {scheme.bits} bit in {dtype}",
        [source],
        memory(dtype),
        {"quantized model, saved": packed + others * find_dtype(dtype).itemsize},
        device,
        out,
        {f"dtype={other!r}": sum(memory(other).values()) for other in narrower(dtype)},
    )


def estimate_merge(
    base: str | PathLike[str] | None,
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    method: str | Method = "average",
    protected: bool = True,
    revisions: tuple[str | None, str | None, str | None] = (None, None, None),
    out: str | PathLike[str] = ".",
) -> Estimate:
    """What `merge_models` needs: memory for one tensor of each model, disk for the models and the result.

    A tensor is one of the opened model; where those are put together from stored ones, both forms are there.
    protected: whether weights are protected by scores of A and B, which then take disk as well, a file of
    float32 for the linear weights of each. Raises what `estimate_scores` raises.
    """
    chosen = find_method(method)
    given = [
        (name, revision) for name, revision in zip((base, a, b), revisions, strict=True) if name is not None
    ]
    sources = [source_of(name, revision) for name, revision in given]
    first = sources[0]
    largest = max(p.numel() for p in first.network.parameters())
    masks = 2 * largest * (protected + isinstance(chosen, Ties | Dare))
    memory = {
        "one tensor of each model": sum(largest * source.itemsize for source in sources),
        "its merged form": largest * first.itemsize,
        "masks": masks,
        "pieces at work": WORK,
    }
    if _builds_tensors(first.network):
        memory["stored tensors that it is built from"] = largest * first.itemsize
    disk = {"merged model": first.parameters * first.itemsize}
    if protected:
        linear = sum(first.network.get_parameter(name).numel() for name in linear_names(first.network))
        memory["scores of one tensor"] = largest * SCORE
        disk["scores of A and B, saved"] = 2 * linear * SCORE
    what = f"merging {' and '.join(source.label for source in sources[-2:])}"
    return estimate_of(what, sources, memory, disk, "cpu", out, {})


def _builds_tensors(network: PreTrainedModel) -> bool:
    """Whether the library changes more than names when it loads or saves such a network."""
    return any(isinstance(t, WeightConverter) for t in get_model_conversion_mapping(network))
