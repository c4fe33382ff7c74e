"""Where images come from: --data_path -> a source of decoded images.

A source has len(source) images. source[i] is (image (C, H, W), label or -1), or raises ValueError if image i cannot be
read; source.path(i) says which that is; source.name(i) are bytes that stay the same wherever the data lies.
source.classes are the classes' names in the order of their labels, source.labels the labels (N,) of all images; either
is None where it is not known.
"""

import hashlib
import os

import numpy as np
import torchvision.datasets

from util import distributed, tar
from util.args import did_you_mean
from util.errors import InputError
from util.folders import DEFAULTS, EXTENSIONS, SPLITS, Options, open_folder, open_list, open_tars
from util.images import pil_to_tensor
from util.shapes import Shapes

# --- The sources of a job -------------------------------------------------------------------------------------


def open_sources(args, sizes, labelled=False, only_val=False):
    """(training source, validation source or None) of --data_path, --val_path and --val_share.

    With only_val the training source is None, and --data_path may itself be the validation images.

    Args:
        sizes: the model's, with 'in_chans' and 'img_size' (H, W).

    Raises:
        InputError: as open_source and hold_out do.
    """
    options = Options(sizes['in_chans'], tuple(args.background), tuple(sizes['img_size']), args.download_dir, labelled)
    return open_splits(args, lambda path, split: open_source(path, split, options), only_val)


def open_splits(args, open_split, only_val):
    """As open_sources, where open_split(path, 'train' or 'val') opens a source, or gives None where there is no val."""
    if args.val_path:
        val = open_split(args.val_path, 'val') or open_split(args.val_path, 'train')
    else:
        val = open_split(args.data_path, 'val')
    train = None if only_val and val is not None else open_split(args.data_path, 'train')
    if val is None and args.val_share:
        train, val = hold_out(train, args.val_share)
    elif val is None and only_val:
        val = train
        val.is_everything = True  # nothing of it is held out
    return (None if only_val else train), val


def open_labelled_sources(args, sizes, only_val=False):
    """open_sources for a classifier: both sources have the same two or more classes, and no image is unlabelled.

    Raises:
        InputError: also if there are no validation images, no labels, one class only, or if the classes differ.
    """
    train, val = open_sources(args, sizes, labelled=True, only_val=only_val)
    if val is None:
        raise InputError(
            f'{args.data_path} has no validation images (val/ or test/ beside train/); name some with --val_path, '
            'or hold some out with --val_share 0.1'
        )
    for path, source in ((args.data_path, train), (args.val_path or args.data_path, val)):
        if source is not None and source.classes is None:
            raise InputError(f'{path}: no labels; use one folder per class, or a list with path, tab, class')
    classes = (train or val).classes
    if len(classes) < 2:
        raise InputError(f'{args.data_path}: only one class, {classes[0]}; a classifier needs at least two')
    check_same_classes(classes, val.classes, 'the training images', 'the validation images')
    return train, val


def check_same_classes(ours, theirs, here, there):
    """Raise InputError that names the classes which only one of the two places has."""
    differences = []
    for extra, place in ((set(ours) - set(theirs), here), (set(theirs) - set(ours), there)):
        if extra:
            names = ', '.join(sorted(extra)[:5])
            differences.append(f'{names}{", ..." if len(extra) > 5 else ""} only in {place}')
    if differences or list(ours) != list(theirs):
        raise InputError(f'the classes differ: {"; ".join(differences) or "their order"}')


def open_source(path, split='train', options=DEFAULTS):
    """The images that --data_path (or --val_path) names; None for 'val' where the data has no such split.

    Raises:
        InputError: if nothing is there, or none of its first images can be read.
    """
    if not path:
        raise InputError('--data_path is required: a folder or tar of images, a list of them, torch/NAME, or shapes')
    if path == 'shapes':
        source = Shapes(split, options.image_size)
    elif path.startswith('torch/'):
        source = open_torchvision(path, split, options)
    elif os.path.isdir(path):
        source = open_folder(path, split, options)
    elif path.lower().endswith(tar.COMPRESSED):
        raise InputError(
            f'{path}: images inside a compressed tar cannot be read in place; decompress it to .tar, or unpack it'
        )
    elif path.lower().endswith('.tar') and os.path.isfile(path):
        source = open_tars({path: ''}, path, split, options)
    elif os.path.isfile(path):
        source = open_list(path, options) if split == 'train' else None
    else:
        raise InputError(f'{path}: no such folder or file')
    if source is not None:
        check_readable(source, path, options.in_chans)
    return source


def check_readable(source, path, in_chans, tries=16):
    """Decode images from the start of a source until one succeeds; InputError if none of the first does."""
    for index in range(min(len(source), tries)):
        try:
            image = source[index][0]
        except ValueError as error:
            problem = error
            continue
        if image.shape[0] != in_chans:
            raise InputError(f'{path}: its images have {image.shape[0]} channels, but --in_chans is {in_chans}')
        return
    raise InputError(f'{path}: none of its first {index + 1} images can be read; {problem}')


# --- A validation split where the data has none ---------------------------------------------------------------


