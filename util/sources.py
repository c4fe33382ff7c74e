"""Where images come from: --data_path -> training and validation images.

A source has len(s) images. s[i] is (image (C, H, W) uint8 or float in 0..1, label or -1), or raises
ValueError, which starts with the path, if image i cannot be read. s.path(i) is its path, for
people; s.name(i) are bytes that stay the same wherever the data lies. s.classes are the names of
the classes, s.labels the labels (N,) int; both are None where they are not known.
"""

import hashlib
import os
from collections import Counter
from functools import partial

import numpy as np
import torch
import torchvision.datasets

from util import files
from util.distributed import world
from util.errors import InputError
from util.files import choose_splits, image_paths, list_files, say, shorten  # noqa: F401
from util.images import EXTENSIONS, decode, is_deep, pil_to_tensor
from util.shapes import Shapes

# --- The sources of a job -------------------------------------------------------------------------


def open_sources(args, sizes, labelled=False, only_val=False, opener=None):
    """(training source, validation source or None) of --data_path, --val_path and --val_share.

    sizes: the model's, with 'in_chans' and 'img_size' (H, W). labelled, for a classifier: both are
    there, with the same classes, which are printed. only_val: the training source is None, and
    --data_path may be the validation images. opener, for segmentation: path -> both sources.
    Raises InputError if images or labels are missing, or none of those tried can be read.
    """
    make = partial(Images, decode_options(args, sizes))
    opener = opener or partial(open_source, args=args, sizes=sizes, make=make, labelled=labelled)
    if only_val and args.val_path:
        train, val = opener(args.val_path)
    else:
        train, val = opener(args.data_path)
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
    max_value = getattr(args, 'max_value', None)
    return {
        'in_chans': sizes['in_chans'],
        'background': tuple(args.background),
        'max_value': max_value,
    }


def open_source(path, args, sizes, make, labelled):
    """(training images, validation images or None) of what --data_path or --val_path names."""
    if not path:
        raise InputError('--data_path: a folder, tar or list of images, torch/..., hf/..., shapes')
    if path == 'shapes':
        return Shapes('train', sizes['img_size']), Shapes('val', sizes['img_size'])
    if path.startswith('torch/'):
        pair = open_torchvision(path, args, make, labelled)
    elif path.startswith('hf/'):
        pair = open_table(path, args, make)
    elif os.path.isdir(path):
        pair = open_folder(path, args, make, labelled)
    elif path.lower().endswith('.tar'):
        pair = open_tars(path, [], args, make, labelled)
    else:
        pair = open_list(path, args, make), None
    for source in pair:
        if source is not None:
            check_first(path, source)
    return pair


