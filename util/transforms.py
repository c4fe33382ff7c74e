"""Crops and augmentations of uint8 images, and normalisation."""

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2

from util.errors import InputError

BICUBIC = InterpolationMode.BICUBIC


class Cover(torch.nn.Module):
    """Resize to the smallest size that covers (H, W) at the same aspect."""

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

    torchvision pads the whole image, in float32, which takes as long as the resize. This pads only
    what lies outside.
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

    crop: 'simple', the reference's (mmpretrain configs/mff); 'rrc', MAE's; 'none', the centre, for
    pictures that are small and varied.
    """
    if crop == 'simple':
        if min(size) <= 4:
            raise InputError(f'--crop simple pads by 4 pixels and needs more than {size}')
        spatial = [Cover(size), PaddedCrop(size, padding=4, padding_mode='reflect')]
    elif crop == 'none':
        spatial = [Cover(size), v2.CenterCrop(size)]
    else:
        spatial = [v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=BICUBIC, antialias=True)]
    return v2.Compose([*spatial, v2.RandomHorizontalFlip()])


def centre_transform(size, crop_pct=1.0, interpolation=InterpolationMode.BILINEAR):
    """uint8 (C, h, w) -> uint8 (C, H, W): resized to size / crop_pct, cropped at the centre."""
    resize = Cover([int(side / crop_pct) for side in size], interpolation)
    return v2.Compose([resize, v2.CenterCrop(size)])


# --- Classifiers ----------------------------------------------------------------------------------


class PadToAspect(torch.nn.Module):
    """Pad an image evenly to the aspect of (H, W); the colour, per channel in 0..1, is the mean."""

    def __init__(self, size, colour):
        super().__init__()
        self.size, self.colour = size, colour

    def forward(self, image):
        (h, w), (height, width) = image.shape[-2:], self.size
        rows = max(0, round(w * height / width) - h)
        columns = max(0, round(h * width / height) - w)
        colour = self.colour
        if not image.is_floating_point():
            colour = [round(255 * value) for value in colour]
        left, top = columns // 2, rows // 2
        return v2.functional.pad(image, [left, top, columns - left, rows - top], fill=colour)


def padding(args, settings):
    """[PadToAspect] where --resize_mode, or that of the checkpoint, is pad; else []."""
    mode = args.resize_mode or settings.args.get('resize_mode')
    return [PadToAspect(settings.sizes['img_size'], settings.mean)] if mode == 'pad' else []


def test_transform(args, settings):
    """uint8 (C, h, w) -> uint8 (C, H, W), nothing random; a padded image is not cropped."""
    pad = padding(args, settings)
    crop_pct = 1.0 if pad else args.crop_pct or settings.crop_pct
    return v2.Compose([*pad, centre_transform(settings.sizes['img_size'], crop_pct, BICUBIC)])


class ClippedResizedCrop(v2.RandomResizedCrop):
    """MAE's crop for probing: a box that does not fit is clipped, not drawn anew (util/crop.py)."""

    def make_params(self, flat_inputs):
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * torch.empty(1).uniform_(*self.scale).item()
        ratio = torch.exp(torch.empty(1).uniform_(*np.log(self.ratio).tolist())).item()
        h, w = (max(1, round((area * scale) ** 0.5)) for scale in (1 / ratio, ratio))
        h, w = min(h, height), min(w, width)
        top = torch.randint(0, height - h + 1, (1,)).item()
        left = torch.randint(0, width - w + 1, (1,)).item()
        return {'top': top, 'left': left, 'height': h, 'width': w}


def finetune_transform(args, settings):
    """uint8 (C, h, w) -> uint8 (C, H, W): crop, flip, RandAugment, erasing (MAE's FINETUNE.md)."""
    size, statistics = settings.sizes['img_size'], (settings.mean, settings.std)
    crop = v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)
    steps = [*padding(args, settings), crop, v2.RandomHorizontalFlip()]
    if args.aa != 'none':
        options = {
            'translate_const': int(min(size) * 0.45),
            'img_mean': tuple(round(255 * value) for value in settings.mean),
            'interpolation': Image.Resampling.BICUBIC,
        }
        steps += [v2.ToPILImage(), rand_augment_transform(args.aa, options), v2.PILToTensor()]
    return v2.Compose([*steps, Erase(args.reprob, statistics)])


class Erase:
    """timm's RandomErasing, with noise of the data's mean and deviation. uint8 stays uint8."""

    def __init__(self, probability, statistics):
        self.erase = RandomErasing(probability, mode='pixel', device='cpu')
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __call__(self, image):
        erased = self.erase(normalise(image, self.mean, self.std)) * self.std + self.mean
        if image.is_floating_point():
            return erased
        return (erased * 255).round().clamp(0, 255).to(torch.uint8)


def linprobe_transform(args, settings):
    """uint8 (C, h, w) -> uint8 (C, H, W): MAE's random resized crop, flip."""
    size = settings.sizes['img_size']
    crop = ClippedResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)
    return v2.Compose([*padding(args, settings), crop, v2.RandomHorizontalFlip()])


def normalise(images, mean, std):
    """uint8, or float in 0..1, (N, C, H, W) -> float, less mean and over std, each per channel."""
    mean, std = (torch.as_tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    if images.is_floating_point():
        images = images.clone()
    else:
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
    return images.sub_(mean).div_(std)  # in place: new memory takes a CPU ten times as long
