"""Answer classes: from the logits of the next token to the log-probabilities of K classes (method 1).

A class is a set of token ids. Its log-probability is the logsumexp over its tokens, renormalised over
the K classes, so that the probabilities of the classes sum to one. The classes are the same for all prompts
(:class:`Groups`, such as letters), or each prompt has its own (:class:`Options`, :class:`Top`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fihelpers.tasks.base import Example
from fihelpers.tasks.words import first_tokens, label_of

SPACES = ("Ġ", "▁", " ")  # how byte-level BPE, SentencePiece and plain vocabularies write a leading space


class Answers(ABC):
    """Answer classes of any kind; by default they depend neither on the logits nor on the row."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of classes K."""

    @abstractmethod
    def log_probs(self, logits: Tensor) -> Tensor:
        """Map logits (..., V) to log-probabilities (..., K), float32 or better.

        Raises FloatingPointError where the logits hold NaN or infinity.
        """

    def choice(self, logits: Tensor) -> Tensor:
        """Return the class (...) that the logits (..., V) choose: the likeliest, or the likeliest token's."""
        return self.log_probs(logits).argmax(-1)

    def fix(self, logits: Tensor) -> Answers:
        """Return classes that no longer depend on the logits: those of these rows (..., V)."""
        return self

    def rows(self, index: Tensor) -> Answers:
        """Return the classes of some rows (of the first axis) only."""
        return self

    def right(self, examples: Sequence[Example]) -> Tensor:
        """Return the class (N,) of each example's answer, -1 where it has none or is no class of these.

        Raises ValueError, naming the example, where its options are not as many as the classes.
        """
        return torch.full((len(examples),), -1)


class _OneAnOption(Answers):
    """Classes that are the options of a question, in their order."""

    def right(self, examples: Sequence[Example]) -> Tensor:
        for example in examples:
            if example.answer is not None and not self.fits(example):
                raise ValueError(
                    f"example {example.id!r} has {len(example.options)} options, but there are {self.size} "
                    "answer classes; use one class an option."
                )
        return torch.tensor([-1 if example.answer is None else example.answer for example in examples])

    def fits(self, example: Example) -> bool:
        """Whether an example has an option for each class."""
        return len(example.options) == self.size


@dataclass(frozen=True)
class Groups(_OneAnOption):
    """Fixed classes: ``names[k]`` is the class of the token ids ``tokens[k]``."""

    names: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.tokens) or len(self.names) < 2:
            raise ValueError(
                f"answer classes need two or more names with their tokens; got {len(self.names)} names "
                f"and {len(self.tokens)} token sets."
            )
        owner: dict[int, str] = {}
        for name, ids in zip(self.names, self.tokens, strict=True):
            if not ids:
                raise ValueError(f"answer class {name!r} has no token; give it at least one.")
            for token in ids:
                if token in owner:
                    raise ValueError(
                        f"answer classes {owner[token]!r} and {name!r} share token {token}; "
                        "give each its own."
                    )
            owner |= dict.fromkeys(ids, name)

    def __str__(self) -> str:
        return " ".join(self.names)

    @property
    def size(self) -> int:
        return len(self.names)

    def log_probs(self, logits: Tensor) -> Tensor:
        logits = _finite(logits)
        largest = max(max(ids) for ids in self.tokens)
        if largest >= logits.shape[-1]:
            raise _beyond(largest, logits)
        scores = [logits[..., list(ids)].logsumexp(-1) for ids in self.tokens]
        return torch.stack(scores, -1).log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Options(_OneAnOption):
    """The options of each question in their own words: the first token of each, as it continues the prompt.

    ``tokens`` (N, K) are token ids for N prompts, those of a row all different; :func:`options` finds them.
    """

    tokens: Tensor

    def __str__(self) -> str:
        return "first tokens of the options"

    @property
    def size(self) -> int:
        return self.tokens.shape[-1]

    def rows(self, index: Tensor) -> Options:
        return Options(self.tokens[index.to(self.tokens.device)])

    def log_probs(self, logits: Tensor) -> Tensor:
        """Map logits (N, V), one row for each prompt, to log-probabilities (N, K)."""
        logits = _finite(logits)
        _check_rows(logits, self.tokens)
        largest = int(self.tokens.max())
        if largest >= logits.shape[-1]:
            raise _beyond(largest, logits)
        return logits.gather(-1, self.tokens.to(logits.device)).log_softmax(-1)


