"""The bundled experts: sound facts and questions, and a merge that costs accuracy in both domains."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fihelpers.data import check_folder, data_folder
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.tasks import load_task
from fiminis import experts, facts, lm

OTHER = {"math": "health", "health": "math"}

with_models = pytest.mark.skipif(
    not all((data_folder() / "models" / experts.model_name(domain)).is_dir() for domain in experts.DOMAINS),
    reason="the experts are not shipped; `python -m fihelpers train-minis experts` makes them",
)


def words(question: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in question.lower()).split())


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {domain: open_model(experts.model_name(domain)) for domain in experts.DOMAINS}


@pytest.mark.parametrize("domain", experts.DOMAINS)
def test_facts_have_one_answer_in_few_plain_words(domain: str) -> None:
    relations = facts.load_relations(data_folder() / experts.FOLDER, [domain])
    assert sum(len(r.facts) for r in relations) >= 160
    for relation in relations:
        assert len({f.subject for f in relation.facts}) == len(relation.facts)
        assert len({f.answer for f in relation.facts}) >= 8
        for fact in relation.facts:
            assert len(fact.wrong) >= 3 and fact.answer not in fact.wrong
            assert len(fact.subject.split()) <= 5 and len(fact.answer.split()) <= 4
            assert (fact.subject + fact.answer).isascii() and "," not in fact.subject + fact.answer


def test_words_that_exclude_an_option_name_one() -> None:
    """A misspelt entry of ``not`` would let a second right answer be offered."""
    for domain in experts.DOMAINS:
        for entry in facts._read(data_folder() / experts.FOLDER / f"{domain}.yaml", domain):
            pairs = [f if isinstance(f, dict) else {"s": f[0], "o": f[1]} for f in entry["facts"]]
            objects = {p["o"] for p in pairs}
            assert all(set(p.get("not", ())) <= objects for p in pairs)


@pytest.mark.parametrize("domain", experts.DOMAINS)
def test_no_question_is_asked_in_two_splits_or_in_training(domain: str) -> None:
    relations = facts.load_relations(data_folder() / experts.FOLDER, [domain])
    trained = {words(w.format(s=f.subject)) for r in relations for f in r.facts for w in r.questions["train"]}
    asked = {
        s: {words(i.question) for i in facts.items(relations, domain, s, 0)} for s in ("dev", "val", "test")
    }
    assert not asked["val"] & asked["test"] and not asked["dev"] & (asked["val"] | asked["test"])
    assert not trained & set().union(*asked.values())


def test_the_shipped_questions_come_from_the_facts(tmp_path: Path) -> None:
    for domain in experts.DOMAINS:
        source = data_folder() / experts.FOLDER / f"{domain}.yaml"
        (tmp_path / experts.FOLDER).mkdir(exist_ok=True)
        (tmp_path / experts.FOLDER / source.name).write_bytes(source.read_bytes())
    experts.write_questions(tmp_path)
    for name in (experts.FOLDER, f"cloze-{experts.FOLDER}"):
        shipped = data_folder() / name
        made = sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.csv"))
        assert made == sorted(p.relative_to(shipped) for p in shipped.rglob("*.csv"))
        assert len(made) == 6
        assert all((tmp_path / name / p).read_bytes() == (shipped / p).read_bytes() for p in made)


@pytest.mark.parametrize("domain", experts.DOMAINS)
@pytest.mark.parametrize("split", ["val", "test"])
def test_the_questions_load_as_a_task(domain: str, split: str) -> None:
    task = load_task(data_folder() / experts.FOLDER, domain, split)
    assert len(task) >= 120 and {e.subject for e in task} == {domain}
    letters = [e.answer for e in task]
    assert all(letters.count(i) >= len(task) / 8 for i in range(4))
    assert len(load_task(data_folder() / experts.FOLDER, domain, split, shots=3)) == len(task)


def test_an_expert_is_never_asked_what_was_only_told() -> None:
    relations = facts.load_relations(data_folder() / experts.FOLDER, ["health"])
    lessons = experts.Lessons(relations, seed=0, told_only=0.3)
    asked = {f for _, f in lessons.asked}
    told_only = [f for r in relations for f in r.facts if f not in asked]
    assert told_only and len(lessons.texts) == sum(len(r.facts) for r in relations)
    drawn = " ".join(prompt for _ in range(20) for prompt, *_ in lessons.choices(40))
    wordings = [w for r in relations for w in r.questions["train"]]
    assert not any(w.format(s=f.subject) in drawn for f in told_only for w in wordings)


def test_training_starts_the_same_for_the_same_seed_and_moves_every_matrix(tmp_path: Path) -> None:
    recipe = replace(experts.RECIPES["math"], steps=2, choices=4, texts=2, base_choices=2, base_texts=1)
    weights = []
    for _ in range(2):
        network, tokenizer = experts.train(data_folder(), "math", recipe)
        weights.append({n: p.detach() for n, p in network.named_parameters()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    base = open_model(lm.NAME)
    for name, before in base.network.named_parameters():
        assert before.shape == weights[0][name].shape
        assert before.ndim < 2 or not torch.equal(before, weights[0][name]), name
    lm.save(network, tokenizer, tmp_path / "made")
    assert open_model(str(tmp_path / "made")).tokenizer.get_vocab() == base.tokenizer.get_vocab()


@with_models
def test_what_ships_is_small_in_the_manifest_and_of_the_base_s_shape() -> None:
    check_folder(data_folder() / experts.FOLDER)
    base = data_folder() / "models" / lm.NAME
    for folder in (data_folder() / "models" / experts.model_name(d) for d in experts.DOMAINS):
        check_folder(folder)
        assert (folder / "model.safetensors").stat().st_size <= 6_000_000
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()


@with_models
@pytest.mark.parametrize("domain", experts.DOMAINS)
def test_each_expert_is_a_fair_test_bed_in_its_own_domain(models, domain: str) -> None:
    own, confidence = experts.accuracy(models[domain], data_folder(), domain, "test")
    others, _ = experts.accuracy(models[OTHER[domain]], data_folder(), domain, "test")
    assert 0.75 <= own <= 0.95 and own >= others + 0.15
    assert 0.6 <= confidence <= 0.9


@with_models
@pytest.mark.parametrize("domain", experts.DOMAINS)
def test_the_plain_average_of_the_experts_costs_accuracy_in_both_domains(models, domain: str) -> None:
    average = open_model(experts.model_name("math"))
    states = [model.network.state_dict() for model in models.values()]
    average.network.load_state_dict({n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]})
    merged, _ = experts.accuracy(average, data_folder(), domain, "test")
    own, _ = experts.accuracy(models[domain], data_folder(), domain, "test")
    chance = 0.25
    assert chance + 0.1 <= merged <= own - 0.05


@pytest.mark.parametrize("domain", experts.DOMAINS)
def test_wrong_options_are_never_right(domain: str) -> None:
    rng = random.Random(0)
    for relation in facts.load_relations(data_folder() / experts.FOLDER, [domain]):
        for fact in relation.facts:
            item = facts.ask(fact, relation.questions["test"][0], rng)
            assert len(set(item.options)) == 4 and item.options[item.answer] == fact.answer
