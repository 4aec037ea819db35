"""The scores on a real pretrained model, which the project did not make."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fihelpers.answers import Top
from fihelpers.data import data_folder
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.measures import MEASURES, Random
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import load_task
from fihelpers.trials import collect


@pytest.fixture(scope="module")
def stories(real_data: Path) -> LanguageModel:
    return open_model(real_data / "stories260K", dtype="float64")


def test_streamed_scores_equal_autograd_on_real_weights(stories: LanguageModel) -> None:
    examples = load_task(data_folder() / "stories.txt", n=3).examples
    names = linear_names(stories.network)
    ours = score_weights(stories, examples, ["FI", "SNIP", "Fisher diagonal"], only=names)
    weights = {n: stories.network.get_parameter(n) for n in names}
    sums = {(m, n): torch.zeros_like(w) for m in ours for n, w in weights.items() if m in MEASURES}
    for example in examples:
        log_p = Top(8).log_probs(stories.last_logits(stories.batches([example.prompt])[0]))[0]
        grads = {name: class_gradients(log_p, weight) for name, weight in weights.items()}
        for (measure, name), total in sums.items():
            total += MEASURES[measure](grads[name], log_p.exp().detach(), value=weights[name].detach()) / 3
    for (measure, name), truth in sums.items():
        torch.testing.assert_close(ours[measure][name], truth, rtol=1e-5, atol=1e-5 * float(truth.max()))


def test_zeroing_by_snip_hurts_a_real_model_more_than_chance_does(stories: LanguageModel) -> None:
    contexts = load_task(data_folder() / "stories.txt").examples
    ask = Evaluator(stories, contexts[-40:])
    names = linear_names(stories.network)

    def tries(k: int) -> Iterator[tuple[dict[str, str], Outcome]]:
        scores = score_weights(stories, contexts[8 * k : 8 * k + 8], ["SNIP", Random(k)], only=names)
        for measure in ("SNIP", "random"):
            with zeroed(stories, select(scores[measure], 0.03, seed=k)):
                yield {"measure": measure}, ask()

    trials = collect(ask, tries, sets=2)
    table = trials.table("measure").set_index("measure").log_prob
    assert table["SNIP"] < table["random"] < trials.start("log_prob").mean()
