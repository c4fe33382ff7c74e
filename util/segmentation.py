"""Semantic segmentation: images with masks, their transform, loss, whole images, and IoU.

The numbers are those of mmsegmentation's configs/mae. A source of pairs is like one of images
(util/sources.py), but source[i] is (image (C, H, W), mask (H, W)): uint8 class numbers from 0, or
IGNORE where a pixel counts for nothing.
"""

import contextlib
import os
import random
from functools import partial

import numpy as np
import PIL.Image
import torch
from matplotlib.colors import hsv_to_rgb
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import InterpolationMode, functional

from util import data
from util.errors import InputError
from util.files import find_splits, list_files, read_file
from util.images import EXTENSIONS
from util.shapes import Shapes
from util.sources import Images, decode_options

IGNORE, PADDING = 255, -1  # in masks: counts for nothing; is not part of the image
AUX_WEIGHT = 0.4  # of the auxiliary head's loss
CHUNK_BYTES = 256e6  # of enlarged logits at a time

# The classes of ADEChallengeData2016, whose masks number them from 1.
ADE20K = (
    'wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,'
    'door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,'
    'field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,'
    'signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,'
    'path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,'
    'coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,'
    'swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,'
    'streetlight,booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,'
    'escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,canopy,washer,'
    'plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,'
    'step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,'
    'hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,'
    'shower,radiator,glass,clock,flag'
).split(',')


# --- Images and masks -----------------------------------------------------------------------------


def open_pairs(path, args, sizes, classes=None):
    """(training pairs, validation pairs or None) of what --data_path or --val_path names.

    classes: of a checkpoint, for data that does not name its own. Raises InputError if images,
    masks or classes are missing, or masks hold numbers that are no classes.
    """
    if path == 'shapes':
        return ShapePairs('train', sizes['img_size']), ShapePairs('val', sizes['img_size'])
    folder = os.path.join(path or '', 'images')
    names = list_files(folder, EXTENSIONS)
    classes = find_classes(path, args.num_classes) or classes
    if not names or classes is None or len(classes) < 2:
        raise InputError(
            f'{folder}: {len(names)} images, of the classes {classes}; name two or more on the '
            f'lines of {path}/classes.txt, or give --num_classes N'
        )
    splits = find_splits(folder, names, labelled=False)
    pairs = [Pairs(path, names[part], classes, args, sizes) for _, part in splits]
    return (*pairs, None)[:2]


def find_classes(root, num_classes):
    """Their names: numbers, those in classes.txt, one on each line, or ADE20K's; else None."""
    path = os.path.join(root, 'classes.txt')
    if num_classes:
        return list(map(str, range(num_classes)))
    if not os.path.exists(path):
        return ADE20K if 'ADEChallengeData2016' in os.path.abspath(root) else None
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        names = [name.strip() for name in file.read().strip().splitlines()]
    if '' in names or len(set(names)) < len(names):
        raise InputError(f'{path}: an empty line or a name twice; each line names one class')
    return names


