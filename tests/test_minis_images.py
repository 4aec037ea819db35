"""The pictures of the bundled vision-language task, and the model that answers questions about them."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from fihelpers.data import check_folder, data_folder
from fihelpers.evaluate.questions import answer_images
from fihelpers.images import read_image
from fihelpers.models.vision import open_vision_model
from fihelpers.tasks import load_task
from fiminis import drawings as images
from fiminis import vlm
from fiminis.lm import save

SMALL = replace(
    vlm.RECIPE,
    pictures=60,
    stages=(vlm.Stage(1, 1e-3, images.SUBJECTS),) * 2,
    batch=3,
    vocabulary=400,
    hidden=32,
    intermediate=32,
    vision_hidden=16,
    vision_depth=2,
    vision_intermediate=16,
)


@pytest.mark.parametrize("subject", images.SUBJECTS)
def test_a_picture_answers_each_of_its_questions_in_one_way(subject: str) -> None:
    rng = random.Random(1)
    for split in (images.TRAIN, images.VAL, images.TEST):
        for _ in range(8):
            picture = images.PAINTERS[subject](rng, split)
            assert picture.pixels.shape == (images.SIZE, images.SIZE, 3) and picture.pixels.dtype == np.uint8
            for question in picture.questions:
                item = images.ask(question, rng, split)
                assert len(set(item.options)) == 4 and item.options[item.answer] == question.answer
                assert question.answer not in question.wrong


def test_wordings_and_digits_of_a_split_are_in_no_other() -> None:
    for wordings in images.QUESTIONS.values():
        asked = [w for split in wordings.values() for w in split]
        assert len(set(asked)) == len(asked)
    used = [set(range(1797)[images.DIGITS_OF[s]]) for s in (images.TRAIN, images.VAL, images.TEST)]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert set().union(*used) == set(range(1797))


def test_every_answer_begins_with_a_word_of_its_own() -> None:
    first = [answer.split()[0] for answer in images.ANSWERS]
    assert len(set(first)) == len(first)
    assert set(images.THINGS.values()) <= set(images.ANSWERS)


def test_the_shipped_questions_come_out_again(tmp_path: Path) -> None:
    images.write_questions(tmp_path, vlm.RECIPE.seed)
    for split, n in images.COUNTS.items():
        made, shipped = (pq.read_table(d / f"{split}.parquet") for d in (tmp_path, data_folder() / "vqa"))
        assert len(made) == len(shipped) == n * len(images.SUBJECTS)
        assert made.drop_columns("image") == shipped.drop_columns("image")
        for mine, theirs in zip(made["image"].to_pylist(), shipped["image"].to_pylist(), strict=True):
            assert torch.equal(read_image(mine), read_image(theirs))


def test_corruption_touches_a_part_of_the_picture_and_leaves_the_original() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        clean = np.full((images.SIZE, images.SIZE, 3), 100, np.uint8)
        spoilt = vlm.corrupt(clean, rng)
        share = (spoilt != clean).any(-1).mean()
        assert 0 < share <= 0.12 and (clean == 100).all()


def test_the_wordings_of_the_earlier_paper_are_among_the_trained_ones() -> None:
    kinds = yaml.safe_load((data_folder() / "prompts.yaml").read_text(encoding="utf-8"))
    assert list(kinds) == ["neutral", "aggressive", "safe"]
    for entry in kinds.values():
        assert not set(entry["trained"]) & set(entry["unseen"])
        assert entry.get("v1", entry["trained"][0]) in entry["trained"]


def test_the_waves_are_unlike_each_other() -> None:
    filters = vlm.waves(96).flatten(1)
    gram = filters @ filters.T
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-5)


def test_training_starts_the_same_for_the_same_seed_and_the_model_opens(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        network, tokenizer = vlm.train(data_folder(), SMALL)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert weights[0].equal(weights[1]) and torch.isfinite(weights[0]).all()
    save(network, tokenizer, tmp_path / "made", {"preprocessor_config.json": vlm.preprocessor()})
    model = open_vision_model(str(tmp_path / "made"))
    task = load_task("bundled-images", n=3)
    pictures = torch.stack([read_image(e.image) for e in task if e.image])
    assert torch.isfinite(model.last_logits(pictures, [e.prompt for e in task])).all()
    # the classes that transformers would choose for this architecture cut a text as the file says
    usual = AutoTokenizer.from_pretrained(tmp_path / "made")
    for example in task:
        assert usual(example.prompt)["input_ids"] == tokenizer(example.prompt)["input_ids"]


def test_the_training_input_is_the_input_of_the_opened_model(tmp_path: Path) -> None:
    """Right padding and hand-made positions in training, left padding and the library's ones afterwards."""
    network, tokenizer = vlm.train(data_folder(), SMALL)
    save(network, tokenizer, tmp_path / "made", {"preprocessor_config.json": vlm.preprocessor()})
    drawn = vlm.Corpus(data_folder(), SMALL).draw(4)
    reader = vlm.Reader(network, tokenizer)
    rows = tokenizer([reader.before + d.text for d in drawn])["input_ids"]
    _, states = reader.read(vlm.pad(rows), [d.pixels for d in drawn])
    last = torch.tensor([len(row) - 1 for row in rows])
    trained = network.lm_head(states.last_hidden_state[torch.arange(4), last])
    pictures = torch.stack([torch.from_numpy(d.pixels.copy()).permute(2, 0, 1).float() for d in drawn])
    opened = open_vision_model(str(tmp_path / "made")).last_logits(pictures, [d.text for d in drawn])
    assert torch.allclose(trained, opened, atol=1e-4)


def test_what_ships_is_small_and_in_the_manifest() -> None:
    for folder in ("vqa", "models"):
        check_folder(data_folder() / folder)
    assert (data_folder() / "models" / vlm.NAME / "model.safetensors").stat().st_size <= 8_000_000
    assert len(load_task("bundled-images")) >= 400


@pytest.mark.parametrize("subject", images.SUBJECTS)
def test_the_bundled_model_is_a_fair_test_bed(subject: str) -> None:
    model = open_vision_model(vlm.NAME)
    outcome = answer_images(model, load_task("bundled-images", subject, "test").examples)
    assert 0.75 <= outcome.accuracy <= 0.97
    assert 0.6 <= outcome.confidence <= 0.95
