"""How good an answer in free text is: ROUGE-1 against another text, and judges that prefer one of two.

A preference is a number in [0, 1] for answer a over answer b: 1 where a is better, 1/2 for a tie. A win rate
is its mean over prompts; the length-controlled one asks what it would be if both answers were as long.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor
from tqdm import tqdm

from fihelpers.models.generate import Response, end_tokens
from fihelpers.models.language import LanguageModel, tokenize
from fihelpers.tasks import Example
from fihelpers.tasks.instructions import from_hub

log = logging.getLogger(__name__)

KEY = "FIHELPERS_JUDGE_KEY"  # the environment variable that holds the key of a judge behind an API
FEWEST_SETTINGS = 3  # of which the difficulties of prompts can be learnt
# Inverse variances of the normal prior on the weight of length. Alone, a setting is pulled weakly towards no
# effect; among others more firmly towards their mean, since it is one judge who likes length or does not (the
# published fit holds the weight by long and short answers of the baseline itself).
ALONE, AMONG_OTHERS = 1.0, 5.0
STEPS = 20_000  # at most, of a fit
WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP states that may pass
DIFFICULTY_FILE = "instruction_difficulty.csv"  # of the hub's AlpacaEval
LOCAL = ("localhost", "127.0.0.1", "::1")

QUESTION = """\
Two assistants answered the same instruction. Say which answer a careful reader would prefer.

<instruction>
{prompt}
</instruction>

<answer_1>
{first}
</answer_1>

<answer_2>
{second}
</answer_2>

