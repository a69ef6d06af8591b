"""Items that are no (input, label) pairs: dicts, tuples of more parts, Hugging Face's datasets, ragged inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image
from small_runs import trainer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import ClassPool, EpisodicDataModule, GlyphDataModule, OmniglotDataModule
from lightning_imaml.data.labelled import named_labels

CLASSES = [f"word {k}" for k in range(6)]
COUNT = 36


def data_module(*datasets, **options):
    defaults = {"ways": 3, "shots": 1, "queries": 2, "tasks_per_batch": 2, "class_split": (1, 0, 0)}
    return EpisodicDataModule(*datasets, **defaults | options)


def first(*datasets, **options):
    return next(iter(data_module(*datasets, **options).train_dataloader()))


def value(index):
    """An input that tells its class, ``index % 6``."""
    return torch.tensor([float(index % 6), float(index)])


def shows_classes(inputs, targets):
    """Whether samples of one class of a task have one number, and samples of others another."""
    for numbers, classes in zip(inputs, targets, strict=True):
        pairs = set(zip(numbers.long().tolist(), classes.tolist(), strict=True))
        if len(pairs) != 3:
            return False
    return True


DICTS = [{"x": value(k), "speaker": k % 2, "word": CLASSES[k % 6]} for k in range(COUNT)]
TRIPLES = [(value(k), k % 2, k % 6) for k in range(COUNT)]
TENSORS = TensorDataset(*(torch.stack([torch.as_tensor(item[part]) for item in TRIPLES]) for part in range(3)))

NAMED = {
    "dicts": (DICTS, {"input_key": "x", "target_key": "word"}),
    "a subset of dicts": (Subset(DICTS, range(COUNT)), {"input_key": "x", "target_key": "word"}),
    "joined dicts": (ConcatDataset([DICTS[:18], DICTS[18:]]), {"input_key": "x", "target_key": "word"}),
    "tuples": (TRIPLES, {"target_key": 2}),
    "tuples from behind": (TRIPLES, {"input_key": 0, "target_key": -1}),
    "tensors": (TENSORS, {"target_key": 2}),
}


@pytest.mark.parametrize("name", NAMED)
def test_parts_by_key(name):
    source, keys = NAMED[name]
    batch = first(source, **keys).validate()
    assert batch.support_inputs.shape == (2, 3, 2)
    assert shows_classes(batch.support_inputs[..., 0], batch.support_targets)
    assert shows_classes(batch.query_inputs[..., 0], batch.query_targets)
    # The same tasks as of pairs.
    pairs = [(value(k), CLASSES[k % 6] if "dicts" in name else k % 6) for k in range(COUNT)]
    assert torch.equal(batch.query_inputs, first(pairs).query_inputs)


def test_several_inputs():
    batch = first(DICTS, input_key=("x", "speaker"), target_key="word")
    assert batch.query_inputs.keys() == {"x", "speaker"}
    assert batch.query_inputs["x"].shape == (2, 6, 2)
    assert batch.query_inputs["speaker"].shape == (2, 6)
    inputs = first(TRIPLES, input_key=[0, 1], target_key=2).query_inputs
    assert [part.shape for part in inputs] == [(2, 6, 2), (2, 6)]


REFUSED = {
    "dicts": (DICTS, {}, r"found items that are dicts with the keys \['x', 'speaker', 'word'\]\. Say which part"),
    "dicts, no input": (DICTS, {"target_key": "word"}, r"dicts with the keys .* input_key=\.\.\. and target_key="),
    "dicts, no target": (DICTS, {"input_key": "x"}, r"dicts with the keys .* input_key=\.\.\. and target_key="),
    "triples": (TRIPLES, {}, r"found items that are tuples of 3 parts \(Tensor, int, int\)\. Say which part"),
    "triples, no target": (TRIPLES, {"input_key": 0}, r"tuples of 3 parts \(Tensor, int, int\)"),
    "three tensors": (TENSORS, {}, r"items of TensorDataset must be .* tuples of 3 parts \(Tensor, Tensor, Tensor\)"),
    "one tensor": (TensorDataset(torch.zeros(9, 2)), {}, r"tuples of 1 parts"),
    "inputs alone": ([value(k) for k in range(9)], {}, r"found items that are Tensor\. Return both from the dataset"),
    "several datasets": ({"train": DICTS}, {}, r"found dict with the keys \['train'\]\. Pass one of its datasets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_items_that_are_no_pairs(name):
    source, keys, found = REFUSED[name]
    with pytest.raises(TypeError, match=found):
        first(source, **keys)


def test_keys_that_are_not_there():
    with pytest.raises(ValueError, match=r"target_key must name a part .* found 'label', and items that are dicts"):
        first(DICTS, input_key="x", target_key="label")
    with pytest.raises(ValueError, match=r"input_key must name a part of the items of list; found 'image', and items"):
        first(DICTS, input_key="image", target_key="word")
    with pytest.raises(ValueError, match=r"target_key must name .* found 3, and items that are tuples of 3 parts"):
        first(TRIPLES, target_key=3)


class Stored(list):
    """Items of three parts whose classes stand beside them, as in some datasets of torchvision."""

    @property
    def targets(self):
        return [item[2] for item in self]


def test_stored_labels_need_no_key():
    batch = first(Stored(TRIPLES))
    assert shows_classes(batch.query_inputs[..., 0], batch.query_targets)
    with pytest.raises(TypeError, match=r"dicts with the keys"):
        first(type("StoredDicts", (list,), {"targets": [k % 6 for k in range(COUNT)]})(DICTS))


def test_splits_of_dicts_must_not_share_classes():
    keys = {"input_key": "x", "target_key": "word"}
    with pytest.raises(ValueError, match="train and val must not share classes; found 6 in both"):
        data_module(DICTS[:18], DICTS[18:], **keys).setup()
    keys["target_key"] = "number"
    numbered = [{"x": value(k), "number": k % 6} for k in range(COUNT)]
    with pytest.raises(ValueError, match="train and val must not share classes"):
        data_module(Subset(numbered, range(18)), Subset(numbered, range(18, 36)), **keys).setup()


def test_images_in_dicts_are_kept_in_memory():
    images = [{"image": Image.new("L", (4, 4), 40 * (k % 6)), "label": k % 6} for k in range(COUNT)]
    keys = {"input_key": "image", "target_key": "label"}
    batch = first(images, in_memory=True, **keys)
    assert batch.query_inputs.shape == (2, 6, 1, 4, 4)
    assert shows_classes(batch.query_inputs[..., 0, 0, 0] * 255 / 40 + 0.5, batch.query_targets)
    with pytest.raises(ValueError, match=r"Resize and ToTensor; .*in_memory=True"):
        first(images, **keys)
    with pytest.raises(ValueError, match=r"collate must be left out with in_memory=True"):
        data_module(images, in_memory=True, collate=torch.stack, **keys)


def test_keys_are_of_datasets_that_are_passed():
    with pytest.raises(ValueError, match=r"target_key must come with a dataset .* found none for GlyphDataModule"):
        GlyphDataModule(target_key="label")
    with pytest.raises(ValueError, match=r"collate must come with a dataset .* found none for OmniglotDataModule"):
        OmniglotDataModule("data", collate=torch.stack)


# Ragged inputs


def tokens(index):
    return torch.full((2 + index % 3,), index % 6 + 1)


def masked(inputs):
    padded = pad_sequence(inputs, batch_first=True)
    return {"tokens": padded, "mask": padded > 0}


def test_sequences_are_padded():
    source = [(tokens(k), k % 6) for k in range(COUNT)]
    padding = partial(pad_sequence, batch_first=True)
    batch = first(source, collate=padding).validate()
    assert batch.query_inputs.shape == (2, 6, 4)
    assert shows_classes(batch.query_inputs[..., 0], batch.query_targets)
    batch = first(source, collate=masked)
    assert torch.equal(batch.query_inputs["mask"], batch.query_inputs["tokens"] > 0)
    with pytest.raises(ValueError, match=r"collate=functools\.partial\(torch\.nn\.utils\.rnn\.pad_sequence, batch"):
        first(source)


def test_other_ragged_inputs():
    with pytest.raises(ValueError, match=r"a function that pads a list of inputs to one shape"):
        first([(torch.zeros(3, 2 + k % 3), k % 6) for k in range(COUNT)])
    with pytest.raises(ValueError, match=r"such as lambda texts: tokenizer\(texts\)"):
        first([("a text", k % 6) for k in range(COUNT)])
    texts = [("a text"[: 1 + k % 3], k % 6) for k in range(COUNT)]
    batch = first(texts, collate=lambda texts: torch.tensor([len(text) for text in texts]))
    assert set(batch.query_inputs.flatten().tolist()) <= {1, 2, 3}
    with pytest.raises(ValueError, match=r"collate must give tensors .* found \['str', 'str', 'str'\] for 18 items"):
        first(texts, collate=list)
    with pytest.raises(ValueError, match=r"found \[\[18\], \[3\]\] for 18 items"):
        first(texts, collate=lambda texts: (torch.zeros(18), torch.zeros(3)))


def test_a_training_run_with_padding():
    """Lightning logs no function as a hyper-parameter, and the network sees the mask."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Linear(7, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            one_hot = (inputs["tokens"].unsqueeze(-1) == torch.arange(7)).float() * inputs["mask"].unsqueeze(-1)
            return self.head(self.embedding(one_hot).sum(dim=-2).tanh())

    source = [{"text": tokens(k).tolist(), "word": CLASSES[k % 6]} for k in range(COUNT)]
    data = data_module(
        source,
        input_key="text",
        target_key="word",
        collate=masked,
        batches_per_epoch=2,
        val_tasks=2,
        class_split=(0.5, 0.5, 0),
    )
    assert (data.hparams["input_key"], data.hparams["target_key"]) == ("text", "word")
    assert "collate" not in data.hparams
    run = trainer()
    run.fit(IMAMLModule(Mean()), datamodule=data)
    assert run.global_step == 2


