"""Where images come from: --data_path -> training and validation images.

A source has len(s) images. s[i] is (image (C, H, W) uint8 or float in 0..1, label or -1), or raises
ValueError, which starts with the path, if image i cannot be read. s.path(i) is its path, for
people; s.name(i) are bytes that stay the same wherever the data lies. s.classes are the names of
the classes, s.labels the labels (N,) int, -1 for none; both are None where no image has a label.
"""

import contextlib
import hashlib
import os
import re
from collections import defaultdict
from functools import partial

import numpy as np
import torchvision.datasets
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional

from util import files
from util.distributed import world
from util.errors import InputError
from util.files import choose_splits, list_files, say, shorten
from util.images import EXTENSIONS, decode, is_deep, reading
from util.shapes import Shapes

# A shard is a numbered piece of a set, x-train-0000 or 3-of-10; n01440764 is a class of ImageNet.
SHARD = re.compile(r'(?!(?:.*/)?n\d{8}$)(.*?)[ ._-]*\d+(?:-of-\d+)?', re.DOTALL)

ENDING = '|'.join(map(re.escape, EXTENSIONS))
LINE = re.compile(  # name, class; no third column, and no path alone
    rf'^(?!.*(?:{ENDING})$)(.*(?:{ENDING}))(?:\s*,(?!.*,)|\s)\s*([^\s,][^\t]*)$', re.IGNORECASE
)

# --- The sources of a job -------------------------------------------------------------------------


def open_sources(args, sizes, labelled=False, only_val=False, opener=None):
    """(training source, validation source or None) of --data_path, --val_path and --val_share.

    sizes: the model's, with 'in_chans' and 'img_size' (H, W). labelled, for a classifier: both are
    there, with the same classes, which are printed. only_val: the training source is None, and
    --data_path may be the validation images. opener, for segmentation: path -> both sources.
    Raises InputError if images or labels are missing, or none of those tried can be read.
    """
    opener = opener or partial(open_source, args=args, sizes=sizes, labelled=labelled)
    train, val = (None, None) if only_val and args.val_path else opener(args.data_path)
    if args.val_path:
        whole, split = opener(args.val_path)
        val = whole if split is None else split
    elif val is None and args.val_share:
        train, val = hold_out(train, args.val_share)
    if only_val:
        train, val = None, train if val is None else val
    if labelled:
        check_labelled(args.data_path, train, val)
    return train, val


def decode_options(args, sizes):
    """What util.images.decode is to know, from flags and the model's sizes."""
    return {
        'in_chans': sizes['in_chans'],
        'background': tuple(args.background),
        'max_value': args.max_value,
    }


def open_source(path, args, sizes, labelled):
    """(training images, validation images or None) of what --data_path or --val_path names."""
    path = path or ''
    kind = os.path.splitext(path)[1].lower()
    if path == 'shapes':
        return Shapes('train', sizes['img_size']), Shapes('val', sizes['img_size'])
    if path.startswith('torch/'):
        parts = open_torchvision(path, args, labelled)
    elif path.startswith('hf/'):
        parts = open_table(path, args)
    elif os.path.isdir(path):
        parts = open_folder(path, args, labelled)
    elif kind == '.tar':
        parts = open_tars(path, [], args, labelled)
    elif kind in ('.txt', '.csv', '.tsv'):
        parts = [open_list(path, args)]
    else:
        raise InputError(
            f'{path!r}: no folder, .tar, .txt or .csv, nor torch/NAME, hf/NAME or shapes; unpack '
            'other archives'
        )
    pair = [Images(decode_options(args, sizes), *part) for part in parts]
    for source in pair:
        check_first(path, source)
    return (*pair, None)[:2]