Reply with one character: 1 if the first answer is better, 2 if the second is, 0 if neither is."""
VERDICTS = {"1": 1.0, "2": 0.0, "0": 0.5}  # preference for the first


class Judge(Protocol):
    """What prefers one of two answers. `label` says in a table what kind of judge it is."""

    @property
    def label(self) -> str: ...

    def prefer(self, prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
        """Return the preference (N,) for answer a over answer b to each prompt; equal texts are a tie."""


def rouge1(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return ROUGE-1 (N,) of each answer: the F measure of the words it shares with its reference (Lin 2004).

    From `rouge_score` with its own tokenizer (runs of a-z and 0-9, in lower case) and without stemming.
    Equal texts score 1, two empty ones too; texts without such words score 0 against any other.
    Raises ValueError unless there are as many references as answers.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers and {len(references)} references; give one each.")
    score = RougeScorer(["rouge1"]).score
    return np.array(
        [1.0 if a == r else score(r, a)["rouge1"].fmeasure for a, r in zip(answers, references, strict=True)]
    )


class LikelihoodJudge:
    """A stand-in for a judge: the answer that the intact model itself finds likelier, per token.

    The preference is P(a) / (P(a) + P(b)), where P is the geometric mean of the probabilities of an answer's
    tokens (its end token too, where it ended) given the prompt. It costs no network and knows nothing of
    the world: it measures how far an answer is from what this model would have said, no more. Likelihood
    is known to favour repetition and to be fooled by an answer that is fluent and wrong.

    Ask it while `model` is intact: likelihoods are kept, so that the same answer is read once.
    """

    label = "likelihood under the intact model (stand-in)"

    def __init__(self, model: LanguageModel, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self._known: dict[tuple[str, Response], float] = {}

    def identity(self) -> list[object]:
        """What its verdicts depend on; see :mod:`fihelpers.identity`."""
        return [self.label, self.model]

    def prefer(self, prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
        """Return the preference (N,); see the class."""
        _check_pairs(prompts, a, b)
        difference = self.log_likelihood(prompts, a) - self.log_likelihood(prompts, b)
        return np.where(_same(a, b), 0.5, expit(difference))

    def log_likelihood(self, prompts: Sequence[str], answers: Sequence[Response]) -> np.ndarray:
        """Return the mean log-probability (N,) of the tokens of each answer, in nats."""
        pairs = list(zip(prompts, answers, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        new.sort(key=lambda pair: len(pair[0]) + len(pair[1].text))
        for start in range(0, len(new), self.batch_size):
            chunk = new[start : start + self.batch_size]
            self._known.update(zip(chunk, _mean_log_probs(self.model, chunk), strict=True))
        return np.array([self._known[pair] for pair in pairs])


class ApiJudge:
    """A judge behind an API in the form of OpenAI's chat completions.

    url: address of the service up to, and without, ``/chat/completions``. model: the judge's name there. The
    key comes from the environment variable FIHELPERS_JUDGE_KEY and is written nowhere. Each pair is asked in
    both orders, and the preference is the mean; a reply that is no verdict counts as a tie and is logged.
    cache: a file of finished verdicts, one JSON object a line, so that a run that stopped can go on.

    Raises ValueError without a key or for a bad address; asking raises ConnectionError where the service
    cannot be reached, or refuses, after `retries` more tries with a doubling pause.
    """

    def __init__(
        self, url: str, model: str, *, cache: Path | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        key = os.environ.get(KEY, "").strip()
        if not key:
            raise ValueError(f"the judge {model!r} needs a key; set the environment variable {KEY}.")
        parts = urlsplit(url)
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise ValueError(f"the judge's address {url!r} is not one; write https://host/path.")
        if parts.scheme == "http" and parts.hostname not in LOCAL:
            raise ValueError(f"the judge's address {url!r} would send the key in the open; use https.")
        self.url, self.model, self.cache = url.rstrip("/"), model, cache
        self.timeout, self.retries, self.pause = timeout, retries, 1.0
        self.label = f"{model} (API)"
        self._key = key
        self._known = _read_verdicts(cache)

    def identity(self) -> list[object]:
        """What its verdicts depend on; see :mod:`fihelpers.identity`."""
        return [self.url, self.model]

    def prefer(self, prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
        """Return the preference (N,); see the class."""
        _check_pairs(prompts, a, b)
        same = _same(a, b)
        found = np.full(len(prompts), 0.5)
        for i in tqdm(np.flatnonzero(~same).tolist(), desc="judging", unit="pair", leave=False):
            forth = self._verdict(prompts[i], a[i].text, b[i].text)
            back = self._verdict(prompts[i], b[i].text, a[i].text)
            found[i] = (forth + 1 - back) / 2
        return found

    def _verdict(self, prompt: str, first: str, second: str) -> float:
        """Return the preference for the first of two texts, from the cache or the service."""
        asked = QUESTION.format(prompt=prompt, first=first, second=second)
        name = hashlib.sha256(json.dumps([self.url, self.model, asked]).encode()).hexdigest()
        if name not in self._known:
            reply = self._ask(asked)
            if reply not in VERDICTS:
                log.warning("the judge %s replied %.60r, which is no verdict; it counts as a tie",
                            self.model, reply)  # fmt: skip
            self._known[name] = VERDICTS.get(reply, 0.5)
            self._keep({"pair": name, "first": self._known[name]})
        return self._known[name]

    def _ask(self, asked: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": asked}], "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _content(json.load(answer))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                error.close()
                if error.code not in WORTH_ANOTHER_TRY:
                    break
            except (OSError, ValueError) as error:  # no network, a timeout, an answer of another form
                problem = type(error).__name__
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        kept = f"; {len(self._known)} verdicts are kept" if self.cache else ""
        raise ConnectionError(
            f"the judge at {self.url} gave no verdict ({problem}); check address, key and network{kept}."
        )

    def _keep(self, record: dict[str, Any]) -> None:
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record))  # first the break: the last line may have been cut off


@dataclass(frozen=True)
class LengthControlled:
    """Win rates (M,) at equal length, the difficulties (N,) they were fitted with, and how, in words."""

    win_rates: np.ndarray
    difficulties: np.ndarray
    fit: str


def length_controlled_win_rates(
    preferences: ArrayLike, lengths_a: ArrayLike, lengths_b: ArrayLike, difficulties: ArrayLike | None = None
) -> LengthControlled:
    """Return the win rates that would be left if both answers were as long (Dubois et al. 2024).

    preferences (M, N): of M settings (models, say) for their answers to the same N prompts over another's.
    lengths_a (M, N), lengths_b (N,) or (M, N): of these answers and the other's, in characters. The fit is
    logit p = quality + weight * tanh(difference) + sensitivity * difficulty, with the difference of the
    lengths (of a minus of b) in units of its standard deviation over the setting's prompts; the win rate is
    the mean of p over the prompts at difference 0.

    As in the published procedure the difficulties of the prompts (high where a is preferred) are estimated
    first, over all settings with sensitivity 1, and then held while every setting is fitted by itself, so
    that both steps are convex. Given difficulties (N,) replace the first step. Of fewer than three settings
    nothing can be learnt of the prompts: each is fitted without difficulty, which is said and logged. A
    setting whose preferences are all one number has that win rate, and no part in the fit.

    Raises ValueError for preferences outside [0, 1], or lengths or difficulties of another number or not
    finite.
    """
    p = _preferences(preferences)
    a = _numbers(lengths_a, "lengths of the answers", p.shape)
    b = _numbers(lengths_b, "lengths of what they are compared with", p.shape, p.shape[1:])
    known = None if difficulties is None else _numbers(difficulties, "difficulties", p.shape[1:])
    found, varied = p.mean(1), p.min(1) < p.max(1)
    found[~varied] = p[~varied, 0]  # the mean but for rounding
    p, x = p[varied], _length_terms(a - b)[varied]
    fit, weight = "given difficulties", (0.0, ALONE)
    if known is None and len(p) >= FEWEST_SETTINGS:
        fit, (known, weight) = f"jointly over {len(p)} settings", _difficulties(p, x)
    elif known is None:
        fit, known = f"without difficulties: fewer than {FEWEST_SETTINGS} settings", np.zeros(p.shape[1])
        log.warning("fewer than %d settings have preferences that vary, too few to tell which prompts are "
                    "difficult; win rates at equal length are fitted without", FEWEST_SETTINGS)  # fmt: skip
    found[varied] = [_at_equal_length(row, terms, known, weight) for row, terms in zip(p, x, strict=True)]
    return LengthControlled(found, known, fit)


def published_difficulties(examples: Sequence[Example]) -> tuple[np.ndarray, str]:
    """How difficult AlpacaEval's length control finds each of its instructions (N,), and the hub's commit.

    High where models do well against the baseline. Raises ConnectionError if the hub does not answer, and
    what `read_difficulties` raises.
    """
    path, commit = from_hub(DIFFICULTY_FILE)
    return read_difficulties(path, examples), commit


def read_difficulties(path: Path, examples: Sequence[Example]) -> np.ndarray:
    """The difficulty of each of AlpacaEval's instructions (N,), from a CSV file in the published layout.

    That is a header and two columns: the instruction's row in the data set, from 0, and its difficulty.
    Raises FileNotFoundError for a missing file, and ValueError for one of another layout, one with a row
    twice, or one without a finite number for each of the examples.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; give a .csv file with the difficulties.")
    types = {"row": int, "difficulty": float}
    try:
        known = pd.read_csv(path, header=0, names=list(types), usecols=[0, 1], dtype=types).set_index("row")
    except ValueError as error:  # those of pandas are, too
        raise ValueError(f"{path.name} is no CSV of row and difficulty ({error}); correct it.") from error
    if known.index.has_duplicates:
        twice = known.index[known.index.duplicated()][0]
        raise ValueError(f"{path.name} has row {twice} twice; give each instruction one difficulty.")
    found = known.difficulty.reindex([_row_of(example) for example in examples]).to_numpy()
    for example, value in zip(examples, found, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"{path.name} has no difficulty of row {_row_of(example)}, {example.id!r}; give it one."
            )
    return found


