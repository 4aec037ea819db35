"""Estimates made before a run, against what the run then needs."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import psutil
import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, T5Config

from fihelpers.data import data_folder
from fihelpers.jobs import preflight
from fihelpers.jobs.preflight import Estimate, estimate_scores
from fihelpers.models.language import WEIGHTS, open_model
from fihelpers.perturb.sparsify import linear_names

FACTOR = 1.3  # between the memory foreseen and that measured
QWEN2_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "tie_word_embeddings": False,
    "dtype": torch.bfloat16,
}  # fmt: skip
HUB_SIZE = 15_231_233_024

RUNS = """
import ctypes
import json
import sys
import time
from pathlib import Path
from fihelpers.models.language import open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.jobs.preflight import estimate_scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import load_task

examples = load_task("bundled", "law", n=8).examples
measures = ["FI", "SNIP"]

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

def score(name, batch_size, every, save_memory):
    model = open_model(name)
    only = None if every else linear_names(model.network)
    start = time.perf_counter()
    score_weights(model, examples, measures, only=only, batch_size=batch_size, save_memory=save_memory)
    seconds = time.perf_counter() - start
    return seconds, [batch.input_ids.shape[1] for batch in model.batches([e.prompt for e in examples], 1)]

score("mini-lm", 2, True, False)  # what the first use loads does not count
for name in ("mini-lm", sys.argv[1]):
    for every, save_memory in ((False, False), (True, False), (False, True)):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest use so far
        before = status("VmRSS")
        seconds, lengths = score(name, 8, every, save_memory)
        measured = status("VmHWM") - before
        settings = {"measures": measures, "batch_size": 8, "every": every, "save_memory": save_memory}
        seconds = min(seconds, score(name, 8, every, save_memory)[0])
        foreseen = [estimate_scores(name, lengths=lengths, **settings) for _ in range(2)]
        told = min(one.seconds for one in foreseen)
        print(json.dumps([measured, foreseen[0].memory_bytes, seconds, told]))
"""


def _part(estimate: Estimate, what: str) -> int:
    (size,) = [sizes[what] for sizes in estimate.parts.values() if what in sizes]
    return size


def test_parameters_are_counted_exactly_without_weights() -> None:
    network = open_model().network
    estimate = estimate_scores("mini-lm")
    assert estimate.parameters == network.num_parameters()
    assert _part(estimate, "weights") == 4 * network.num_parameters()
    assert _part(estimate_scores("mini-lm", dtype="bfloat16"), "weights") == 2 * network.num_parameters()


def test_some_layers_and_several_sets_are_counted() -> None:
    whole, some = estimate_scores("mini-lm"), estimate_scores("mini-lm", layers=["o_proj"], out=".", files=3)
    assert some.memory_bytes < whole.memory_bytes and whole.disk_bytes == 0
    network = open_model().network
    weights = sum(network.get_parameter(n).numel() for n in linear_names(network) if "o_proj" in n)
    assert some.disk_bytes == 3 * 4 * weights
    with pytest.raises(ValueError, match=r"no linear layers \['v'\]; known: q_proj, k_proj"):
        estimate_scores("mini-lm", layers=["v"])


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads its memory as Linux tells it")
def test_bytes_and_seconds_of_scores_are_foreseen(tmp_path: Path) -> None:
    """On the bundled model and on one of 15 million weights, measured in a process of its own.

    Other processes may slow a run down, so seconds are held against each other: what the larger model takes
    more than the smaller one, foreseen and measured.
    """
    shape = {"vocab_size": 5000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_folder() / "models" / "mini-lm" / file, tmp_path)
    run = subprocess.run([sys.executable, "-c", RUNS, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    for measured, foreseen, *_ in lines:
        assert measured / FACTOR < foreseen < measured * FACTOR
    took, told = (
        sum(line[place] for line in lines[3:]) / sum(line[place] for line in lines[:3]) for place in (2, 3)
    )
    assert took / 2 < told < took * 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that knows one model of the shape of Qwen2-7B; the files it lists, to be changed by the test."""
    shard = SimpleNamespace(filename="model-1.safetensors", file_size=HUB_SIZE - 9, will_download=True)
    config = SimpleNamespace(filename="config.json", file_size=9, will_download=True)
    files = [shard, config]

    def configuration(name: str, **options: Any) -> Qwen2Config:
        assert options["trust_remote_code"] is False
        return Qwen2Config(**QWEN2_7B)

    def snapshot(name: str, **options: Any) -> list[Any]:
        assert options["dry_run"] is True  # nothing is downloaded
        if not files:
            raise OSError("no answer")
        return files

    monkeypatch.setattr(AutoConfig, "from_pretrained", configuration)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return files


