"""Crops and augmentations of uint8 images, alone or with their masks, and normalisation."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from util.errors import InputError

BICUBIC = InterpolationMode.BICUBIC
IGNORE, PADDING = 255, -1  # in masks: counts for nothing; is not part of the image


class Cover(torch.nn.Module):
    """Resize to the smallest size that covers (H, W) at the same aspect: for squares, torchvision's Resize(side)."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image):
        (h, w), (height, width) = image.shape[-2:], self.size
        if h * width <= w * height:  # wider than the crop: height decides
            height, width = height, max(width, w * height // h)
        else:
            height, width = max(height, h * width // w), width
        return v2.functional.resize(image, [height, width], self.interpolation, antialias=True)


class PaddedCrop(v2.RandomCrop):
    """RandomCrop(size, padding, padding_mode='reflect'), the same draws and pixels.

    torchvision pads the whole image, in float32, which takes as long as the resize; this pads only what lies outside.
    """

    def transform(self, image, params):
        if min(self.size) <= 8:  # the reflection may reach beyond what the crop has inside
            return super().transform(image, params)
        left, top = params['left'] - params['padding'][0], params['top'] - params['padding'][1]
        right, bottom = left + self.size[1], top + self.size[0]
        inside = image.numpy()[:, max(top, 0) : bottom, max(left, 0) : right]
        vertical = max(-top, 0), max(bottom - image.shape[1], 0)
        horizontal = max(-left, 0), max(right - image.shape[2], 0)
        return torch.from_numpy(np.pad(inside, ((0, 0), vertical, horizontal), 'reflect'))


def pretrain_transform(size, crop='simple'):
    """uint8 (C, h, w) -> uint8 (C, H, W), flipped or not.

    crop: 'simple', the reference's (mmpretrain configs/mff); 'rrc', MAE's; 'none', the centre, for pictures that are
    small and varied.
    """
    if crop == 'simple':
        if min(size) <= 4:
            raise InputError(f'--input_size {size[0]} {size[1]}: --crop simple pads by 4 pixels and needs more')
        spatial = [Cover(size), PaddedCrop(size, padding=4, padding_mode='reflect')]
    elif crop == 'none':
        spatial = [Cover(size), v2.CenterCrop(size)]
    else:
        spatial = [v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC, antialias=True)]
    return v2.Compose([*spatial, v2.RandomHorizontalFlip()])


def centre_transform(size, crop_pct=1.0, interpolation=InterpolationMode.BILINEAR):
    """uint8 (C, h, w) -> uint8 (C, H, W), nothing random: resize to size / crop_pct, crop the centre."""
    return v2.Compose([Cover([int(side / crop_pct) for side in size], interpolation), v2.CenterCrop(size)])


class ClippedResizedCrop(v2.RandomResizedCrop):
    """MAE's random resized crop for probing: a box that does not fit is clipped, not drawn anew (its util/crop.py)."""

    def make_params(self, flat_inputs):
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * torch.empty(1).uniform_(*self.scale).item()
        ratio = torch.exp(torch.empty(1).uniform_(*np.log(self.ratio).tolist())).item()
        h, w = (max(1, round((area * scale) ** 0.5)) for scale in (1 / ratio, ratio))
        h, w = min(h, height), min(w, width)
        top, left = torch.randint(0, height - h + 1, (1,)).item(), torch.randint(0, width - w + 1, (1,)).item()
        return {'top': top, 'left': left, 'height': h, 'width': w}


def finetune_transform(size, statistics, auto_augment, erase_probability):
    """uint8 (C, h, w) -> uint8 (C, H, W): random resized crop, flip, RandAugment, erasing (MAE's FINETUNE.md)."""
    steps = [v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)]
    steps += [v2.RandomHorizontalFlip()]
    if auto_augment != 'none':
        colour = tuple(round(255 * value) for value in statistics[0])
        options = {
            'translate_const': int(min(size) * 0.45),
            'img_mean': colour,
            'interpolation': Image.Resampling.BICUBIC,
        }
        steps += [v2.ToPILImage(), rand_augment_transform(auto_augment, options), v2.PILToTensor()]
    return v2.Compose([*steps, Erase(erase_probability, statistics)])


class Erase:
    """timm's RandomErasing with normal noise per pixel, of the data's mean and deviation. uint8 stays uint8."""

    def __init__(self, probability, statistics):
        self.erase = RandomErasing(probability, mode='pixel', device='cpu')
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __call__(self, image):
        erased = self.erase(normalise(image, self.mean, self.std)) * self.std + self.mean
        if image.is_floating_point():
            return erased
        return (erased * 255).round().clamp(0, 255).to(torch.uint8)


