"""Which samples a process sees, what is drawn for each, and the loader."""

import os
import random
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from util import data, distributed, transforms, workers
from util.errors import RunError
from util.shapes import Shapes

CPU = torch.device('cpu')
STATISTICS = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


class Source:
    """n images of one colour that is their number, some of which cannot be read."""

    classes = labels = None

    def __init__(self, n, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def path(self, index):
        return f'images/{index}.png'

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f'images/{index}.png: no image')
        image = torch.full((3, 16, 16), index, dtype=torch.uint8)
        image[0, 0, 0] = 255  # not flat
        return image, index


# --- Which samples, in which order ------------------------------------------------------------------------------


def stream(rank=0, world_size=1, batch_size=8, start=0, stop=9, num_samples=50, total=16, seed=3):
    return list(data.BatchStream(num_samples, total, batch_size, seed, start, stop, rank, world_size))


def test_every_image_once_an_epoch_and_in_new_order():
    steps = stream(batch_size=16)
    assert len(steps) == 9 and all(len(step) == 16 for step in steps)
    for epoch in range(3):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert len(set(keys)) == 48 and all(key[0] == epoch and 0 <= key[1] < 50 for key in keys)
    assert [index for _, index in steps[0]] != [index for _, index in steps[3]]
    assert steps == stream(batch_size=16) != stream(batch_size=16, seed=4)


@pytest.mark.parametrize('world_size, batch_size', [(1, 4), (2, 4), (4, 4), (2, 8), (4, 2)])
def test_processes_share_each_step(world_size, batch_size):
    shares = [stream(rank, world_size, batch_size) for rank in range(world_size)]
    micro_steps = 16 // batch_size // world_size
    for step, expected in enumerate(stream(batch_size=16)):
        mine = slice(step * micro_steps, (step + 1) * micro_steps)
        seen = [key for share in shares for micro_batch in share[mine] for key in micro_batch]
        assert sorted(seen) == sorted(expected)


def test_a_stream_resumes_at_any_step():
    for start in (0, 1, 3, 7):
        assert stream(start=start) == stream()[2 * start :]


def test_fixed_batches_hold_every_sample_once():
    shares = [data.fixed_batches(11, 2, rank, 3) for rank in range(3)]
    assert sorted(key for share in shares for batch in share for key in batch) == [(0, index) for index in range(11)]


# --- What is drawn for a sample -----------------------------------------------------------------------------------


def everything(image):
    """A transform that draws from every generator."""
    return torch.tensor([torch.rand(()), random.random(), np.random.random(), image.float().mean()])


def test_samples_depend_on_seed_epoch_and_index_only():
    keys = [(epoch, index) for epoch in range(2) for index in range(5)]
    samples = data.Samples(Source(8), everything, num_patches=16, seed=1)
    forward, backward = [samples[key] for key in keys], [samples[key] for key in reversed(keys)][::-1]
    for (image, noise, _), (image_again, noise_again, _) in zip(forward, backward):
        assert torch.equal(image, image_again) and torch.equal(noise, noise_again)
    other_seed = [data.Samples(Source(8), everything, num_patches=16, seed=2)[key] for key in keys]
    noises = torch.stack([noise for _, noise, _ in forward + other_seed])
    assert len(noises.unique(dim=0)) == 20 and 0 <= noises.min() and noises.max() < 1
    for column in range(3):  # torch's, Python's and NumPy's
        assert len({image[column].item() for image, _, _ in forward + other_seed}) == 20


def test_masks_are_the_same_for_every_crop():
    shapes = Shapes('train', (20, 20))
    crops = [transforms.pretrain_transform((16, 16), crop) for crop in ('simple', 'rrc', 'none')]
    noises = [data.Samples(shapes, crop, num_patches=16)[0, 3][1] for crop in crops]
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


# --- The loader -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
def test_loader_gives_normalised_batches(num_workers):
    source = Shapes('val', (16, 16))
    samples = data.Samples(source, transforms.centre_transform((16, 16)), num_patches=4)
    loader = data.Loader(samples, data.fixed_batches(5, 2), CPU, STATISTICS, num_workers)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    for _ in range(2):  # the workers stay
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [2, 2, 1]
        expected = (torch.stack([source[i][0] for i in range(5)]) / 255 - mean) / std
        assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)
        assert torch.equal(
            torch.cat([noise for _, noise in batches]), torch.stack([samples[0, i][1] for i in range(5)])
        )


