"""lm-evaluation-harness on models in memory: it agrees with our evaluation and leaves the model as it was."""

import json
import random
import re
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny import tiny_model
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from fihelpers.answers import Groups, groups
from fihelpers.evaluate import harness
from fihelpers.evaluate.harness import HarnessResult, evaluate_with_harness, score_number
from fihelpers.evaluate.questions import answer_all
from fihelpers.evaluate.stats import wilson
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.sparsify import linear_names, zeroed
from fihelpers.tasks import load_task

REAL_SUBJECTS = ("business_ethics", "world_religions")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local tasks ask nothing of any network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def mini() -> LanguageModel:
    return open_model()


def _one_spelling(model: LanguageModel) -> Groups:
    """What the harness compares: each letter after a space."""
    return groups(model.tokenizer, {letter: [f" {letter}"] for letter in "ABCD"})


def _assert_agrees(
    result: HarnessResult, model: LanguageModel, folder: str, subject: str, n: int, shots: int
) -> None:
    examples = load_task(folder, subject, n=n, shots=shots).examples
    ours = answer_all(model, examples, _one_spelling(model))
    theirs = result.answers[result.answers["task"] == subject]
    assert theirs["prompt"].tolist() == [example.prompt for example in examples]
    assert theirs["target"].tolist() == ours.answer.tolist()
    assert theirs["response"].tolist() == ours.predicted.tolist()
    log_probs = torch.tensor(theirs["log_probs"].tolist()).log_softmax(-1)
    torch.testing.assert_close(log_probs, ours.log_probs.float(), atol=1e-4, rtol=1e-4)
    row = result.table.set_index("task").loc[subject]
    assert (row["metric"], row["value"], row["n"], row["shots"]) == ("acc", ours.accuracy, n, shots)
    assert (row["low"], row["high"]) == wilson(int(ours.correct.sum()), n)


@pytest.mark.parametrize("shots", [0, 2])
def test_our_choices_equal_the_harnesss_on_bundled_questions(mini: LanguageModel, shots: int) -> None:
    result = evaluate_with_harness(mini, ["geography", "law"], task_folder="bundled", n=20, shots=shots)
    for subject in ("geography", "law"):
        _assert_agrees(result, mini, "bundled", subject, 20, shots)
    assert result.settings["harness"] == "0.4.13"
    assert result.settings["sha256"] == mini.sha256
    assert not result.settings["cut"]


@pytest.mark.parametrize("name", ["cloze", "cloze:bundled"])
@pytest.mark.parametrize("shots", [0, 1])
def test_options_in_their_own_words_are_asked_in_our_prompt(
    mini: LanguageModel, name: str, shots: int
) -> None:
    result = evaluate_with_harness(mini, "geography", task_folder=name, n=12, shots=shots)
    examples = load_task(name, "geography", n=12, shots=shots).examples
    ours = answer_all(mini, examples)
    theirs = result.answers
    assert theirs["prompt"].tolist() == [example.prompt for example in examples]
    assert theirs["target"].tolist() == ours.answer.tolist()
    of_one_token = 0
    for row, example in enumerate(examples):  # the harness compares whole options, we their first tokens
        lengths = [len(mini.tokenizer(f" {option}")["input_ids"]) for option in example.options]
        if max(lengths) == 1:
            of_one_token += 1
            whole = torch.tensor(theirs["log_probs"][row]).log_softmax(-1)
            torch.testing.assert_close(whole, ours.log_probs[row].float(), atol=1e-4, rtol=1e-4)
    assert of_one_token or name != "cloze"


@pytest.mark.parametrize(("shots", "n"), [(0, 10), (1, 3)])
def test_our_choices_equal_the_harnesss_on_real_mmlu(real_data: Path, shots: int, n: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, tie_word_embeddings=True, initializer_range=1.0,
    )  # fmt: skip
    model = LanguageModel(Qwen2ForCausalLM(config).eval(), tokenizer, "random Qwen2", None, "0" * 64)
    folder = real_data / "mmlu"
    result = evaluate_with_harness(model, REAL_SUBJECTS, task_folder=folder, n=n, shots=shots, batch_size=2)
    assert result.answers["response"].nunique() > 1  # a model that always says A would prove nothing
    for subject in REAL_SUBJECTS:
        _assert_agrees(result, model, str(folder), subject, n, shots)


