"""Evaluation tasks as a file: the same tasks from it as were written, and a word where the data does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_imaml.data import EpisodicDataModule, LabelledTensors


def numbered(count=400):
    return TensorDataset(torch.arange(count), torch.arange(count) % 40)


def named():
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    classes = [f"class {index}" for index in range(20)]
    items = [f"class {index % 20}/{index:03}.png" for index in range(200)]
    return LabelledTensors(images, torch.arange(200) % 20, classes, items)


def module(data=None, **options):
    settings = {"ways": 3, "shots": 2, "queries": 3, "tasks_per_batch": 4, "val_tasks": 5, "test_tasks": 9}
    return EpisodicDataModule(numbered() if data is None else data, **{**settings, **options})


def parts(loader):
    return [tuple(map(tuple, (part.flatten(1).tolist() for part in episode))) for episode in loader]


@pytest.mark.parametrize("data", [numbered, named])
@pytest.mark.parametrize("ranges", [{}, {"ways": (2, 3), "shots": (1, 3)}])
def test_the_tasks_of_a_file_are_those_that_were_written(tmp_path, data, ranges):
    written = module(data(), seed=3, **ranges)
    written.save_episodes(tmp_path / "episodes.json")
    read = module(data(), seed=4, val_tasks=1, test_tasks=2, ways=2, episodes=tmp_path / "episodes.json")
    assert parts(read.test_dataloader()) == parts(written.test_dataloader())
    assert parts(read.val_dataloader()) == parts(written.val_dataloader())
    assert parts(read.train_dataloader()) == parts(module(data(), seed=4, ways=2).train_dataloader())
    read.save_episodes(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "episodes.json").read_text()


def test_a_path_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    module(named()).save_episodes("~/episodes.json")
    assert (tmp_path / "episodes.json").is_file()
    module(named(), episodes="~/episodes.json").setup()


def test_another_library_can_read_it(tmp_path):
    """Each task names its classes and images; nothing of this package is needed to find them."""
    data = module(named())
    data.save_episodes(tmp_path / "episodes.json")
    content = json.loads((tmp_path / "episodes.json").read_text())
    assert content["format"] == "few-shot episodes 1"
    assert {split: len(tasks) for split, tasks in content["splits"].items()} == {"val": 5, "test": 9}
    listed = content["splits"]["test"]
    values = [episode for batch in data.test_dataloader() for episode in zip(*batch, strict=True)]
    for task, (support, _, query, _) in zip(listed, values, strict=True):
        for name, inputs in (("support", support), ("query", query)):
            images = [image for row in task[name] for image in row]
            assert [int(image[-7:-4]) for image in images] == (inputs.flatten() * 255).round().int().tolist()
            owners = [label for label, row in zip(task["classes"], task[name], strict=True) for _ in row]
            assert [image.split("/")[0] for image in images] == owners


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format="other"), "file of the format 'few-shot episodes 1'; .* is not .*'other'"),
        (lambda c: c.pop("splits"), "is not \\('splits'\\)"),
        (lambda c: c["splits"].update(extra=[]), r"splits that the data has \(val, test\); found extra"),
        (lambda c: c["splits"].update(train=[{}]), r"splits that the data has \(val, test\); found train"),
        (lambda c: c["splits"].update(test=[]), r"at least one task for a split; found \[\] for test"),
        (lambda c: c["splits"].update(test=3), "at least one task for a split; found 3 for test"),
        (lambda c: c["splits"]["test"][4]["classes"].__setitem__(0, "yak"), "found 'yak' in task 4"),
        (lambda c: c["splits"]["test"][4]["query"][1].__setitem__(0, "no.png"), "found 'no.png' in task 4"),
        (lambda c: c["splits"]["test"][0]["query"][1].pop(), "as many images for each of its classes; .* in task 0"),
        (lambda c: c["splits"]["val"][0].pop("query"), "the val split has"),
        (
            lambda c: c["splits"]["val"][1]["query"].__setitem__(2, c["splits"]["val"][1]["support"][2] + ["x"]),
            "in task 1",
        ),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, edit, message):
    path = tmp_path / "episodes.json"
    module(named()).save_episodes(path)
    change(path, edit)
    with pytest.raises(ValueError, match=message):
        module(named(), episodes=path).setup()


def test_an_image_twice_is_refused(tmp_path):
    path = tmp_path / "episodes.json"
    module(named()).save_episodes(path)
    change(path, lambda c: c["splits"]["val"][0]["query"][0].__setitem__(0, c["splits"]["val"][0]["support"][0][0]))
    with pytest.raises(ValueError, match="an image twice in task 0"):
        module(named(), episodes=path).setup()


def test_a_class_twice_is_refused(tmp_path):
    path = tmp_path / "episodes.json"
    data = module(named())
    data.save_episodes(path)
    label, items = next(iter(data._pools["val"].members.items()))
    names = [data._pools["val"].item_names()[item] for item in items]

    def edit(content):
        task = content["splits"]["val"][0]
        task["classes"] = [label, label]
        task["support"], task["query"] = [names[:1], names[1:2]], [names[2:3], names[3:4]]

    change(path, edit)
    with pytest.raises(ValueError, match="a class twice in task 0"):
        module(named(), episodes=path).setup()


@pytest.mark.parametrize("items", [[({"x": 1}, "a")] * 400, ["same"] * 400, ["too", "few"]])
def test_a_dataset_s_own_items_are_names_only_if_they_name_items(tmp_path, items):
    data, plain = numbered(), module()
    data.items = items
    module(data).save_episodes(tmp_path / "episodes.json")
    plain.save_episodes(tmp_path / "plain.json")
    assert (tmp_path / "episodes.json").read_text() == (tmp_path / "plain.json").read_text()


def test_other_data_is_noticed(tmp_path):
    module().save_episodes(tmp_path / "episodes.json")
    with pytest.raises(ValueError, match="Use the dataset that the file was written for"):
        module(numbered(280), episodes=tmp_path / "episodes.json").setup()


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing at '.*none\.json'"):
        module(episodes=tmp_path / "none.json").setup()
    (tmp_path / "text.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"text\.json' is not"):
        module(episodes=tmp_path / "text.json").setup()
    with pytest.raises(ValueError, match="there must be validation or test classes to save tasks of"):
        module(class_split=(1, 0, 0)).save_episodes(tmp_path / "episodes.json")


class Tuples(Dataset):
    def __init__(self):
        self.targets = [(index % 10, "x") for index in range(100)]

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.tensor(index), self.targets[index]


def test_labels_that_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="must be numbers or strings to be written; found tuple"):
        module(Tuples(), class_split=(0.4, 0.3, 0.3)).save_episodes(tmp_path / "episodes.json")