def _row_of(example: Example) -> int:
    """The example's row in the file it was read from, from 0."""
    return int(example.id.rpartition("/")[2]) - 1


def _length_terms(difference: np.ndarray) -> np.ndarray:
    """tanh of the differences (M, N) in units of each row's standard deviation; 0 where a row has none."""
    if difference.shape[1] < 2:
        return np.zeros_like(difference)
    spread = difference.std(1, ddof=1, keepdims=True)
    return np.tanh(difference / np.where(spread > 0, spread, np.inf))


def _difficulties(p: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Difficulties (N,) of prompts by logit p = quality + weight * x + difficulty over all settings (M, N).

    Weights and difficulties have a standard normal prior. Returned too is the prior that this makes for the
    weight of a single setting: its mean and inverse variance.
    """
    m = len(p)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        quality, weight, difficulty = np.split(values, [m, 2 * m])
        z = quality[:, None] + weight[:, None] * x + difficulty
        rest = expit(z) - p
        slope = [rest.sum(1), (rest * x).sum(1) + weight, rest.sum(0) + difficulty]
        return _log_loss(z, p) + (weight @ weight + difficulty @ difficulty) / 2, np.concatenate(slope)

    _, weight, difficulty = np.split(_minimum(loss, np.zeros(2 * m + p.shape[1])), [m, 2 * m])
    return difficulty, (float(weight.mean()), AMONG_OTHERS)


def _at_equal_length(
    p: np.ndarray, x: np.ndarray, difficulty: np.ndarray, weight: tuple[float, float]
) -> float:
    """The win rate at x = 0 of one setting (N,).

    weight: the mean and inverse variance of the normal prior on the weight of x. The sensitivity to the
    difficulty has one of mean 1, what it is in `_difficulties`, and variance 1.
    """
    terms = np.stack([np.ones(len(p)), x, difficulty], 1)
    centre, firm = np.array([0, weight[0], 1]), np.array([0, weight[1], 1])

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        z, off = terms @ values, values - centre
        return _log_loss(z, p) + firm @ off**2 / 2, terms.T @ (expit(z) - p) + firm * off

    quality, _, sensitivity = _minimum(loss, centre)
    return float(expit(quality + sensitivity * difficulty).mean())


def _log_loss(z: np.ndarray, p: np.ndarray) -> float:
    """The sum of the cross entropies of shares p with the probabilities whose logits are z."""
    return float((np.logaddexp(0, z) - p * z).sum())


def _minimum(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray) -> np.ndarray:
    """Where a convex function that gives its value and slope is least, to rounding."""
    options = {"maxiter": STEPS, "maxfun": STEPS, "ftol": 0, "gtol": 1e-9}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x


@torch.inference_mode()
def _mean_log_probs(model: LanguageModel, pairs: Sequence[tuple[str, Response]]) -> list[float]:
    """The mean log-probability of the tokens of each answer after its prompt, in one forward pass."""
    prompts = tokenize(model.tokenizer, [prompt for prompt, _ in pairs])
    whole = [[*p, *answer.ids] for p, (_, answer) in zip(prompts, pairs, strict=True)]
    ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    for row, tokens in zip(ids, whole, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    # padded on the right, where a causal model's earlier tokens do not look
    logits = model.network(input_ids=ids.to(model.device), use_cache=False).logits.cpu()
    found = []
    for row, (p, tokens, (_, answer)) in zip(logits, zip(prompts, whole, pairs, strict=True), strict=True):
        chosen = _token_log_probs(row[len(p) - 1 : len(tokens)], answer.ids, end_tokens(model))
        found.append(float(chosen[: len(answer.ids) + answer.ended].mean()))
    if not np.isfinite(found).all():
        raise FloatingPointError(f"model {model.name!r} gives an answer no finite likelihood.")
    return found


def _token_log_probs(logits: Tensor, ids: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Log-probabilities (T + 1,) of T tokens, and of any token that ends an answer after them."""
    log_p = logits.float().log_softmax(-1) if logits.dtype.itemsize < 4 else logits.log_softmax(-1)
    chosen = log_p[:-1].gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]
    return torch.cat([chosen, log_p[-1, list(ends)].logsumexp(0, keepdim=True)])


