"""Features of a frozen encoder: what they are, nearest neighbours, logistic regression, and the flags that use them."""

import contextlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command
from torch.multiprocessing.reductions import StorageWeakRef

import main_linprobe
from models_mff import MaskedAutoencoderMFF, create_encoder, model_sizes
from util import data, features
from util.args import run_job
from util.errors import RunError


class Batches(list):
    """Stands in for data.Loader: batches of as many images as could be read."""

    def __init__(self, batches, num_images):
        super().__init__(batches)
        self.bad = data.BadImages(num_images, 0.5)


def clusters(count, seed, classes=4, width=6, noise=0.8):
    """(features, labels) as extract gives them: the cls token tells the classes apart, the mean of patches is noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    cls_token = centres[labels] + noise * torch.randn(count, width, generator=generator)
    return {'cls token': cls_token, 'mean of patches': torch.randn(count, width, generator=generator)}, labels


@pytest.mark.parametrize('kind', ['pre-training model', "timm's encoder"])
def test_features_are_those_of_forward_features(kind):
    sizes = model_sizes('vit_nano_patch4', img_size=16)
    if kind == 'pre-training model':
        model = MaskedAutoencoderMFF(**sizes).train()
    else:
        model = create_encoder(sizes, 'token').train()
    imgs, labels = torch.randn(5, 3, 16, 16), torch.arange(5)
    batches = list(zip(imgs.split(2), labels.split(2)))
    found, found_labels = features.extract(model, Batches(batches, 6), contextlib.nullcontext)
    assert model.training and torch.equal(found_labels, labels)
    tokens = model.eval().forward_features(imgs)
    assert torch.allclose(found['cls token'], tokens[:, 0], atol=1e-6)
    assert torch.allclose(found['mean of patches'], tokens[:, 1:].mean(1), atol=1e-6)
    with pytest.raises(RunError, match='95 of 100 images cannot be read'):
        features.extract(model, Batches(batches, 100), contextlib.nullcontext)


def test_only_the_features_are_kept():
    """The tokens of a batch are gone once those of the next are there."""
    model = create_encoder(model_sizes('vit_nano_patch4', img_size=16), 'token')
    forward_features, tokens = model.forward_features, []

    def forward(imgs):
        assert all(before.expired() for before in tokens[:-1])
        output = forward_features(imgs)
        tokens.append(StorageWeakRef(output.untyped_storage()))
        return output

    model.forward_features = forward
    batches = [(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)) for _ in range(4)]
    features.extract(model, Batches(batches, 8), contextlib.nullcontext)
    assert len(tokens) == 4


def test_neighbours_vote_by_their_cosine():
    """Against numpy, one query at a time; the bank is large enough to come in chunks."""
    bank, queries, k = np.random.randn(9000, 5), np.random.randn(5000, 5), 7
    labels = np.random.randint(0, 3, 9000)
    ours = features.nearest_neighbours(*(torch.from_numpy(x) for x in (bank, labels, queries)), k).numpy()
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    for index in range(0, 5000, 100):
        cosine = bank @ queries[index] / np.linalg.norm(queries[index])
        nearest = np.argsort(-cosine)[:k]
        votes = [np.exp(cosine[nearest] / 0.07)[labels[nearest] == label].sum() for label in range(3)]
        assert ours[index] == np.argmax(votes)
    few = features.nearest_neighbours(torch.eye(2), torch.tensor([4, 2]), torch.tensor([[1.0, 0.1], [0.0, 1.0]]), 20)
    assert few.tolist() == [4, 2]  # more neighbours than images


def test_accuracy_of_each_feature():
    train, val = clusters(400, 0), clusters(200, 1)
    for accuracy in (features.neighbour_accuracy(train, val, 20), features.logistic_accuracy(train, val)):
        assert accuracy['cls token'] > 75 and accuracy['mean of patches'] < 40


def newton(x, y, classes, penalty):
    """Logistic regression by Newton's method in numpy: (D+1, C), the last row the bias."""
    M, D = x.shape
    z, target = np.hstack([x, np.ones((M, 1))]), np.eye(classes)[y]
    shrink = np.diag([penalty] * D + [0.0])
    weight = np.zeros((D + 1, classes))
    for _ in range(50):
        p = np.exp(z @ weight - (z @ weight).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = z.T @ (p - target) / M + shrink @ weight
        hessian = np.kron(np.eye(classes), shrink)
        for a in range(classes):
            for b in range(classes):
                block = z.T @ (z * (p[:, a] * ((a == b) - p[:, b]))[:, None]) / M
                hessian[a * (D + 1) : (a + 1) * (D + 1), b * (D + 1) : (b + 1) * (D + 1)] += block
        weight -= np.linalg.lstsq(hessian, gradient.T.ravel(), rcond=1e-12)[0].reshape(classes, D + 1).T
    return weight


@pytest.mark.parametrize('penalty', [1e-1, 1e-4])
def test_logistic_regression_agrees_with_newton(penalty):
    x, y = clusters(300, 0)
    x = x['cls token'].double()
    start = torch.zeros(7, 4, dtype=torch.float64)
    ours = features.fit_logistic(x, y, start, penalty)
    theirs = torch.from_numpy(newton(x.numpy(), y.numpy(), 4, penalty))
    again = features.fit_logistic(x, y, torch.randn(7, 4, dtype=torch.float64), penalty)  # convex: from anywhere
    ours, again, theirs = (features.logits(x, weight).softmax(1) for weight in (ours, again, theirs))
    assert torch.allclose(ours, theirs, atol=1e-4) and torch.allclose(again, theirs, atol=1e-4)
    assert not start.any()


def test_logistic_accuracy_chooses_a_penalty_and_standardises():
    """Few images of many dimensions, most of which say nothing: without a penalty they would be fitted."""
    x, y = clusters(2000, 3, noise=1.5)
    noise = torch.randn(2000, 60, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x['cls token'], noise], dim=1)
    train, val = ({'wide': wide[:200]}, y[:200]), ({'wide': wide[200:]}, y[200:])
    chosen = features.logistic_accuracy(train, val)['wide']
    assert chosen == features.logistic_accuracy(train, val)['wide']  # deterministic
    scaled = [({'wide': part['wide'] * 1000 + 5}, labels) for part, labels in (train, val)]
    assert features.logistic_accuracy(*scaled)['wide'] == pytest.approx(chosen, abs=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, 'PENALTIES', [1e-6])
        assert features.logistic_accuracy(train, val)['wide'] < chosen - 3