@pytest.mark.parametrize('device, expected', [('cpu', False), ('mps', False), ('cuda', True)])
def test_copies_are_asynchronous_on_cuda_only(device, expected, monkeypatch):
    """On MPS such copies read memory that is freed, before torch 2.13."""
    loader = data.Loader(data.Samples(Source(4), lambda image: image), data.fixed_batches(4, 2), CPU, STATISTICS, 0)
    copies = []
    monkeypatch.setattr(torch.Tensor, 'to', lambda tensor, *a, **options: copies.append(options) or tensor)
    monkeypatch.setattr(loader, 'device', Namespace(type=device))
    monkeypatch.setattr(data, 'normalise', lambda images, mean, std: images)
    assert len(list(loader)) == 2
    assert copies == [{'non_blocking': expected}] * 4


@pytest.mark.parametrize(
    'cores, launcher, expected',
    [
        (8, {}, 8),
        (64, {}, 16),
        (64, {'LOCAL_WORLD_SIZE': '8'}, 8),
        (64, {'OMPI_COMM_WORLD_LOCAL_SIZE': '16'}, 4),
        (4, {'LOCAL_WORLD_SIZE': '8'}, 1),
    ],
)
def test_workers_share_the_cores(cores, launcher, expected, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores), raising=False)
    for name in workers.LOCAL_WORLD_SIZE:
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert workers.default_workers() == expected


@pytest.mark.parametrize(
    'num_workers, batch_bytes, expected',
    [
        (16, 64 * 3 * 224**2, 4),  # 0.6 GB
        (16, 256 * 3 * 224**2, 3),  # 1.8 GB; with 4 it would be 2.5
        (16, 2048 * 3 * 224**2, 1),  # the published probe on 8 GPUs: 4.9 GB
        (2, 2048 * 3 * 224**2, 3),
        (1, 1, 4),
    ],
)
def test_prefetching_is_bounded_in_bytes(num_workers, batch_bytes, expected):
    factor = workers.prefetch_factor(num_workers, batch_bytes)
    assert factor == expected
    assert factor == 1 or factor * num_workers * batch_bytes <= 2e9
    assert factor == 4 or (factor + 1) * num_workers * batch_bytes > 2e9


def test_the_loader_counts_the_bytes_of_its_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(data, 'prefetch_factor', lambda *arguments: asked.append(arguments) or 1)
    samples = data.Samples(Source(20), transforms.centre_transform((8, 6)))
    keys = data.BatchStream(20, 10, 5, seed=0, start=0, stop=2)
    assert len(list(data.Loader(samples, keys, CPU, STATISTICS, 2))) == 4
    assert asked == [(2, 5 * 3 * 8 * 6)]
    assert list(data.Loader(samples, [], CPU, STATISTICS, 2)) == []  # a process without a share


NOTEBOOK = """
import torch
from util import data, sources, transforms
samples = data.Samples(sources.open_source('shapes'), transforms.centre_transform((16, 16)))
loader = data.Loader(samples, data.fixed_batches(400, 4), torch.device('cpu'), ([0.5] * 3, [0.5] * 3), 2)
batches = iter(loader)
next(batches)
print('done', flush=True)
"""