def test_all_subjects_are_one_group(mini: LanguageModel) -> None:
    table = evaluate_with_harness(mini, "all", task_folder="bundled", n=5).table.set_index("task")
    subjects = table.drop(index="all")
    assert list(subjects.index) == ["business", "culture", "geography", "law"]
    row = table.loc["all"]
    assert row["n"] == subjects["n"].sum() == 20
    assert row["value"] == pytest.approx(subjects["value"].mean())
    assert row["low"] < row["value"] < row["high"] or row["value"] in (0, 1)


def test_a_perturbed_network_is_evaluated_in_place_and_left_as_it_was(mini: LanguageModel) -> None:
    network = mini.network
    intact = evaluate_with_harness(mini, "law", task_folder="bundled", n=20).answers
    places = {name: p.data_ptr() for name, p in network.named_parameters()}
    padding = mini.tokenizer.pad_token, mini.tokenizer.padding_side
    weights = dict(network.named_parameters())
    all_of = {name: torch.arange(weights[name].numel()) for name in linear_names(network)}
    network.train()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with zeroed(network, all_of):
        perturbed = evaluate_with_harness(mini, "law", task_folder="bundled", n=20).answers
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert all(module.training for module in network.modules())
    network.eval()
    assert {name: p.data_ptr() for name, p in network.named_parameters()} == places
    assert (mini.tokenizer.pad_token, mini.tokenizer.padding_side) == padding
    assert perturbed["log_probs"].tolist() != intact["log_probs"].tolist()
    again = evaluate_with_harness(mini, "law", task_folder="bundled", n=20).answers
    pd.testing.assert_frame_equal(again, intact)


