"""Opening models, and the batches and logits they give."""

import json
import logging
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from fihelpers.data import file_sha256
from fihelpers.models.language import LanguageModel, bundled_models, open_model
from fiminis.manifest import write_manifest

KINDS = ("qwen2", "llama", "gpt_neox")
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "w2 w2", "w3 w1 w9 w4 w5 w6 w7"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save(model: LanguageModel, folder: Path, max_shard_size: str = "5GB") -> Path:
    model.network.save_pretrained(folder, max_shard_size=max_shard_size)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tiny_model("qwen2", torch.float32), tmp_path / "my-model")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that ships the model mini-lm."""
    save(tiny_model("llama", torch.float32), tmp_path / "data" / "models" / "mini-lm")
    write_manifest(tmp_path / "data")
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def logits_one_by_one(model: LanguageModel, prompts: list[str]) -> torch.Tensor:
    """The plain way: no padding, no batch, the logits of every position."""
    ids = [torch.tensor([model.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
    return torch.cat([model.network(input_ids=row).logits[:, -1] for row in ids])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_opened_as_it_was(kind: str, tmp_path: Path) -> None:
    made = tiny_model(kind, torch.float32)
    folder = save(made, tmp_path / kind)
    model = open_model(folder)
    assert (model.name, model.revision, model.device.type) == (kind, None, "cpu")
    assert model.sha256 == file_sha256(folder / "model.safetensors")
    assert not model.network.training
    weights = made.network.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.network.state_dict().items())
    torch.testing.assert_close(logits_one_by_one(model, PROMPTS), logits_one_by_one(made, PROMPTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padded_batches_give_the_logits_of_each_prompt_alone(kind: str, batch_size: int) -> None:
    model = tiny_model(kind)
    batches = model.batches(PROMPTS, batch_size)
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(len(PROMPTS)))
    lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(-1)]
    assert lengths == sorted(lengths)
    for _ in range(2):  # batches are reusable
        found = torch.cat([model.last_logits(batch) for batch in batches])
        expected = logits_one_by_one(model, PROMPTS)[index]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prefix_read_once_gives_the_same_logits(kind: str) -> None:
    model = tiny_model(kind)
    start = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    prompts = [f"{start} {prompt}" for prompt in PROMPTS]
    prefix, batches = model.prefixed_batches(prompts, 2)
    assert prefix.shape == (1, 9)
    past = model.read(prefix)
    index = torch.cat([batch.index for batch in batches])
    for _ in range(2):  # what was read stays as it is
        found = torch.cat([model.last_logits(batch, past) for batch in batches])
        torch.testing.assert_close(found, logits_one_by_one(model, prompts)[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        (PROMPTS, 0),  # nothing shared
        (["w1 w2 w3 w4", "w1 w2 w3 w5"], 0),  # too little to be worth it
        (["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 2, 8),  # the same prompts keep their last token
        (["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w9"], 8),  # one begins the other
    ],
)
def test_the_prefix_leaves_each_prompt_a_token(prompts: list[str], length: int) -> None:
    model = tiny_model("qwen2")
    prefix, batches = model.prefixed_batches(prompts, 1)
    assert prefix.shape == (1, length)
    assert (model.read(prefix) is None) == (length == 0)
    found = torch.cat([model.last_logits(batch, model.read(prefix)) for batch in batches])
    index = torch.cat([batch.index for batch in batches])
    torch.testing.assert_close(found, logits_one_by_one(model, prompts)[index], rtol=1e-10, atol=1e-10)


def test_logits_are_differentiable() -> None:
    model = tiny_model("qwen2")
    (batch,) = model.batches(PROMPTS)
    model.last_logits(batch).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.network.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_asked_dtype_is_used_and_logits_are_float32_or_better(saved: Path, dtype: str) -> None:
    model = open_model(saved, dtype=dtype)
    assert model.network.dtype == getattr(torch, dtype)
    logits = model.last_logits(model.batches(PROMPTS)[0])
    assert logits.dtype == (torch.float64 if dtype == "float64" else torch.float32)


@pytest.mark.parametrize(
    ("prompts", "batch_size", "message"),
    [
        ([], 2, "non-empty list of prompts"),
        ("w1 w2", 2, "non-empty list of prompts, got 'w1 w2'"),
        (["w1", ""], 2, "prompt 1 has no tokens"),
        (["w1", "w1 " * 33], 2, "prompt 1 has 33 tokens, more than the 32 that model 'tiny-qwen2' can read"),
        (["w1"], 0, "at least 1, got 0"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompts, batch_size: int, message: str) -> None:
    model = tiny_model("qwen2")
    for make in (model.batches, model.prefixed_batches):
        with pytest.raises(ValueError, match=message):
            make(prompts, batch_size)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model = tiny_model("qwen2")
    model.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="prompt 1 has token 32, but model 'tiny-qwen2' knows 32"):
        model.batches(["w1", "new"])


def test_logits_that_are_not_finite_name_the_model_and_the_prompt() -> None:
    model = tiny_model("qwen2")
    w9 = model.tokenizer.convert_tokens_to_ids("w9")
    model.network.get_parameter("model.embed_tokens.weight").data[w9] = torch.nan
    model.network.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.network.lm_head.weight))
    (batch,) = model.batches(["w1", "w2 w9", "w2"])
    with pytest.raises(
        FloatingPointError, match="model 'tiny-qwen2' gives NaN or infinite logits for prompt 1"
    ):
        model.last_logits(batch)


def test_a_bundled_model_is_opened_by_name(bundled: Path) -> None:
    assert bundled_models() == ["mini-lm"]
    model = open_model()
    assert (model.name, model.revision) == ("mini-lm", None)
    assert (
        model.sha256
        == json.loads((bundled / "manifest.json").read_text())["models/mini-lm/model.safetensors"]
    )


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_bundled_file_is_named(bundled: Path, file: str) -> None:
    path = bundled / "models" / "mini-lm" / file
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    with pytest.raises(ValueError, match=rf"^models/mini-lm/{file} is damaged"):
        open_model("mini-lm")


def test_an_unknown_name_lists_the_bundled_ones(bundled: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no model 'maxi-lm': give a bundled name \(mini-lm, smollm2\)"
    ):
        open_model("maxi-lm")
    with pytest.raises(FileNotFoundError, match=r"no model '\./no/such/folder'"):
        open_model("./no/such/folder")


def test_a_missing_data_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path / "none"))
    assert bundled_models() == []
    with pytest.raises(FileNotFoundError, match="FIHELPERS_DATA names"):
        open_model("mini-lm")


def test_pickled_weights_are_refused(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="'my-model' has no safetensors weights; pickled weights can run code"
    ):
        open_model(saved)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_model(tmp_path)


def test_a_cut_off_weight_file_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^the weights of model 'my-model' cannot be opened: [^\n]+$"):
        open_model(saved)


def test_absent_weights_are_not_made_up(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"'my-model' lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        open_model(saved)


def test_a_folder_without_a_tokenizer_is_refused(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^the tokenizer of model 'my-model' cannot be opened: [^\n]+$"):
        open_model(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="'my-model' has no tokenizer"):
        open_model(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_own_tokenizer_is_taken_as_it_is_written(kind: str, tmp_path: Path) -> None:
    made = tiny_model(kind, torch.float32)
    model = open_model(save(made, tmp_path / kind))
    ids = [made.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS] == ids


def test_shards_are_opened_and_their_hash_sees_each(tmp_path: Path) -> None:
    made = tiny_model("qwen2", torch.float32)
    folder = save(made, tmp_path / "shards", max_shard_size="5KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    model = open_model(folder)
    torch.testing.assert_close(logits_one_by_one(model, PROMPTS), logits_one_by_one(made, PROMPTS))
    weights = load_file(shards[-1])
    save_file({name: weight + 1 for name, weight in weights.items()}, shards[-1], {"format": "pt"})
    assert open_model(folder).sha256 != model.sha256
    index = folder / "model.safetensors.index.json"
    for damaged in ("{", "{}", "[]"):
        shutil.copy(index, folder.parent)
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json of model 'shards' is damaged"):
            open_model(folder)
        shutil.move(folder.parent / index.name, index)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"lacks the weight file '{shards[0].name}'"):
        open_model(folder)


def test_a_shard_outside_the_folder_is_refused(saved: Path) -> None:
    shutil.move(saved / "model.safetensors", saved.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks the weight file '\.\./model\.safetensors'"):
        open_model(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; use one of float32, float64"),
        ({"device": "nonsense"}, "device 'nonsense' is not available"),
        ({"device": "meta:x"}, "device 'meta:x' is not available"),
        ({"revision": "main"}, "is local and has no revision"),
    ],
)
def test_options_that_do_not_fit_are_refused(saved: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_model(saved, **options)


def test_code_of_the_model_runs_only_where_the_user_asks(saved: Path) -> None:
    ran = saved / "ran"
    (saved / "theirs.py").write_text(
        "from pathlib import Path\nfrom transformers import Qwen2Config, Qwen2ForCausalLM\n"
        f"Path({str(ran)!r}).touch()\nclass Theirs(Qwen2ForCausalLM):\n    pass\n"
        "class TheirConfig(Qwen2Config):\n    model_type = 'theirs'\n"
    )
    config = json.loads((saved / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.Theirs"}}
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    with pytest.raises(ValueError, match="cannot be opened"):
        open_model(saved)
    assert not ran.exists()


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A hub that holds the saved model as some/model; lists what it was asked for."""
    asked: list[tuple] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        asked.append(("patterns", *allow_patterns))
        return str(saved.rename(saved.parent / COMMIT))  # where the hub's client keeps a snapshot

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_a_hub_model_is_pinned_to_the_commit_of_the_moment(
    hub, revision, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fihelpers.models.language"):
        model = open_model("some/model", revision=revision)
    assert (model.name, model.revision) == ("some/model", COMMIT)
    assert hub[0] == ("some/model", revision)
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in hub[1][1:])
    assert f"model some/model: using commit {COMMIT}" in caplog.messages