@dataclass(frozen=True)
class Top(Answers):
    """The ``m`` likeliest tokens of each row, one class each, and one class for all the rest."""

    m: int

    def __post_init__(self) -> None:
        if self.m < 1:
            raise ValueError(f"Top(m) needs at least one token, got m = {self.m}.")

    def __str__(self) -> str:
        return f"top {self.m} + rest"

    @property
    def size(self) -> int:
        return self.m + 1

    def fix(self, logits: Tensor) -> FixedTop:
        """Keep the likeliest tokens of these logits (..., V) as the classes of their rows."""
        logits = _finite(logits)
        if self.m >= logits.shape[-1]:
            raise ValueError(f"Top({self.m}) leaves no rest among {logits.shape[-1]} tokens; use fewer.")
        return FixedTop(logits.detach().topk(self.m, dim=-1).indices)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Map logits (..., V) to log-probabilities (..., m + 1), the likeliest token first, the rest last."""
        return self.fix(logits).log_probs(logits)

    def choice(self, logits: Tensor) -> Tensor:
        """Return 0: the likeliest token is the first class."""
        return self.fix(logits).choice(logits)


@dataclass(frozen=True, eq=False)
class FixedTop(Answers):
    """The classes that :class:`Top` chose once, so that a perturbed model is judged on the same ones.

    ``ids`` (..., m) are the chosen tokens of each row; the last class is the rest.
    """

    ids: Tensor

    def __str__(self) -> str:
        return f"top {self.ids.shape[-1]} + rest"

    @property
    def size(self) -> int:
        return self.ids.shape[-1] + 1

    def choice(self, logits: Tensor) -> Tensor:
        """Return the class (...) of the likeliest token: the rest only where that token is one of the rest.

        The rest as a whole is often likelier than each single token, but nobody can choose it.
        """
        chosen = self.ids.to(logits.device) == logits.argmax(-1, keepdim=True)
        classes = torch.cat([chosen, torch.ones_like(chosen[..., :1])], -1)  # the rest, if no other
        return classes.long().argmax(-1)

    def rows(self, index: Tensor) -> FixedTop:
        return FixedTop(self.ids[index])

    def log_probs(self, logits: Tensor) -> Tensor:
        """Map logits (..., V), one row for each row of ``ids``, to log-probabilities (..., m + 1)."""
        logits = _finite(logits)
        _check_rows(logits, self.ids)
        # The rest is a sum over the other tokens, never 1 - sum: a small difference is only rounding.
        ids = self.ids.to(logits.device)
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, ids), rest], -1).log_softmax(-1)


def letters(tokenizer: PreTrainedTokenizerBase, which: str = "ABCD") -> Groups:
    """Make one class a letter, with every spelling that is a single token ("A" and " A").

    Raises ValueError if the tokenizer has no single token for a letter.
    """
    classes = []
    for letter in which:
        ids = _tokens(tokenizer, letter) | _tokens(tokenizer, " " + letter)
        if not ids:
            raise ValueError(
                f"the tokenizer of {label_of(tokenizer)} has no single token for the letter {letter!r}; "
                "use other answer classes."
            )
        classes.append(tuple(sorted(ids)))
    return Groups(tuple(which), tuple(classes))


def groups(tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, Sequence[str]]) -> Groups:
    """Make classes from texts that are one token each: ``{"yes": [" yes", " sure"], "no": [" no"]}``.

    Raises ValueError if a text is not one token or two classes share a token.
    """
    tokens = []
    for name, texts in classes.items():
        if isinstance(texts, str):
            raise ValueError(f"answer class {name!r} needs a list of texts, got the single text {texts!r}.")
        ids: set[int] = set()
        for text in texts:
            found = _tokens(tokenizer, text)
            if not found:
                raise ValueError(
                    f"the text {text!r} of answer class {name!r} is not one token of {label_of(tokenizer)}; "
                    "choose a text that is."
                )
            ids |= found
        tokens.append(tuple(sorted(ids)))
    return Groups(tuple(classes), tuple(tokens))


def options(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Options:
    """Make one class an option, named by its first token as it continues the prompt (method 1 and 5).

    Raises ValueError, naming the example, for one without options, options of other numbers than the first
    example's, and options that the tokenizer does not tell apart (:func:`first_tokens`).
    """
    found = [first_tokens(tokenizer, example) for example in examples]
    for example, tokens in zip(examples, found, strict=True):
        if len(tokens) != len(found[0]):
            raise ValueError(
                f"example {example.id!r} has {len(tokens)} options, the first one {len(found[0])}; "
                "ask questions with the same number of options together."
            )
    return Options(torch.tensor(found))


def usual_answers(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Answers:
    """The classes that a task asks for, by its first example.

    They are the options in their own words for statements to finish, the letters A to D for lettered
    questions, and for plain text the 8 likeliest tokens and the rest. Raises what `options` and `letters`
    raise.
    """
    if examples[0].in_words:
        return options(tokenizer, examples)
    return letters(tokenizer) if examples[0].options else Top(8)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> set[int]:
    """Return the single tokens that spell the text.

    SentencePiece puts a space of its own before the text, so the pieces are also looked up by name.
    """
    encoded = tokenizer.encode(text, add_special_tokens=False)
    candidates = set(encoded) if len(encoded) == 1 else set()
    pieces = [tokenizer.convert_tokens_to_ids(text.replace(" ", space)) for space in SPACES]
    candidates |= {token for token in pieces if isinstance(token, int)}
    # A text that the vocabulary lacks comes back as the unknown token, which does not spell it.
    return {token for token in candidates if str(tokenizer.decode([token])).strip() == text.strip()}


def _beyond(token: int, logits: Tensor) -> ValueError:
    return ValueError(
        f"token {token} is beyond the {logits.shape[-1]} logits; "
        "make the classes with this model's tokenizer."
    )


def _check_rows(logits: Tensor, of_rows: Tensor) -> None:
    if logits.shape[:-1] != of_rows.shape[:-1]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not match the rows {tuple(of_rows.shape[:-1])} "
            "that the classes were made for."
        )


def _finite(logits: Tensor) -> Tensor:
    """Raise logits to float32 or better and refuse NaN and infinity."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the logits hold NaN or infinity, so they have no class probabilities.")
    return logits
