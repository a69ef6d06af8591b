"""Transforms on the batch, rotated classes, and images kept as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_imaml.data import EpisodicDataModule, LabelledTensors, PerSample

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
SETTINGS = {"ways": 2, "shots": 1, "queries": 2, "tasks_per_batch": 2, "val_tasks": 3, "test_tasks": 3}


def images(count=120, size=4):
    return LabelledTensors(
        torch.arange(count * size * size).view(count, 1, size, size).remainder(251).to(torch.uint8),
        torch.arange(count) % 12,
        [f"c{index}" for index in range(12)],
    )


def module(data=None, **options):
    return EpisodicDataModule(images() if data is None else data, **{**SETTINGS, "batches_per_epoch": 4, **options})


class Recorder(LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        torch.rand(batch_idx + 1)  # a step that draws random numbers must not change the transforms
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path, data, steps=4, ckpt_path=None, save=None, test=False):
    recorder = Recorder()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(default_root_dir=tmp_path, max_steps=steps, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    if test:
        trainer.test(recorder, datamodule=data, verbose=False)
    return recorder.seen


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_transform_is_applied_to_every_batch(tmp_path):
    normalise = v2.Normalize(mean=[0.5], std=[0.25])
    plain, seen = (run(tmp_path, module(transform=t), test=True) for t in (None, normalise))
    for stage in plain:
        assert plain[stage]
        for before, after in zip(plain[stage], seen[stage], strict=True):
            for name in ("support_inputs", "query_inputs"):
                expected = (getattr(before, name) - 0.5) / 0.25
                torch.testing.assert_close(getattr(after, name), expected)
            assert torch.equal(before.query_targets, after.query_targets)


def augmentation():
    return PerSample(v2.RandomCrop(4, padding=2))


def test_augmentation_is_for_training_and_of_each_image(tmp_path):
    plain = run(tmp_path, module(), test=True)
    seen = run(tmp_path, module(train_transform=augmentation()), test=True)
    assert same(plain["val"], seen["val"])
    assert same(plain["test"], seen["test"])
    assert not same(plain["train"], seen["train"])
    blank = PerSample(v2.RandomCrop(4, padding=2))
    torch.manual_seed(0)
    alike = blank(torch.arange(1.0, 17).view(1, 1, 4, 4).expand(20, -1, -1, -1))
    assert len({tuple(image.flatten().tolist()) for image in alike}) > 5


def test_augmentation_is_a_function_of_the_seed_and_the_batch(tmp_path):
    whole = run(tmp_path, module(train_transform=augmentation()), steps=7)["train"]
    torch.manual_seed(123)
    first = run(tmp_path, module(train_transform=augmentation()), steps=3, save=tmp_path / "stop.ckpt")["train"]
    torch.manual_seed(321)
    rest = run(tmp_path, module(train_transform=augmentation()), steps=7, ckpt_path=tmp_path / "stop.ckpt")["train"]
    assert same(first + rest, whole)
    assert not same(run(tmp_path, module(train_transform=augmentation(), seed=1), steps=7)["train"], whole)


def test_augmentation_leaves_the_random_state_alone(tmp_path):
    states = []
    for options in ({}, {"train_transform": augmentation()}):
        torch.manual_seed(0)
        run(tmp_path, module(**options))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_transform_that_loses_samples_is_refused():
    data = module(transform=lambda images: images[:1])
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match=r"a sample for each of the 4 in \[n, ...\]; found \[1, 1, 4, 4\]"):
        data.on_after_batch_transfer(batch, 0)


def test_rotated_classes():
    data, plain = module(rotations=True), module()
    data.setup()
    plain.setup()
    pool, upright = data._pools["train"], list(plain._pools["train"].members)
    assert list(pool.members) == upright + [f"{name}/rot{turn}" for turn in (90, 180, 270) for name in upright]
    assert all("/rot" not in name for split in ("val", "test") for name in data._pools[split].members)
    originals = images().tensors[0]
    for turns in range(4):
        for item in (0, 5, 119):
            turned = pool.source.fetch(torch.tensor([item + 120 * turns]))[0] * 255
            expected = np.rot90(originals[item, 0].numpy(), turns)
            assert np.array_equal(turned[0].round().numpy(), expected)
    episode = next(iter(data.train_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 2, 1, 4, 4)


def test_transformed_classes():
    """Mirrored and inverted classes beside the rotated ones, by NumPy's own flip and difference."""
    own = {"mirrored": v2.functional.hflip, "inverted": lambda images: 1 - images}
    data, plain = module(rotations=True, class_transforms=own), module()
    data.setup()
    plain.setup()
    pool, upright = data._pools["train"], list(plain._pools["train"].members)
    endings = ["", "/rot90", "/rot180", "/rot270", "/mirrored", "/inverted"]
    assert list(pool.members) == [name + ending for ending in endings for name in upright]
    assert data._pools["test"].members.keys() == plain._pools["test"].members.keys()
    originals = images().tensors[0].numpy() / 255
    name = upright[0]
    for ending, expected in {"mirrored": np.flip(originals, axis=-1), "inverted": 1 - originals}.items():
        found = pool.source.fetch(torch.from_numpy(pool.members[f"{name}/{ending}"]))
        np.testing.assert_allclose(found, expected[pool.members[name]], atol=1e-6)
    with pytest.raises(ValueError, match=r"other names than the rotations \[.*\]; found \['rot90'\]\. Rename"):
        module(rotations=True, class_transforms={"rot90": v2.functional.hflip})
    alone = module(class_transforms={"mirrored": v2.functional.hflip})
    alone.setup()
    assert len(alone._pools["train"].members) == 2 * len(upright)


