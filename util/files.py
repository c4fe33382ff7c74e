"""Which image files there are, in folders, tar files and lists, and which split each belongs to."""

import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import unicodedata
from bisect import bisect_left
from collections import defaultdict

import numpy as np

from util.distributed import is_first
from util.errors import InputError, as_input_error
from util.images import EXTENSIONS, reading

SPLIT = re.compile(  # 'Training', 'test_set', 'val2017', 'ILSVRC2012_img_val'
    r'(?:(.*)[^a-z])?'
    r'(?:(train|training)|(val|valid|validation|dev|eval|evaluation)|(test|testing))'
    r'(?:[ _-]?(?:set|data|images)|[ _-]?\d+)?',
    re.DOTALL | re.IGNORECASE,
)


def shorten(names):
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def say(text):
    if is_first():
        print(text, flush=True)


# --- Folders --------------------------------------------------------------------------------------


def list_files(root, extensions):
    """Sorted names, as bytes relative to root, of the files below it that have an extension.

    Links are followed, except into a folder that they are in; hidden files are left out.
    InputError if a folder may not be read.
    """
    names, endings = [], tuple(map(os.fsencode, extensions))

    def scan(folder, prefix, above):
        real = os.path.realpath(folder)
        for entry in os.scandir(folder) if real not in above else ():
            name = prefix + entry.name
            # entry.is_dir() raises for a link to itself, isdir() asks the disk for each file
            is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
            if entry.name.startswith(b'.'):
                continue
            if is_folder:
                scan(entry.path, name + b'/', {*above, real})
            elif name.lower().endswith(endings):
                names.append(name)

    with as_input_error():
        scan(os.fsencode(root), b'', ())
    return sorted(names)


