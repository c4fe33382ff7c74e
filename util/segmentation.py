"""Semantic segmentation: images with masks, their transform, loss, whole images, and IoU.

The numbers are those of mmsegmentation's configs/mae. A source of pairs is like one of images
(util/sources.py), but source[i] is (image (C, H, W), mask (H, W)): uint8 class numbers from 0, or
IGNORE where a pixel counts for nothing.
"""

import contextlib
import itertools
import os
import random
import sys
from functools import partial

import numpy as np
import PIL.Image
import torch
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import InterpolationMode, functional

from util import data
from util.errors import InputError, as_input_error
from util.files import find_splits, image_paths, list_files, read_file
from util.images import EXTENSIONS, read_image, reading
from util.shapes import Shapes
from util.sources import Images, decode_options
from util.transforms import normalise

IGNORE, PADDING, WRONG = 255, -1, 256  # in masks: counts for nothing; beside the image; no class
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
    folder, listed = (os.path.join(path or '', name) for name in ('images', 'classes.txt'))
    names = list_files(folder, EXTENSIONS)
    if args.num_classes:
        classes = list(map(str, range(args.num_classes)))
    elif os.path.exists(listed):
        with open(listed, encoding='utf-8-sig', errors='replace') as file:
            classes = [name.strip() for name in file.read().strip().splitlines()]
    elif 'ADEChallengeData2016' in os.path.abspath(path):
        classes = ADE20K
    if not names or not classes or len(set(classes) - {''}) < max(2, len(classes)):
        raise InputError(
            f'{folder}: {len(names)} images, of the classes {classes}; name two or more, each on '
            f'a line of its own, in {listed}, or give --num_classes N'
        )
    splits = find_splits(folder, names, labelled=False)
    pairs = [Pairs(path, names[part], classes, args, sizes) for _, part in splits]
    return (*pairs, None)[:2]


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
        zero, ignore = args.reduce_zero_label, args.ignore_label
        zero = classes == ADE20K if zero is None else zero
        self.table = np.arange(2**16) - zero  # number in a PNG -> class, IGNORE or WRONG
        self.table[self.table >= len(classes)] = WRONG
        self.table[:zero] = self.table[IGNORE if ignore is None else ignore] = IGNORE
        self.check_numbers(ignore)

    def read_mask(self, index):
        """(path, what the mask's file holds: an array of numbers). Raises InputError."""
        path = os.path.join(self.folder, os.fsdecode(self.masks[index]))
        with reading(path), PIL.Image.open(path) as image:
            return path, np.array(image).astype(int)

    def __getitem__(self, index):
        image, (path, numbers) = super().__getitem__(index)[0], self.read_mask(index)
        mask, size = self.table[numbers], tuple(image.shape[1:])
        if mask.shape != size or (mask == WRONG).any():
            raise ValueError(
                f'{path}: {mask.shape} numbers up to {numbers.max()}, for {size} pixels of '
                f'{len(self.classes)} classes'
            )
        return image, torch.from_numpy(mask.astype(np.uint8))

    def check_numbers(self, ignore, count=16):
        """Look at masks spread over the set; InputError if some numbers seem to be no classes."""
        numbers = set()
        for index in range(0, len(self), -(-len(self) // count)):
            with contextlib.suppress(InputError):  # an unreadable one; training counts these
                numbers.update(np.unique(self.read_mask(index)[1]).tolist())
        found = {number: self.table[number] for number in sorted(numbers)}
        wrong = [number for number in found if found[number] == WRONG]
        if ignore is None and IGNORE in found and len(set(found.values())) < 3:
            wrong.append(IGNORE)  # as in masks of 0 and 255
        if wrong:
            raise InputError(
                f'{self.folder}: some masks hold {list(found)}; number the {len(self.classes)} '
                f'classes from 0, and not as {wrong}; or say by --ignore_label N what to ignore, '
                'or by --reduce_zero_label that classes count from 1'
            )


class ShapePairs(Shapes):
    """Drawn pictures with the outlines of their shapes: class 0 is the background."""

    classes = ['background', *Shapes.classes]

    def __getitem__(self, index):
        return self.picture_and_mask(index)


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

    size: (H, W), of the crop. ratios: range of a random factor of scale (fitted_size).
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
    """Beside the image: 0 in normalised imgs (N, C, H, W), IGNORE in masks (N, H, W) -> int64."""
    beside = masks == PADDING
    return imgs.masked_fill(beside[:, None], 0.0), masks.masked_fill(beside, IGNORE).long()


def fitted_size(size, scale, ratio=1.0):
    """(height, width) of an image of this size, fitted into scale (long and short side) * ratio."""
    short, long = sorted(int(side * ratio) for side in scale)
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
        lambda x: (x + random.uniform(-32, 32)).clamp(0, 255).to(torch.uint8),
        lambda x: shift_hsv(x, saturation=random.uniform(0.5, 1.5)),
        lambda x: shift_hsv(x, hue=random.randint(-18, 17)),
    ]
    place = 1 if random.random() < 0.5 else 3
    steps.insert(place, lambda x: functional.adjust_brightness(x, random.uniform(0.5, 1.5)))
    for step in steps:
        if random.random() < 0.5:
            image = step(image)
    return image


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


def segment(model, imgs, size, scale, ratios=(1.0,), flip=False):
    """The class of every pixel: imgs (1, C, h, w) normalised -> (1, *size).

    Images are fitted into scale, as in fitted_size. The probabilities at several ratios and, with
    flip, of the mirrored image are averaged.
    """
    maps = []  # of scales and mirror images: (1, K, H, w)
    for ratio, mirrored in itertools.product(ratios, (False, True)[: 1 + flip]):
        fitted = fitted_size(imgs.shape[-2:], scale, ratio)
        resized = enlarge(imgs, fitted)
        logits = slide(model, resized.flip(-1) if mirrored else resized)
        maps.append(enlarge(logits.flip(-1) if mirrored else logits, (size[0], fitted[1])))
    # Rows come first, then columns of a strip: 150 classes of a large photo would not fit.
    rows, strips = max(1, int(CHUNK_BYTES / (4 * maps[0].shape[1] * size[1]))), []
    for parts in zip(*(logits.split(rows, dim=2) for logits in maps)):
        probabilities = sum(enlarge(part, (part.shape[2], size[1])).softmax(1) for part in parts)
        strips.append(probabilities.argmax(1))
    return torch.cat(strips, dim=1)


def slide(model, imgs):
    """Logits of windows over imgs (1, C, h, w), averaged where they overlap -> (1, K, h, w) float.

    Windows have the size of the model's input, and two thirds of it lie between them; the last
    of a row ends with the image. An image that is smaller is padded with 0.
    """
    size, (height, width) = model.img_size, imgs.shape[-2:]
    imgs = pad(imgs, (0, max(0, size[1] - width), 0, max(0, size[0] - height)))
    total = imgs.new_zeros(1, model.classifier[-1].out_channels, *imgs.shape[-2:])
    count = imgs.new_zeros(imgs.shape[-2:])
    for top in starts(imgs.shape[-2], size[0]):
        for left in starts(imgs.shape[-1], size[1]):
            window = ..., slice(top, top + size[0]), slice(left, left + size[1])
            total[window] += model(imgs[window]).float()
            count[window] += 1
    return (total / count)[..., :height, :width]


def starts(length, size):
    """Where the windows along a side begin; the last one ends with the side."""
    stride = max(1, 2 * size // 3)
    return [min(start, length - size) for start in range(0, length - size + stride, stride)]


# --- Scores ---------------------------------------------------------------------------------------


def confusion_matrix(predicted, masks, num_classes):
    """(K, K) int64: pixels by class, rows, and predicted class, columns; IGNORE is left out."""
    counted = masks != IGNORE
    pairs = masks[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion, classes):
    """{'val_iou/CLASS', ..., 'val_miou', 'val_macc', 'val_pixel_acc', all in percent, and a count}.

    IoU is nan for a class that is neither there nor predicted, accuracy for one that is not there;
    means leave nan out: mIoU is over val_classes_in_mean classes.
    """
    confusion = confusion.double()
    right, there, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = 100 * right / (there + predicted - right)
    values = {f'val_iou/{name}': value for name, value in zip(classes, iou.tolist())}
    values['val_miou'] = iou.nanmean().item()
    values['val_macc'] = (100 * right / there).nanmean().item()
    values['val_pixel_acc'] = (100 * right.sum() / there.sum()).item()
    return values | {'val_classes_in_mean': iou.isfinite().sum().item()}


# --- Pictures -------------------------------------------------------------------------------------

PALETTE = (np.arange(256)[:, None] * (67, 113, 197)).astype(np.uint8)  # class -> colour


def predict(args, device, settings, segment):
    """--predict: write pictures of the pixels' classes, and print the share of each class.

    NAME.png holds class numbers, which a palette shows in colour, NAME_overlay.png the image under
    these colours. Raises SystemExit(1) at the end if an image cannot be read.
    """
    folder, written, code = os.path.join(args.output_dir, 'predictions'), set(), 0
    with as_input_error(folder):
        os.makedirs(folder, exist_ok=True)
    for path in image_paths(args.predict):
        try:
            image = read_image(path, **decode_options(args, settings.sizes))
        except InputError as error:
            print(error, file=sys.stderr)
            code = 1
            continue
        imgs = normalise(image[None].to(device), settings.mean, settings.std)
        mask = segment(imgs, size=image.shape[-2:])[0].cpu()
        name = os.path.splitext(os.path.basename(path))[0]
        while {name, f'{name}_overlay'} & written:  # of the same name in another folder
            name += '_'
        written |= {name, f'{name}_overlay'}
        picture = PIL.Image.fromarray(mask.numpy().astype(np.uint8))
        picture.putpalette(PALETTE.tobytes())
        picture.save(f'{folder}/{name}.png')
        image = functional.to_pil_image(image if len(image) == 3 else image[:1]).convert('RGB')
        blend = PIL.Image.blend(image, picture.convert('RGB'), 0.5)
        blend.save(f'{folder}/{name}_overlay.png')
        print(f'{path}: {folder}/{name}.png')
        shares = mask.flatten().bincount() / mask.numel()
        for number in shares.argsort(descending=True)[: (shares > 0).sum()].tolist():
            print(f'{settings.classes[number]:>24} {shares[number]:7.2%}')
    raise SystemExit(code)