def test_subset_keeps_the_shares_of_classes():
    labels = np.array([0, 1, 1, 2] * 100)
    chosen = features.spread(labels, 40)
    assert len(set(chosen.tolist())) == 40 and np.bincount(labels[chosen]).tolist() == [10, 20, 10]
    assert sorted(features.spread(labels, 1000).tolist()) == list(range(400))
    labels[::4] = -1  # unlabelled
    assert np.bincount(labels[features.spread(labels, 30)]).tolist() == [0, 20, 10]


# --- The flags ----------------------------------------------------------------------------------------------------


def test_processes_share_the_work(pretrain, folder, capsys):
    """--knn and --logistic of two processes print what one does."""
    path = pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    flags = f'--knn 5 --logistic --data_path {folder} --init_from {path} --num_workers 0 --device cpu'.split()
    two = command('main_linprobe.py', *flags, torchrun=2)
    assert two.returncode == 0, two.stderr
    capsys.readouterr()
    run_job(main_linprobe.main, main_linprobe.get_parser(), flags)
    numbers = [re.findall(r'top-1 ([\d.]+) %', printed) for printed in (two.stdout, capsys.readouterr().out)]
    assert len(numbers[0]) == 4 and numbers[0] == numbers[1]


def test_neighbours_while_training(pretrain, monkeypatch):
    """Before training, every other epoch and at the end; each feature under its own name."""
    calls = []

    def extract(model, loader, autocast):
        labels = torch.cat([labels for _, labels in loader])
        calls.append(labels)
        return {'cls token': F.one_hot(labels).float(), 'mean of patches': torch.ones(len(labels), 2)}, labels

    monkeypatch.setattr(features, 'extract', extract)
    entries = pretrain('run', '--knn_every', '2').entries
    found = [
        (entry['epoch'], entry['val_knn_cls'], entry['val_knn_patches']) for entry in entries if 'val_knn_cls' in entry
    ]
    assert [epoch for epoch, _, _ in found] == [0, 2, 3]
    assert all(cls == 100 and patches < 30 for _, cls, patches in found)
    assert [len(labels) for labels in calls] == [64, 20] * 3


def test_neighbours_need_labels(pretrain, tmp_path, folder, capsys):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for path in (folder / 'train').rglob('*.png'):
        (flat / path.name).symlink_to(path)
    with pytest.raises(SystemExit):
        pretrain('run', '--knn_every', '1', '--data_path', str(flat))
    assert '--knn_every needs' in capsys.readouterr().err
