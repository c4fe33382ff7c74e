"""Crops and augmentations: each gives what torchvision's or timm's original does from a seed."""

import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from util import transforms

BICUBIC = v2.InterpolationMode.BICUBIC
FLIP = v2.RandomHorizontalFlip()
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_seed(seed, transform, image):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return transform(image)


def same(ours, reference, image, seeds=8):
    """Whether both give the same uint8 image from each of several seeds."""
    results = [[from_seed(seed, t, image) for seed in range(seeds)] for t in (ours, reference)]
    assert results[0][0].dtype == torch.uint8
    return all(torch.equal(a, b) for a, b in zip(*results))


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def resized_crop(size, scale):
    return v2.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC, antialias=True)


def settings(size, statistics=STATISTICS, **args):
    """What the transforms of classifiers read of flags and of a checkpoint: (args, settings)."""
    flags = {'resize_mode': None, 'aa': 'none', 'reprob': 0.0, 'crop_pct': None} | args
    mean, std = statistics
    sizes = {'img_size': size}
    return Namespace(**flags), Namespace(sizes=sizes, mean=mean, std=std, crop_pct=0.875, args={})


# --- Pre-training ---------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(30, 40), (57, 31), (32, 32), (224, 224), (500, 375)])
def test_simple_crop(shape):
    """The reference's: Resize(side), RandomCrop(side, padding 4, reflect), flip."""
    for side in (32, 9, 8, 5):
        crop = v2.RandomCrop(side, padding=4, padding_mode='reflect')
        reference = v2.Compose([v2.Resize(side, antialias=True), crop, FLIP])
        assert same(transforms.pretrain_transform((side, side), 'simple'), reference, noise(*shape))


def test_other_crops():
    rrc = v2.Compose([resized_crop((24, 40), (0.2, 1.0)), FLIP])
    assert same(transforms.pretrain_transform((24, 40), 'rrc'), rrc, noise(50, 70))
    none = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32), FLIP])
    assert same(transforms.pretrain_transform((32, 32), 'none'), none, noise(50, 70))


@pytest.mark.parametrize('shape', [(7, 300), (300, 7), (64, 48), (1, 1), (24, 40)])
def test_rectangles_are_covered_at_the_same_aspect(shape):
    image = torch.full((3, *shape), 200, dtype=torch.uint8)
    crops = [transforms.pretrain_transform((24, 40), crop) for crop in ('simple', 'rrc')]
    for transform in (*crops, transforms.centre_transform((24, 40))):
        result = transform(image)
        assert result.shape == (3, 24, 40) and (result == 200).all()
    scale = max(24 / shape[0], 40 / shape[1])
    covered = [(24, int(shape[1] * scale)), (int(shape[0] * scale), 40)]
    assert tuple(transforms.Cover((24, 40))(image).shape[1:]) in covered


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('crop_pct, resized', [(0.875, 256), (1.0, 224), (0.9, 248), (None, 256)])
def test_test_images(crop_pct, resized):
    """Resized and cropped at the centre; the share is that of the flag, or of the checkpoint."""
    resize = v2.Resize(resized, BICUBIC, antialias=True)
    reference = v2.Compose([resize, v2.CenterCrop(224)])
    ours = transforms.test_transform(*settings((224, 224), crop_pct=crop_pct))
    assert torch.equal(ours(noise(300, 260)), reference(noise(300, 260)))


@pytest.mark.parametrize(
    'shape, padding',
    [((16, 32), (0, 8)), ((32, 16), (8, 0)), ((16, 16), (0, 0)), ((15, 32), (0, 8))],
)
def test_padded_images_are_whole(shape, padding):
    """A square of the mean's colour with the image in its middle; crop_pct has no effect."""
    args = settings((32, 32), resize_mode='pad', crop_pct=0.5)
    image = noise(*shape)
    result = transforms.test_transform(*args)(image)
    left, top = padding
    side = max(shape)
    square = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    square[:, top : top + shape[0], left : left + shape[1]] = image
    assert torch.equal(result, v2.functional.resize(square, [32, 32], BICUBIC, antialias=True))
    if side == 32:  # nothing to resize
        floats = transforms.test_transform(*args)(image / 255)
        assert (floats - square / 255).abs().max() < 0.01


