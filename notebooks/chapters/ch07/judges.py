"""How good an answer in free text is: ROUGE-1 against another text, and judges that prefer one of two.

A preference is a number in [0, 1] for answer a over answer b: 1 where a is better, 1/2 for a tie. A win rate
is its mean over prompts; the length-controlled one asks what it would be if both answers were as long.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import finalize

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit
from tqdm import tqdm

from fihelpers.identity import identity
from fihelpers.models.generate import Response, end_tokens
from fihelpers.models.language import LanguageModel, right_padded, tokenize

log = logging.getLogger(__name__)

KEY = "FIHELPERS_JUDGE_KEY"  # the environment variable that holds the key of a judge behind an API
FEWEST_SETTINGS = 3  # of which the difficulties of prompts can be learnt
# Inverse variances of the normal prior on the weight of length. Alone, a setting is pulled weakly towards no
# effect; among others more firmly towards their mean, since it is one judge who likes length or does not (the
# published fit holds the weight by long and short answers of the baseline itself).
ALONE, AMONG_OTHERS = 1.0, 5.0
STEPS = 20_000  # at most, of a fit
WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP states that may pass
TRIES = 5  # to get one verdict
PAUSE, TIMEOUT = 1.0, 60.0  # seconds between the first two tries, and to wait for each
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


def rouge1(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return ROUGE-1 (N,) of each answer: the F measure of the words it shares with its reference (Lin 2004).

    From `rouge_score` with its own tokenizer (runs of a-z and 0-9, in lower case) and without stemming.
    Equal texts score 1, two empty ones too; texts without such words score 0 against any other.
    """
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rouge1"]).score
    return np.array(
        [1.0 if a == r else score(r, a)["rouge1"].fmeasure for a, r in zip(answers, references, strict=True)]
    )