def check_first(path, source):
    """Read 16 images of a source. InputError if none is readable, or they are too dark."""
    problem = 'a folder, .tar or text file is expected; unpack other archives'
    shares = []  # of their range, what images use whose range the type does not tell
    for index in range(0, len(source), 1 + len(source) // 16):
        try:
            image, _ = source[index]
            content = source.read(source, index)
            if isinstance(content, bytes) and is_deep(content):
                shares.append(float(image.max()) / (255 if image.dtype == torch.uint8 else 1))
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
    """Prepare the labels of a classifier's sources, and print the classes. Raises InputError."""
    if val is None:
        raise InputError(f'{path} has no validation images; use --val_path or --val_share 0.1')
    first = val if train is None else train
    for source in (first, val):
        if not source.classes or train is source and len(source.classes) < 2:
            problem = 'only one class' if source.classes else 'no labels'
            example = f'; {source.unlabelled} has none' if source.unlabelled else ''
            raise InputError(
                f'{source.root}: {problem}{example}; use one folder per class, a list with path, '
                'tab, class, or tars with .cls or .json files'
            )
    if train is not None:
        use_classes(val, train.classes)
    classes, counts = first.classes, np.bincount(first.labels, minlength=len(first.classes))
    few, many = counts.argmin(), counts.argmax()
    trained = '' if train is None else f'{len(train)} images to train on, '
    say(
        f'{len(classes)} classes: {shorten(classes)}; {trained}{len(val)} images to evaluate; '
        f'{counts[few]} of {classes[few]} to {counts[many]} of {classes[many]}'
    )


def use_classes(source, classes):
    """Number a source's labels as in `classes`, of which it may lack some.

    Raises InputError if it has others.
    """
    extra = sorted(set(source.classes) - set(classes))
    if extra:
        raise InputError(f'{source.root}: classes that the training images lack: {shorten(extra)}')
    lacking = sorted(set(classes) - set(source.classes))
    if lacking:
        say(f'{source.root}: no image of {len(lacking)} classes, {shorten(lacking)}')
    numbers = {name: number for number, name in enumerate(classes)}
    table = np.array([numbers[name] for name in source.classes])
    source.labels, source.classes = table[source.labels], list(classes)


# --- Sources --------------------------------------------------------------------------------------


class Images:
    """Images by number, with the options of decode.

    names (N,) are bytes, relative to root; read(self, index) gives the bytes of a file or a PIL
    image. Either class_names (N,), bytes, b'' for none, or labels (N,) may be there; classes are
    the names in their order, where it is known.
    """

    def __init__(self, options, root, names, read, class_names=(), classes=None, labels=None):
        self.options, self.root, self.read = options, root, read
        self.names = np.asarray(names, dtype=bytes)  # one buffer, which forked workers share
        self.classes, self.labels = (None, None) if labels is None else (classes, labels)
        self.unlabelled = None  # the path of the first without a class, where others have one
        self.dtype = None  # of the first that is read
        if len(class_names) and all(class_names):
            self.classes, self.labels = files.number_classes(class_names, classes)
        elif any(class_names):
            self.unlabelled = self.path(list(class_names).index(b''))

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return bytes(self.names[index])

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def __getitem__(self, index):
        try:
            content = self.read(self, index)
            to_tensor = decode if isinstance(content, bytes) else pil_to_tensor
            image = to_tensor(content, **self.options)
            self.dtype = self.dtype or image.dtype
            if image.dtype != self.dtype:
                raise ValueError(f'values of {image.dtype} among images of {self.dtype}')
        except Exception as error:  # decoders raise many kinds of error for a damaged file
            problem = getattr(error, 'strerror', None) or ' '.join(str(error).split())
            raise ValueError(f'{self.path(index)}: {problem}') from None
        return image, -1 if self.labels is None else int(self.labels[index])


class Part:
    """Some images of a source."""

    def __init__(self, source, indices):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        self.root = getattr(source, 'root', '')
        self.unlabelled = getattr(source, 'unlabelled', None)

    def __len__(self):
        return len(self.indices)

    def name(self, index):
        return self.source.name(self.indices[index])

    def path(self, index):
        return self.source.path(self.indices[index])

    def __getitem__(self, index):
        image, target = self.source[int(self.indices[index])]
        return image, target if self.labels is None else int(self.labels[index])


def hold_out(source, share):
    """(training Part, validation Part): of each class the share whose names have the lowest hashes.

    So the parts do not depend on the order of the images, and when images are added, few change
    sides. At least one of a class is held out. Raises InputError if none would be left.
    """
    digests = (hashlib.blake2b(source.name(i), digest_size=8).digest() for i in range(len(source)))
    hashes = np.array([int.from_bytes(digest, 'big') for digest in digests], dtype=np.uint64)
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    held_out = np.zeros(len(source), dtype=bool)
    order = np.lexsort((hashes, labels))
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # of one class
        count = max(1, round(share * len(members)))
        held_out[members] = hashes[members] <= hashes[members[count - 1]]  # equal names together
        if held_out[members].all():
            label = labels[members[0]]
            which = f'the class {source.classes[label]}' if label >= 0 else 'the data'
            raise InputError(f'--val_share {share:g} leaves no image of {which} to train on')
    return Part(source, np.flatnonzero(~held_out)), Part(source, np.flatnonzero(held_out))


# --- Files ----------------------------------------------------------------------------------------


def open_folder(path, args, make, labelled):
    """The images below a folder; if there are none, those in its tars, or in Parquet files."""
    others = Counter()
    names = list_files(path, EXTENSIONS, others)
    if not names and others['.tar']:
        return open_tars(path, list_files(path, ['.tar']), args, make, labelled)
    if not names and (others['.parquet'] or others['.arrow']):
        return open_table(path, args, make)
    if others:
        kinds = [f'{n} {kind or "without ending"}' for kind, n in others.most_common(6)]
        say(f'{path}: left out: {", ".join(kinds)}')
    return files.divide(path, names, make, labelled)


def open_tars(path, names, args, make, labelled):
    """The images in tars below a folder, or in one tar, as if they were unpacked there.

    Labels are those of WebDataset, if there are any; else folders are classes, except for shards.
    """
    tars, shards = files.tar_folders(path, names) if names else ({path: ''}, False)
    label_key = getattr(args, 'label_key', 'label')
    names, places, labels = files.load_index(tars, args.download_dir, label_key)
    labels = labels.tolist() if shards or any(labels) else None
    return files.divide(path, names.tolist(), make, labelled, list(tars), places, labels)


def open_list(path, args, make):
    """The images that a text file lists (files.read_list). A missing one is bad like any other.

    A path may lead into a tar: ILSVRC2012_img_val.tar/ILSVRC2012_val_00000001.JPEG.
    """
    lines = files.read_list(path)
    names, labels = ([os.fsencode(line[part]) for line in lines] for part in (0, 1))
    root, read = os.path.dirname(path), files.read_file
    tars = sorted({name.partition(b'.tar/')[0] + b'.tar' for name in names if b'.tar/' in name})
    if tars:
        tars = {os.path.join(root, os.fsdecode(tar)): os.fsdecode(tar) for tar in tars}
        known, places, _ = files.load_index(tars, args.download_dir)
        order = {name: row for row, name in enumerate(known.tolist())}
        rows = [order.get(name) for name in names]
        if None in rows:
            raise InputError(f'{path}: no image {os.fsdecode(names[rows.index(None)])}')
        read = partial(files.read_member, list(tars), places[rows])
    return make(root, names, read, labels)


# --- Data sets of libraries -----------------------------------------------------------------------


def open_torchvision(path, args, make, labelled):
    """torch/NAME: a torchvision.datasets class of (image, label) pairs, downloaded if need be.

    Unlabelled images beside the training images (STL-10) are trained on unless `labelled`.
    """
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    name = known.get(path.removeprefix('torch/').replace('_', '').lower(), 'FakeData')
    create = partial(getattr(torchvision.datasets, name), root=args.download_dir)
    trains = [] if labelled else ['train+unlabeled']
    trains = [{'split': split} for split in [*trains, 'train', 'trainval']]
    vals = [{'split': split} for split in ('val', 'valid', 'validation', 'test')]
    train = create_torchvision(path, create, [*trains, {'train': True}, {}])
    val = create_torchvision(path, create, [*vals, {'train': False}])
    if train is None:
        raise InputError(f'{path}: torchvision has no such data set of labelled images')
    return from_torchvision(path, train, make), val and from_torchvision(path, val, make)


def create_torchvision(path, create, choices):
    """The data set by the first arguments that it knows, or None. Raises InputError."""
    downloads = [{}, {'download': True}] if world()[1] == 1 else [{}]  # processes would clash
    for arguments in choices:
        problems = []
        for download in downloads:
            try:
                return create(**arguments, **download)
            except (TypeError, ValueError):  # no such argument, or no split of that name
                break
            except (RuntimeError, OSError, ImportError) as error:  # SVHN needs scipy
                problems.append(' '.join(str(getattr(error, 'reason', error)).split()))
        else:
            start = '' if len(downloads) > 1 else '; start once without torchrun'
            raise InputError(f'{path}, in --download_dir: {"; ".join(problems)}{start}')
    return None


def from_torchvision(path, dataset, make):
    labels = classes = None
    for name in ('targets', 'labels', '_labels', 'y'):  # they have no common name
        found = np.asarray(getattr(dataset, name, ()))
        if found.shape == (len(dataset),) and found.dtype.kind in 'iu':
            labels = found.astype(np.int64)
    if hasattr(dataset, '_samples'):
        labels = np.array([label for *_, label in dataset._samples])
    if labels is not None:
        names = getattr(dataset, 'classes', None) or getattr(dataset, 'categories', None)
        names = names or range(1 + labels.max())  # SVHN only numbers them
        classes = [', '.join(name) if isinstance(name, tuple) else str(name) for name in names]
    names = np.arange(len(dataset)).astype(bytes)
    return make(path, names, partial(read_pair, dataset), classes=classes, labels=labels)


def read_pair(dataset, source, index):
    return dataset[index][0]


def open_table(path, args, make):
    """hf/NAME[:CONFIG] on the Hugging Face hub, or a folder of Parquet or Arrow files."""
    local = os.listdir(path) if os.path.isdir(path) else []
    name, _, config = (path, '', '') if local else path.removeprefix('hf/').partition(':')
    try:
        import datasets

        if 'state.json' in local or 'dataset_dict.json' in local:  # by save_to_disk
            tables = datasets.load_from_disk(path)
        else:
            tables = datasets.load_dataset(name, config or None)
    except Exception as error:  # it raises many kinds
        problem = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'{path}: {problem}') from None
    tables = tables if isinstance(tables, dict) else {'train': tables}
    splits = choose_splits(tables) or list(tables)[:1]
    key = getattr(args, 'label_key', 'label')
    splits = splits[:1] + splits[1:][-1:]
    return (*(from_table(path, split, tables[split], key, make) for split in splits), None)[:2]


