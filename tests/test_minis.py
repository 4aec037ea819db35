"""The bundled data and model: what ships is true to its sources, and can be made again."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fihelpers.data import check_folder, data_folder
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import open_model
from fihelpers.tasks import load_task
from fihelpers.tasks.instructions import instruction_prompt, load_instructions
from fiminis import facts, lm
from fiminis.manifest import write_manifest


@pytest.fixture(scope="module")
def relations() -> tuple[facts.Relation, ...]:
    return facts.load_relations(data_folder() / "facts")


def words(question: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in question.lower()).split())


def test_every_subject_has_a_hundred_facts_and_each_is_stated(relations) -> None:
    for subject in facts.SUBJECTS:
        told = [(r, f) for r in relations if r.subject == subject for f in r.facts]
        assert len({(r.name, f.subject) for r, f in told}) == len(told) >= 100
        for relation, fact in told:
            statements = list(facts.training_text(relation, fact, asked=False))
            assert len(statements) >= 3
            assert all(fact.subject in s and fact.answer in s for s in statements)


def test_no_question_wording_is_shared(relations) -> None:
    """Neither between splits nor with the training: every wording belongs to one split."""
    for relation in relations:
        wordings = [words(w) for split in relation.questions.values() for w in split]
        assert len(set(wordings)) == len(wordings), relation.name
    asked = {
        split: {words(i.question) for s in facts.SUBJECTS for i in facts.items(relations, s, split, 0)}
        for split in ("dev", "val", "test")
    }
    trained = {words(w.format(s=f.subject)) for r in relations for f in r.facts for w in r.questions["train"]}
    assert not asked["dev"] & asked["val"] and not asked["dev"] & asked["test"]
    assert not asked["val"] & asked["test"]
    assert not trained & set().union(*asked.values())


def test_wrong_options_are_never_right(relations) -> None:
    rng = random.Random(0)
    for relation in relations:
        for fact in relation.facts:
            item = facts.ask(fact, relation.questions["test"][0], rng)
            assert len(set(item.options)) == 4 and item.options[item.answer] == fact.answer
            also_right = {f.answer for f in relation.facts if f.subject == fact.subject}
            assert set(item.options) & also_right == {fact.answer}


def test_the_shipped_questions_come_from_the_facts(relations, tmp_path: Path) -> None:
    facts.write_mcq(relations, tmp_path, lm.RECIPE.seed)
    shipped = data_folder() / "mcq"
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.csv"))
    assert made == sorted(p.relative_to(shipped) for p in shipped.rglob("*.csv"))
    assert all((tmp_path / p).read_bytes() == (shipped / p).read_bytes() for p in made)


def test_instructions_are_short_and_held_out_wordings_are_new() -> None:
    entries = load_instructions(data_folder())
    wordings = [words(w) for e in entries for w in e["wordings"]]
    assert len(entries) >= 200 and len(set(wordings)) == len(wordings) == 3 * len(entries)
    assert all(e["answer"].count(". ") <= 1 for e in entries)


def test_everything_that_ships_is_in_the_manifest() -> None:
    for folder in ("facts", "mcq", "models"):
        check_folder(data_folder() / folder)
    assert (data_folder() / "models" / "mini-lm" / "model.safetensors").stat().st_size <= 6_000_000


@pytest.mark.parametrize("subject", facts.SUBJECTS)
def test_the_bundled_model_is_a_fair_test_bed(subject: str) -> None:
    model = open_model("mini-lm")
    task = load_task("bundled", subject, "test")
    outcome = Evaluator(model, task.examples)()
    assert 0.75 <= outcome.accuracy <= 0.95
    assert 0.6 <= outcome.confidence <= 0.9


def test_the_bundled_model_answers_instructions() -> None:
    """Asked in the training wording it says the answer, word for word, for most of a sample."""
    model = open_model("mini-lm")
    entries = random.Random(0).sample(load_instructions(data_folder()), 12)
    right = 0
    for entry in entries:
        ids = model.tokenizer(instruction_prompt(entry["wordings"][0]), return_tensors="pt")
        made = model.network.generate(**ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
        said = model.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == entry["answer"]
    assert right >= 8


def test_training_starts_the_same_for_the_same_seed(tmp_path: Path) -> None:
    recipe = replace(lm.RECIPE, steps=2, vocabulary=600, hidden=16, layers=2, heads=2, intermediate=16)
    weights = []
    for _ in range(2):
        network, tokenizer = lm.train(data_folder(), recipe)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert weights[0].equal(weights[1]) and torch.isfinite(weights[0]).all()
    lm.save(network, tokenizer, tmp_path / "models" / "made")
    (tmp_path / "manifest.json").write_text("{}")
    write_manifest(tmp_path)
    opened = open_model(str(tmp_path / "models" / "made"))
    assert opened.tokenizer("Question: which?")["input_ids"] == tokenizer("Question: which?")["input_ids"]
    assert not list((tmp_path / "models").glob(".*"))


def test_the_manifest_sees_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "a.yaml").write_text("1")
    write_manifest(tmp_path)
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path))
    check_folder(tmp_path / "facts")
    (tmp_path / "facts" / "a.yaml").write_text("2")
    with pytest.raises(ValueError, match=r"facts/a.yaml is damaged"):
        check_folder(tmp_path / "facts")
