"""Pictures of episodes with predictions."""

from __future__ import annotations

import pytest
import torch
from conftest import class_episode
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import EpisodeGrid
from lightning_imaml.callbacks.episode_grid import draw_episodes
from lightning_imaml.inner import GradientDescent

SHAPE = (1, 4, 4)


def module() -> IMAMLModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return IMAMLModule(network, inner_solver=GradientDescent(0.3, 2))


def loader(**settings) -> DataLoader:
    return DataLoader([class_episode(**{"tasks": 3, "ways": 3, "shape": SHAPE} | settings)], batch_size=None)


class Board(CSVLogger):
    """Takes figures, as TensorBoard's logger does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []
        self.experiment.add_figure = lambda tag, figure, step: self.taken.append((tag, figure, step))


class Images(CSVLogger):
    """Takes images, as W&B's logger does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []

    def log_image(self, key, images, step=None):
        self.taken.append((key, images, step))


def trainer(tmp_path, callback, logger=False, **settings) -> Trainer:
    return Trainer(
        **{"max_steps": 2} | settings, default_root_dir=tmp_path, callbacks=[callback], logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
        num_sanity_val_steps=1,
    )  # fmt: skip


def titles(figure) -> list[tuple[str, str]]:
    return [(axes.get_title(), axes.title.get_color()) for axes in figure.axes if axes.images]


def test_the_picture_shows_the_predictions(tmp_path):
    board, model = Board(tmp_path), module()
    run = trainer(tmp_path, EpisodeGrid(tasks=2), board)
    run.test(model, loader(), verbose=False)
    ((tag, figure, step),) = board.taken
    assert (tag, step) == ("test/episodes", 0)
    (outputs,) = trainer(tmp_path, EpisodeGrid()).predict(model, loader())
    expected = []
    for task in range(2):
        for label in range(3):
            answers = outputs[task].argmax(-1)[2 * label : 2 * label + 2].tolist()
            expected.append((f"class {label}", "black"))
            expected += [(f"→ {answer}", "green" if answer == label else "red") for answer in answers]
    assert titles(figure) == expected


def test_files_and_loggers_after_validation_and_test(tmp_path):
    images, model = Images(tmp_path), module()
    run = trainer(tmp_path, EpisodeGrid(), images)
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    assert [key for key, *_ in images.taken] == ["val/episodes"] * 2 + ["test/episodes"]  # Not of the sanity check.
    for key, (path,), _ in images.taken:
        assert path.endswith(f"episodes_{key.split('/')[0]}.png")
        with open(path, "rb") as file:  # noqa: PTH123 - the logger was given a string
            assert file.read(4) == b"\x89PNG"


def test_few_of_many_queries_are_drawn():
    episode = class_episode(tasks=1, ways=2, shots=2, queries=9, shape=(3, 4, 4))
    figure = draw_episodes(episode, torch.zeros(1, 18, dtype=torch.long), queries=4)
    assert len(titles(figure)) == 2 * (2 + 4)
    assert [colour for title, colour in titles(figure) if title == "→ 0"] == ["green"] * 4 + ["red"] * 4


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_every_precision(tmp_path, precision):
    trainer(tmp_path, EpisodeGrid(), precision=precision).test(module(), loader(), verbose=False)
    assert (tmp_path / "episodes_test.png").is_file()


def test_what_is_no_image_is_explained(tmp_path):
    with pytest.raises(TypeError, match=r"inputs must be images .* found \[2, 3, 16\]. Remove the callback."):
        trainer(tmp_path, EpisodeGrid()).test(module(), loader(shape=(16,)), verbose=False)


@pytest.mark.parametrize("name", ["tasks", "queries"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; found 0"):
        EpisodeGrid(**{name: 0})