@pytest.fixture
def cmath_data(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Questions of our own in CMATH's columns stand in for the hub; what was asked for is kept."""
    asked: list[dict[str, Any]] = []
    rows = [
        {"grade": 1, "question": "小明有3支铅笔，又买了2支，现在有几支？", "golden": "5"},
        {"grade": 2, "question": "一本书4元，3本书多少元？", "golden": "12"},
    ]

    def load(path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
        asked.append({"path": path, "name": name, **options})
        table = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict({"validation": table, "test": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_task_file_of_cmath_is_one_that_the_harness_reads() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=harness.OUR_TASKS)
    assert manager.all_subtasks == ["cmath"]
    config = manager.task_index["cmath"].cfg
    assert config is not None
    assert len(config["dataset_kwargs"]["revision"]) == 40
    solved = config["fewshot_config"]["samples"]
    assert len(solved) == config["num_fewshot"] == 6


def test_the_solved_problems_of_cmath_are_right() -> None:
    config = (harness.OUR_TASKS / "cmath.yaml").read_text(encoding="utf-8").replace("!function ", "")
    for solved in yaml.safe_load(config)["fewshot_config"]["samples"]:
        sums = re.findall(r"([0-9.+×÷/-]+)=([0-9.]+)", solved["solution"])
        assert sums
        for left, right in sums:
            assert eval(left.replace("×", "*").replace("÷", "/")) == float(right)
        assert harness._last_number(solved["solution"]) == float(sums[-1][1])


def test_cmath_runs_as_a_generation_task(cmath_data: list[dict[str, Any]]) -> None:
    model = tiny_model("qwen2", torch.float32)
    model.tokenizer.eos_token = "<unk>"
    model.network.config.max_position_embeddings = 4096
    result = evaluate_with_harness(model, "cmath", n=1)
    assert cmath_data[0]["path"] == "weitianwen/cmath"
    assert len(cmath_data[0]["revision"]) == 40
    (row,) = result.table.to_dict("records")
    assert (row["metric"], row["n"], row["shots"], row["version"]) == ("exact_match", 1, 6, "1.0")
    (answer,) = result.answers.to_dict("records")
    assert answer["prompt"].count("问题：") == 7
    assert answer["prompt"].endswith("\n答案：")
    assert isinstance(answer["response"], str)


@pytest.mark.parametrize(
    ("golden", "response", "right"),
    [
        ("9", "99-90=9。所以答案是：9。", 1),
        ("9", "所以答案是：90。", 0),
        ("1200", "一共1,200元", 1),
        ("0.5", "1/2", 1),
        ("40%", "答案是40%。", 1),
        ("3.14", "3.15", 1),
        ("314", "315", 0),
        ("5", "不知道", 0),
        ("5", "5/0", 0),
        ("10", "\\boxed{10}", 1),
    ],
)
def test_numbers_are_compared_as_numbers(golden: str, response: str, right: int) -> None:
    assert score_number({"golden": golden}, [response]) == {"exact_match": right}


def test_a_result_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="the result 'five' of a CMATH question is not a number"):
        score_number({"golden": "five"}, ["5"])


def test_a_task_file_of_the_users_own_is_found(mini: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "The capital of France is", "a": "Paris"}\n' * 3)
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(task))
    (row,) = evaluate_with_harness(mini, "capitals", task_folder=tmp_path).table.to_dict("records")
    assert (row["task"], row["n"]) == ("capitals", 3)


@pytest.fixture
def few_standard_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the harness's own tasks; reading all takes it a minute."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    places: list[str | Path] = [tasks / name for name in ("gsm8k", "mgsm", "hendrycks_math", "mmlu/default")]
    manager = TaskManager(include_defaults=False, include_path=places)
    monkeypatch.setattr(harness, "_standard_tasks", lambda: manager)


@pytest.mark.usefixtures("few_standard_tasks")
def test_an_unknown_task_is_answered_with_similar_names(mini: LanguageModel) -> None:
    with pytest.raises(ValueError, match="unknown task 'mgsm'; similar names are mgsm_direct"):
        evaluate_with_harness(mini, "mgsm")
    with pytest.raises(ValueError, match="unknown task 'gsm8'; similar names are gsm8k"):
        evaluate_with_harness(mini, ["cmath", "gsm8"][1])
    with pytest.raises(ValueError, match="unknown subject 'lawe'; use one of business"):
        evaluate_with_harness(mini, "lawe", task_folder="bundled")


@pytest.mark.usefixtures("few_standard_tasks")
def test_a_hub_that_does_not_answer_is_one_sentence(
    mini: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    for name in ("gsm8k", "cmath", "mmlu", "mgsm_direct_zh", "hendrycks_math"):
        with pytest.raises(ConnectionError, match=rf"the data of task '{name}' could not be .* no route\); "):
            evaluate_with_harness(mini, name)


@pytest.fixture
def real_gsm8k(real_data: Path, few_standard_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real problems on this machine stand in for the hub."""
    lines = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    table = datasets.Dataset.from_list([json.loads(line) for line in lines[:60]])
    splits = datasets.DatasetDict({"train": table.select(range(20)), "test": table.select(range(20, 60))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)


@pytest.mark.usefixtures("real_gsm8k")
def test_gsm8k_of_the_harness_runs_on_real_problems(mini: LanguageModel) -> None:
    result = evaluate_with_harness(mini, "gsm8k", n=2, shots=0)
    assert result.table["filter"].tolist() == ["strict-match", "flexible-extract"]
    assert result.table["n"].tolist() == [2, 2]
    assert result.table["shots"].tolist() == [0, 0]
    assert result.answers["prompt"].str.fullmatch(r"Question: .*\nAnswer:").all()


@pytest.mark.usefixtures("real_gsm8k")
def test_a_prompt_too_long_is_said_aloud(mini: LanguageModel) -> None:
    with pytest.warns(UserWarning, match="longer than the 512 tokens that model 'mini-lm' can read"):
        result = evaluate_with_harness(mini, "gsm8k", n=1, shots=8)
    assert result.settings["cut"]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer of model 'tiny-qwen2' has no end-of-text token"):
        evaluate_with_harness(tiny_model("qwen2"), "law", task_folder="bundled")


def test_broken_logits_are_an_error() -> None:
    model = open_model()
    with torch.no_grad():
        next(iter(model.network.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="model 'mini-lm' gives NaN or infinite log-probabilities"):
        evaluate_with_harness(model, "law", task_folder="bundled", n=2)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "there are no tasks"),
        ("law", {"n": 0}, "n must be at least 1, got 0"),
        ("law", {"shots": -1}, "shots must be at least 0, got -1"),
        ("law", {"batch_size": 0}, "batch size must be at least 1, got 0"),
        ("law", {"shots": 999}, "fewer than the 999 shots asked for"),
    ],
)
def test_bad_input_is_one_sentence(
    mini: LanguageModel, tasks: list[str] | str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_with_harness(mini, tasks, task_folder="bundled", **options)  # type: ignore[arg-type]


def test_a_folder_without_tasks_is_refused(mini: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no tasks; give 'bundled'"):
        evaluate_with_harness(mini, "law", task_folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="absent has no tasks; give 'bundled'"):
        evaluate_with_harness(mini, "law", task_folder=tmp_path / "absent")
