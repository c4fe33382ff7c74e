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
import torchvision.datasets

from util import files
from util.distributed import world
from util.errors import InputError
from util.files import choose_splits, image_paths, list_files, say, shorten  # noqa: F401
from util.images import EXTENSIONS, decode, pil_to_tensor, used_range
from util.shapes import Shapes

ARCHIVES = ('.zip', '.7z', '.rar', '.gz', '.tgz', '.bz2', '.tbz2', '.xz', '.txz', '.zst')

# --- The sources of a job -------------------------------------------------------------------------


def open_sources(args, sizes, labelled=False, only_val=False, opener=None):
    """(training source, validation source or None) of --data_path, --val_path and --val_share.

    Args:
        sizes: the model's, with 'in_chans' and 'img_size' (H, W).
        labelled: for a classifier: both are there, with the same classes, which are printed.
        only_val: the training source is None, and --data_path may be the validation images.
        opener: path -> (training source, validation source or None); for segmentation.

    Raises InputError if images or labels are missing, or none of those tried can be read.
    """
    options = {'in_chans': sizes['in_chans'], 'background': tuple(args.background)}
    make = partial(Images, options | {'max_value': getattr(args, 'max_value', None)})
    opener = opener or partial(open_source, args=args, sizes=sizes, make=make, labelled=labelled)
    train = val = None
    if args.val_path:
        whole, val = opener(args.val_path)
        val = whole if val is None else val
    if not (only_val and args.val_path):
        train, split = opener(args.data_path)
        val = split if val is None else val
    if val is None and args.val_share:
        train, val = hold_out(train, args.val_share)
    elif only_val:
        val = train if val is None else val
    train = None if only_val else train
    if labelled:
        check_labelled(args.data_path, train, val)
    return train, val


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
    elif path.lower().endswith(ARCHIVES):
        raise InputError(f'{path}: unpack it, or decompress it to .tar, which is read in place')
    else:
        pair = open_list(path, args, make), None
    for source in pair:
        if source is not None:
            check_first(source)
    return pair


