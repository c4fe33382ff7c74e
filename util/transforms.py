"""Crops and augmentations of uint8 images, and their normalisation."""

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2

from util.errors import InputError

BICUBIC = InterpolationMode.BICUBIC


class Cover(torch.nn.Module):
    """Resize to the smallest size that covers (H, W) at the same aspect: for squares, torchvision's Resize(side)."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image):
        (h, w), (height, width) = image.shape[-2:], self.size
        if h * width <= w * height:  # relatively flat: height decides
            height, width = height, max(width, w * height // h)
        else:
            height, width = max(height, h * width // w), width
        return v2.functional.resize(image, [height, width], self.interpolation, antialias=True)


class PaddedCrop(v2.RandomCrop):
    """RandomCrop(size, padding, padding_mode='reflect'), the same draws and pixels: but torchvision pads all of the
    image, in float32, which takes as long as the resize, and this only what the crop has outside.
    """

    def transform(self, image, params):
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
        spatial = [Cover(size), PaddedCrop(size, padding=4)]
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
        h, w = min(round((area / ratio) ** 0.5), height), min(round((area * ratio) ** 0.5), width)
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
    """timm's RandomErasing with normal noise per pixel, on uint8: the noise has the data's mean and deviation."""

    def __init__(self, probability, statistics):
        self.erase = RandomErasing(probability, mode='pixel', device='cpu')
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __call__(self, image):
        erased = self.erase(normalise(image, self.mean, self.std))
        return ((erased * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


def linprobe_transform(size):
    """uint8 (C, h, w) -> uint8 (C, H, W): MAE's random resized crop, flip."""
    crop = ClippedResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def normalise(images, mean, std):
    """uint8, or float in 0..1, (N, C, H, W) -> float, less mean and over std, each per channel."""
    mean, std = (torch.as_tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    floats = images.clone() if images.is_floating_point() else v2.functional.to_dtype(images, torch.float32, scale=True)
    return floats.sub_(mean).div_(std)  # in place: on a CPU new memory would take ten times as long
