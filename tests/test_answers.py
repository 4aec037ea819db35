"""Answer classes: log-probabilities that sum to one, over the right tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fihelpers.answers import FixedTop, Groups, Top, groups, letters, usual_answers
from fihelpers.tasks import Example

FIVE = Groups(("a", "b", "c"), ((0, 4), (2,), (1, 7, 9)))


def byte_level(*pieces: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (a leading space is written Ġ) with bytes and a few longer pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *pieces])}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="somewhere/bytes")


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", *vocabulary])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", name_or_path="here/words")


def random_logits(*shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("answers", [FIVE, Top(4)], ids=str)
def test_probabilities_are_those_of_the_classes_renormalised(answers: Groups | Top) -> None:
    logits = random_logits(2, 3, 12)
    probs = logits.softmax(-1)
    if isinstance(answers, Groups):
        expected = torch.stack([probs[..., list(ids)].sum(-1) for ids in answers.tokens], -1)
    else:
        top = probs.topk(answers.m, dim=-1).values
        expected = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    expected = expected / expected.sum(-1, keepdim=True)
    found = answers.log_probs(logits)
    assert found.shape == (2, 3, answers.size)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("answers", [FIVE, Top(4)], ids=str)
@given(shift=st.floats(-1e3, 1e3), scale=st.floats(0.01, 30))
@settings(max_examples=30, deadline=None)
def test_probabilities_sum_to_one_and_ignore_a_shift_of_the_logits(
    answers, shift: float, scale: float
) -> None:
    logits = random_logits(5, 12, scale=scale)
    found = answers.log_probs(logits + shift)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, answers.log_probs(logits), rtol=1e-9, atol=1e-9)


def test_the_rest_keeps_its_digits_where_a_difference_would_lose_them() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 3] = 40.0
    rest = Top(1).log_probs(logits)[0, 1]
    exact = torch.log(torch.tensor(99.0)) - 40  # P(rest) is about 4e-16, below float32's 1 - P
    torch.testing.assert_close(rest, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("answers", [FIVE, Top(4)], ids=str)
def test_half_precision_is_raised_to_float32(answers: Groups | Top, dtype: torch.dtype) -> None:
    found = answers.log_probs(random_logits(2, 12).to(dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("answers", [FIVE, Top(4)], ids=str)
def test_gradients_are_those_of_finite_differences(answers: Groups | Top) -> None:
    logits = random_logits(3, 12).requires_grad_()
    fixed = answers.fix(logits)
    assert torch.autograd.gradcheck(fixed.log_probs, (logits,))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("answers", [FIVE, Top(4), FixedTop(torch.tensor([[0, 1]]))], ids=str)
def test_logits_that_are_not_finite_are_refused(answers, bad: float) -> None:
    logits = torch.zeros(1, 12)
    logits[0, 11] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        answers.log_probs(logits)


def test_a_fixed_top_judges_another_model_on_the_first_ones_classes() -> None:
    first, second = random_logits(4, 12), random_logits(4, 12).flip(-1)
    fixed = Top(3).fix(first)
    torch.testing.assert_close(fixed.log_probs(first), Top(3).log_probs(first))
    ids = first.topk(3).indices
    expected = second.softmax(-1).gather(-1, ids)
    torch.testing.assert_close(fixed.log_probs(second).exp()[:, :3], expected)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(fixed.rows(rows).log_probs(second[rows]), fixed.log_probs(second)[rows])


def test_classes_that_do_not_depend_on_the_logits_stay_as_they_are() -> None:
    logits = random_logits(4, 12)
    assert FIVE.fix(logits) is FIVE and FIVE.rows(torch.tensor([1])) is FIVE
    assert Top(3).rows(torch.tensor([1])) == Top(3)
    fixed = Top(3).fix(logits)
    assert fixed.fix(-logits) is fixed


def test_the_choice_is_the_likeliest_class_or_the_class_of_the_likeliest_token() -> None:
    logits = random_logits(40, 12, scale=0.3)  # so flat that the rest is likelier than any token
    assert FIVE.choice(logits).tolist() == FIVE.log_probs(logits).argmax(-1).tolist()
    assert Top(3).log_probs(logits).argmax(-1).tolist() == [3] * 40
    assert Top(3).choice(logits).tolist() == [0] * 40
    fixed, other = Top(3).fix(logits), random_logits(40, 12).flip(0)
    found = fixed.choice(other)
    for ids, token, chosen in zip(fixed.ids.tolist(), other.argmax(-1).tolist(), found.tolist(), strict=True):
        assert chosen == (ids.index(token) if token in ids else 3)
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_a_fixed_top_refuses_other_rows_than_its_own() -> None:
    fixed = Top(3).fix(random_logits(4, 12))
    with pytest.raises(ValueError, match=r"\(5, 12\) do not match the rows \(4,\)"):
        fixed.log_probs(random_logits(5, 12))


@pytest.mark.parametrize(("m", "message"), [(0, "at least one"), (12, "leaves no rest")])
def test_a_top_without_classes_or_without_a_rest_is_refused(m: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Top(m).log_probs(random_logits(2, 12))


def test_a_letter_has_every_spelling_that_is_one_token() -> None:
    tokenizer = byte_level("ĠA", "ĠB", "ĠC")
    found = letters(tokenizer)
    spelled = [sorted(map(tokenizer.decode, ids)) for ids in found.tokens]
    assert found.names == tuple("ABCD")
    assert spelled == [[" A", "A"], [" B", "B"], [" C", "C"], ["D"]]


def test_a_letter_that_the_tokenizer_lacks_is_named_with_the_model() -> None:
    with pytest.raises(ValueError, match="tokenizer of model 'words' has no single token for the letter 'C'"):
        letters(words("A", "B", "D"))


def test_groups_take_texts_of_one_token() -> None:
    tokenizer = byte_level("ĠA", "ye", "yes", "no")
    found = groups(tokenizer, {"agree": ["yes", " A"], "deny": ["no"]})
    assert str(found) == "agree deny" and found.size == 2
    assert [sorted(map(tokenizer.decode, ids)) for ids in found.tokens] == [[" A", "yes"], ["no"]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"agree": ["yes", "certainly"], "deny": ["no"]},
            "'certainly' of answer class 'agree' is not one token",
        ),
        ({"agree": ["yes"], "deny": ["no", "yes"]}, "'agree' and 'deny' share token"),
        ({"agree": ["yes"], "deny": []}, "'deny' has no token"),
        ({"agree": ["yes"]}, "two or more names"),
        ({"agree": "yes", "deny": ["no"]}, "needs a list of texts"),
        ({"agree": ["<unknown>"], "deny": ["no"]}, "is not one token of model 'words'"),
    ],
)
def test_groups_that_are_no_classes_are_refused(classes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups(words("yes", "no"), classes)


def test_classes_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="token 9 is beyond the 8 logits"):
        FIVE.log_probs(random_logits(2, 8))


def test_the_usual_answers_are_letters_or_the_likeliest_tokens() -> None:
    tokenizer = byte_level("ĠA")
    lettered = Example("q/1", "q", "Which?", ("a", "b", "c", "d"), 0, "Which?")
    assert usual_answers(tokenizer, [lettered]) == letters(tokenizer)
    assert usual_answers(tokenizer, [replace(lettered, options=())]) == Top(8)


@pytest.mark.parametrize(
    ("folder", "expected"),
    # stories260K is SentencePiece-like and encodes "A" as two tokens, but has the piece "A".
    [("tokenizers/qwen2", {" A", "A"}), ("stories260K", {"A"})],
)
def test_letters_of_real_tokenizers(real_data: Path, folder: str, expected: set[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / folder)
    assert {tokenizer.decode([token]) for token in letters(tokenizer).tokens[0]} == expected
