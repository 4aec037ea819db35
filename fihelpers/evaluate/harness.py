"""Standard evaluation: any model in memory goes straight into lm-evaluation-harness.

    evaluate_with_harness(model, "gsm8k", n=200)                        # a standard task, from the hub
    evaluate_with_harness(model, "all", task_folder="bundled", shots=5)  # local questions, no network

The harness asks its own prompts and compares log-probabilities by its own code, so that our numbers can be
set beside published ones. Imported here only when called, as it takes seconds to load.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from logging.handlers import BufferingHandler
from os import PathLike
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from fihelpers.evaluate.stats import wilson
from fihelpers.extras import optional
from fihelpers.models.language import LanguageModel, brief, context_of
from fihelpers.tasks import BUNDLED, CLOZE, mcq, question_reader

log = logging.getLogger(__name__)

OUR_TASKS = Path(__file__).resolve().parent / "harness_tasks"
ALL = "all"
BATCH_SIZE = 4  # the harness holds float32 log-probabilities of all tokens at all positions of a batch
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own defaults
SHOWN_NAMES = 5
Z = NormalDist().inv_cdf(0.975)
MESSAGES = 10**6  # of the harness that are kept
CUT = ("Truncating", "Left truncation")
EXPECTED = (  # what the harness says each time it is given a model in memory and a table in memory
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "Custom kwargs can be passed",
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
HEADERS: dict[Any, Callable[[str], str]] = {
    mcq.format_prompt: mcq.header,
    mcq.open_prompt: mcq.open_header,
    mcq.statement: lambda subject: "",
}
CLOSE = 0.01  # relative; how CMATH's authors compare numbers that are not both whole


@dataclass(frozen=True, eq=False)
class HarnessResult:
    """What the harness measured.

    table: a row for each task, or group of tasks, and metric: task, metric, filter (how the answer was taken
        from the text), value, stderr (the harness's), low and high (95 %: Wilson's interval where answers are
        right or wrong, otherwise value ± 1.96 stderr), n, shots, version (of the task).
    answers: a row for each question and filter: task, question (its position in the task), prompt, target,
        response (the chosen option's index, or the text), log_probs (of the options), and its metrics.
    settings: the model with its hash, versions, seeds, batch size, and whether prompts were cut.
    """

    table: pd.DataFrame
    answers: pd.DataFrame
    settings: dict[str, Any]


def evaluate_with_harness(
    model: LanguageModel,
    tasks: str | Sequence[str],
    *,
    task_folder: str | PathLike[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> HarnessResult:
    """Evaluate an open model, perturbed or merged or intact, as it is: no copy of its network is made.

    tasks: names of the harness's tasks and groups ("mmlu", "gsm8k", "mgsm_direct", "hendrycks_math") or
        "cmath". With a task_folder only its tasks are known, and nothing is asked of the hub for questions.
    task_folder: "bundled", "bundled-experts" or a folder in the MMLU CSV layout, whose subjects are the
        tasks and "all" is the group of them, asked in the harness's own MMLU prompt; "cloze" or "cloze:" and
        one of these, whose options it compares whole; or a folder of the harness's .yaml task files.
    n: a seeded draw of that many questions of each task, the same that `load_task` draws of one subject; all
        by default and of a task that has fewer. shots: solved questions before each; by default what
        the task says. A task that says 0 keeps it.

    A prompt longer than the model can read is cut on the left by the harness, with a warning. Finding a
    standard task takes the harness up to a minute the first time. Remote code is never run.

    Raises ValueError for an unknown task, with similar names, bad numbers, and a tokenizer without an
    end-of-text token, which the harness needs; FileNotFoundError for a folder without tasks; ConnectionError
    where a task's data cannot be had; FloatingPointError where the model gives NaN or infinite
    log-probabilities.
    """
    with optional():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, n, shots, batch_size)
    if model.tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of model {model.name!r} has no end-of-text token, which the harness needs; "
            "set its eos_token."
        )
    with _left_as_it_was(model.network) as records:
        loaded = _load(names, task_folder, shots)
        for task in loaded["tasks"].values():
            _prepare(task, shots)
        drawn = None if n is None else {name: _draw(task, n, seed) for name, task in loaded["tasks"].items()}
        tokenizer = copy.deepcopy(model.tokenizer)  # the harness gives it a padding token
        network = HFLM(pretrained=model.network, tokenizer=tokenizer, batch_size=batch_size)
        output = lm_eval.evaluate(network, loaded, samples=drawn)
    assert output is not None  # None only on the further machines of a distributed run
    settings = _settings(model, n, seed, batch_size, _was_cut(records, model))
    answers = _answers(output["samples"], model.name)
    return HarnessResult(_table(output, loaded["groups"], answers), answers, settings)


def _check(names: Sequence[str], n: int | None, shots: int | None, batch_size: int) -> None:
    if not names:
        raise ValueError("there are no tasks to evaluate; name at least one.")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if shots is not None and shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}.")
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}.")


def _load(names: Sequence[str], task_folder: str | PathLike[str] | None, shots: int | None) -> dict[str, Any]:
    """The tasks and groups as `lm_eval.evaluate` takes them: {"tasks", "groups", "group_map"}."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None and _holds_questions(str(task_folder)):
        read, prompt = question_reader(str(task_folder))
        made = [_of_questions(name, read, shots or 0, prompt) for name in names]
        return dict(TaskManager(include_defaults=False).load(made))
    places = [OUR_TASKS] if task_folder is None else [Path(task_folder).expanduser()]
    manager = TaskManager(include_defaults=False, include_path=places)
    if task_folder is not None and not manager.all_tasks:
        raise FileNotFoundError(
            f"{task_folder} has no tasks; give 'bundled', a folder in the MMLU CSV layout, or one with the "
            "harness's .yaml task files."
        )
    found: list[Any] = []
    for name in names:
        knows = manager
        if name not in knows.all_tasks and task_folder is None:
            knows = _standard_tasks()
        if name not in knows.all_tasks:
            raise _unknown(name, {*manager.all_tasks, *knows.all_tasks})
        found += _load_one(name, knows)
    return dict(manager.load(found))


def _load_one(name: str, manager: Any) -> list[Any]:
    """The task, the group, or the tasks of a tag, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # the hub client and the harness raise many types; the remedy is the same
        raise ConnectionError(
            f"the data of task {name!r} could not be loaded ({brief(error)}); check the network, or give a "
            "task_folder."
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


@lru_cache(maxsize=1)
def _standard_tasks() -> Any:
    """The harness's own list of tasks: 14,000 names, read from as many files."""
    from lm_eval.tasks import TaskManager

    log.info("reading the harness's list of tasks, which takes up to a minute")
    return TaskManager()


def _unknown(name: str, known: set[str]) -> ValueError:
    begin = sorted((k for k in known if k.startswith(name)), key=lambda k: (len(k), k))
    near = dict.fromkeys([*begin[:SHOWN_NAMES], *difflib.get_close_matches(name, known, SHOWN_NAMES)])
    shown = list(near) or sorted(known)
    return ValueError(f"unknown task {name!r}; similar names are {', '.join(shown[:SHOWN_NAMES])}.")


def _holds_questions(name: str) -> bool:
    """Whether these are questions in the MMLU CSV layout, and not task files of the harness."""
    if name in BUNDLED or name.startswith(f"{CLOZE}:"):
        return True
    return any((Path(name).expanduser() / "test").glob("*_test.csv"))


def _of_questions(name: str, read: Callable[..., mcq.Rows], shots: int, prompt: Callable[..., str]) -> Any:
    """The harness's task of one subject, or the group "all" of all subjects."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    subject = None if name == ALL else name
    asked = read(subject=subject, split="test")
    solved = read(subject=subject, split="dev") if shots else {}
    mcq.make_examples(asked, "test", solved, shots)  # raises for too few solved questions
    tasks = [_subject_task(each, rows, solved.get(each, []), prompt) for each, rows in asked.items()]
    if subject is not None:
        return tasks[0]
    group = Group(ALL, aggregate_metric_list=[AggMetricConfig("acc")], metadata={"version": 1.0})
    for task in tasks:
        group.add(task)
    return group


def _subject_task(
    subject: str, asked: Sequence[mcq.Row], solved: Sequence[mcq.Row], prompt: Callable[..., str]
) -> Any:
    """One subject with its data in memory, in the harness's own MMLU prompt, with letters or without.

    Statements to finish are the latter without the words around a question.
    """
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    parts = {"test": asked, "dev": solved} if solved else {"test": asked}
    tables = {
        split: Dataset.from_list([vars(row) | {"choices": row.options} for row in rows])
        for split, rows in parts.items()
    }
    form = "default" if prompt is mcq.format_prompt else "continuation"
    template = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / form / f"_{form}_template_yaml"
    config = yaml.safe_load(template.read_text(encoding="utf-8"))
    del config["dataset_path"]
    if not solved:
        config.pop("fewshot_split")
    own = {"task": subject, "description": HEADERS[prompt](subject), "custom_dataset": lambda **_: tables}
    if prompt is mcq.statement:
        own["doc_to_text"] = "{{question}}"
    return ConfigurableTask(config=config | own)


def _prepare(task: Any, shots: int | None) -> None:
    """Set the shots and their seed, as the harness's own entry point does."""
    usual = task.get_config("num_fewshot")
    if usual is None or (shots is not None and usual != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _draw(task: Any, n: int, seed: int) -> list[int]:
    """Positions of n questions, drawn as `load_task` draws them."""
    total = len(task.eval_docs)
    return sorted(random.Random(seed).sample(range(total), n)) if n < total else list(range(total))


@contextmanager
def _left_as_it_was(network: torch.nn.Module) -> Iterator[list[logging.LogRecord]]:
    """Yield what the harness logs. The network's mode and all random numbers are afterwards as before."""
    logger = logging.getLogger("lm_eval")
    heard = BufferingHandler(MESSAGES)
    training, propagate, level = network.training, logger.propagate, logger.level
    python, numpy = random.getstate(), np.random.get_state()
    logger.addHandler(heard)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield heard.buffer
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            logger.removeHandler(heard)
            logger.propagate = propagate
            logger.setLevel(level)
            network.train(training)


def _was_cut(records: Sequence[logging.LogRecord], model: LanguageModel) -> bool:
    """Whether the harness cut prompts, by what it logged, with a warning; passes on all that is unusual."""
    messages = dict.fromkeys(record.getMessage() for record in records)
    for message in messages:
        if not any(phrase in message for phrase in (*CUT, *EXPECTED)):
            log.warning("lm-evaluation-harness: %s", message)
    cut = any(phrase in message for message in messages for phrase in CUT)
    if cut:
        warnings.warn(
            f"prompts, with room for the answers, are longer than the {context_of(model.network)} tokens "
            f"that model {model.name!r} can read, and the harness cut them on the left; use fewer shots.",
            stacklevel=3,
        )
    return cut


def _answers(samples: Mapping[str, Sequence[Mapping[str, Any]]], model_name: str) -> pd.DataFrame:
    rows = []
    for task, of_task in samples.items():
        for sample in of_task:
            replies = sample["filtered_resps"]
            # A log-likelihood comes with whether it is the likeliest text.
            options = all(isinstance(reply, tuple) for reply in replies)
            log_probs = tuple(reply[0] for reply in replies) if options else ()
            if not all(map(math.isfinite, log_probs)):
                raise FloatingPointError(
                    f"model {model_name!r} gives NaN or infinite log-probabilities for question "
                    f"{sample['doc_id']} of task {task!r}."
                )
            row = {"task": task, "question": sample["doc_id"], "filter": sample["filter"]}
            row |= {"prompt": sample["arguments"][0][0], "target": sample["target"]}
            row |= {"response": int(np.argmax(log_probs)) if options else replies[0], "log_probs": log_probs}
            rows.append(row | {metric: sample[metric] for metric in sample["metrics"]})
    return pd.DataFrame(rows)


def _table(output: Mapping[str, Any], groups: Mapping[str, Any], answers: pd.DataFrame) -> pd.DataFrame:
    rows = []
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    for task, measured in {**output["results"], **output.get("groups", {})}.items():
        keys = [key for key in measured if "," in key and "_stderr," not in key]
        for metric, name in (key.split(",", 1) for key in keys):
            chosen = answers[answers["task"].isin(members.get(task, [task])) & (answers["filter"] == name)]
            stderr = measured.get(f"{metric}_stderr,{name}")
            row = {"task": task, "metric": metric, "filter": name, "value": measured[f"{metric},{name}"]}
            row["stderr"] = stderr if isinstance(stderr, int | float) else math.nan
            row["low"], row["high"] = _interval(row["value"], row["stderr"], chosen[metric])
            row |= {"n": len(chosen), "shots": output["n-shot"].get(task)}
            rows.append(row | {"version": str(output["versions"].get(task, "none"))})
    return pd.DataFrame(rows)


def _interval(value: float, stderr: float, of_each: pd.Series) -> tuple[float, float]:
    """Wilson's interval where the value is a share of right answers."""
    right = of_each.astype(float) if of_each.map(np.isscalar).all() else of_each.iloc[:0]
    if len(right) and right.isin([0, 1]).all() and math.isclose(value, right.mean(), abs_tol=1e-12):
        return wilson(int(right.sum()), len(right))
    return value - Z * stderr, value + Z * stderr


def _settings(model: LanguageModel, n: int | None, seed: int, batch_size: int, cut: bool) -> dict[str, Any]:
    import lm_eval
    import transformers

    return {
        "model": model.name,
        "revision": model.revision,
        "sha256": model.sha256,
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "harness": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seeds": SEEDS,
        "n": n,
        "seed": seed,
        "batch_size": batch_size,
        "cut": cut,
    }


def score_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Whether the last number of a response is CMATH's result.

    Whole numbers must be equal; others within 1 %, as the data set's authors compare them. The authors take
    either of the last two numbers, this only the last.
    """
    wanted = _last_number(str(doc["golden"]))
    if wanted is None:
        raise ValueError(f"the result {doc['golden']!r} of a CMATH question is not a number.")
    found = _last_number(results[0])
    if found is None:
        return {"exact_match": 0}
    both_whole = wanted.is_integer() and found.is_integer()
    right = wanted == found if both_whole else math.isclose(wanted, found, rel_tol=CLOSE)
    return {"exact_match": int(right)}


def _last_number(text: str) -> float | None:
    """The last number in a text: 3, 1,200, 2.5, 5/8 or 40%."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    above, _, below = number.removesuffix("%").partition("/")
    if below and float(below) == 0:
        return None
    return float(above) / float(below or 1) / (100 if number.endswith("%") else 1)