def test_python_exits_while_workers_run():
    """As in a notebook: workers ignore SIGTERM, by which Python would end them, and then wait for them."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, '-c', NOTEBOOK], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'done\n', '')


# --- Images that cannot be read, or show nothing ------------------------------------------------------------------


def test_a_bad_image_is_replaced():
    samples = data.Samples(Source(6, bad=[3]), lambda image: image, 4, seed=1)
    (image, noise, problem), again = samples[0, 3], samples[0, 3]
    assert problem == 'images/3.png\tno image' and torch.equal(image, again[0]) and torch.equal(noise, again[1])
    stand_ins = {int(samples[epoch, 3][0][1, 0, 0]) for epoch in range(30)}
    assert 3 not in stand_ins and len(stand_ins) > 2  # not always the same


def test_a_source_without_any_good_image_ends():
    with pytest.raises(RunError, match='100 images in a row cannot be read; images/..png: no image'):
        data.Samples(Source(2, bad=[0, 1]), lambda image: image)[0, 0]


def test_bad_images_are_left_out_of_evaluation(tmp_path):
    samples = data.Samples(Source(7, bad=[2, 4, 5]), lambda image: image)
    bad = data.BadImages(7, 1.0, str(tmp_path))
    loader = data.Loader(samples, data.fixed_batches(7, 2), CPU, STATISTICS, 0, bad, leave_out=True)
    assert [labels.tolist() for _, labels in loader] == [[0, 1], [3], [6]]
    assert bad.count == 3
    list(loader)
    lines = (tmp_path / 'bad_images.txt').read_text().splitlines()
    assert lines == [f'images/{index}.png\tno image' for index in (2, 4, 5)]  # once each


def test_bad_images_are_replaced_in_training():
    samples = data.Samples(Source(7, bad=[2, 4, 5]), lambda image: image)
    batches = list(data.Loader(samples, data.fixed_batches(7, 2), CPU, STATISTICS, 0))
    assert [len(images) for images, _ in batches] == [2, 2, 2, 1]
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert [labels[index] for index in (0, 1, 3, 6)] == [0, 1, 3, 6] and not {2, 4, 5} & set(labels)


def test_each_process_has_its_own_list(tmp_path, monkeypatch):
    for rank, name in ((0, 'bad_images.txt'), (1, 'bad_images-1.txt'), (12, 'bad_images-12.txt')):
        monkeypatch.setattr(distributed, 'world', lambda rank=rank: (rank, 16))
        for _ in range(2):  # a resumed run
            data.BadImages(100, 0.1, str(tmp_path)).add(['', f'{rank}.png\tbroken', ''])
        assert (tmp_path / name).read_text() == f'{rank}.png\tbroken\n'
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    'num_images, max_bad, most',
    [
        (1000, 0.01, 10),
        (64, 0.01, 3),
        (20, 0.5, 10),
        (4, 0.01, 3),
        (3, 0.01, 2),
        (2, 1.0, 1),
        (50, 1.0, 49),
        (90, 0, 0),
    ],
)
def test_how_many_images_may_be_bad(num_images, max_bad, most, monkeypatch):
    """A share, but a few in any case, and never all."""
    bad = data.BadImages(num_images, max_bad)
    bad.check(most)
    bad.add(['a.png\tbroken'])
    message = f'{most + 1} of {num_images} images cannot be read, more than --max_bad {max_bad:g} allows; a.png: broken'
    with pytest.raises(RunError, match=message):
        bad.check(most + 1)
    monkeypatch.setattr(distributed, 'world', lambda: (1, 2))
    with pytest.raises(SystemExit):  # rank 0 tells
        bad.check(most + 1)


class FlatSource(Source):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        if index % 2:
            image[:] = torch.tensor([index, 0, 255], dtype=torch.uint8).view(3, 1, 1)
        return image, label


@pytest.mark.parametrize('num_workers', [0, 1])
def test_flat_images_are_counted_and_used(num_workers, tmp_path):
    samples = data.Samples(FlatSource(9, bad=[4]), lambda image: image, num_patches=4)
    bad = data.BadImages(9, 0.0, str(tmp_path))
    loader = data.Loader(samples, data.fixed_batches(9, 3), CPU, STATISTICS, num_workers, bad, leave_out=True)
    assert sum(len(images) for images, _ in loader) == 8
    assert (bad.flat, bad.count) == (4, 1)
    note = bad.flat_note()
    assert note.startswith('4 images are one flat colour, such as images/1.png; see ') and note.endswith(
        'bad_images.txt'
    )
    listed = (tmp_path / 'bad_images.txt').read_text().splitlines()
    assert 'images/1.png\tone flat colour' in listed and len(listed) == 5
    labelled = data.Loader(data.Samples(FlatSource(9), lambda image: image), [[(0, 1)]], CPU, STATISTICS, 0)
    assert len(list(labelled)) == 1 and labelled.bad.flat == 0  # asked in pre-training only


@pytest.mark.parametrize('place', [(0, 0, 0), (2, 15, 15), (1, 7, 3)])
def test_one_other_pixel_is_not_flat(place):
    image = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    assert data.is_flat(image) and data.is_flat(image[:, :1, :1])
    image[place] = 8
    assert not data.is_flat(image)