class LikelihoodJudge:
    """A stand-in for a judge: it prefers the answer that the intact model finds likelier, per token.

    The preference is P(a) / (P(a) + P(b)), where P is the geometric mean of the probabilities of an answer's
    tokens (its end token too, where it ended) given the prompt. It costs no network and knows nothing of
    the world: it measures how far an answer is from what this model would have said, no more. Likelihood
    is known to favour repetition and to be fooled by an answer that is fluent and wrong.

    Ask it while `model` is intact: likelihoods are kept, so that the same answer is read once.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self._known: dict[tuple[str, Response], float] = {}

    def identity(self) -> list[object]:
        """What its verdicts depend on; see :mod:`fihelpers.identity`."""
        return [self.model]

    def prefer(self, prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
        """Return the preference (N,) for answer a over answer b to each prompt; equal texts are a tie."""
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
    kept: a file (SQLite) of finished verdicts, so that a run that stopped can go on.

    Raises ValueError without a key or for a bad address; asking raises ConnectionError where the service
    cannot be reached, or refuses, after some tries with a doubling pause.
    """

    def __init__(self, url: str, model: str, kept: Path | None = None) -> None:
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            raise ValueError(f"the judge {model!r} needs a key; set the environment variable {KEY}.")
        parts = urlsplit(url)
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise ValueError(f"the judge's address {url!r} is not one; write https://host/path.")
        if parts.scheme == "http" and parts.hostname not in LOCAL:
            raise ValueError(f"the judge's address {url!r} would send the key in the open; use https.")
        self.url, self.model = url.rstrip("/"), model
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
        self._kept = sqlite3.connect(kept or ":memory:", isolation_level=None)
        self._kept.execute("CREATE TABLE IF NOT EXISTS verdicts (pair TEXT PRIMARY KEY, first REAL)")
        finalize(self, self._kept.close)

    def identity(self) -> list[object]:
        """What its verdicts depend on; see :mod:`fihelpers.identity`."""
        return [self.url, self.model]

    def prefer(self, prompts: Sequence[str], a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
        """Return the preference (N,) for answer a over answer b to each prompt; equal texts are a tie."""
        same = _same(a, b)
        found = np.full(len(prompts), 0.5)
        for i in tqdm(np.flatnonzero(~same).tolist(), desc="judging", unit="pair", leave=False):
            forth = self._verdict(prompts[i], a[i].text, b[i].text)
            back = self._verdict(prompts[i], b[i].text, a[i].text)
            found[i] = (forth + 1 - back) / 2
        return found

    def _verdict(self, prompt: str, first: str, second: str) -> float:
        """Return the preference for the first of two texts, as it was kept or from the service."""
        asked = QUESTION.format(prompt=prompt, first=first, second=second)
        pair = identity(self, asked)
        known = self._kept.execute("SELECT first FROM verdicts WHERE pair = ?", [pair]).fetchone()
        if known:
            return float(known[0])
        reply = self._ask(asked)
        if reply not in VERDICTS:
            log.warning("the judge %s replied %.60r, which is no verdict; it is a tie", self.model, reply)
        preference = VERDICTS.get(reply, 0.5)
        self._kept.execute("INSERT INTO verdicts VALUES (?, ?)", [pair, preference])
        return preference

    def _ask(self, asked: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": asked}], "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        for number in range(TRIES):
            if number:
                time.sleep(PAUSE * 2 ** (number - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                error.close()
                if error.code not in WORTH_ANOTHER_TRY:
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:  # no network, or another answer
                problem = type(error).__name__
        raise ConnectionError(
            f"the judge at {self.url} gave no verdict ({problem}); check address, key and network. Finished "
            "verdicts are kept."
        )


@dataclass(frozen=True)
class LengthControlled:
    """Win rates (M,) at equal length, the difficulties (N,) they were fitted with, and how, in words."""

    win_rates: np.ndarray
    difficulties: np.ndarray
    fit: str


def length_controlled_win_rates(
    preferences: ArrayLike, lengths_a: ArrayLike, lengths_b: ArrayLike
) -> LengthControlled:
    """Return the win rates that would be left if both answers were as long (Dubois et al. 2024).

    preferences (M, N): of M settings (models, say) for their answers to the same N prompts over another's.
    lengths_a (M, N), lengths_b (N,) or (M, N): of these answers and the other's, in characters. The fit is
    logit p = quality + weight * tanh(difference) + sensitivity * difficulty, with the difference of the
    lengths (of a minus of b) in units of its standard deviation over the setting's prompts; the win rate is
    the mean of p over the prompts at difference 0.

    As in the published procedure the difficulties of the prompts (high where a is preferred) are estimated
    first, over all settings with sensitivity 1, and then held while every setting is fitted by itself, so
    that both steps are convex. Of fewer than three settings nothing can be learnt of the prompts: each is
    fitted without difficulty, which is said and logged. A setting whose preferences are all one number has
    that win rate, and no part in the fit.

    Raises ValueError for preferences outside [0, 1], or lengths of another number or not finite.
    """
    p = np.asarray(preferences, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        worst = p[~((p >= 0) & (p <= 1))][0]
        raise ValueError(f"a preference lies between 0 and 1, not {worst}; leave out a prompt without one.")
    a = _lengths(lengths_a, "the answers", p.shape)
    b = _lengths(lengths_b, "what they are compared with", p.shape, p.shape[1:])
    found, varied = p.mean(1), p.min(1) < p.max(1)
    found[~varied] = p[~varied, 0]  # the mean but for rounding
    p, x = p[varied], _length_terms(a - b)[varied]
    if len(p) >= FEWEST_SETTINGS:
        fit, (difficulties, weight) = f"jointly over {len(p)} settings", _difficulties(p, x)
    else:
        fit = f"without difficulties: fewer than {FEWEST_SETTINGS} settings"
        difficulties, weight = np.zeros(p.shape[1]), (0.0, ALONE)
        log.warning("too few settings have preferences that vary; win rates are fitted %s", fit)
    found[varied] = [_at_equal_length(*row, difficulties, weight) for row in zip(p, x, strict=True)]
    return LengthControlled(found, difficulties, fit)


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
    m, n = p.shape
    quality = sparse.kron(sparse.identity(m), np.ones((n, 1)))
    weight, difficulty = sparse.block_diag(x[:, :, None]), sparse.kron(np.ones((m, 1)), sparse.identity(n))
    terms = sparse.hstack([quality, weight, difficulty], format="csr")
    firm = np.repeat([0.0, 1.0, 1.0], [m, m, n])
    _, weights, difficulties = np.split(_fit(terms, p.ravel(), np.zeros(2 * m + n), firm), [m, 2 * m])
    return difficulties, (float(weights.mean()), AMONG_OTHERS)


def _at_equal_length(
    p: np.ndarray, x: np.ndarray, difficulty: np.ndarray, weight: tuple[float, float]
) -> float:
    """The win rate at x = 0 of one setting (N,).

    weight: the mean and inverse variance of the normal prior on the weight of x. The sensitivity to the
    difficulty has one of mean 1, what it is in `_difficulties`, and variance 1.
    """
    terms = np.stack([np.ones(len(p)), x, difficulty], 1)
    centre, firm = np.array([0, weight[0], 1]), np.array([0, weight[1], 1])
    quality, _, sensitivity = _fit(terms, p, centre, firm)
    return float(expit(quality + sensitivity * difficulty).mean())


def _fit(terms: Any, p: np.ndarray, centre: np.ndarray, firm: np.ndarray) -> np.ndarray:
    """The factors (k,) of terms (N, k), dense or sparse, that sum to the logits of shares p (N,), fitted.

    centre, firm: the means and inverse variances of their normal priors, 0 for none.
    """

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        z, off = terms @ values, values - centre
        value = (np.logaddexp(0, z) - p * z).sum() + firm @ off**2 / 2
        return float(value), terms.T @ (expit(z) - p) + firm * off

    options = {"maxiter": STEPS, "maxfun": STEPS, "ftol": 0, "gtol": 1e-9}
    return minimize(loss, centre, jac=True, method="L-BFGS-B", options=options).x


@torch.inference_mode()
def _mean_log_probs(model: LanguageModel, pairs: Sequence[tuple[str, Response]]) -> list[float]:
    """The mean log-probability of the tokens of each answer after its prompt, in one forward pass."""
    prompts = tokenize(model.tokenizer, [prompt for prompt, _ in pairs])
    whole = [[*p, *answer.ids] for p, (_, answer) in zip(prompts, pairs, strict=True)]
    # padded on the right, where a causal model's earlier tokens do not look
    ids = right_padded(range(len(whole)), whole, 0, model.device).input_ids
    logits = model.network(input_ids=ids, use_cache=False).logits.cpu()
    found = []
    for row, p, tokens, (_, answer) in zip(logits, prompts, whole, pairs, strict=True):
        precise = torch.promote_types(row.dtype, torch.float32)
        log_p = row[len(p) - 1 : len(tokens)].log_softmax(-1, dtype=precise)
        chosen = log_p[:-1].gather(1, torch.tensor(answer.ids, dtype=torch.long)[:, None])[:, 0]
        end = log_p[-1, end_tokens(model)].logsumexp(0, keepdim=True)  # of any token that ends an answer
        found.append(float(torch.cat([chosen, end])[: len(answer.ids) + answer.ended].mean()))
    if not np.isfinite(found).all():
        raise FloatingPointError(f"model {model.name!r} gives an answer no finite likelihood.")
    return found


def _same(a: Sequence[Response], b: Sequence[Response]) -> np.ndarray:
    return np.array([x.text == y.text for x, y in zip(a, b, strict=True)])


def _lengths(values: ArrayLike, what: str, *shapes: tuple[int, ...]) -> np.ndarray:
    lengths = np.asarray(values, dtype=float)
    if lengths.shape not in shapes or not np.isfinite(lengths).all():
        wanted = " or ".join(map(str, shapes))
        raise ValueError(
            f"lengths of {what} have the shape {lengths.shape}; give one each, finite, in the shape {wanted}."
        )
    return lengths