class Pairs(Images):
    """images/NAME.jpg, or another ending, and masks/NAME.png below a folder.

    names: of the images, bytes, relative to root/images.
    """

    def __init__(self, root, names, classes, args, sizes):
        options = decode_options(args, sizes)
        super().__init__(options, root, [b'images/' + name for name in names], read_file)
        self.classes = classes
        has_annotations = os.path.isdir(os.path.join(root, 'annotations'))  # as in ADE20K
        self.folder = os.path.join(root, 'annotations' if has_annotations else 'masks')
        self.masks = np.array([os.path.splitext(name)[0] + b'.png' for name in names])
        alone = set(self.masks.tolist()) - set(list_files(self.folder, ('.png',)))
        if alone:
            missing = os.path.join(self.folder, os.fsdecode(min(alone)))
            raise InputError(f'{len(alone)} images lack their mask, such as {missing}')
        reduce_zero = args.reduce_zero_label
        reduce_zero = classes == ADE20K if reduce_zero is None else reduce_zero
        self.table = number_table(args.ignore_label, reduce_zero)
        self.check_numbers(args.ignore_label)

    def numbers(self, index):
        """(path, what the mask file holds, (H, W) uint8). Raises ValueError."""
        path = os.path.join(self.folder, os.fsdecode(self.masks[index]))
        try:
            with PIL.Image.open(path) as image:
                if image.mode not in ('1', 'L', 'P'):
                    raise ValueError(f'a mask has class numbers of 8 bits, not mode {image.mode}')
                return path, np.array(image).astype(np.uint8)
        except Exception as error:  # decoders raise many kinds of error for a damaged file
            raise ValueError(f'{path}: {error}') from None

    def __getitem__(self, index):
        image, (path, numbers) = super().__getitem__(index)[0], self.numbers(index)
        mask = self.table[numbers]
        if mask.shape != image.shape[1:]:
            raise ValueError(f'{path}: {mask.shape}, but its image {tuple(image.shape[1:])} pixels')
        if (mask[mask != IGNORE] >= len(self.classes)).any():
            raise ValueError(f'{path}: class numbers beyond the {len(self.classes)} classes')
        return image, torch.from_numpy(mask.astype(np.uint8))

    def check_numbers(self, ignore, count=16):
        """Look at masks spread over the set; InputError if some numbers seem to be no classes."""
        numbers = set()
        for index in range(0, len(self), -(-len(self) // count)):
            with contextlib.suppress(ValueError):  # an unreadable one; training counts these
                numbers.update(np.unique(self.numbers(index)[1]).tolist())
        classes = {number: self.table[number] for number in sorted(numbers)}
        wrong = [number for number in classes if len(self.classes) <= classes[number] != IGNORE]
        if ignore is None and IGNORE in numbers and len(set(classes.values())) < 3:
            wrong.append(IGNORE)  # as in masks of 0 and 255
        if wrong:
            raise InputError(
                f'{self.folder}: some masks hold {list(classes)}; number the {len(self.classes)} '
                f'classes from 0, and not as {wrong}; or say by --ignore_label N what to ignore, '
                'or by --reduce_zero_label that classes count from 1'
            )


class ShapePairs(Shapes):
    """Drawn pictures with the outlines of their shapes: class 0 is the background."""

    classes = ['background', *Shapes.classes]

    def __getitem__(self, index):
        return self.picture_and_mask(index)


def number_table(ignore=None, reduce_zero=False):
    """(256,): number in a file -> class, or IGNORE. reduce_zero: 1 is the first class."""
    table = np.arange(256)
    if reduce_zero:
        table = np.append(IGNORE, table[:-1])
    elif ignore is not None:
        table[IGNORE] = IGNORE + 1  # no class has that number
    table[IGNORE if ignore is None else ignore] = IGNORE
    return table.astype(np.int16)


class PairSamples(data.Samples):
    """(epoch, index) -> (transformed image, transformed mask, problem), as data.Samples."""

    def __getitem__(self, key):
        image, mask, problem = self.read(*key)
        if self.transform is not None:  # None in evaluation
            data.seed_generators(self.seed, *key)
            image, mask = self.transform(image, mask)
        return image, mask, problem


# --- The training transform (mmsegmentation configs/_base_/datasets/ade20k.py) --------------------


def transform_pair(image, mask, size, scale, ratios=(0.5, 2.0)):
    """uint8 (C, h, w) and (h, w) -> (C, H, W) and int16 (H, W), PADDING beside the image.

    What is beside the image has to become 0 after normalisation: fill_padding does it.

    size: (H, W), of the crop. scale: (long, short) side that images are fitted into, times a random
    number in the range of ratios.
    """
    fitted = fitted_size(image.shape[-2:], scale, random.uniform(*ratios))
    image = functional.resize(image, fitted, antialias=False)  # as cv2, to one level
    mask = functional.resize(mask[None], fitted, InterpolationMode.NEAREST)  # (1, h, w)
    box = choose_crop(mask, size)
    image, mask = functional.crop(image, *box), functional.crop(mask, *box)
    if random.random() < 0.5:
        image, mask = functional.horizontal_flip(image), functional.horizontal_flip(mask)
    if len(image) == 3 and image.dtype == torch.uint8:
        image = photometric_distortion(image)
    beside = [0, 0, size[1] - image.shape[2], size[0] - image.shape[1]]  # right and bottom
    mask = functional.pad(mask.to(torch.int16), beside, fill=PADDING)
    return functional.pad(image, beside), mask[0]


def fill_padding(imgs, masks):
    """Normalised (N, C, H, W) with 0 beside the image, and masks (N, H, W) int64 with IGNORE."""
    beside = masks == PADDING
    return imgs.masked_fill(beside[:, None], 0.0), masks.masked_fill(beside, IGNORE).long()


def fitted_size(size, scale, ratio=1.0):
    """(height, width) of an image of this size, fitted into scale (long, short) * ratio."""
    long, short = (int(side * ratio) for side in scale)
    factor = min(long / max(size), short / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def choose_crop(mask, size, max_share=0.75, tries=10):
    """(top, left, height, width) of a random crop; masks that are smaller are not cropped.

    It has at least two classes, none on max_share of the pixels that count, if tries find one.
    """
    height, width = mask.shape[-2:]
    h, w = min(size[0], height), min(size[1], width)
    for attempt in range(tries + 1):
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        crop = mask[..., top : top + h, left : left + w]
        counts = torch.bincount(crop.flatten(), minlength=IGNORE + 1)[:IGNORE]
        is_mixed = (counts > 0).sum() > 1 and int(counts.max()) / int(counts.sum()) < max_share
        if is_mixed or attempt == tries:
            return top, left, h, w


def photometric_distortion(image):
    """Brightness, contrast (second or last), saturation and hue, each with probability 0.5.

    mmsegmentation's contrast multiplies all pixels of an RGB image, as adjust_brightness does.
    """
    steps = [
        lambda image: brighten(image, random.uniform(-32, 32)),
        lambda image: shift_hsv(image, saturation=random.uniform(0.5, 1.5)),
        lambda image: shift_hsv(image, hue=random.randint(-18, 17)),
    ]
    place = 1 if random.random() < 0.5 else 3
    steps.insert(place, lambda x: functional.adjust_brightness(x, random.uniform(0.5, 1.5)))
    for step in steps:
        if random.random() < 0.5:
            image = step(image)
    return image


def brighten(image, levels):
    """Add to every pixel."""
    return (image.float() + levels).clamp(0, 255).to(torch.uint8)


def shift_hsv(image, saturation=1.0, hue=0):
    """Scale the saturation, turn the hue by steps of 2 degrees: OpenCV's HSV of 8 bits."""
    r, g, b = x = image.float()
    v = x.amax(0)
    c = v - x.amin(0)
    s = (255 * c / v.clamp(min=1)).round()
    h = torch.where(v == r, (g - b) / c, torch.where(v == g, 2 + (b - r) / c, 4 + (r - g) / c))
    h = (30 * h.nan_to_num(0, 0, 0)).round() % 180  # from sixths of a turn
    s = (s * saturation).clamp(max=255).floor()
    k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + (h + hue) % 180 / 30) % 6
    return (v - v * s / 255 * torch.minimum(k, 4 - k).clamp(0, 1)).round().to(torch.uint8)


# --- Loss -----------------------------------------------------------------------------------------

enlarge = partial(interpolate, mode='bilinear', align_corners=False)  # (x, size)


def segmentation_loss(logits, aux_logits, masks):
    """Cross entropy of the head, plus AUX_WEIGHT times that of the auxiliary head.

    logits, aux_logits: (N, K, h, w) at any resolution; masks (N, H, W) int64, with IGNORE.
    """
    return pixel_loss(logits, masks) + AUX_WEIGHT * pixel_loss(aux_logits, masks)


def pixel_loss(logits, masks):
    """Cross entropy of the enlarged logits over ALL pixels: ignored ones count as 0 in the mean.

    A few images at a time, whose enlarged logits the backward pass computes again: those of 150
    classes at 512 x 512 take 157 MB per image, and would be kept several times.
    """
    count = max(1, int(CHUNK_BYTES / (4 * logits.shape[1] * masks[0].numel())))
    losses = [
        checkpoint(loss_sum, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(logits.split(count), masks.split(count))
    ]
    return sum(losses) / masks.numel()


def loss_sum(logits, masks):
    logits = enlarge(logits, masks.shape[-2:])
    return cross_entropy(logits, masks, ignore_index=IGNORE, reduction='sum')


# --- Whole images ---------------------------------------------------------------------------------


def segment(model, imgs, size, window, stride, scale, ratios=(1.0,), flip=False):
    """The class of every pixel: imgs (1, C, h, w) normalised -> (1, *size).

    Args:
        window, stride: (H, W), of the sliding window, which is the model's input.
        scale: (long, short) side that images are fitted into.
        ratios, flip: average the probabilities at several scales, and of the mirrored image.
    """
    maps = []  # of scales and mirror images: (1, K, H, w)
    for ratio in ratios:
        fitted = fitted_size(imgs.shape[-2:], scale, ratio)
        resized = enlarge(imgs, fitted)
        for mirrored in (False, True) if flip else (False,):
            logits = slide(model, resized.flip(-1) if mirrored else resized, window, stride)
            maps.append(enlarge(logits.flip(-1) if mirrored else logits, (size[0], fitted[1])))
    # Rows come first, then columns of a strip: 150 classes of a large photo would not fit.
    rows, strips = max(1, int(CHUNK_BYTES / (4 * maps[0].shape[1] * size[1]))), []
    for parts in zip(*(logits.split(rows, dim=2) for logits in maps)):
        probabilities = sum(enlarge(part, (part.shape[2], size[1])).softmax(1) for part in parts)
        strips.append(probabilities.argmax(1))
    return torch.cat(strips, dim=1)


def slide(model, imgs, size, stride):
    """Logits of windows over imgs (1, C, h, w), averaged where they overlap -> (1, K, h, w) float.

    The last window of a row ends with the image. An image that is smaller is padded with 0.
    """
    height, width = imgs.shape[-2:]
    imgs = pad(imgs, (0, max(0, size[1] - width), 0, max(0, size[0] - height)))
    total, count = None, imgs.new_zeros(imgs.shape[-2:])
    for top in starts(imgs.shape[-2], size[0], stride[0]):
        for left in starts(imgs.shape[-1], size[1], stride[1]):
            window = ..., slice(top, top + size[0]), slice(left, left + size[1])
            logits = model(imgs[window]).float()
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *imgs.shape[-2:])
            total[window] += logits
            count[window] += 1
    return (total / count)[..., :height, :width]


def starts(length, size, stride):
    """Where the windows along a side begin; the last one ends with the side."""
    number = -(-(length - size) // stride) + 1
    return [min(i * stride, length - size) for i in range(number)]


# --- Scores ---------------------------------------------------------------------------------------


def confusion_matrix(predicted, masks, num_classes):
    """(K, K) int64: pixels by class, rows, and predicted class, columns; IGNORE is left out."""
    counted = masks != IGNORE
    pairs = masks[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion):
    """{'miou', 'macc', 'pixel_acc', 'iou': (K,), 'acc': (K,)} in percent.

    IoU is nan for a class that is neither there nor predicted, accuracy for one that is not there;
    means leave nan out.
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


# --- Pictures -------------------------------------------------------------------------------------

# (256, 3) uint8, a colour for each class, neighbours of distant hues, and white for IGNORE.
HSV = [((0.6 + 0.61 * i) % 1, (0.4, 0.8)[i % 2], (0.5, 0.95, 0.75)[i % 3]) for i in range(IGNORE)]
PALETTE = np.round(255 * hsv_to_rgb([*HSV, (0, 0, 1)])).astype(np.uint8)


def indexed(mask):
    """PIL image of mask (H, W): class numbers, which a palette shows in colour."""
    image = PIL.Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(PALETTE.tobytes())
    return image


def overlay(image, mask):
    """PIL image of image (C, H, W) under the colours of mask (H, W)."""
    image = functional.to_pil_image(image if len(image) == 3 else image[:1]).convert('RGB')
    return PIL.Image.blend(image, indexed(mask).convert('RGB'), 0.5)
