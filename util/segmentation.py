"""Semantic segmentation: the training transform of image and mask, the loss, the sliding window, and IoU.

Everything follows mmsegmentation's recipe for ADE20K (configs/_base_/datasets/ade20k.py, configs/mae).
"""

import random
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.checkpoint import checkpoint
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from util import data
from util.masks import IGNORE

PADDING = -1  # what a transformed mask holds beside the image
AUX_WEIGHT = 0.4
CHUNK_BYTES = 256e6  # of enlarged logits at a time


class PairSamples(data.Samples):
    """(epoch, index) -> (transformed image, transformed mask, problem), as data.Samples."""

    def __getitem__(self, key):
        epoch, index = key
        image, mask, problem = self.read(epoch, index)
        data.seed_generators(self.seed, epoch, index)
        return *self.transform(image, mask), problem


def unchanged(image, mask):
    """The transform of evaluation."""
    return image, mask


# --- Training transform (mmsegmentation configs/_base_/datasets/ade20k.py) ------------------------------------


@dataclass(frozen=True)
class TrainTransform:
    """uint8 image (C, h, w) and mask (h, w) -> image (C, H, W) and mask (H, W) int16, PADDING beside the image.

    What is beside the image has to become 0 after normalisation: fill_padding does it on the device.
    """

    size: tuple  # (H, W), the crop
    scale: tuple  # (long, short) side that images are fitted into
    ratios: tuple = (0.5, 2.0)  # bounds of what the scale is multiplied by

    def __call__(self, image, mask):
        size = fitted_size(image.shape[-2:], self.scale, random.uniform(*self.ratios))
        image = functional.resize(tv_tensors.Image(image), size, antialias=False)  # as cv2, to one level
        mask = functional.resize(tv_tensors.Mask(mask), size)  # nearest
        box = choose_crop(mask, self.size)
        image, mask = functional.crop(image, *box), functional.crop(mask, *box)
        if random.random() < 0.5:
            image, mask = functional.horizontal_flip(image), functional.horizontal_flip(mask)
        if len(image) == 3 and image.dtype == torch.uint8:
            image = photometric_distortion(image)
        beside = [0, 0, self.size[1] - image.shape[2], self.size[0] - image.shape[1]]  # right and bottom
        mask = functional.pad(mask.to(torch.int16), beside, fill=PADDING)
        return functional.pad(image, beside).as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


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
    """Brightness, contrast (first or last), saturation and hue, each with probability 0.5. uint8 RGB."""
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
        image = functional.adjust_brightness(image, random.uniform(0.5, 1.5))  # the reference's contrast
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


def fill_padding(imgs, masks):
    """On the device: normalised images (N, C, H, W) with 0 beside the image, and masks (N, H, W) int64 with IGNORE."""
    beside = masks == PADDING
    return imgs.masked_fill(beside[:, None], 0.0), masks.masked_fill(beside, IGNORE).long()


# --- Loss -----------------------------------------------------------------------------------------------------


def segmentation_loss(logits, aux_logits, masks):
    """Cross entropy of the head, plus AUX_WEIGHT times that of the auxiliary head.

    logits, aux_logits: (N, K, h, w) at any resolution; masks (N, H, W) int64, with IGNORE.
    """
    return pixel_loss(logits, masks) + AUX_WEIGHT * pixel_loss(aux_logits, masks)


def pixel_loss(logits, masks):
    """Cross entropy of the enlarged logits, divided by ALL pixels, ignored ones included, as the reference does.

    A few images at a time, whose enlarged logits the backward pass computes again: those of 150 classes at 512 x 512
    take 157 MB an image, and would be kept several times for the whole batch.
    """
    count = max(1, int(CHUNK_BYTES / (4 * logits.shape[1] * masks[0].numel())))
    losses = [
        checkpoint(loss_sum, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(logits.split(count), masks.split(count))
    ]
    return sum(losses) / masks.numel()


def loss_sum(logits, masks):
    logits = interpolate(logits, masks.shape[-2:], mode='bilinear', align_corners=False)
    return cross_entropy(logits, masks, ignore_index=IGNORE, reduction='sum')


# --- Inference ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """How whole images are segmented."""

    size: tuple  # (H, W), the model's input
    stride: tuple
    scale: tuple  # (long, short) side that images are fitted into
    ratios: tuple = (1.0,)  # of the scale: the probabilities of several are averaged
    flip: bool = False  # and those of the mirrored image


def segment(model, imgs, window, size):
    """The class of every pixel: imgs (1, C, h, w) normalised -> (1, *size), for an annotation of this size."""
    total = 0.0
    for ratio in window.ratios:
        fitted = fitted_size(imgs.shape[-2:], window.scale, ratio)
        resized = interpolate(imgs, fitted, mode='bilinear', align_corners=False)
        for mirrored in (False, True) if window.flip else (False,):
            logits = slide(model, resized.flip(-1) if mirrored else resized, window.size, window.stride)
            logits = logits.flip(-1) if mirrored else logits
            total = total + interpolate(logits, size, mode='bilinear', align_corners=False).softmax(1)
    return total.argmax(1)


def slide(model, imgs, size, stride):
    """Logits of windows over imgs (1, C, h, w), averaged where they overlap -> (1, K, h, w) float.

    The last window of a row ends with the image. An image smaller than a window is padded to it with 0.
    """
    height, width = imgs.shape[-2:]
    imgs = pad(imgs, (0, max(0, size[1] - width), 0, max(0, size[0] - height)))
    total, count = 0.0, imgs.new_zeros(imgs.shape[-2:])
    for top in starts(imgs.shape[-2], size[0], stride[0]):
        for left in starts(imgs.shape[-1], size[1], stride[1]):
            rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
            logits = model(imgs[..., rows, columns]).float()
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, logits.shape[1], *imgs.shape[-2:])
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return (total / count)[..., :height, :width]


def starts(length, size, stride):
    """Where windows of a size begin along a side: every stride, the last one so that it ends with the side."""
    number = -(-(length - size) // stride) + 1
    return [min(i * stride, length - size) for i in range(number)]


# --- Scores ---------------------------------------------------------------------------------------------------


def confusion_matrix(predicted, masks, num_classes):
    """(K, K) int64: pixels by class, rows, and predicted class, columns. Both (..., H, W); IGNORE is left out."""
    counted = masks != IGNORE
    pairs = masks[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion):
    """{'miou', 'macc', 'pixel_acc', 'iou': (K,), 'acc': (K,)} in percent.

    IoU is nan for a class that is neither there nor predicted, accuracy for one that is not there; means leave nan out.
    """
    confusion = confusion.double().cpu()
    right, there, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, acc = 100 * right / (there + predicted - right), 100 * right / there
    return {
        'miou': iou.nanmean().item(),
        'macc': acc.nanmean().item(),
        'pixel_acc': (100 * right.sum() / there.sum()).item(),
        'iou': iou,
        'acc': acc,
    }