def from_table(path, split, table, key, make):
    """The images in the first column of type Image, or else in `image` or `img`, as bytes or paths.

    Paths are relative to `path`. The classes are the column `key`, or else the first ClassLabel.
    """
    from datasets import ClassLabel, Image

    features, root = table.features, f'{path}/{split}'
    columns = [name for name in features if isinstance(features[name], Image)]
    columns += [name for name in ('image', 'img') if name in features]
    if not columns:
        raise InputError(f'{root}: no image in {shorten(table.column_names)}')
    keys = [key] if key in features else []
    keys += [name for name in features if isinstance(features[name], ClassLabel)]
    classes, class_names = None, ()
    if keys:
        class_names = table.select_columns(keys[:1])[:][keys[0]]
        if isinstance(features[keys[0]], ClassLabel):
            classes = features[keys[0]].names
            class_names = [classes[n] if n is not None and n >= 0 else '' for n in class_names]
        class_names = [files.as_class(name) for name in class_names]
    names = np.arange(len(table)).astype(bytes)
    table = table.select_columns(columns[:1]).cast_column(columns[0], Image(decode=False))
    return make(root, names, partial(read_cell, table, path), class_names, classes)


def read_cell(table, folder, source, index):
    (cell,) = table[int(index)].values()
    if cell['bytes'] is not None:
        return cell['bytes']
    with open(os.path.join(folder, cell['path']), 'rb') as file:
        return file.read()