def test_padding_is_to_the_aspect_of_the_model_and_follows_the_checkpoint():
    args, checkpoint = settings((24, 40))
    checkpoint.args['resize_mode'] = 'pad'
    pad, *_ = transforms.test_transform(args, checkpoint).transforms
    sizes = {(24, 20): (24, 40), (60, 50): (60, 100), (12, 40): (24, 40)}
    assert {shape: tuple(pad(noise(*shape)).shape[1:]) for shape in sizes} == sizes
    white = torch.full((3, 8, 80), 255, dtype=torch.uint8)  # a crop of it would be white
    for transform in (transforms.finetune_transform, transforms.linprobe_transform):
        results = [from_seed(seed, transform(args, checkpoint), white) for seed in range(9)]
        assert min((result == 255).float().mean().item() for result in results) < 0.8
    args.resize_mode = 'crop'
    assert (transforms.test_transform(args, checkpoint)(white) == 255).all()


# --- Fine-tuning and probing ----------------------------------------------------------------------


def test_linprobe():
    """A box that does not fit is clipped; torchvision would draw it anew."""

    def first_box_fits(seed, height, width):
        torch.manual_seed(seed)
        area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(*np.log([3 / 4, 4 / 3]).tolist())).item()
        return round((area * ratio) ** 0.5) <= width and round((area / ratio) ** 0.5) <= height

    reference = v2.Compose([resized_crop((32, 32), (0.08, 1.0)), FLIP])
    ours = transforms.linprobe_transform(*settings((32, 32)))
    image, fits = noise(40, 70), [first_box_fits(seed, 40, 70) for seed in range(30)]
    assert 5 < sum(fits) < 30
    for seed in range(30):
        result = from_seed(seed, ours, image)
        assert torch.equal(result, from_seed(seed, reference, image)) == fits[seed]
    # Each row has its number: a box that is too high is clipped to all of the height.
    rows = torch.arange(40, dtype=torch.uint8).view(1, 40, 1).expand(3, 40, 400).contiguous()
    results = [from_seed(seed, ours, rows) for seed in range(30)]
    heights = [int(result.max()) - int(result.min()) for result in results]
    assert max(heights) == 39 and heights.count(39) > 15
    assert from_seed(0, ours, noise(1, 2)).shape == (3, 32, 32)


@pytest.mark.parametrize('aa', ['rand-m9-mstd0.5-inc1', 'none'])
@pytest.mark.parametrize('probability', [0.0, 1.0])
def test_finetune(aa, probability):
    """MAE's FINETUNE.md by timm's own parts: crop, flip, RandAugment, erasing."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    options = {'translate_const': 14, 'img_mean': (124, 116, 104), 'interpolation': Image.BICUBIC}
    erase = RandomErasing(probability, mode='pixel', device='cpu')

    def reference(image):
        image = FLIP(resized_crop((32, 32), (0.08, 1.0))(image))
        if aa != 'none':
            augmented = rand_augment_transform(aa, options)(v2.functional.to_pil_image(image))
            image = v2.functional.pil_to_tensor(augmented)
        return erase((image / 255 - mean) / std) * std + mean

    ours = transforms.finetune_transform(*settings((32, 32), aa=aa, reprob=probability))
    for seed in range(12):
        result = from_seed(seed, ours, noise(50, 60))
        expected = from_seed(seed, reference, noise(50, 60)).clamp(0, 1)
        assert result.dtype == torch.uint8
        assert (result / 255 - expected).abs().max() < 0.51 / 255


def test_floats_of_any_range_and_number_of_channels():
    args = settings((8, 8), ((0.5,) * 5, (0.5,) * 5), reprob=0.5)
    result = transforms.finetune_transform(*args)(torch.full((5, 9, 9), 3.0))
    assert result.dtype == torch.float32 and result.max() > 2.9


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = v2.Normalize(*STATISTICS)(images.double() / 255)
    floats = images / 255
    for batch in (images, floats):
        before = batch.clone()
        ours = transforms.normalise(batch, *STATISTICS).double()
        assert torch.allclose(ours, expected, atol=1e-6)
        assert torch.equal(batch, before)
