"""CIFAR-FS: Bertinetto's split, on a small made-up CIFAR-100."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_imaml.data import CifarFSDataModule, cifar_fs
from lightning_imaml.data.datasets.class_splits import shipped_split

# The 20 superclasses of CIFAR-100 (Krizhevsky, 2009), which its 100 classes are told by.
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip
| bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television
| bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf
| bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo
| fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman
| crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel
| maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train
| lawn_mower rocket streetcar tank tractor
"""
NAMES = sorted(SUPERCLASSES.replace("|", " ").split())


class Fake:
    """torchvision's CIFAR100 with five training and one test image a class."""

    downloads: list[str] = []  # noqa: RUF012

    def __init__(self, root, train=True, download=False):
        if download:
            self.downloads.append(root)
        elif not self.downloads:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.classes = NAMES
        self.targets = list(range(100)) * (5 if train else 1)
        self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
        self.data[:, 0, 1, 2] = self.targets
        self.data[:, 3, 0, 0] = 255 * train

    def __len__(self):
        return len(self.data)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(cifar_fs, "CIFAR100", Fake)
    monkeypatch.setattr(Fake, "downloads", [])


def test_the_split_is_of_all_classes_of_cifar_100():
    split = shipped_split("cifar_fs")
    assert {name: len(labels) for name, labels in split.items()} == {"train": 64, "val": 16, "test": 20}
    assert sorted(label for labels in split.values() for label in labels) == NAMES


def test_training_and_test_images_make_up_the_classes(tmp_path):
    data = CifarFSDataModule(tmp_path, download=True, queries=5, tasks_per_batch=2)
    data.prepare_data()
    data.setup()
    assert Fake.downloads == [str(tmp_path)]
    for name, labels in shipped_split("cifar_fs").items():
        assert list(data._pools[name].members) == labels
    episode = next(iter(data.train_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 5, 3, 32, 32)
    for task in range(2):
        images = torch.cat([episode.support_inputs[task], episode.query_inputs[task]])
        targets = torch.cat([episode.support_targets[task], episode.query_targets[task]])
        for way in range(5):
            shown = images[targets == way]
            assert len(shown[:, 2, 0, 1].unique()) == 1  # of one class, whose number lies in this pixel
            assert shown[:, 0, 3, 0].sort().values.tolist() == [0.0] + [1.0] * 5
    assert data._pools["test"].item_names()[500] == "test/0"


def test_nothing_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must hold CIFAR-100 .* Pass download=True to fetch it"):
        CifarFSDataModule(tmp_path).setup()


def test_other_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Fake, "downloads", ["there"])
    monkeypatch.setattr(f"{__name__}.NAMES", [f"class {k}" for k in range(100)])
    with pytest.raises(ValueError, match=r"must have exactly the 100 classes .* 100 missing, .* 100 unknown"):
        CifarFSDataModule(tmp_path).setup()