# Hugging Face


class Columns:
    """What this package asks of a Hugging Face dataset: rows and columns by one bracket, ClassLabel names."""

    column_names = ("tokens", "label")

    def __init__(self, transform=None):
        self.transform, self.rows_read = transform, 0
        self.features = {"label": type("ClassLabel", (), {"names": CLASSES})()}

    def __len__(self):
        return COUNT

    def with_format(self, kind):
        assert kind is None
        return Columns()

    def __getitem__(self, key):
        if isinstance(key, str):
            assert self.transform is None, "a transform of rows gets a single column"
            return [k % 6 for k in range(COUNT)]
        self.rows_read += 1
        row = {"tokens": [key % 6, key], "label": key % 6}
        return row if self.transform is None else self.transform(row)


def test_columns():
    keys = {"input_key": "tokens", "target_key": "label"}
    source = Columns()
    pool = ClassPool.of(source, **keys)
    assert source.rows_read == 0
    assert list(pool.members) == CLASSES
    assert pool.named
    batch = first(source, **keys)
    assert batch.query_inputs.dtype == torch.long
    assert shows_classes(batch.query_inputs[..., 0], batch.query_targets)
    assert source.rows_read == 18
    batch = first(Columns(lambda row: row | {"tokens": torch.tensor(row["tokens"]) + 100}), **keys)
    assert batch.query_inputs.min() >= 100
    # A part that only the transform makes.
    made = Columns(lambda row: row | {"group": f"group {row['label']}"})
    assert named_labels(made, "group")[:2] == ["group 0", "group 1"]