def check_first(source):
    """Read 16 images of a source. InputError if none is readable, or they are too dark."""
    problem, shares = '', []
    for index in range(0, len(source), -(-len(source) // 16)):
        try:
            source.dtype or source[index]
            content = source.content(index)
            shares.append(used_range(content) if isinstance(content, bytes) else None)
        except Exception as error:
            problem = error
    if source.dtype is None:
        raise InputError(f'{source.root}: none of the images tried can be read: {problem}')
    shares = [share for share in shares if share is not None]
    if shares and max(shares) < 0.25 and not source.options['max_value']:
        raise InputError(
            f'{source.root}: images of more than 8 bits use only {max(shares):.1%} of their range; '
            'say what is white: --max_value 4095 for 12 bits, 65535 if they are that dark'
        )


def check_labelled(path, train, val):
    """Prepare the labels of a classifier's sources, and print the classes. Raises InputError."""
    if val is None:
        raise InputError(
            f'{path} has no validation images (val/ or test/ beside train/); name some with '
            '--val_path, or hold some out with --val_share 0.1'
        )
    first = val if train is None else train
    for source in (first, val):
        if source.classes is None:
            example = f'{source.unlabelled} has none; ' if source.unlabelled else ''
            raise InputError(
                f'{source.root}: no labels; {example}use one folder per class, a list with path, '
                'tab, class, or tars with .cls or .json files'
                + (f'; or leave it out: --data_path {first.root}' if first.classes else '')
            )
    classes = first.classes
    if train is not None:
        if len(classes) < 2:
            raise InputError(f'{path}: only one class, {classes[0]}; two are needed')
        use_classes(val, classes, 'the training images')
    counts = np.bincount(first.labels, minlength=len(classes))
    few, many = counts.argmin(), counts.argmax()
    images = f'{len(val)} images to evaluate'
    images = images if train is None else f'{len(train)} images to train on, {images}'
    extremes = f'{counts[few]} of {classes[few]} to {counts[many]} of {classes[many]}'
    say(f'{len(classes)} classes: {shorten(classes)}; {images}; {extremes}')


def use_classes(source, classes, whose):
    """Number a source's labels as in `classes`, of which it may lack some.

    Raises InputError if it has others, which `whose`, such as 'the checkpoint', lacks.
    """
    extra = sorted(set(source.classes) - set(classes))
    if extra:
        raise InputError(f'{source.root}: classes that {whose} lack: {shorten(extra)}')
    lacking = sorted(set(classes) - set(source.classes))
    if lacking:
        say(f'{source.root}: no image of {len(lacking)} classes, {shorten(lacking)}')
    numbers = {name: number for number, name in enumerate(classes)}
    table = np.array([numbers[name] for name in source.classes])
    source.labels, source.classes = table[source.labels], list(classes)


# --- Sources --------------------------------------------------------------------------------------


class Images:
    """Images by number.

    Args:
        options: of decode.
        root: where they are, for people.
        names: (N,) bytes, relative to root.
        read: (self, index) -> the bytes of a file, or a PIL image.
        class_names: (N,) bytes, b'' for an image that has none; or else labels (N,).
        classes: the names of the classes, where their order is known.
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

    def content(self, index):
        """The bytes of a file, or a PIL image; or what reading raises."""
        return self.read(self, index)

    def __getitem__(self, index):
        try:
            content = self.content(index)
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

    unlabelled = None

    def __init__(self, source, indices):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.root = getattr(source, 'root', '')
        self.labels = None if source.labels is None else source.labels[indices]

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
    if names:
        files.say_left_out(path, others)
        return files.divide(path, names, make, labelled)
    if others['.tar']:
        return open_tars(path, list_files(path, ['.tar']), args, make, labelled)
    if others['.parquet'] or others['.arrow']:
        return open_table(path, args, make)
    kinds = ' '.join(sorted(others)) or 'no files'
    raise InputError(f'{path}: no image in it or in the folders below, but {kinds}')


def open_tars(path, names, args, make, labelled):
    """The images in tars below a folder, or in one tar, as if they were unpacked there.

    Labels are those of WebDataset, if there are any; else folders are classes, except for shards.
    """
    tars, shards = files.tar_folders(path, names) if names else ({path: ''}, False)
    label_key = getattr(args, 'label_key', 'label')
    names, places, labels = files.load_index(tars, args.download_dir, label_key)
    if not len(names):
        raise InputError(f'{path}: no image in it')
    names, labels = names.tolist(), labels.tolist()
    labels = labels if shards or any(labels) else None
    return files.divide(path, names, make, labelled, list(tars), places, labels)


def open_list(path, args, make):
    """The images that a text file lists (files.read_list). A missing one is bad like any other.

    A path may lead into a tar: ILSVRC2012_img_val.tar/ILSVRC2012_val_00000001.JPEG.
    """
    names, labels = (list(map(os.fsencode, texts)) for texts in files.read_list(path))
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
    name = known.get(path.removeprefix('torch/').replace('_', '').lower())
    if name is None:
        raise InputError(f'{path}: torchvision {torchvision.__version__} has no such data set')
    create = partial(getattr(torchvision.datasets, name), root=args.download_dir)
    unlabelled = [] if labelled else [{'split': 'train+unlabeled'}]
    splits = [{'split': 'train'}, {'split': 'trainval'}, {'train': True}, {}]
    train = create_torchvision(path, create, unlabelled + splits)
    splits = [{'split': name} for name in ('val', 'valid', 'validation', 'test')]
    val = create_torchvision(path, create, splits + [{'train': False}])
    if train is None:
        raise InputError(f'{path}: cannot be opened as a data set of labelled images')
    return from_torchvision(path, train, make), val and from_torchvision(path, val, make)


def create_torchvision(path, create, choices):
    """The data set by the first arguments that it knows, or None. Raises InputError."""
    downloads = [{}, {'download': True}] if world()[1] == 1 else [{}]
    for arguments in choices:
        for download in downloads:
            try:
                return create(**arguments, **download)
            except (TypeError, ValueError):  # no such argument, or no split of that name
                break
            except ImportError as error:  # SVHN needs scipy
                raise InputError(f'{path}: {error}') from None
            except (RuntimeError, OSError) as error:
                problem = ' '.join(str(getattr(error, 'reason', error)).split())
        else:
            how = ' (start once without torchrun)' if len(downloads) == 1 else ''
            raise InputError(f'{path}: not in --download_dir, no download{how}: {problem}')
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
    try:
        import datasets
    except ImportError:
        raise InputError(f'{path}: needs datasets (pip install datasets)') from None
    local = os.listdir(path) if os.path.isdir(path) else []
    name, _, config = (path, '', '') if local else path.removeprefix('hf/').partition(':')
    try:
        if 'state.json' in local or 'dataset_dict.json' in local:  # by save_to_disk
            tables = datasets.load_from_disk(path)
        else:
            tables = datasets.load_dataset(name, config or None)
    except Exception as error:  # it raises many kinds
        problem = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'{path}: {problem}') from None
    tables = tables if isinstance(tables, dict) else {'train': tables}
    train, val = choose_splits(tables) or (list(tables), [None])
    key = getattr(args, 'label_key', 'label')
    open_split = partial(from_table, path, tables, key, make)
    return open_split(train[0]), val[0] and open_split(val[0])


def from_table(path, tables, key, make, split):
    """The images of a split: the first column of type Image, or else `image` or `img`.

    Paths are relative to `path`. The classes are the column `key`, or else the first ClassLabel.
    """
    from datasets import ClassLabel, Image

    table, root = tables[split], f'{path}/{split}'
    features = table.features
    columns = [name for name in features if isinstance(features[name], Image)]
    columns += [name for name in ('image', 'img') if name in features]  # bytes or paths
    if not columns or not len(table):
        raise InputError(f'{root}: {len(table)} rows, no image in {shorten(table.column_names)}')
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
