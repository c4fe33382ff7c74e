"""Which samples a process sees, what is drawn for each, and the loader."""

import atexit
import multiprocessing
import os
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import Processes

from util import data, distributed, transforms
from util.args import ArgumentParser
from util.errors import RunError
from util.optim import Schedule
from util.shapes import Shapes

CPU = torch.device('cpu')
SETTINGS = Namespace(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))


class Source:
    """n images of one colour that is their number, some of which cannot be read."""

    classes = labels = None

    def __init__(self, n, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f'images/{index}.png: no image')
        return torch.full((3, 16, 16), index, dtype=torch.uint8), index


def plain(source, **others):
    return data.Samples(source, lambda image: image, **others)


@pytest.fixture
def stream(monkeypatch):
    """The micro-batches of a process: 50 images, three epochs of three steps of 16."""

    def keys(rank=0, world_size=1, batch_size=8, start=0, seed=3):
        monkeypatch.setattr(distributed, 'world', lambda: (rank, world_size))
        schedule = Schedule(
            num_images=50, total_batch_size=16, batch_size=batch_size,
            accumulation=16 // batch_size // world_size, steps_per_epoch=3, total_steps=9,
            warmup_steps=0, lr=1.0, min_lr=0.0,
        )  # fmt: skip
        return list(data.BatchStream(schedule, seed, start))

    return keys


def test_every_image_once_an_epoch_and_in_new_order(stream):
    steps = stream(batch_size=16)
    assert len(steps) == 9 and all(len(step) == 16 for step in steps)
    for epoch in range(3):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert len(set(keys)) == 48 and all(key[0] == epoch and 0 <= key[1] < 50 for key in keys)
    assert [index for _, index in steps[0]] != [index for _, index in steps[3]]
    assert steps == stream(batch_size=16) != stream(batch_size=16, seed=4)
    for start in (1, 3, 7):
        assert stream(start=start) == stream()[2 * start :]


@pytest.mark.parametrize('world_size, batch_size', [(1, 4), (2, 4), (4, 4), (2, 8), (4, 2)])
def test_processes_share_each_step(world_size, batch_size, stream):
    """In the order of the whole batch: micro-batch by micro-batch, process by process."""
    shares = [stream(rank, world_size, batch_size) for rank in range(world_size)]
    whole = [key for step in stream(batch_size=16) for key in step]
    assert [key for batches in zip(*shares) for batch in batches for key in batch] == whole


def test_fixed_batches_hold_every_sample_once(monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, 'world', lambda rank=rank: (rank, 3))
        shares.append(data.fixed_batches(10, 2))
    keys = sorted(key for share in shares for batch in share for key in batch)
    assert keys == [(0, index) for index in range(10)]
    assert {len(share) for share in shares} == {2}  # all meet as often


def test_samples_depend_on_seed_epoch_and_index_only():
    def everything(image):  # draws from every generator
        return torch.tensor([torch.rand(()), random.random(), np.random.random()])

    def sample(seed, *key):
        image, noise, _ = data.Samples(Source(8), everything, num_patches=16, seed=seed)[key]
        plain_noise = plain(Source(8), num_patches=16, seed=seed)[key][1]
        assert torch.equal(noise, plain_noise)  # whatever the transform draws
        return torch.cat([image, noise])

    keys = [(seed, epoch, i) for seed in range(2) for epoch in range(2) for i in range(5)]
    drawn = torch.stack([sample(*key) for key in keys])  # (20, 3 + 16)
    assert torch.equal(drawn, torch.stack([sample(*key) for key in keys[::-1]]).flip(0))
    assert all(len(column.unique()) == 20 for column in drawn.T)
    assert 0 <= drawn.min() and drawn.max() < 1


@pytest.mark.parametrize('num_workers', [0, 2])
def test_loader_gives_normalised_batches(num_workers):
    source = Shapes('val', (16, 16))
    samples = data.Samples(source, transforms.centre_transform((16, 16)), num_patches=4)
    loader = data.Loader(samples, data.fixed_batches(5, 2), CPU, SETTINGS, num_workers)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SETTINGS.mean, SETTINGS.std))
    expected = (torch.stack([source[i][0] for i in range(5)]) / 255 - mean) / std
    noise = torch.stack([samples[0, i][1] for i in range(5)])
    for _ in range(2):  # the workers stay
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [2, 2, 1] and len(loader) == 3
        assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)
        assert torch.equal(torch.cat([targets for _, targets in batches]), noise)


@pytest.mark.parametrize('cores, local, expected', [(8, 1, 8), (64, 1, 16), (64, 8, 8), (4, 8, 1)])
def test_workers_share_the_cores(cores, local, expected, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(local))
    assert data.default_workers() == expected


def test_python_exits_while_workers_run():
    """As in a notebook: workers ignore SIGTERM, by which Python would end them, and wait."""

    def main(args):
        batches = iter(data.Loader(plain(Source(99)), data.fixed_batches(99, 4), CPU, SETTINGS, 2))
        next(batches)
        atexit._run_exitfuncs()
        assert not multiprocessing.active_children()

    job = Processes(Namespace(main=main, get_parser=ArgumentParser), [])
    assert job.wait(timeout=30) == [0], job.printed(errors=True)


def test_a_bad_image_is_replaced_by_another():
    samples = plain(Source(6, bad=[3]), num_patches=4, seed=1)
    (image, noise, problem), again = samples[0, 3], samples[0, 3]
    assert problem == 'images/3.png: no image'
    assert torch.equal(image, again[0]) and torch.equal(noise, again[1])
    stand_ins = {int(samples[epoch, 3][0][1, 0, 0]) for epoch in range(30)}
    assert 3 not in stand_ins and len(stand_ins) > 2  # not always the same
    with pytest.raises(RunError, match='100 images in a row cannot be read; images/..png'):
        plain(Source(2, bad=[0, 1]))[0, 0]


def test_bad_images_are_reported_once_counted_and_left_out_of_evaluation(capfd):
    samples = plain(Source(7, bad=[2, 4, 5]))
    keys = data.fixed_batches(7, 2)
    loader = data.Loader(samples, keys, CPU, SETTINGS, 0, leave_out=True)
    for _ in range(2):
        assert [labels.tolist() for _, labels in loader] == [[0, 1], [3], [], [6]]
    assert loader.num_bad == 6
    lines = [f'unreadable: images/{index}.png: no image' for index in (2, 4, 5)]
    assert capfd.readouterr().err.splitlines() == lines
    labels = torch.cat([labels for _, labels in data.Loader(samples, keys, CPU, SETTINGS, 0)])
    assert len(labels) == 7 and labels[[0, 1, 3, 6]].tolist() == [0, 1, 3, 6]
    assert not {2, 4, 5} & set(labels.tolist())


@pytest.mark.parametrize('num_images, most', [(1050, 10), (64, 3), (3, 2), (1, 0)])
def test_how_many_images_may_be_bad(num_images, most, monkeypatch):
    """A hundredth, but three in any case, and never all."""
    loader = data.Loader(plain(Source(num_images)), [], CPU, SETTINGS, 0)
    loader.check_bad(most)
    with pytest.raises(RunError, match=f'{most + 1} of {num_images} images'):
        loader.check_bad(most + 1)
    monkeypatch.setattr(distributed, 'world', lambda: (1, 2))
    with pytest.raises(SystemExit):  # rank 0 tells
        loader.check_bad(most + 1)
