"""Images with masks: which files belong together, and what the numbers in a mask mean.

A source is as in util/sources.py, except that source[i] is (image (C, H, W), mask (H, W)): uint8 class numbers from 0,
or IGNORE where a pixel counts for nothing.
"""

import io
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from util import tar
from util.errors import InputError, as_input_error
from util.folders import EXTENSIONS, SPLITS, ImageFiles, Options, TarImages, find_files
from util.shapes import Shapes
from util.sources import open_splits
from util.transforms import IGNORE

# Names below --data_path: images/train/a/1.jpg and masks/train/a/1.png belong together
LAYOUT = re.compile(rb'((?:[^/]+/)*?)(images|annotations|masks|labels)/(.+)\.([^./]+)')

# The classes of ADEChallengeData2016, whose masks number them from 1 (--reduce_zero_label).
ADE20K = (
    'wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,'
    'plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,'
    'wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,'
    'fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,'
    'bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,'
    'swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,'
    'television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,'
    'van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,'
    'minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,'
    'sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,'
    'radiator,glass,clock,flag'
).split(',')


# --- Sources --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the numbers in mask files mean."""

    classes: list | None = None  # their names, by --num_classes; None: those that the data names, or else of_checkpoint
    of_checkpoint: list | None = None
    ignore: int = IGNORE  # the number of pixels that count for nothing
    reduce_zero: bool | None = None  # 0 is ignored too, and 1 is the first class; None: if the classes are ADE20K's

    def table(self):
        """(256,) uint8: number in a file -> class, or IGNORE."""
        table = np.arange(256, dtype=np.uint8)
        if self.classes == ADE20K if self.reduce_zero is None else self.reduce_zero:
            table[1:IGNORE] -= 1
            table[0] = IGNORE
        table[self.ignore] = IGNORE
        return table


class Pairs:
    """Image files and their mask files, both given by their numbers in `files`, as open_files gives them."""

    labels = None  # of whole images

    def __init__(self, files, images, masks, labels):
        self.files, self.images, self.masks = files, np.asarray(images), np.asarray(masks)
        self.classes, self.table = labels.classes, labels.table()

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return self.files.name(self.images[index])

    def path(self, index):
        return self.files.path(self.images[index])

    def __getitem__(self, index):
        image, _ = self.files[self.images[index]]
        path = self.files.path(self.masks[index])
        mask = self.table[read_mask(self.files, self.masks[index])]
        if mask.shape != image.shape[1:]:
            sizes = ' and '.join(f'{width} x {height}' for height, width in (image.shape[1:], mask.shape))
            raise ValueError(f'{path}: image and mask differ in size, {sizes} pixels')
        seen = mask[mask != IGNORE]
        if not seen.size:
            raise ValueError(f'{path}: all pixels are ignored')
        if seen.max() >= len(self.classes):
            number = np.flatnonzero(self.table == seen.max())[0]
            raise ValueError(
                f'{path}: holds {number}, above the last of {len(self.classes)} classes; is it the '
                '--ignore_label, or is --reduce_zero_label needed?'
            )
        return image, torch.from_numpy(mask)


class ShapePairs(Shapes):
    """Drawn pictures with the outlines of their shapes: class 0 is the background."""

    classes = ['background', *Shapes.classes]

    def __getitem__(self, index):
        return self.picture_and_mask(index)


def read_mask(files, number):
    """The class numbers (H, W) uint8 in a mask file. Raises ValueError."""
    path = files.path(number)
    try:
        content = files.content(number)
        image = Image.open(io.BytesIO(content))
        odd = image.mode == 'L' and content[:4] == b'\x89PNG' and content[24] < 8  # PIL would scale these to 0..255
        if image.mode not in ('1', 'L', 'P') or odd:
            raise ValueError(
                f'has {"2 or 4 bits" if odd else f"pixels of kind {image.mode}"}; a mask is an 8-bit image, grey or '
                'with a palette, whose values number the classes'
            )
        return np.array(image).astype(np.uint8)
    except UnidentifiedImageError:
        raise ValueError(f'{path}: not an image of a known format') from None
    except Exception as error:  # decoders raise many kinds of error for a damaged file
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from None


def open_pairs(args, sizes, labels, only_val=False):
    """(training source, validation source) of --data_path, --val_path and --val_share; with only_val the first is None.

    Args:
        sizes: the model's, with 'in_chans' and 'img_size' (H, W).
        labels: Labels; without classes, those of the data.

    Raises:
        InputError: if images or masks are missing, have no classes, or do not fit together.
    """
    options = Options(sizes['in_chans'], tuple(args.background), tuple(sizes['img_size']), args.download_dir)
    train, val = open_splits(args, lambda path, split: open_source(path, split, options, labels), only_val)
    if val is None:
        raise InputError(
            f'{args.data_path} has no val/, validation/ or test/ beside its training images; name validation images '
            'with --val_path, or hold some out with --val_share 0.1'
        )
    if train is not None and train.classes != val.classes:
        raise InputError(f'{args.data_path} and {args.val_path} have different classes')
    return train, val