def test_a_silent_hub_is_a_connection_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match=r"^no local folder is called 'some/model' and the hub did not"):
        open_model("some/model")


def test_a_real_model_tells_its_story(real_data: Path) -> None:
    model = open_model(real_data / "stories260K")
    assert model.name == os.path.basename(real_data / "stories260K")
    assert sum(p.numel() for p in model.network.parameters()) == 260_032
    text = "Once upon a time"
    for _ in range(12):
        logits = model.last_logits(model.batches([text])[0])
        ids = model.tokenizer(text)["input_ids"] + [int(logits.argmax())]
        text = str(model.tokenizer.decode(ids, skip_special_tokens=True))
    assert text.startswith("Once upon a time, there was a little girl")


def test_a_real_model_gives_the_same_logits_in_any_batch(real_data: Path) -> None:
    model = open_model(real_data / "stories260K", dtype="float64")
    prompts = ["Once upon a time", "Lily and Tom went to the park. They saw a big", "The"]
    batches = model.batches(prompts, 3)
    found = torch.cat([model.last_logits(batch) for batch in batches])
    index = torch.cat([batch.index for batch in batches])
    torch.testing.assert_close(found, logits_one_by_one(model, prompts)[index], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_take_the_place_of_the_tokens(kind: str) -> None:
    model = tiny_model(kind)
    for batch in model.batches(["w1 w2 w3", "w4"]):
        embedded = model.embed(batch)
        assert torch.equal(model.last_logits(batch, embeddings=embedded), model.last_logits(batch))
        assert not torch.equal(model.last_logits(batch, embeddings=embedded * 2), model.last_logits(batch))