def test_a_hub_model_is_estimated_without_a_download(hub: list[Any]) -> None:
    estimate = estimate_scores("Qwen/Qwen2-7B", dtype="bfloat16")
    assert estimate.parameters == 7_615_616_512  # as its card says: 7.62 billion
    assert _part(estimate, "weights") == 2 * 7_615_616_512
    assert _part(estimate, "download of Qwen/Qwen2-7B") == HUB_SIZE
    hub[0].will_download = False
    assert _part(estimate_scores("Qwen/Qwen2-7B"), "download of Qwen/Qwen2-7B") == 9
    hub.clear()  # no answer: the configuration's type says how large the files are
    assert _part(estimate_scores("Qwen/Qwen2-7B"), "download of Qwen/Qwen2-7B") == 2 * 7_615_616_512


def test_downloads_of_several_models_are_added(hub: list[Any]) -> None:
    names = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Math-7B", "FreedomIntelligence/HuatuoGPT-o1-7B")
    sources = [preflight.source_of(name, None) for name in names]
    estimate = preflight.estimate_of("opening three models", sources, {}, {}, "cpu", None, {})
    assert estimate.parameters == 3 * 7_615_616_512
    assert estimate.disk_bytes == 3 * HUB_SIZE


def test_a_hub_model_without_safetensors_is_refused(hub: list[Any]) -> None:
    hub[0].filename = "pytorch_model.bin"
    with pytest.raises(ValueError, match="has no safetensors weights"):
        estimate_scores("Qwen/Qwen2-7B")


def test_too_little_memory_is_said_with_a_remedy(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def with_free(gigabytes: float) -> Estimate:
        memory = SimpleNamespace(available=int(gigabytes * 1e9))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        return estimate_scores("Qwen/Qwen2-7B", measures=["SNIP"], batch_size=1, save_memory=True)

    needed = with_free(1000).check().memory_bytes / 1e9
    message = rf"{needed:.1f} GB of memory, 10.0 GB more than the {needed - 10:.1f} GB that are free; with "
    with pytest.raises(MemoryError, match=message + r"dtype='bfloat16' it needs .* GB and fits"):
        with_free(needed - 10).check()
    with pytest.raises(MemoryError, match="choose a smaller model or a larger machine"):
        with_free(2).check()


def test_too_little_disk_is_said(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match=r"GB more than the 1.0 GB that are free; make room") as caught:
        estimate_scores("Qwen/Qwen2-7B", out=".").check()
    assert caught.value.errno == errno.ENOSPC


def test_places_are_summed_and_checked_apart() -> None:
    parts = {"memory": {"weights": 3 * 10**9, "scores": 10**9}, "disk at /": {"copy": 5}}
    estimate = Estimate("a run", 7, parts, {"memory": 4 * 10**9, "disk at /": 5})
    estimate.check()
    assert (estimate.memory_bytes, estimate.disk_bytes) == (4 * 10**9, 5)
    assert "4.0 GB of 4.0 GB free" in str(estimate)
    assert "3.0 GB  weights" in str(estimate)


def test_free_memory_is_of_this_machine() -> None:
    free = estimate_scores("mini-lm").free["memory"]
    assert 0 < free <= psutil.virtual_memory().total


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model 'mini-absent'"):
        estimate_scores("mini-absent")
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        estimate_scores("mini-lm", dtype="int8")
    T5Config().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(ValueError, match="is no language model"):
        estimate_scores(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ConnectionError, match="did not give the configuration of 'Qwen/Qwen2-7B'"):
        estimate_scores("Qwen/Qwen2-7B")


def test_a_model_is_named_as_it_is_opened() -> None:
    assert preflight.source_of("mini-lm", None).label == open_model().name