def open_source(path, split, options, labels):
    """The pairs of a split; None for 'val' where the data has no such split. Raises InputError."""
    if not path:
        raise InputError('--data_path is required: a folder or tar with images/ and masks/, or shapes')
    if path == 'shapes':
        source = ShapePairs(split, options.image_size)
        check_pairs(source, path, options.in_chans)
        return source
    files = open_files(path, options)
    images, masks = find_pairs(files, split)
    if not images and not masks:
        if split == 'val':
            return None
        raise InputError(f'{path}: no image in its images/ and no mask in its annotations/, masks/ or labels/')
    for ours, theirs, text in ((images, masks, 'image without mask'), (masks, images, 'mask without image')):
        alone = sorted(ours.keys() - theirs.keys())
        if alone:
            raise InputError(
                f'{path}: {text}: {files.path(ours[alone[0]])} ({len(alone)} of {len(ours)}); both need the same name, '
                'masks ending in .png'
            )
    classes = labels.classes or find_classes(files, path) or labels.of_checkpoint
    masks = [masks[key] for key in images]
    if classes is None:
        with as_input_error():
            tried = [np.unique(read_mask(files, number)) for number in masks[:16]]
        numbers = ' '.join(map(str, np.unique(np.concatenate(tried)).tolist()))
        raise InputError(
            f'{path}: which classes? Name them in {path}/classes.txt, one per line, or give their number: '
            f'--num_classes N (the first masks hold {numbers})'
        )
    if len(classes) < 2:
        raise InputError(f'{path}: one class only, {classes[0]}; a mask needs at least two, such as the background')
    source = Pairs(files, list(images.values()), masks, replace(labels, classes=classes))
    check_pairs(source, path, options.in_chans)
    return source


def open_files(path, options):
    """All images, masks and classes.txt of a folder or a tar. Raises InputError."""
    extensions = (*EXTENSIONS, 'classes.txt')
    if os.path.isdir(path):
        return ImageFiles(path, find_files(path, extensions), options, class_names=[])
    if path.lower().endswith('.tar') and os.path.isfile(path):
        names, places = tar.load_index({path: ''}, extensions, options.download_dir)
        return TarImages(path, names, options, [path], places)
    raise InputError(f'{path}: no such folder or tar; images with masks come as images/ with annotations/ or masks/')


def find_pairs(files, split):
    """({key: number of an image}, {key: number of a mask}) of a split; equal keys belong together.

    Without folders for splits, everything is 'train'.
    """
    images, masks, folders = {}, {}, {}
    known = SPLITS['train'] + SPLITS['val']
    for number, name in enumerate(files.names.tolist()):
        match = LAYOUT.fullmatch(name)
        if not match:
            continue
        root, kind, stem, ending = map(os.fsdecode, match.groups())
        found, key = images if kind == 'images' else masks, root + stem
        if found is masks and ending.lower() != 'png':
            continue
        if key in found:
            raise InputError(f'two files for one name: {files.path(found[key])} and {files.path(number)}')
        found[key] = number
        around = [*root.split('/'), stem.rpartition('/')[0].split('/')[0]]  # train/images/ or images/train/
        folders[key] = next((folder for folder in around if folder in known), None)
    if not any(folders.values()):
        return (images, masks) if split == 'train' else ({}, {})
    chosen = next((folder for folder in SPLITS[split] if folder in folders.values()), 'none')
    return [{key: number for key, number in found.items() if folders[key] == chosen} for found in (images, masks)]


def find_classes(files, path):
    """The names in classes.txt, one on each line, or ADE20K's where a folder has its name; None if there are none."""
    numbers = [number for number, name in enumerate(files.names.tolist()) if name.split(b'/')[-1] == b'classes.txt']
    if numbers:
        text = files.content(numbers[0]).decode('utf-8-sig', 'replace')
        names = [line.strip() for line in text.strip().splitlines()]
        if '' in names or len(set(names)) < len(names):
            raise InputError(f'{files.path(numbers[0])}: an empty line or a name twice; each line names one class')
        return names or None
    where = os.path.join(os.path.abspath(path), files.path(0))
    return list(ADE20K) if 'ADEChallengeData2016' in where.split(os.sep) else None


def check_pairs(source, path, in_chans, tries=16):
    """Read pairs from the start; InputError if most of them cannot be used."""
    problems = []
    tries = min(len(source), tries)
    for index in range(tries):
        try:
            channels = len(source[index][0])
        except ValueError as error:
            problems.append(error)
            continue
        if channels != in_chans:
            raise InputError(f'{path}: its images have {channels} channels, but --in_chans is {in_chans}')
    if 2 * len(problems) > tries:
        raise InputError(f'{len(problems)} of the first {tries} images and masks cannot be used; {problems[0]}')
