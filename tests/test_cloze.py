"""Statements to finish: every question has its own answer classes, the first tokens of its options."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_examples, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fihelpers.answers import Options, options
from fihelpers.data import data_folder
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped
from fihelpers.influence import fi
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.embeddings import attack, top_dimensions
from fihelpers.perturb.quantize import Scheme, pack_model, quantized
from fihelpers.perturb.sparsify import select, zeroed
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.scores.inputs import embedding_batches, score_embeddings
from fihelpers.scores.sequences import score_sequences
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task
from fihelpers.tasks.words import first_tokens
from fiminis import experts, facts

SPLITS = ("dev", "val", "test")
NAME = "model.layers.0.mlp.down_proj.weight"


def asked(n: int) -> list[Example]:
    """Word salads to finish, each with four words of its own as options."""
    examples = tiny_examples(n)
    words = [tuple(f"w{(7 * k + 5 * i) % 27}" for i in range(4)) for k in range(n)]
    return [replace(e, options=words[k], in_words=True) for k, e in enumerate(examples)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2")


def of_row(classes: Options, row: int) -> Options:
    return classes.rows(torch.tensor([row]))


# --- the classes


def test_probabilities_are_those_of_the_tokens_renormalised() -> None:
    logits = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes = Options(torch.tensor([[1, 2, 3], [4, 0, 10], [7, 8, 2]]))
    log_p = classes.log_probs(logits)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(3, dtype=torch.float64))
    for row, tokens in enumerate(classes.tokens.tolist()):
        raw = logits[row].softmax(0)[tokens]
        assert torch.allclose(log_p[row].exp(), raw / raw.sum())
        assert torch.equal(of_row(classes, row).log_probs(logits[row : row + 1])[0], log_p[row])


def test_classes_of_other_prompts_or_another_model_are_refused() -> None:
    classes = Options(torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="do not match the rows"):
        classes.log_probs(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="token 4 is beyond the 4 logits"):
        classes.log_probs(torch.zeros(2, 4))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        classes.log_probs(torch.full((2, 9), torch.nan))


def test_a_token_is_the_first_that_continues_the_prompt(model: LanguageModel) -> None:
    example = asked(1)[0]
    prompt = model.tokenizer(example.prompt)["input_ids"]
    for token, option in zip(first_tokens(model.tokenizer, example), example.options, strict=True):
        assert model.tokenizer(f"{example.prompt} {option} w1")["input_ids"][len(prompt)] == token


def character_tokenizer() -> PreTrainedTokenizerFast:
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One for which the space before a word belongs to it, but before a digit is a token of its own."""
    pieces = [*"?0123456789 ", "The", " sum", " is", " year", " was", " in", " May"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d| "), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_space_that_all_options_share_belongs_to_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    told_apart, alike, mixed = "The sum is,12,24,36,48,B", "The year was,1912,1924,1936,1948,B", "The sum is"
    rows = [told_apart, alike, f"{mixed},12,in May,36,48,B"]
    (tmp_path / "val" / "sums_val.csv").write_text("\n".join(rows) + "\n")
    tokenizer = digit_tokenizer()
    task = load_task(f"cloze:{tmp_path}", None, "val", tokenizer=tokenizer)
    (example,) = task.examples
    assert len(task.skipped) == 2 and example.prompt.endswith("The sum is\nAnswer: ")
    found = tokenizer.convert_ids_to_tokens(first_tokens(tokenizer, example))
    assert found == ["1", "2", "3", "4"] and example.answer == 1
    plain = load_task(f"cloze:{tmp_path}", None, "val").examples[0]
    assert example.prompt == f"{plain.prompt} " and example.options == plain.options


def test_options_that_tokens_do_not_tell_apart_are_refused(model: LanguageModel) -> None:
    example = asked(1)[0]
    same = replace(example, options=("w1", "w2", "w1 w3", "w4"))
    with pytest.raises(ValueError, match=r"'w1 w3' begins with the same token .*tokenizer=model\.tokenizer"):
        options(model.tokenizer, [same])
    with pytest.raises(ValueError, match="has 0 options, whose first tokens cannot be"):
        options(model.tokenizer, [replace(example, options=())])
    with pytest.raises(ValueError, match="has 3 options, the first one 4"):
        options(model.tokenizer, [example, replace(example, options=("w1", "w2", "w3"))])
    spelled = replace(example, prompt="the end of it is", options=("red", "green", "blue", "white"))
    with pytest.raises(ValueError, match="splits the first letters of the options off"):
        options(character_tokenizer(), [spelled])


# --- the task


@pytest.mark.parametrize(
    "name, subject", [("cloze", s) for s in facts.SUBJECTS] + [("cloze-experts", "health")]
)
def test_no_fact_stands_in_two_splits(name: str, subject: str) -> None:
    splits = [load_task(name, subject, split) for split in SPLITS]
    told = [{(e.question, e.options[e.answer or 0]) for e in task} for task in splits]
    assert sum(map(len, told)) == len(set.union(*told)) == sum(map(len, splits))
    for example in (e for task in splits for e in task):
        assert example.prompt == example.question and example.in_words
        assert len({option[0].lower() for option in example.options}) == len(example.options) == 4


def test_the_statements_are_what_the_facts_make(tmp_path: Path) -> None:
    data = data_folder()
    facts.write_cloze(facts.load_relations(data / "facts"), tmp_path / "cloze")
    relations = facts.load_relations(data / experts.FOLDER, experts.DOMAINS)
    facts.write_cloze(relations, tmp_path / "cloze-experts", experts.DOMAINS)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.csv"))
    assert len(made) == 18
    for path in made:
        assert (tmp_path / path).read_bytes() == (data / path).read_bytes()


def test_solved_statements_stand_before_one(model: LanguageModel) -> None:
    (example,) = load_task("cloze", "geography", "test", 1, shots=2)
    solved = load_task("cloze", "geography", "dev").examples[:2]
    *before, last = example.prompt.split("\n\n")
    assert last == example.question
    assert before == [f"{e.question} {e.options[e.answer or 0]}" for e in solved]


def test_any_questions_can_be_asked_without_their_options() -> None:
    plain, opened = (load_task(name, "law", "test", 5, 3) for name in ("bundled", "cloze:bundled"))
    folder = load_task(f"cloze:{data_folder() / 'mcq'}", "law", "test", 5, 3)
    assert opened.name == "cloze:bundled" and folder.name == "cloze:mcq"
    for a, b, c in zip(plain, opened, folder, strict=True):
        assert (a.id, a.options, a.answer) == (b.id, b.options, b.answer) and b.prompt == c.prompt
        head = "The following are questions (with answers) about law.\n\nQuestion: "
        assert b.prompt == f"{head}{a.question}\nAnswer:" and b.in_words and not a.in_words


def test_what_a_tokenizer_cannot_tell_apart_is_left_out_before_the_draw(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    good = [f"Statement {i} ends in,red,green,blue,white,A" for i in range(6)]
    bad = ["This one ends in,red wine,red,blue,white,B", "And this one in,green,white,blue,blue sky,C"]
    (tmp_path / "val" / "wine_val.csv").write_text("\n".join([*good[:3], *bad, *good[3:]]) + "\n")
    tokenizer = open_model("mini-lm").tokenizer
    words = sorted({"red", "green", "blue", "white"})
    assert len({tokenizer(f"in {w}")["input_ids"][1] for w in words}) == 4  # else this test says nothing
    name = f"cloze:{tmp_path}"
    assert len(load_task(name, None, "val")) == 8
    task = load_task(name, None, "val", tokenizer=tokenizer)
    assert len(task) == 6 and len(task.skipped) == 2
    assert all("begins with the same token" in reason for reason in task.skipped)
    assert len(load_task(name, None, "val", 6, tokenizer=tokenizer)) == 6
    with pytest.raises(ValueError, match="has 6 examples, fewer than the 7 asked for"):
        load_task(name, None, "val", 7, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="begins with the same token as another one; load the task with"):
        Evaluator(open_model("mini-lm"), load_task(name, None, "val").examples)


# --- wherever letters do


def test_scores_are_the_mean_over_each_questions_own_classes(model: LanguageModel) -> None:
    examples = asked(5)
    found = score_weights(model, examples, ["FI damped 0.01", "SNIP"], only=[NAME], batch_size=2)
    wanted = torch.zeros_like(model.network.get_parameter(NAME))
    for row, example in enumerate(examples):
        own = of_row(options(model.tokenizer, examples), row)
        (batch,) = model.batches([example.prompt])
        log_p = own.log_probs(model.last_logits(batch))[0]
        grads = class_gradients(log_p, model.network.get_parameter(NAME))
        wanted += fi(grads, log_p.detach().exp(), spectral=Damped(0.01)) / len(examples)
    values = found["FI damped 0.01"].values[NAME]
    assert torch.allclose(values, wanted.to(values.dtype), rtol=1e-6, atol=1e-9 * float(wanted.max()))
    assert found["SNIP"].metadata["classes"] == "first tokens of the options"


def test_one_question_can_be_scored(model: LanguageModel) -> None:
    examples = asked(3)
    together = score_weights(model, examples, ["FI"], only=[NAME])["FI exact"].values[NAME]
    alone = [score_weights(model, [e], ["FI"], only=[NAME])["FI exact"].values[NAME] for e in examples]
    assert torch.allclose(together, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-9)


def test_answers_are_judged_by_the_options(model: LanguageModel) -> None:
    examples = asked(6)
    outcome = Evaluator(model, examples, batch_size=4)()
    for row, example in enumerate(examples):
        (batch,) = model.batches([example.prompt])
        with torch.no_grad():
            raw = model.last_logits(batch)[0].softmax(0)[first_tokens(model.tokenizer, example)]
        assert torch.allclose(outcome.log_probs[row].exp(), raw / raw.sum())
        assert bool(outcome.correct[row]) == (int(raw.argmax()) == example.answer)


def _with_all(examples: Sequence[Example]) -> list[Example]:
    return [replace(e, options=tuple(reversed(e.options)), answer=3 - (e.answer or 0)) for e in examples]


def test_the_order_of_the_options_changes_nothing(model: LanguageModel) -> None:
    examples = asked(4)
    first, second = (Evaluator(model, one)() for one in (examples, _with_all(examples)))
    assert torch.allclose(first.log_prob, second.log_prob)
    a, b = (score_embeddings(model, one, ["FI", "Jacobian norm"]) for one in (examples, _with_all(examples)))
    for name in a:
        assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(a[name], b[name], strict=True))


def test_an_attack_takes_probability_from_the_models_answer(model: LanguageModel) -> None:
    examples = asked(4)
    for batch in embedding_batches(model, examples):
        scores = batch.scores(["Jacobian norm"], "dimension")["Jacobian norm"]
        places = [top_dimensions(one, 0.5) for one in scores]
        before = batch.log_probs(batch.embeddings).max(1)
        after = batch.log_probs(attack(batch, places, 0.05))
        assert (after.gather(1, before.indices[:, None])[:, 0] < before.values).all()


def test_perturbed_weights_are_judged_by_the_same_options(model: LanguageModel) -> None:
    ask = Evaluator(model, asked(4))
    intact = ask()
    scores = score_weights(model, asked(4), ["magnitude"], only=[NAME])["magnitude"]
    with zeroed(model, select(scores, 0.5)):
        assert not torch.equal(ask().log_probs, intact.log_probs)
    with quantized(model.network, pack_model(model, [NAME], Scheme(2))):
        assert not torch.equal(ask().log_probs, intact.log_probs)
    assert torch.equal(ask().log_probs, intact.log_probs)


def test_options_are_the_classes_of_a_first_step_alone(model: LanguageModel) -> None:
    examples = asked(3)
    classes = options(model.tokenizer, examples)
    steps = score_sequences(model, examples, ["FI"], horizon=1, samples=1, answers=classes, only=[NAME])
    single = score_weights(model, examples, ["FI"], only=[NAME])
    assert torch.allclose(steps["FI exact"].values[NAME], single["FI exact"].values[NAME], rtol=1e-6)
    with pytest.raises(ValueError, match="the classes of a first step, not of 2; set the horizon to 1"):
        score_sequences(model, examples, ["FI"], horizon=2, samples=1, answers=classes)