def test_transforms_of_classes_keep_the_shape():
    data = module(class_transforms={"cut": lambda images: images[..., :2]})
    with pytest.raises(
        ValueError, match=r"found that 'cut' makes \[\d+, 1, 4, 2\] of \[\d+, 1, 4, 4\]\. Resize or crop"
    ):
        list(data.train_dataloader())


def test_rotations_need_squares():
    data = TensorDataset(torch.zeros(100, 1, 4, 6), torch.arange(100) % 10)
    with pytest.raises(ValueError, match=r"rotations need square images \[C, S, S\]; found \[1, 4, 6\]"):
        next(iter(module(data, rotations=True, class_split=(1, 0, 0)).train_dataloader()))


class Pictures(Dataset):
    """PIL images, as torchvision's datasets give without a transform."""

    def __init__(self, kind=lambda image: image):
        self.targets = [7 * (index % 10) for index in range(60)]
        self.kind, self.reads = kind, 0

    def __len__(self):
        return 60

    def __getitem__(self, index):
        self.reads += 1
        return self.kind(Image.new("RGB", (3, 2), (index, 0, 255))), self.targets[index]


def test_a_dataset_is_kept_as_bytes():
    source = Pictures()
    settings = {"class_split": (0.4, 0.3, 0.3), "in_memory": True}
    data = module(source, **settings)
    data.setup()
    assert source.reads == 60
    assert data._pools["train"].source.tensors[0].dtype == torch.uint8
    floats = module(Pictures(TO_TENSOR), class_split=(0.4, 0.3, 0.3))
    for kept, read in zip(data.test_dataloader(), floats.test_dataloader(), strict=True):
        torch.testing.assert_close(kept, read)
    assert source.reads == 60


def test_what_cannot_be_kept_as_bytes():
    with pytest.raises(TypeError, match=r"found torch.float32 \[3, 2, 3\]\. Leave ToTensor and normalisation out"):
        module(Pictures(TO_TENSOR), in_memory=True).setup()
    sizes = iter(range(2, 100))
    with pytest.raises(ValueError, match=r"found \[3, 2, 2\] for item 0 and \[3, 2, 3\] for item 1. Add Resize"):
        module(Pictures(lambda image: image.resize((next(sizes), 2))), in_memory=True).setup()


def test_a_module_s_own_hook_is_not_replaced(tmp_path):
    class Own(Recorder):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch._replace(query_inputs=batch.query_inputs + 1)

    recorder = Own()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=1, enable_model_summary=False, num_sanity_val_steps=0, **quiet
    )
    with pytest.warns(UserWarning, match="will use the implementation from `LightningModule`"):  # Lightning's own word
        trainer.fit(recorder, datamodule=module())
    plain = next(iter(module().train_dataloader()))
    assert torch.equal(recorder.seen["train"][0].query_inputs, plain.query_inputs + 1)
