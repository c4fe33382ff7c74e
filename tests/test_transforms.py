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


@pytest.mark.parametrize('shape', [(30, 40), (57, 31), (32, 32)])
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


@pytest.mark.parametrize('crop_pct, resized', [(0.875, 256), (1.0, 224), (0.9, 248), (None, 256)])
def test_test_images(crop_pct, resized):
    """Resized and cropped at the centre; the share is that of the flag, or of the checkpoint."""
    resize = v2.Resize(resized, BICUBIC, antialias=True)
    reference = v2.Compose([resize, v2.CenterCrop(224)])
    ours = transforms.test_transform(*settings((224, 224), crop_pct=crop_pct))
    assert torch.equal(ours(noise(300, 260)), reference(noise(300, 260)))


@pytest.mark.parametrize('shape, left, top', [((16, 32), 0, 8), ((15, 7), 4, 0)])
def test_padded_images_are_whole(shape, left, top):
    """A square of the mean's colour with the image in its middle; crop_pct has no effect."""
    ours = transforms.test_transform(*settings((32, 32), resize_mode='pad', crop_pct=0.5))
    image, side = noise(*shape), max(shape)
    square = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    square[:, top : top + shape[0], left : left + shape[1]] = image
    assert torch.equal(ours(image), v2.functional.resize(square, [32, 32], BICUBIC))
    floats = v2.functional.resize(square / 255, [32, 32], BICUBIC)
    assert (ours(image / 255) - floats).abs().max() < 0.01


def test_padding_is_to_the_aspect_of_the_model_and_follows_the_checkpoint():
    args, checkpoint = settings((24, 40))
    checkpoint.args['resize_mode'] = 'pad'
    pad, *_ = transforms.test_transform(args, checkpoint).transforms
    sizes = {(24, 20): (24, 40), (60, 50): (60, 100), (12, 40): (24, 40)}
    assert {shape: tuple(pad(noise(*shape)).shape[1:]) for shape in sizes} == sizes
    for transform in (transforms.finetune_transform, transforms.linprobe_transform):
        first, *_ = transform(args, checkpoint).transforms
        assert first(noise(24, 20)).shape == (3, 24, 40)
    args.resize_mode = 'crop'
    assert not isinstance(transforms.test_transform(args, checkpoint).transforms[0], type(pad))


def test_linprobe():
    """MAE's crop: a box that does not fit is clipped; torchvision would draw it anew."""
    ours, image = transforms.linprobe_transform(*settings((32, 32))), noise(40, 70)
    heights = []
    for seed in range(30):
        result = from_seed(seed, ours, image)
        torch.manual_seed(seed)
        area = 40 * 70 * torch.empty(1).uniform_(0.08, 1.0).item()
        aspect = torch.empty(1).uniform_(*np.log([3 / 4, 4 / 3]).tolist()).exp().item()
        height, width = min(40, round((area / aspect) ** 0.5)), round((area * aspect) ** 0.5)
        top, left = (torch.randint(1 + n, (1,)).item() for n in (40 - height, 70 - width))
        box = v2.functional.resized_crop(image, top, left, height, width, (32, 32), BICUBIC)
        assert torch.equal(result, FLIP(box))
        heights.append(height)
    assert 5 < heights.count(40) < 25
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


def test_floats_are_normalised_in_new_memory():
    images = torch.rand(2, 3, 4, 5)
    before = images.clone()
    ours = transforms.normalise(images, *STATISTICS)
    assert torch.allclose(ours, v2.Normalize(*STATISTICS)(before), atol=1e-6)
    assert torch.equal(images, before)
