"""Stored tensors under the names that they have in memory, one at a time, and back.

When transformers opens a folder it renames what is stored, stacks the experts of a layer into one tensor,
cuts others, and ties weights; when it saves, it does the reverse. Here its own rules are followed on a
network without storage, so that nothing but the tensors of one group is ever read.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fihelpers.models.language import brief
from fihelpers.models.tensors import Tensors

# what old files hold although the library computes it: angles of rotary positions (masks: see _is_computed)
ANGLES = re.compile(r"(inv_freq|(cos|sin)_cached)$")


def networks_without_storage(config: PreTrainedConfig) -> Iterator[PreTrainedModel]:
    """Networks on the meta device that files with this configuration may be of, the likeliest first.

    They are the language model, as `open_model` opens it, the vision-language model and what the
    configuration calls its architecture; none for an architecture that transformers does not know.
    """
    classes = (getattr(transformers, name, None) for name in config.architectures or ())
    makers: list[Callable[..., Any]] = [
        AutoModelForCausalLM.from_config,
        AutoModelForImageTextToText.from_config,
        *(cls._from_config for cls in classes if cls is not None),
    ]
    for make in makers:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are about values, of which there are none
                network = make(copy.deepcopy(config))
        except Exception:  # of many types, for a configuration that is not of this kind
            continue
        yield network


def as_loaded(stored: Tensors, config: PreTrainedConfig, label: str) -> LoadedTensors | None:
    """Stored tensors as the network of that configuration loads them; None where none is known for them.

    Raises ValueError, naming the model and a tensor, where some that the network needs are not there, or
    cannot be made.
    """
    found: list[LoadedTensors] = []
    errors: list[ValueError] = []
    for network in networks_without_storage(config):
        try:
            found.append(LoadedTensors(stored, network, label))
        except ValueError as error:
            errors.append(error)
            continue
        if not found[-1].missing:
            return found[-1]
    if errors:
        raise errors[0]
    best = min(found, key=lambda loaded: len(loaded.missing), default=None)
    if best is None or not best.layouts:
        return None
    raise ValueError(
        f"model {label!r} lacks {len(best.missing)} weights, {best.missing[0]} first; fetch it again."
    )


class LoadedTensors:
    """What a network without storage would hold once it had loaded `stored`, a tied weight once.

    layouts: under the names of `network.named_parameters()` and of its saved buffers. missing: names that
    nothing stored is for. used: the conversions that apply. others: names of stored tensors that have no
    place in the network and are learned (a part that this network does without).

    A group is the tensors that are made together, named by the first of them. Raises ValueError, naming it,
    for a tensor that cannot be made.
    """

    def __init__(self, stored: Tensors, network: PreTrainedModel, label: str) -> None:
        self.stored, self.network, self.label = stored, network, label
        transforms = get_model_conversion_mapping(network)
        self._groups, without = _grouped(network, transforms, stored.layouts)
        own = network.state_dict()
        self._group_of: dict[str, str] = {}
        self._made: dict[str, Tensor] = {}
        for group, made in self._groups.items():
            for name, layout in self._layouts_of(group).items():
                if name not in own:
                    continue
                self._group_of[name], self._made[name] = group, layout
                if not isinstance(made, str) and layout.shape != own[name].shape:
                    raise self._torn(group, f"to {list(layout.shape)} instead of {list(own[name].shape)}")
        self.used = [t for t in transforms if t.was_used()]
        self.others = [n for n in without if not _is_computed(n, stored.layouts[n])]
        order = {name: i for i, name in enumerate(stored.layouts)}
        under, self.missing = self._tied()
        self._under = dict(sorted(under.items(), key=lambda pair: order[self._sources(pair[1])[0]]))
        self.layouts = {name: self._made[made] for name, made in self._under.items()}

    def read(self, name: str, rows: int | None = None) -> Tensor:
        return self._read(self._under[name], rows)

    def _read(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor that is made under a name."""
        made = self._groups[self._group_of[name]]
        if isinstance(made, str):
            return self.stored.read(made, rows)
        tensor = self._converted(self._group_of[name], self.stored.read)[name]
        return tensor[:rows] if rows else tensor

    def _sources(self, name: str) -> list[str]:
        """The stored names of the group of a tensor."""
        made = self._groups[self._group_of[name]]
        return [made] if isinstance(made, str) else _collected(made)

    def _layouts_of(self, group: str) -> dict[str, Tensor]:
        made, layouts = self._groups[group], self.stored.layouts
        if isinstance(made, str):
            return {group: layouts[made]}
        return self._converted(group, layouts.__getitem__)

    def _converted(self, group: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of a group that is made by a converter."""
        made = copy.deepcopy(self._groups[group])
        names = _collected(made)
        dtype = reduce(torch.promote_types, (self.stored.layouts[name].dtype for name in names))
        for pattern, of in made.collected_tensors.items():
            made.collected_tensors[pattern] = [read(name).to(dtype) for name in of]
        try:
            values = made.convert(group, model=self.network, config=self.network.config)
        except Exception as error:  # of many types: shapes that do not fit, a tensor that is not there
            raise self._torn(group, brief(error)) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def _torn(self, group: str, reason: str) -> ValueError:
        names = _collected(self._groups[group])
        return ValueError(
            f"{group} of {self.label!r} cannot be put together from {names[0]} and {len(names) - 1} more "
            f"stored tensors ({reason}); fetch the model again."
        )

    def _tied(self) -> tuple[dict[str, str], list[str]]:
        """The name in memory of every tensor with the name that it is made under, and what is missing.

        As in `PreTrainedModel.tie_weights`: a weight that is stored under both its names, with values that
        differ, is not tied.
        """
        network, ties = self.network, self.network.all_tied_weights_keys
        shared: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        saved = set(network.state_dict())
        buffers = [[name] for name, _ in network.named_buffers() if name in saved]
        under: dict[str, str] = {}
        missing: list[str] = []
        for names in (*shared.values(), *buffers):
            source = next((ties[name] for name in names if name in ties), names[0])
            here = [name for name in dict.fromkeys((source, *names)) if name in self._made]
            if not here:
                missing += names[:1]
                continue
            apart = [name for name in here[1:] if not self._same(here[0], name)]
            under[next(name for name in names if name not in apart)] = here[0]
            under |= {name: name for name in apart}
        ignored = network._keys_to_ignore_on_load_missing or ()
        return under, [name for name in missing if not any(re.search(p, name) for p in ignored)]

    def _same(self, one: str, other: str) -> bool:
        x, y = self._read(one), self._read(other)
        dtype = torch.promote_types(x.dtype, y.dtype)
        return torch.equal(x.to(dtype), y.to(dtype))


class StoredTensors:
    """Tensors in memory in the form in which transformers saves the network that `loaded` is of.

    layouts: of the stored tensors. make: gives the tensors in memory by name; those of `layouts_in_memory`
    that the network does not load are stored as they are. Raises ValueError, naming a tensor, where what
    would be stored could not be loaded again.
    """

    def __init__(
        self, loaded: LoadedTensors, layouts_in_memory: Mapping[str, Tensor], make: Callable[[str], Tensor]
    ) -> None:
        self.network, self.make, self._used = loaded.network, make, loaded.used
        self._last: dict[str, Tensor] = {}
        names = [name for name in layouts_in_memory if name in loaded.layouts]
        self._ties = {name: self._source(name, names) for name in names}
        self._group_of: dict[str, Sequence[str]] = {}
        self.layouts: dict[str, Tensor] = {}
        for group in self._grouped(names):
            values = self._stored(group, layouts_in_memory.__getitem__)
            self._group_of |= dict.fromkeys(values, group)
            self.layouts |= values
        again = LoadedTensors(self, self.network, loaded.label)
        for name in names:
            found, wanted = again.layouts.get(name), layouts_in_memory[name]
            if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise self._unstored(name, "it would come back in another form")
        self.layouts |= {name: layout for name, layout in layouts_in_memory.items() if name not in names}

    def read(self, name: str, rows: int | None = None) -> Tensor:
        group = self._group_of.get(name)
        if group is None:
            return self.make(name)
        if name not in self._last:  # only the last group is kept: its tensors are asked for in turn
            self._last = self._stored(group, self.make)
        return self._last.pop(name)

    def _source(self, name: str, names: Sequence[str]) -> str:
        """The name under which a tied weight is stored: that which the library ties the others to."""
        source: str = self.network.all_tied_weights_keys.get(name, name)
        return name if source in names else source

    def _grouped(self, names: Sequence[str]) -> list[list[str]]:
        """Names in memory, together where the stored tensors are made of several."""
        reverse = [t.reverse_transform() for t in self._used[::-1]]
        converters = [t for t in reverse if isinstance(t, WeightConverter)]
        groups: dict[str, list[str]] = {}
        for name in names:
            key, pattern = apply_converters(self._ties[name], converters)
            groups.setdefault(name if pattern is None else key, []).append(name)
        return list(groups.values())

    def _stored(self, group: Sequence[str], make: Callable[[str], Tensor]) -> dict[str, Tensor]:
        values = {self._ties[name]: make(name) for name in group}
        self.network._weight_conversions = self._used  # type: ignore[assignment]  # what saving reverts
        try:
            return revert_weight_conversion(self.network, values)
        except Exception as error:  # of many types, where a step of the library has no reverse
            raise self._unstored(group[0], brief(error)) from error

    def _unstored(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"{name} of a {type(self.network).__name__} cannot be stored so that transformers loads it again "
            f"({reason}); Merger gives the merged tensors in memory."
        )


def _grouped(
    network: PreTrainedModel, transforms: Sequence[WeightTransform], stored: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """Stored names that are loaded together, by the first name in memory, and those that are for nothing.

    A group is the one stored name, or the library's converter with the names that it collects. Follows
    `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
    """
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    own, prefix = network.state_dict(), network.base_model_prefix
    groups: dict[str, Any] = {}
    without: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if key not in own and name in own:
            key, pattern = name, None
        if key not in own:
            without.append(name)
            continue
        if key not in groups:
            groups[key] = name if pattern is None else copy.deepcopy(by_pattern[pattern])
        if not isinstance(groups[key], str):
            groups[key].add_tensor(key, name, pattern or name, name)
    return groups, without


def _collected(made: Any) -> list[str]:
    return [name for names in made.collected_tensors.values() for name in names]


def _is_computed(name: str, layout: Tensor) -> bool:
    """Whether a stored tensor without a place in the network is a buffer of an older version, not learned.

    Those are masks, positions and indices (whole numbers, or a "bias" of several dimensions) and angles.
    """
    mask = name.endswith("bias") and len(layout.shape) > 1
    return mask or not (layout.shape and layout.dtype.is_floating_point) or bool(ANGLES.search(name))