def image_paths(paths, most=None):
    """Paths that a user typed -> paths of images: a folder stands for those below it.

    most: how many of a folder, spread over it. Raises InputError if there are none.
    """
    found = []
    for path in paths:
        names = [path]
        if not os.path.isfile(path):
            names = [os.path.join(path, os.fsdecode(x)) for x in list_files(path, EXTENSIONS)]
        found += names[:: max(1, -(-len(names) // most)) if most else 1]
    if not found:
        raise InputError(f'no image in {", ".join(paths)}')
    return found


def read_file(path):
    with open(path, 'rb') as file:
        return file.read()


# --- Splits and classes ---------------------------------------------------------------------------


def choose_splits(folders):
    """Names of folders -> [those of training images, then those of validation images].

    Empty if it lacks one of them; more than two if several are meant.
    """
    kinds = defaultdict(list)  # (what stands before the word, number of SPLIT's group): folders
    for folder in sorted(folders):
        match = SPLIT.fullmatch(folder)
        if match:
            kinds[(match[1] or '').lower(), match.lastindex].append(folder)
    for before, _ in sorted(kinds):
        train, val, test = (kinds[before, group] for group in (2, 3, 4))
        if train and (val or test):
            return train + (val or test)
    return []


def find_splits(path, names, labelled):
    """Sorted names of images -> for each split (what its names begin with, slice of names).

    Training images are the first; there may be no second. A folder that holds everything belongs
    to what its names begin with, unless it is the only class. Raises InputError if it is not clear
    which folders are splits; where folders are classes (`labelled`), also if all hold the same.
    """
    holding = {name.rpartition(b'/')[0] for name in names}  # the folders that hold images
    holding = [tuple(filter(None, os.fsdecode(folder).split('/'))) for folder in holding]
    tree = defaultdict(set)  # folder: the folders in it
    for folder in holding:
        for depth, name in enumerate(folder):
            tree[folder[:depth]].add(name)

    def below(folder):
        shared = os.path.commonprefix([x for x in holding if x[: len(folder)] == folder])
        top = ''.join(f'{name}/' for name in (folder if shared in holding else shared))
        prefix = os.fsencode(top)
        first = bisect_left(names, prefix)
        return top, slice(first, first + sum(name.startswith(prefix) for name in names))

    top = os.path.commonprefix(holding)
    splits = choose_splits(tree[top])
    if len(splits) == 2:
        return [below((*top, split)) for split in splits]
    unclear = splits or sorted('/'.join(x) for x in tree if choose_splits(tree[x]))
    inside = {frozenset(tree[(*top, name)]) for name in tree[top]}
    if labelled and len(tree[top]) > 1 and len(inside) == 1 and len(*inside) > 1:
        unclear = unclear or sorted(tree[top])  # all hold the same folders
    if unclear:
        raise InputError(
            f'{path}: are {shorten(unclear)} splits, or classes? Name a folder of training images '
            'by --data_path and one of validation images by --val_path, or lists with classes'
        )
    return [below(tuple(choose_splits([*top[:1], 'val'])[:1]))]  # a lone train/ is a split, too


def number_classes(names):
    """Class names of images (N,), empty for none -> (classes, in order; labels (N,), -1 for none).

    Whole numbers are sorted by value. Unicode's spellings of one name are one class.
    """
    spelled = {name: unicodedata.normalize('NFC', os.fsdecode(name)) for name in set(names)}
    classes = sorted(set(spelled.values()) - {''})
    if all(map(str.isdecimal, classes)):
        classes.sort(key=int)
    order = {name: number for number, name in enumerate(classes)} | {'': -1}
    return classes, np.array([order[spelled[name]] for name in names])


# --- Tar files, read in place ---------------------------------------------------------------------


class Tars:
    """The images in tars, {path: folder below root that it stands for}; a tar in a tar is a folder.

    The index is kept in --download_dir, and built again if a tar changes. Raises InputError if a
    tar cannot be read to its end.

    Attributes:
        names: (M,) bytes, relative to root, sorted like those of an unpacked folder.
        places: (M, 3) number of the tar, offset and size in bytes.
        labels: (M,) bytes, as WebDataset has them: what NAME.cls says, or else 'label' in
            NAME.json; for another --label_key only the latter; b'' for none.
    """

    def __init__(self, root, folders, args):
        self.tars, self.prefix = list(folders), os.path.join(root, '')
        key = [args.label_key, EXTENSIONS]
        for path, folder in folders.items():
            with reading(path):
                status = os.stat(path)
            key += os.path.realpath(path), status.st_size, status.st_mtime_ns, folder
        name = hashlib.sha256(os.fsencode(str(key))).hexdigest()[:16]
        cache = os.path.join(args.download_dir, f'tar-index-{name}.npz')
        try:
            index = tuple(np.load(cache).values())
        except Exception:  # not there, or damaged: killed while writing
            index = build_index(folders, args.label_key)
            with reading(f'{cache} (--download_dir)'):
                os.makedirs(args.download_dir, exist_ok=True)
                np.savez(cache, *index)  # other processes write the same bytes
        self.names, self.places, self.labels = index

    def read(self, path):
        """The bytes of an image. No file position moves: forked workers share the open files."""
        name = os.fsencode(path.removeprefix(self.prefix))
        row = bisect_left(self.names, name)
        if name not in self.names[row : row + 1]:
            raise ValueError('the tar has no such image')
        number, offset, size = self.places[row].tolist()
        return os.pread(open_tar(self.tars[number]).fileno(), size, offset)


@functools.lru_cache(256)  # fewer than the files that a process may have open
def open_tar(path):
    return open(path, 'rb', buffering=0)


def build_index(folders, label_key):
    """Names, places and labels, as Tars has them."""
    places, labels = {}, {}
    say(f'Indexing {len(folders)} tar files, once')
    for number, (path, folder) in enumerate(folders.items()):
        with reading(f'{path}: not a plain tar, or damaged'), open(path, 'rb') as file:
            for name, offset, size in members(file):
                stem, kind = os.path.splitext(os.fsencode(os.path.join(folder, name)))
                if os.fsdecode(kind).lower() in EXTENSIONS:
                    places[stem + kind] = number, offset, size  # the last of equal names
                elif kind == b'.cls' and label_key == 'label':
                    labels[stem] = os.pread(file.fileno(), size, offset).strip()
                elif kind == b'.json' and size < 1e6:
                    content = os.pread(file.fileno(), size, offset)
                    with contextlib.suppress(ValueError, LookupError, TypeError):  # another kind
                        label = as_class(json.loads(content)[label_key])
                        labels.setdefault(stem, os.fsencode(label))
    names = sorted(places)
    found = [labels.get(os.path.splitext(name)[0], b'') for name in names]
    places = np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 3)
    return np.array(names, dtype=bytes), places, np.array(found, dtype=bytes)


def as_class(value):
    """A class as JSON or a table gives it -> text, '' for none, such as a table's NaN."""
    return str(value) if isinstance(value, (int, str)) else ''


def members(file):
    """Yield (name, offset, size) of the regular files in a tar and in the tars within it.

    Hidden ones are left out. Raises tarfile.TarError if it is no plain tar, cut off or damaged.
    """
    with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in iter(archive.next, None):
            archive.members.clear()  # it would keep them all
            name = os.path.normpath(member.name.lstrip('/'))
            if not member.isreg() or any(part[0] == '.' for part in name.split('/')):
                continue
            if name.lower().endswith('.tar'):
                for inner, offset, size in members(archive.extractfile(member)):
                    yield f'{name[:-4]}/{inner}', member.offset_data + offset, size
            else:
                yield name, member.offset_data, member.size
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b'\0'):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f'damaged header at byte {archive.offset}')