def _same(a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
    return np.array([x.text == y.text for x, y in zip(a, b, strict=True)])


def _check_pairs(prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> None:
    if not prompts or not len(prompts) == len(a) == len(b):
        raise ValueError(
            f"{len(prompts)} prompts, {len(a)} and {len(b)} answers; give two answers to each prompt."
        )


def _preferences(preferences: ArrayLike) -> np.ndarray:
    values = _numbers(preferences, "preferences")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"preferences must be a non-empty table (settings, prompts), got shape {values.shape}."
        )
    if not ((values >= 0) & (values <= 1)).all():
        worst = values[~((values >= 0) & (values <= 1))][0]
        raise ValueError(f"a preference lies between 0 and 1, not {worst}; leave out a prompt without one.")
    return values


def _numbers(values: ArrayLike, what: str, *shapes: tuple[int, ...]) -> np.ndarray:
    """The values as finite numbers of one of the shapes; of any shape, and finite or not, without shapes."""
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:  # a text, or rows of several lengths
        raise ValueError(f"{what} must be numbers in rows of one length ({error}).") from error
    if shapes and numbers.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{what} have the shape {numbers.shape}; give one each, in the shape {wanted}.")
    if shapes and not np.isfinite(numbers).all():
        raise ValueError(f"{what} must be finite, not {numbers[~np.isfinite(numbers)][0]}.")
    return numbers


def _content(answer: Any) -> str:
    """The text of a completion's first choice; ValueError for an answer of another form."""
    try:
        return str(answer["choices"][0]["message"]["content"]).strip()
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no completion") from error


def _read_verdicts(cache: Path | None) -> dict[str, float]:
    """Finished verdicts; a line that a crash cut off is passed over."""
    found: dict[str, float] = {}
    if cache is None or not cache.is_file():
        return found
    for line in filter(str.strip, cache.read_text(encoding="ascii", errors="replace").splitlines()):
        try:
            record = json.loads(line)
            found[record["pair"]] = float(record["first"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s holds a damaged line, which is asked again", cache.name)
    return found