def check_first(path, source):
    """Read 16 images of a source. InputError if none is readable, or they are too dark."""
    problem, shares = 'there is none', []  # of the range of more than 8 bits, what images use
    for index in range(0, len(source), 1 + len(source) // 16):
        try:
            image, _ = source[index]
            content = source.read(source.path(index))
            if isinstance(content, bytes) and is_deep(content):
                shares.append(float(functional.to_dtype(image, scale=True).max()))
        except ValueError as error:
            problem = error
    if source.dtype is None:
        raise InputError(f'{path}: no image that can be read: {problem}')
    if shares and max(shares) < 0.25 and not source.options['max_value']:
        raise InputError(
            f'{path}: images of more than 8 bits use only {max(shares):.1%} of their range; say '
            'what is white: --max_value 4095 for 12 bits, 65535 if they are that dark'
        )


def check_labelled(path, train, val):
    """Check the labels of a classifier's sources, and print the classes. Raises InputError."""
    if val is None:
        raise InputError(f'{path} has no validation images; use --val_path or --val_share 0.1')
    first = val if train is None else train
    for source in (first, val):
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        if labels.min() < 0 or source is train and len(source.classes) < 2:
            raise InputError(
                f'no labels, or only one class: {source.path(labels.argmin())}; use one folder per '
                'class, a list with path, tab, class, or shards or parquet with --label_key'
            )
    use_classes(val, first.classes)
    classes, counts = first.classes, np.bincount(first.labels, minlength=len(first.classes))
    few, many = counts.argmin(), counts.argmax()
    trained = '' if train is None else f'{len(train)} images to train on, '
    say(
        f'{len(classes)} classes: {shorten(classes)}; {trained}{len(val)} images to evaluate; '
        f'{counts[few]} of {classes[few]} to {counts[many]} of {classes[many]}'
    )


def use_classes(val, classes):
    """Number the labels of validation images as in `classes`, of which they may lack some.

    Raises InputError if there are others.
    """
    extra = sorted(set(val.classes) - set(classes))
    if extra:
        raise InputError(f'validation classes that the training images lack: {shorten(extra)}')
    lacking = sorted(set(classes) - set(val.classes))
    if lacking:
        say(f'no validation image of {len(lacking)} classes, {shorten(lacking)}')
    numbers = {name: number for number, name in enumerate(classes)}
    table = np.array([numbers[name] for name in val.classes] + [-1])  # no label stays none
    val.labels, val.classes = table[val.labels], list(classes)


# --- Sources --------------------------------------------------------------------------------------


class Images:
    """Images by number, with the options of decode.

    names (N,) are bytes, relative to root; read(path) gives the bytes of a file or a PIL image.
    labels (N,) number the classes from 0; -1 is none.
    """

    def __init__(self, options, root, names, read, classes=None, labels=None):
        self.options, self.root, self.read = options, root, read
        self.names = np.asarray(names).astype(bytes)  # one buffer, which forked workers share
        known = labels is not None and labels.max(initial=-1) >= 0
        self.classes, self.labels = (classes, labels) if known else (None, None)
        self.dtype = None  # of the first that is read

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return bytes(self.names[index])

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def __getitem__(self, index):
        path = self.path(index)
        with reading(path):
            image = decode(self.read(path), **self.options)
            self.dtype = self.dtype or image.dtype
            if image.dtype != self.dtype:
                raise ValueError(f'values of {image.dtype} among images of {self.dtype}')
        return image, -1 if self.labels is None else int(self.labels[index])


class Part(Subset):
    """Some images of a source."""

    def __init__(self, source, indices):
        super().__init__(source, indices)
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def name(self, index):
        return self.dataset.name(self.indices[index])

    def path(self, index):
        return self.dataset.path(self.indices[index])


def hold_out(source, share):
    """(training Part, validation Part): of each class the share whose names have the lowest hashes.

    So the parts do not depend on the order of the images, and when images are added, few change
    sides. At least one of a class is held out. Raises InputError if none would be left.
    """
    digests = (hashlib.blake2b(source.name(i), digest_size=8).digest() for i in range(len(source)))
    hashes = np.frombuffer(b''.join(digests), dtype='>u8')
    labels = source.labels
    if labels is None or labels.min() < 0:  # some without a label: as if all were of one class
        labels = np.zeros(len(source), dtype=int)
    held_out = np.zeros(len(source), dtype=bool)
    order = np.lexsort((hashes, labels))
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # of one class
        count = max(1, round(share * len(members)))
        held_out[members] = hashes[members] <= hashes[members[count - 1]]  # equal names together
        if held_out[members].all():
            path = source.path(members[0])
            raise InputError(f'--val_share {share:g} holds out all images of the class of {path}')
    return Part(source, np.flatnonzero(~held_out)), Part(source, np.flatnonzero(held_out))


# --- What there is: (root, names, read, classes, labels) of each split, as Images takes them ------


def open_folder(path, args, labelled):
    """The images below a folder; if there are none, those in its tars, or in Parquet files."""
    kinds = defaultdict(list)  # ending: names
    for name in list_files(path, ['']):
        kinds[os.path.splitext(name)[1].lower()].append(name)
    names = sorted(name for kind in EXTENSIONS for name in kinds.pop(os.fsencode(kind), []))
    if not names and b'.tar' in kinds:
        return open_tars(path, list(map(os.fsdecode, kinds[b'.tar'])), args, labelled)
    if not names and kinds.keys() & {b'.parquet', b'.arrow'}:
        return open_table(path, args)
    if kinds:
        counts = [f'{len(kinds[kind])} {os.fsdecode(kind) or "without ending"}' for kind in kinds]
        say(f'{path}: left out: {shorten(counts)}')
    return divide(path, names, files.read_file, labelled)


def open_tars(path, names, args, labelled):
    """The images in tars below a folder, or in one tar, as if they were unpacked there.

    Labels are those of WebDataset, if there are any; else folders are classes, except for shards.
    """
    folders = {} if names else {path: ''}
    for name in names:
        stem = name[: -len('.tar')]
        match = SHARD.fullmatch(stem)
        folder = os.path.join(match[1], os.path.basename(stem)) if match else stem
        folders[os.path.join(path, name)] = folder
    tars = files.Tars(path, folders, args)
    labels = tars.labels.tolist()
    labels = labels if any(labels) or any(map(SHARD.fullmatch, folders.values())) else None
    return divide(path, tars.names.tolist(), tars.read, labelled, labels)


def divide(path, names, read, labelled, labels=None):
    """The splits of the images below path, by sorted names. Without labels, folders are classes."""
    for top, part in files.find_splits(path, names, labelled and labels is None):
        length = len(os.fsencode(top))
        kept = [name[length:] for name in names[part]]
        folders = [name.rpartition(b'/')[0].partition(b'/')[0] for name in kept]
        found = files.number_classes(labels[part] if labels else folders)
        yield os.path.join(path, top), kept, read, *found


def open_list(path, args):
    """The images on the lines of a text file. A missing one is bad like any other.

    A line is a path, relative to the list or absolute, and after a tab, a comma or a space the
    class, if it has one. '#' starts a comment. A header is left out. A path may lead into a tar:
    ILSVRC2012_img_val.tar/ILSVRC2012_val_00000001.JPEG.
    """
    root, read = os.path.dirname(path), files.read_file
    with reading(path), open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        lines = [line.strip() for line in file]
    lines = [line for line in lines if line and line[0] != '#']
    if [bool(re.search(ENDING, line, re.IGNORECASE)) for line in lines[:2]] == [False, True]:
        del lines[0]
    parts = [LINE.sub(r'\1\t\2', line).partition('\t') for line in lines]
    names, labels = ([part[column].strip() for part in parts] for column in (0, 2))
    tars = {name.partition('.tar/')[0] + '.tar' for name in names if '.tar/' in name}
    if tars:
        read = files.Tars(root, {os.path.join(root, tar): tar for tar in sorted(tars)}, args).read
    return root, list(map(os.fsencode, names)), read, *files.number_classes(labels)


# --- Data sets of libraries -----------------------------------------------------------------------


# The first of these that a data set knows are its arguments.
TRAIN = [{'split': 'train+unlabeled'}, {'split': 'train'}, {'split': 'trainval'}, {'train': True}]
VAL = [{'split': 'val'}, {'split': 'valid'}, {'split': 'test'}, {'train': False}]


def open_torchvision(path, args, labelled):
    """torch/NAME: a set of torchvision.datasets of (image, label) pairs, downloaded if need be.

    Unlabelled images beside the training images (STL-10) are trained on unless `labelled`.
    """
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    name = known.get(path.removeprefix('torch/').replace('_', '').lower(), 'FakeData')
    create = partial(getattr(torchvision.datasets, name), root=args.download_dir)
    choices = [*TRAIN[labelled:], {}], VAL
    found = [create_torchvision(path, create, arguments) for arguments in choices]
    if found[0] is None:
        raise InputError(f'{path}: torchvision has no such data set of labelled images')
    return [
        (path, range(len(dataset)), partial(read_pair, dataset), *find_labels(dataset))
        for dataset in filter(None, found)
    ]


def create_torchvision(path, create, choices):
    """The data set by the first arguments that it knows, or None. Raises InputError."""
    problem = f'{path}: not in --download_dir, nor to be had (only without torchrun)'
    for arguments in choices:
        # suppressed is what says that there is no such argument, or no such split
        with reading(problem), contextlib.suppress(TypeError, ValueError):
            try:
                return create(**arguments)
            except (RuntimeError, OSError):
                return create(**arguments, download=world()[1] == 1)  # processes would clash


def find_labels(dataset):
    """(classes, labels (N,)) of a data set of torchvision; (None, None) if it has none."""
    names = [name for name in ('targets', 'labels', '_labels') if hasattr(dataset, name)]
    labels = np.asarray(getattr(dataset, names[0]) if names else ())
    if labels.shape != (len(dataset),) or labels.dtype.kind not in 'iu':
        return None, None
    classes = getattr(dataset, 'classes', range(1 + labels.max()))  # SVHN only numbers them
    return list(map(str, classes)), labels.astype(np.int64)


def read_pair(dataset, path):
    return dataset[int(os.path.basename(path))][0]


def open_table(path, args):
    """hf/NAME[:CONFIG] on the Hugging Face hub, or a folder of Parquet or Arrow files.

    The images are the first column of type Image, or else `image`: bytes, or paths relative to
    `path`. The classes are the column --label_key.
    """
    local, parts = os.listdir(path) if os.path.isdir(path) else [], []
    with reading(path):
        from datasets import ClassLabel, Image, load_dataset, load_from_disk

        if {'state.json', 'dataset_dict.json'} & set(local):  # by save_to_disk
            tables = load_from_disk(path)
        else:
            tables = load_dataset(*[path] if local else path[len('hf/') :].split(':'))
        tables = tables if isinstance(tables, dict) else {'train': tables}
        splits = choose_splits(tables)
        for split in splits if len(splits) == 2 else list(tables)[:1]:
            table, labels, classes = tables[split], None, None
            kinds, key = table.features, args.label_key
            if isinstance(kinds.get(key), ClassLabel):
                classes = kinds[key].names
                labels = np.array([-1 if label is None else label for label in table[key]])
            elif key in kinds:
                classes, labels = files.number_classes(list(map(files.as_class, table[key])))
            image = next((name for name in kinds if isinstance(kinds[name], Image)), 'image')
            cells = table.select_columns(image).cast_column(image, Image(decode=False))
            read = partial(read_cell, cells, path)
            parts.append((f'{path}/{split}', range(len(table)), read, classes, labels))
    return parts


def read_cell(table, folder, path):
    (cell,) = table[int(os.path.basename(path))].values()
    return cell['bytes'] or files.read_file(os.path.join(folder, cell['path']))
