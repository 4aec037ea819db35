"""Merge two models fine-tuned from one base, and keep the weights that scores call fragile (method 4.6).

The models are read tensor by tensor, so memory grows with the largest tensor and not with the model. Tensors
have the names that they have in the opened models, under which scores name them; the merged folder stores
them as transformers does. Each method is a small value that holds its conventions; the defaults are those of
the method's own paper:

    merge_models("mini-lm", "mini-math", "mini-health", "merged", Ties(task_weight=0.6),
                 Protection(0.05, "math.safetensors", "health.safetensors"))

Here delta_X = theta_X - theta_base is the displacement of an expert X, A or B.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fihelpers import __version__
from fihelpers.data import new_folder
from fihelpers.models.conversion import StoredTensors
from fihelpers.models.files import ModelWeights, open_weights, write_weights
from fihelpers.models.language import WEIGHTS_INDEX, LanguageModel
from fihelpers.models.tensors import TensorDict, TensorFile
from fihelpers.perturb.merge_methods import (
    FLOOR,
    AnyScores,
    Dare,
    DareTies,
    FisherAverage,
    Method,
    Pair,
    Piece,
    Protection,
    Ties,
    find_method,
)
from fihelpers.perturb.topshare import CHUNK, TopShare, seed_of
from fihelpers.scores.store import Scores

AnyModel = str | PathLike[str] | LanguageModel | ModelWeights

SAME_BASE = 0.3  # cosine between two models' matrices; about 0 for models trained apart
SAMPLE_ROWS = 64
MUST_AGREE = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head",
    "hidden_act", "tie_word_embeddings",
)  # fmt: skip
MAY_DIFFER = (
    "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window",
    "max_position_embeddings",
)  # fmt: skip


def merge_models(
    base: AnyModel | None,
    a: AnyModel,
    b: AnyModel,
    out: str | PathLike[str],
    method: str | Method = "average",
    protection: Protection | None = None,
    *,
    fishers: tuple[AnyScores, AnyScores] | None = None,
) -> Path:
    """Merge two models into a normal model folder with a model card; returns the folder.

    base, a, b: bundled name, folder, hub id or what `open_weights` gives. base may be None for the averages.
    method: a name in METHODS or a Method. fishers: the Fisher diagonals of A and B for "Fisher average".
    Configuration, tokenizer and type of numbers are those of the base, or of A where there is none.

    Raises ValueError, naming the first tensor, for models of another architecture, shape, vocabulary or base,
    and for scores made for another model; FileExistsError for an `out` that is not empty; OSError for a full
    disk; FloatingPointError for NaN or infinite weights. Nothing half-written is left.
    """
    merger = Merger(base, a, b, method, protection, fishers)
    source = merger.first.folder
    if source is None:
        raise ValueError("A model in memory cannot be written from; give its folder, or use Merger.")
    out = Path(out)
    with new_folder(out) as folder:
        layouts, make = merger.stored()
        needed = sum(layout.nbytes for layout in layouts.values())
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, f"the merged model needs {needed / 1e9:.1f} GB")
        for file in sorted(source.iterdir()):
            if file.suffix in (".json", ".model", ".txt", ".jinja") and file.name != WEIGHTS_INDEX:
                shutil.copyfile(file, folder / file.name)
        write_weights(folder, layouts, make)
        (folder / "README.md").write_text(merger.card(out.name), encoding="utf-8")
    return out


class Merger:
    """A merge as a function from a tensor's name to the merged tensor; arguments as for `merge_models`.

    first: the base, or A where there is none, which the result takes its settings from. layouts: the merged
    model's tensors, of the types of that model. What an opened model does without and not all models hold (a
    vision tower, say) is taken from it.
    """

    def __init__(
        self,
        base: AnyModel | None,
        a: AnyModel,
        b: AnyModel,
        method: str | Method = "average",
        protection: Protection | None = None,
        fishers: tuple[AnyScores, AnyScores] | None = None,
    ) -> None:
        self.method, self.protection = find_method(method), protection
        self.base = None if base is None else open_weights(base)
        self.experts = (open_weights(a), open_weights(b))
        self.first = first = self.base or self.experts[0]
        self.layouts = first.layouts
        self._check_method(fishers)
        for expert in self.experts:
            _check_alike(first, expert)
        if self.base is not None:
            for expert in self.experts:
                _check_same_base(self.base, expert)
        models = (first, *self.experts)
        self.common = {name for name in self.layouts if all(name in m.layouts for m in models)}
        shared = [name for name in self.layouts if name in self.common]
        self.floating = [n for n in shared if all(m.layouts[n].dtype.is_floating_point for m in models)]
        self.fishers = None if fishers is None else self._scores(fishers)
        given = (None, None) if protection is None else (protection.scores_a, protection.scores_b)
        self.scores = self._scores(given)

    def tensor(self, name: str) -> Tensor:
        """The merged tensor. Raises FloatingPointError where it holds NaN or infinite values."""
        layout = self.layouts[name]
        if name not in self.common:
            return self.first.read(name)
        if name not in self.floating:
            return self._unmerged(name)
        protected = self._protected_masks(name)
        merged = torch.empty(layout.numel(), dtype=layout.dtype)
        done = 0
        for piece in self._pieces(name, self._kept(name), protected):
            part = self.method.merge(piece)
            merged[done : done + len(part)] = part.to(layout.dtype)
            done += len(part)
        if not torch.isfinite(merged).all():
            raise FloatingPointError(f"The merged {name} holds NaN or infinite values; check the models.")
        return merged.view(layout.shape)

    def state(self) -> dict[str, Tensor]:
        """All merged tensors, in memory."""
        return {name: self.tensor(name) for name in self.layouts}

    def stored(self) -> tuple[Mapping[str, Tensor], Callable[[str], Tensor]]:
        """Layouts and values of the merged tensors in the form in which they are written.

        Raises ValueError, naming a tensor, for an architecture that transformers could not load again.
        """
        if self.first.loaded is None:
            return self.layouts, self.tensor
        stored = StoredTensors(self.first.loaded, self.layouts, self.tensor)
        return stored.layouts, stored.read

    def card(self, name: str) -> str:
        """The model card: the models with their hashes, the method with its options, and what was kept."""
        named = {"base": self.base, "A": self.experts[0], "B": self.experts[1]}
        lines = ["---", "library_name: transformers", "tags:", "- merge", "---", "", f"# {name}", ""]
        lines += [f"Made by fihelpers {__version__} from these models:", ""]
        lines += ["| | model | revision | SHA-256 of the weights |", "|---|---|---|---|"]
        for role, m in named.items():
            if m is not None:
                lines.append(f"| {role} | {m.label} | {m.revision or 'local'} | {m.sha256} |")
        lines += ["", f"Method: {self.method}. Configuration and tokenizer: {self.first.label}.", ""]
        return "\n".join([*lines, *self._protection_lines(), *self._fisher_lines()]) + "\n"

    def masks(self, expert: Literal["a", "b"]) -> Iterator[tuple[str, Tensor]]:
        """Names and masks (of the tensors' shapes) of the protected weights of one expert."""
        top = self._protected["ab".index(expert)]
        if top is not None:
            for name in top.names:
                yield name, top.mask(name).view(self.layouts[name].shape)

    def _check_method(self, fishers: object) -> None:
        if self.method.needs_base and self.base is None:
            raise ValueError(f"{self.method.name} needs the base that both models were fine-tuned from.")
        if isinstance(self.method, FisherAverage) != (fishers is not None):
            raise ValueError("fishers=(of A, of B) go with the method 'Fisher average', and only with it.")
        if self.protection is not None and not self.method.protects:
            raise ValueError(f"No protection is defined for {self.method.name}; leave protection out.")

    def _scores(self, given: tuple[AnyScores | None, AnyScores | None]) -> tuple[_ScoreReader | None, ...]:
        return tuple(
            None if scores is None else _ScoreReader(scores, expert)
            for scores, expert in zip(given, self.experts, strict=True)
        )

    def _unmerged(self, name: str) -> Tensor:
        """A tensor of whole numbers, which all models must share."""
        first = self.first.read(name)
        if any(not expert.read(name).equal(first) for expert in self.experts):
            raise ValueError(f"{name} holds whole numbers that differ between the models and has no mean.")
        return first

    def _work(self, name: str) -> torch.dtype:
        dtype = torch.float32
        for model in (self.first, *self.experts):
            dtype = torch.promote_types(dtype, model.layouts[name].dtype)
        return dtype

    def _pieces(self, name: str, kept: Pair | None, protected: Pair | None = None) -> Iterator[Piece]:
        size, dtype = self.layouts[name].numel(), self._work(name)
        a, b = (expert.read(name).reshape(-1) for expert in self.experts)
        base = None
        if self.base is not None and self.method.needs_base:
            base = self.base.read(name).reshape(-1)
        fishers = self._fishers_of(name)
        drop_a, drop_b = (_dropping(self.method, name, which) for which in (0, 1))
        for start in range(0, size, CHUNK):
            part = slice(start, start + CHUNK)
            of_a, of_b = a[part].to(dtype), b[part].to(dtype)
            of_base = None if base is None else base[part].to(dtype)
            deltas = None if of_base is None else (drop_a(of_a - of_base), drop_b(of_b - of_base))
            yield Piece(
                of_base, of_a, of_b, deltas, _cut(kept, part), _cut(protected, part), _cut(fishers, part),
                self.protection,
            )  # fmt: skip

    @cached_property
    def _trims(self) -> tuple[TopShare, TopShare] | None:
        """What the trim keeps of each displacement; None for a method without one."""
        method = self.method
        if not isinstance(method, Ties):
            return None
        sizes = {name: self.layouts[name].numel() for name in self.floating}
        counts = _counts(sizes, method.trim == "global", lambda n: int(method.density * n))
        dtype = max((self._work(name) for name in sizes), key=lambda d: d.itemsize)

        a, b = (TopShare(sizes, partial(self._sizes, which), counts, dtype) for which in (0, 1))
        return a, b

    def _sizes(self, which: int, name: str) -> Iterator[Tensor]:
        """The sizes of one expert's displacement of one tensor, in pieces."""
        assert self.base is not None  # a method with a trim needs it
        dtype, drop = self._work(name), _dropping(self.method, name, which)
        own, base = (model.read(name).reshape(-1) for model in (self.experts[which], self.base))
        for a, b in zip(own.split(CHUNK), base.split(CHUNK), strict=True):
            yield drop(a.to(dtype) - b.to(dtype)).abs()

    def _kept(self, name: str) -> Pair | None:
        trims = self._trims
        return None if trims is None else (trims[0].mask(name), trims[1].mask(name))

    @cached_property
    def _protected(self) -> tuple[TopShare | None, ...]:
        """Theta_A and Theta_B."""
        p = self.protection
        if p is None:
            return (None, None)
        plain = None
        if p.displaced:
            plain = copy.copy(self)
            plain.protection = None
        found: list[TopShare | None] = []
        for which, reader in enumerate(self.scores):
            if reader is None:
                found.append(None)
                continue
            sizes = {name: layout.numel() for name, layout in reader.layouts.items()}
            counts = _counts(sizes, p.scope == "global", lambda n: round(p.share * n))
            dtype = max((_scored(layout) for layout in reader.layouts.values()), key=lambda d: d.itemsize)
            stream = reader.stream if plain is None else plain._displaced(reader, which)
            found.append(TopShare(sizes, stream, counts, dtype, p.seed))
        return tuple(found)

    def _displaced(self, reader: _ScoreReader, which: int) -> Callable[[str], Iterator[Tensor]]:
        """A stream of scores times the squared displacement of this, the plain, merge (method 1b.4)."""

        def stream(name: str) -> Iterator[Tensor]:
            pieces = self._pieces(name, self._kept(name))
            for values, piece in zip(reader.stream(name), pieces, strict=True):
                delta = self.method.merge(piece) - (piece.a, piece.b)[which]
                yield values.to(delta.dtype) * delta * delta

        return stream

    def _protected_masks(self, name: str) -> Pair | None:
        if self.protection is None:
            return None
        nothing = torch.zeros(self.layouts[name].numel(), dtype=torch.bool)
        a, b = (
            top.mask(name) if top is not None and name in top.names else nothing for top in self._protected
        )
        return a, b

    def _fishers_of(self, name: str) -> Pair | None:
        if self.fishers is None or any(r is None or name not in r.layouts for r in self.fishers):
            return None
        dtype = self._work(name)
        a, b = (r.read(name).reshape(-1).to(dtype).clamp(min=FLOOR) / r.norm for r in self.fishers if r)
        return a, b

    def _protection_lines(self) -> list[str]:
        p = self.protection
        if p is None:
            return ["Protection: none."]
        stages = f", stages {p.stages}{'' if p.whole else ' (trimmed entries)'}"
        of_plain = ", scores times the squared displacement of the plain merge" if p.displaced else ""
        head = (
            f"Protection: top {100 * p.share:g} % ({p.scope}{of_plain}"
            f"{stages if self.method.protects == 'stages' else ''}, seed {p.seed})."
        )
        lines = [head, ""]
        for role, reader, top in zip("AB", self.scores, self._protected, strict=True):
            if reader is not None and top is not None:
                scored = sum(layout.numel() for layout in reader.layouts.values())
                lines.append(f"- {role}: {top.total} of {scored} scored weights, by {reader.about}.")
        return lines

    def _fisher_lines(self) -> list[str]:
        if self.fishers is None:
            return []
        return ["", *(f"- Fisher of {r}: {f.about}." for r, f in zip("AB", self.fishers, strict=True) if f)]


def _dropping(method: Method, name: str, which: int) -> Callable[[Tensor], Tensor]:
    """DARE's random dropping of one expert's displacement of one tensor; nothing for other methods."""
    if not isinstance(method, Dare | DareTies):
        return lambda delta: delta
    density = method.density if isinstance(method, Dare) else method.drop_density
    generator = torch.Generator().manual_seed(seed_of(method.seed, name, which))

    def drop(delta: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full_like(delta, density), generator=generator)
        return delta * kept / density if method.rescale else delta * kept

    return drop


class _ScoreReader:
    """Scores of one expert, read tensor by tensor from memory or a file.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one and for scores of another model.
    """

    def __init__(self, given: AnyScores, expert: ModelWeights) -> None:
        self.given = given
        self.source: TensorDict | TensorFile
        if isinstance(given, Scores):
            self.source, metadata = TensorDict(given.values), given.metadata
        else:
            if not Path(given).is_file():
                raise FileNotFoundError(f"There are no scores at {given}; make them with score_weights.")
            self.source = TensorFile(Path(given), "the scores")
            metadata = self.source.metadata
        self.layouts, self.metadata = self.source.layouts, metadata
        for name, layout in self.layouts.items():
            own = expert.layouts.get(name)
            if own is None or own.shape != layout.shape:
                raise ValueError(
                    f"The scores of {name} {list(layout.shape)} do not fit {expert.label!r}; "
                    "score that model."
                )
        if not self.layouts:
            raise ValueError(f"The scores for {expert.label!r} are of no weight; score some.")
        if metadata.get("sha256", expert.sha256) != expert.sha256:
            raise ValueError(
                f"The scores were made for {metadata.get('model', 'another model')!r} with hash "
                f"{metadata['sha256'][:12]}…, not for {expert.label!r} with {expert.sha256[:12]}…; "
                "score that model."
            )

    @property
    def about(self) -> str:
        """What the scores are of, for the model card."""
        known = ("measure", "model", "sha256", "classes", "n")
        said = [f"{key} {self.metadata[key]}" for key in known if key in self.metadata]
        return ", ".join(said) or "scores that say nothing of themselves"

    @cached_property
    def norm(self) -> float:
        """Euclidean norm over all scored weights."""
        squares = (float(v.double().square().sum()) for name in self.layouts for v in self.stream(name))
        total = math.sqrt(sum(squares))
        if total == 0:
            raise ValueError("A Fisher diagonal is zero everywhere; score the model on other examples.")
        return total

    def read(self, name: str) -> Tensor:
        values = self.source.read(name)
        if not torch.isfinite(values).all():
            raise ValueError(f"The scores of {name} hold NaN or infinite values; score the model again.")
        return values

    def stream(self, name: str) -> Iterator[Tensor]:
        yield from self.read(name).reshape(-1).split(CHUNK)


def _counts(sizes: Mapping[str, int], together: bool, share_of: Callable[[int], int]) -> int | dict[str, int]:
    return share_of(sum(sizes.values())) if together else {name: share_of(n) for name, n in sizes.items()}


def _scored(layout: Tensor) -> torch.dtype:
    return torch.promote_types(layout.dtype, torch.float32)


def _cut(pair: Pair | None, part: slice) -> Pair | None:
    return None if pair is None else (pair[0][part], pair[1][part])


def _check_alike(first: ModelWeights, other: ModelWeights) -> None:
    """Raise ValueError where two models cannot be merged; it names the first difference."""
    pair = f"{first.label!r} and {other.label!r}"
    for name in dict.fromkeys([*first.layouts, *other.layouts]):
        if name not in first.layouts or name not in other.layouts:
            if name in first.extra | other.extra:
                continue
            lacking = other if name in first.layouts else first
            tied = ", where it is tied to another weight" if name in lacking.tied else ""
            raise ValueError(
                f"{pair} have different architectures: {name} is not in {lacking.label!r}{tied}."
            )
        one, two = list(first.layouts[name].shape), list(other.layouts[name].shape)
        if one != two:
            raise ValueError(f"{pair} differ in {name}: its shape is {one} and {two}.")
    if first.architecture != other.architecture and None not in (first.architecture, other.architecture):
        raise ValueError(
            f"{pair} have different architectures: {first.architecture} and {other.architecture}."
        )
    for key in MUST_AGREE:
        own, others = first.config.get(key), other.config.get(key)
        if own != others and None not in (own, others):
            raise ValueError(f"{pair} have different architectures: {key} is {own} and {others}.")
    ids = {i: token for token, i in first.vocabulary.items()}
    for token, i in other.vocabulary.items():
        if ids.get(i, token) != token:
            raise ValueError(f"{pair} have different vocabularies: token {i} is {ids[i]!r} and {token!r}.")
    for key in MAY_DIFFER:
        own, others = first.config.get(key), other.config.get(key)
        if own != others and None not in (own, others):
            said = f"{pair} differ in {key}, {json.dumps(own)} and {json.dumps(others)}"
            warnings.warn(f"{said}; the merged model has that of the first.", stacklevel=4)


def _check_same_base(base: ModelWeights, expert: ModelWeights) -> None:
    """Raise ValueError where most matrices of the expert have nothing in common with those of the base."""
    matrices = [n for n, layout in base.layouts.items() if len(layout.shape) == 2 and n in expert.layouts]
    far = [name for name in matrices if _cosine(base, expert, name) < SAME_BASE]
    if 2 * len(far) > len(matrices):
        raise ValueError(
            f"{expert.label!r} was not fine-tuned from {base.label!r}: {far[0]} and {len(far) - 1} more of "
            f"{len(matrices)} matrices have nothing in common; give the base of both models."
        )


def _cosine(base: ModelWeights, expert: ModelWeights, name: str) -> float:
    x, y = (model.read(name, SAMPLE_ROWS).float().flatten() for model in (base, expert))
    return 1.0 if x.equal(y) else float(torch.nn.functional.cosine_similarity(x, y, 0))