def linprobe_transform(size):
    """uint8 (C, h, w) -> uint8 (C, H, W): MAE's random resized crop, flip."""
    crop = ClippedResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def normalise(images, mean, std):
    """uint8, or float in 0..1, (N, C, H, W) -> float, less mean and over std, each per channel."""
    mean, std = (torch.as_tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    floats = images.clone() if images.is_floating_point() else v2.functional.to_dtype(images, torch.float32, scale=True)
    return floats.sub_(mean).div_(std)  # in place: on a CPU new memory would take ten times as long


# --- Image and mask together (mmsegmentation configs/_base_/datasets/ade20k.py) ---------------------------------


@dataclass(frozen=True)
class SegmentationTransform:
    """uint8 image (C, h, w) and mask (h, w) -> image (C, H, W) and mask (H, W) int16, PADDING beside the image.

    What is beside the image has to become 0 after normalisation: fill_padding does it on the device.
    """

    size: tuple  # (H, W), the crop
    scale: tuple  # (long, short) side that images are fitted into
    ratios: tuple = (0.5, 2.0)  # bounds of what the scale is multiplied by

    def __call__(self, image, mask):
        size = fitted_size(image.shape[-2:], self.scale, random.uniform(*self.ratios))
        image = functional.resize(image, size, antialias=False)  # as cv2, to one level
        mask = functional.resize(mask[None], size, InterpolationMode.NEAREST)  # (1, h, w)
        box = choose_crop(mask, self.size)
        image, mask = functional.crop(image, *box), functional.crop(mask, *box)
        if random.random() < 0.5:
            image, mask = functional.horizontal_flip(image), functional.horizontal_flip(mask)
        if len(image) == 3 and image.dtype == torch.uint8:
            image = photometric_distortion(image)
        beside = [0, 0, self.size[1] - image.shape[2], self.size[0] - image.shape[1]]  # right and bottom
        return functional.pad(image, beside), functional.pad(mask.to(torch.int16), beside, fill=PADDING)[0]


def fitted_size(size, scale, ratio=1.0):
    """(height, width) of an image of this size, resized at the same aspect to fit into scale (long, short) * ratio."""
    long, short = (int(side * ratio) for side in scale)
    factor = min(long / max(size), short / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def choose_crop(mask, size, max_share=0.75, tries=10):
    """(top, left, height, width) of a random crop in which no class has max_share of the pixels, if tries find one.

    Smaller masks are not cropped.
    """
    height, width = mask.shape[-2:]
    h, w = min(size[0], height), min(size[1], width)
    for attempt in range(tries + 1):
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        if attempt == tries or is_mixed(mask[..., top : top + h, left : left + w], max_share):
            return top, left, h, w


def is_mixed(mask, max_share):
    """Whether there are at least two classes, none with max_share of the pixels that are not ignored."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return int((counts > 0).sum()) > 1 and int(counts.max()) / int(counts.sum()) < max_share


def photometric_distortion(image):
    """Brightness, contrast (first or last), saturation and hue, each with probability 0.5. uint8 RGB.

    mmsegmentation's contrast multiplies all pixels, which torchvision calls brightness.
    """
    contrast_first = random.random() < 0.5
    if random.random() < 0.5:
        image = brighten(image, random.uniform(-32, 32))
    if contrast_first and random.random() < 0.5:
        image = functional.adjust_brightness(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = shift_hsv(image, saturation=random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = shift_hsv(image, hue=random.randint(-18, 17))
    if not contrast_first and random.random() < 0.5:
        image = functional.adjust_brightness(image, random.uniform(0.5, 1.5))
    return image


def brighten(image, levels):
    """Add to every pixel."""
    return (image.float() + levels).clamp(0, 255).to(torch.uint8)


def shift_hsv(image, saturation=1.0, hue=0):
    """Scale the saturation and turn the hue by steps of 2 degrees, on 8-bit HSV with 180 hues, as OpenCV has it."""
    r, g, b = x = image.float()
    v = x.amax(0)
    c = v - x.amin(0)
    s = (255 * c / v.clamp(min=1)).round()
    h = torch.where(v == r, (g - b) / c, torch.where(v == g, 2 + (b - r) / c, 4 + (r - g) / c))  # sixths of a turn
    h = (30 * h.nan_to_num(0, 0, 0)).round() % 180
    s = (s * saturation).clamp(max=255).floor()
    k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + (h + hue) % 180 / 30) % 6
    return (v - v * s / 255 * torch.minimum(k, 4 - k).clamp(0, 1)).round().to(torch.uint8)