def test_a_dataset_of_hugging_face():
    datasets = pytest.importorskip("datasets", minversion="2.14")  # The folder beside this file has none
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("int64")), "label": datasets.ClassLabel(names=CLASSES)}
    )
    rows = {"tokens": [[k % 6, k] for k in range(COUNT)], "label": [k % 6 for k in range(COUNT)]}
    source = datasets.Dataset.from_dict(rows, features=features)
    keys = {"input_key": "tokens", "target_key": "label"}
    expected = first(Columns(), **keys)
    assert list(ClassPool.of(source, **keys).members) == CLASSES
    for dataset in (source, source.with_format("torch"), source.with_transform(lambda rows: rows)):
        batch = first(dataset, **keys)
        assert torch.equal(batch.query_inputs, expected.query_inputs)
    with pytest.raises(TypeError, match=r"items of Dataset must be .* dicts with the keys \['tokens', 'label'\]"):
        first(source)
    with pytest.raises(TypeError, match=r"found DatasetDict with the keys \['train'\]\. Pass one of its datasets"):
        first(datasets.DatasetDict(train=source), **keys)
    with pytest.raises(TypeError, match=r"found IterableDataset\. Read an iterable dataset into a list"):
        first(source.to_iterable_dataset(), **keys)
    with pytest.raises(ValueError, match="train and test must not share classes"):
        data_module(source, None, source, **keys).setup()


def test_images_of_hugging_face():
    datasets = pytest.importorskip("datasets", minversion="2.14")  # The folder beside this file has none
    images = [Image.new("L", (4, 4), 40 * (k % 6)) for k in range(COUNT)]
    rows = {"image": images, "label": [k % 6 for k in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    source = datasets.Dataset.from_dict(rows, features=features)
    batch = first(source, input_key="image", target_key="label", in_memory=True)
    assert shows_classes(batch.query_inputs[..., 0, 0, 0] * 255 / 40 + 0.5, batch.query_targets)
