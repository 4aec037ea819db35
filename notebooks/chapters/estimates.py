"""What merging needs of memory and disk, estimated before anything is downloaded.

print(estimate_merge("mini-lm", "mini-math", "mini-health"))
"""

from __future__ import annotations

from os import PathLike

from fihelpers.jobs.preflight import SCORE, Estimate, estimate_of, source_of
from fihelpers.models.linear import linear_names
from fihelpers.perturb.merge_methods import Dare, Method, Ties, find_method
from fihelpers.perturb.topshare import CHUNK

WORK = 16 * CHUNK * 8  # bytes of the pieces that a merge works on


def estimate_merge(
    base: str | PathLike[str] | None,
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    method: str | Method = "average",
    protected: bool = True,
    out: str | PathLike[str] = ".",
) -> Estimate:
    """What `merge_models` needs: memory for one tensor of each model, disk for the models and the result.

    protected: whether weights are protected by scores of A and B, which then take disk as well, a file of
    float32 for the linear weights of each. Raises what `estimate_scores` raises.
    """
    chosen = find_method(method)
    sources = [source_of(name, None) for name in (base, a, b) if name is not None]
    first = sources[0]
    largest = max(p.numel() for p in first.network.parameters())
    memory = {
        "one tensor of each model": sum(largest * source.itemsize for source in sources),
        "its merged form": largest * first.itemsize,
        "masks": 2 * largest * (protected + isinstance(chosen, Ties | Dare)),
        "pieces at work": WORK,
    }
    disk = {"merged model": first.parameters * first.itemsize}
    if protected:
        linear = sum(first.network.get_parameter(name).numel() for name in linear_names(first.network))
        memory["scores of one tensor"] = largest * SCORE
        disk["scores of A and B, saved"] = 2 * linear * SCORE
    what = f"merging {' and '.join(source.label for source in sources[-2:])}"
    return estimate_of(what, sources, memory, disk, "cpu", out, {})