class Part:
    """Some images of a source."""

    def __init__(self, source, indices):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self):
        return len(self.indices)

    def path(self, index):
        return self.source.path(self.indices[index])

    def name(self, index):
        return self.source.name(self.indices[index])

    def __getitem__(self, index):
        return self.source[int(self.indices[index])]


def hold_out(source, share):
    """(training part, validation part): of each class the share whose names have the lowest hashes, one at least.

    So the parts do not depend on the order of the images, and when images are added, few change sides. A copy by
    util.resize holds out the same images.

    Raises:
        InputError: if a class would have no image left to train on.
    """
    names = (original_name(source.name(index)) for index in range(len(source)))
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
    hashes = np.array([int.from_bytes(digest, 'big') for digest in digests], dtype=np.uint64)
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    held_out = np.zeros(len(source), dtype=bool)
    order = np.lexsort((hashes, labels))
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # of one class, by hash
        count = max(1, round(share * len(members)))
        held_out[members] = hashes[members] <= hashes[members[count - 1]]  # equal names stay together
        if held_out[members].all():
            label = labels[members[0]]
            which = f'the class {source.classes[label]}' if label >= 0 else 'the data'
            raise InputError(
                f'--val_share {share:g} leaves no image of {which} to train on, as it has {len(members)} in all'
            )
    return Part(source, np.flatnonzero(~held_out)), Part(source, np.flatnonzero(held_out))


def original_name(name):
    """The name that an image has in the folder that util.resize copied: b'A.png.bmp' -> b'A.png'."""
    stem = os.path.splitext(name)[0]
    return stem if stem.lower().endswith(tuple(map(os.fsencode, EXTENSIONS))) else name


# --- torchvision ----------------------------------------------------------------------------------------------


class TorchvisionImages:
    """A torchvision classification set, whose items are (PIL image, label)."""

    def __init__(self, name, dataset, options):
        self.title, self.dataset, self.options = name, dataset, options
        self.labels = self.find_labels()
        names = getattr(dataset, 'classes', None) or getattr(dataset, 'categories', None)
        if not names and self.labels is not None:  # SVHN, for one, only numbers them
            names = range(1 + self.labels.max())
        self.classes = names and [', '.join(name) if isinstance(name, tuple) else str(name) for name in names]

    def find_labels(self):
        """The labels (N,), or None: torchvision has no common name for them."""
        for name in ('targets', 'labels', '_labels', 'y'):
            labels = np.asarray(getattr(self.dataset, name, ()))
            if labels.shape == (len(self.dataset),) and labels.dtype.kind in 'iu':
                return labels.astype(np.int64)
        samples = getattr(self.dataset, '_samples', None)
        return None if samples is None else np.array([label for *_, label in samples])

    def __len__(self):
        return len(self.dataset)

    def name(self, index):
        return str(index).encode()

    def path(self, index):
        return f'{self.title}, image {index}'

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
            return pil_to_tensor(image, self.options.in_chans, self.options.background), int(label)
        except Exception as error:
            raise ValueError(f'{self.path(index)}: {" ".join(str(error).split())}') from None


def open_torchvision(path, split, options):
    """torch/NAME, as timm spells it: a torchvision.datasets class of (image, label) pairs, downloaded if need be.

    Where a set has unlabelled images beside the training images (STL-10), 'train' is both unless options.labelled.
    Where it has no splits (EuroSAT), 'train' is all of it.
    """
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    wanted = path.removeprefix('torch/').replace('_', '').lower()
    if wanted not in known:
        advice = did_you_mean(f'torch/{wanted}', [f'torch/{name}' for name in known])
        advice = advice or '; it has, for instance, torch/cifar10 and torch/stl10'
        raise InputError(f'{path}: torchvision {torchvision.__version__} has no such data set{advice}')
    dataset_class = getattr(torchvision.datasets, known[wanted])
    choices = [{'split': name} for name in SPLITS['val']] + [{'train': False}]
    if split == 'train':
        choices = [{'split': 'train'}, {'split': 'trainval'}, {'train': True}, {}]
        if not options.labelled:
            choices.insert(0, {'split': 'train+unlabeled'})
    for arguments in choices:
        try:
            return TorchvisionImages(path, create_or_download(path, dataset_class, arguments, options), options)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # no such argument, or no split of that name
            problem = error
        except ImportError as error:
            raise InputError(f'{path}: {known[wanted]} needs another package: {error}') from None
    if split == 'val':
        return None
    raise InputError(f'{path}: {known[wanted]} cannot be opened as a data set of labelled images ({problem})')


def create_or_download(path, dataset_class, arguments, options):
    """A torchvision data set. Raises InputError if it is not there and cannot be downloaded."""
    try:
        return dataset_class(root=options.download_dir, **arguments)
    except (RuntimeError, OSError):  # not there
        missing = f'{path}: not found in {options.download_dir} (--download_dir)'
        if distributed.world()[1] > 1:
            raise InputError(f'{missing}; start once without torchrun to download it') from None
    try:
        return dataset_class(root=options.download_dir, **arguments, download=True)
    except (RuntimeError, OSError) as error:
        reason = ' '.join(str(getattr(error, 'reason', error)).split())
        raise InputError(f'{missing}, and the download failed: {reason}') from None
