"""Crops and augmentations: each draws and gives what torchvision's or timm's original does from the same seed."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from util import transforms
from util.errors import InputError

BICUBIC = v2.InterpolationMode.BICUBIC
FLIP = v2.RandomHorizontalFlip()
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_seed(seed, transform, image):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return transform(image)


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def resized_crop(size, scale):
    return v2.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC, antialias=True)


@pytest.mark.parametrize('shape', [(30, 40), (57, 31), (32, 32), (224, 224), (500, 375)])
def test_simple_crop(shape):
    """The reference's: Resize(side), RandomCrop(side, padding 4, reflect), RandomHorizontalFlip()."""
    for side in (32, 9, 8, 5):
        crop = v2.RandomCrop(side, padding=4, padding_mode='reflect')
        reference = v2.Compose([v2.Resize(side, antialias=True), crop, FLIP])
        ours = transforms.pretrain_transform((side, side), 'simple')
        for seed in range(8):
            result = from_seed(seed, ours, noise(*shape))
            assert result.dtype == torch.uint8 and torch.equal(result, from_seed(seed, reference, noise(*shape)))


def test_rrc():
    reference = v2.Compose([resized_crop((24, 40), (0.2, 1.0)), FLIP])
    ours = transforms.pretrain_transform((24, 40), 'rrc')
    for seed in range(8):
        assert torch.equal(*(from_seed(seed, transform, noise(50, 70)) for transform in (ours, reference)))


def test_no_crop():
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32), FLIP])
    ours = transforms.pretrain_transform((32, 32), 'none')
    for seed in range(8):
        assert torch.equal(*(from_seed(seed, transform, noise(50, 70)) for transform in (ours, reference)))


@pytest.mark.parametrize('crop_pct, resized', [(0.875, 256), (1.0, 224), (0.9, 248)])
@pytest.mark.parametrize('interpolation', [BICUBIC, v2.InterpolationMode.BILINEAR])
def test_centre(crop_pct, resized, interpolation):
    reference = v2.Compose([v2.Resize(resized, interpolation, antialias=True), v2.CenterCrop(224)])
    ours = transforms.centre_transform((224, 224), crop_pct, interpolation)
    assert torch.equal(ours(noise(300, 260)), reference(noise(300, 260)))


def first_draw_fits(seed, height, width):
    """Whether the first box that torchvision draws from a seed lies within the image."""
    torch.manual_seed(seed)
    area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
    ratio = torch.exp(torch.empty(1).uniform_(*np.log([3 / 4, 4 / 3]).tolist())).item()
    return round((area * ratio) ** 0.5) <= width and round((area / ratio) ** 0.5) <= height


def test_linprobe():
    """torchvision's random resized crop, but where its first box does not fit, that is clipped, not drawn anew."""
    height, width = 40, 70
    reference = v2.Compose([resized_crop((32, 32), (0.08, 1.0)), FLIP])
    ours = transforms.linprobe_transform((32, 32))
    fits = [first_draw_fits(seed, height, width) for seed in range(30)]
    assert 5 < sum(fits) < 30
    for seed in range(30):
        result = from_seed(seed, ours, noise(height, width))
        assert torch.equal(result, from_seed(seed, reference, noise(height, width))) == fits[seed]
    # Each row has its number: a box that is too high is clipped to all of the height.
    rows = torch.arange(40, dtype=torch.uint8).view(1, 40, 1).expand(3, 40, 400).contiguous()
    heights = []
    for seed in range(30):
        result = from_seed(seed, ours, rows)
        heights.append(int(result.max()) - int(result.min()))
    assert max(heights) == 39 and heights.count(39) > 15
    for seed in range(30):  # a box is never empty
        assert from_seed(seed, ours, noise(1, 2)).shape == (3, 32, 32)


@pytest.mark.parametrize('auto_augment', ['rand-m9-mstd0.5-inc1', 'none'])
@pytest.mark.parametrize('probability', [0.0, 1.0])
def test_finetune(auto_augment, probability):
    """MAE's FINETUNE.md by timm's own parts: crop, flip, RandAugment on PIL images, erasing of normalised pixels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    options = {'translate_const': int(32 * 0.45), 'img_mean': (124, 116, 104), 'interpolation': Image.BICUBIC}
    erase = RandomErasing(probability, mode='pixel', device='cpu')

    def reference(image):
        image = FLIP(resized_crop((32, 32), (0.08, 1.0))(image))
        if auto_augment != 'none':
            augmented = rand_augment_transform(auto_augment, options)(v2.functional.to_pil_image(image))
            image = v2.functional.pil_to_tensor(augmented)
        return erase((image / 255 - mean) / std)

    ours = transforms.finetune_transform((32, 32), STATISTICS, auto_augment, probability)
    for seed in range(12):
        result = from_seed(seed, ours, noise(50, 60))
        expected = from_seed(seed, reference, noise(50, 60)) * std + mean
        assert result.dtype == torch.uint8
        assert (result / 255 - expected.clamp(0, 1)).abs().max() < 0.51 / 255


def test_floats_are_fine_tuned_on_as_they_are():
    """Arrays of another range than 0..1, and of more channels than a picture."""
    transform = transforms.finetune_transform((8, 8), ((0.5,) * 5, (0.5,) * 5), 'none', 0.5)
    result = transform(torch.full((5, 9, 9), 3.0))
    assert result.dtype == torch.float32 and result.max() > 2.9


@pytest.mark.parametrize('crop', ['simple', 'rrc'])
@pytest.mark.parametrize('shape', [(7, 300), (300, 7), (64, 48), (1, 1)])
def test_rectangles_are_covered(crop, shape):
    image = torch.full((3, *shape), 200, dtype=torch.uint8)
    for transform in (transforms.pretrain_transform((24, 40), crop), transforms.centre_transform((24, 40))):
        result = transform(image)
        assert result.shape == (3, 24, 40) and (result == 200).all()


def test_cover_keeps_the_aspect():
    for shape in [(100, 50), (50, 100), (30, 31), (24, 40), (600, 7)]:
        height, width = transforms.Cover((24, 40))(noise(*shape)).shape[1:]
        scale = max(24 / shape[0], 40 / shape[1])
        assert (height, width) in [(24, int(shape[1] * scale)), (int(shape[0] * scale), 40)]
    assert transforms.Cover((32, 32))(noise(50, 70)).shape == v2.Resize(32)(noise(50, 70)).shape


def test_a_size_too_small_to_pad():
    with pytest.raises(InputError, match='--crop simple pads by 4 pixels'):
        transforms.pretrain_transform((4, 8), 'simple')


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = v2.Normalize(*STATISTICS)(images.double() / 255)
    assert torch.allclose(transforms.normalise(images, *STATISTICS).double(), expected, atol=1e-6)
    floats = images / 255
    before = floats.clone()
    assert torch.allclose(transforms.normalise(floats, *STATISTICS).double(), expected, atol=1e-6)
    assert torch.equal(floats, before)
