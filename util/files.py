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
from tqdm import tqdm

from util.distributed import is_first
from util.errors import InputError, as_input_error
from util.images import EXTENSIONS

SPLIT = re.compile(  # 'Training', 'test_set', 'val2017', 'ILSVRC2012_img_val'
    r'(?:(.*)[^a-z])?'
    r'(?:(train|training)|(val|valid|validation|dev|eval|evaluation)|(test|testing))'
    r'(?:[ _-]?(?:set|data|images)|[ _-]?\d+)?',
    re.DOTALL | re.IGNORECASE,
)
ENDINGS = tuple(map(os.fsencode, EXTENSIONS))
ENDING = '|'.join(map(re.escape, EXTENSIONS))
LINE = re.compile(  # name, class; a third column is not read as part of the class
    rf'([^\t]+?(?=\s*\t)|.*(?:{ENDING}))(?:(?:\s*\t|\s*,(?!.*,)|\s)\s*([^\s,].*))?', re.IGNORECASE
)


def shorten(names):
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def say(text):
    if is_first():
        print(text, flush=True)


# --- Folders --------------------------------------------------------------------------------------


def list_files(root, extensions, others=None):
    """Sorted names, as bytes relative to root, of the files below it that have an extension.

    Links are followed, except into a folder that they are in; hidden ones are left out. `others`,
    a Counter, gets the extensions of the other files. InputError if a folder may not be read.
    """
    names, endings = [], tuple(map(os.fsencode, extensions))

    def scan(folder, prefix, above):
        status = os.stat(folder)
        this = status.st_dev, status.st_ino
        if this in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[:1] == b'.':
                    continue
                # entry.is_dir() raises for a link to itself, isdir() asks the disk for each file
                if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                    scan(entry.path, prefix + entry.name + b'/', above | {this})
                elif entry.name.lower().endswith(endings):
                    names.append(prefix + entry.name)
                elif others is not None:
                    others[os.path.splitext(os.fsdecode(entry.name))[1].lower()] += 1

    with as_input_error():
        scan(os.fsencode(root), b'', frozenset())
    return sorted(names)


def image_paths(paths, most=None):
    """Paths that a user typed -> paths of images: a folder stands for those below it.

    most: how many of a folder, spread over it. Raises InputError if there are none.
    """
    found = []
    for path in paths:
        names = [path]
        if os.path.isdir(path):
            names = [os.path.join(path, os.fsdecode(x)) for x in list_files(path, EXTENSIONS)]
            names = names[:: max(1, -(-len(names) // most)) if most else 1]
        found += names
    if not found:
        raise InputError(f'no image in {", ".join(paths)}')
    return found


# --- Splits ---------------------------------------------------------------------------------------


def choose_splits(folders):
    """Names of folders -> [those of training images, then those of validation images].

    Empty if it lacks one of them; more than two if several are meant.
    """
    kinds = defaultdict(list)  # (what stands before the word, number of SPLIT's group): folders
    for folder in sorted(folders):
        match = SPLIT.fullmatch(folder)
        if match:
            kinds[(match[1] or '').lower(), match.lastindex].append(folder)
    for before in sorted({before for before, _ in kinds}):
        train, val, test = (kinds[before, group] for group in (2, 3, 4))
        if train and (val or test):
            return train + (val or test)
    return []


def find_splits(path, names, labelled):
    """Sorted names of images -> for each split (folder that its names begin with, slice of names).

    Training images are the first; there may be no second. A folder that holds everything belongs
    to what its names begin with, unless it is the only class. Raises InputError if it is not clear
    which folders are splits; where folders are classes (`labelled`), also if all hold the same.
    """
    tree = defaultdict(set)  # folder: the folders in it
    holding = set(map(os.fsdecode, {name.rpartition(b'/')[0] for name in names}))  # images
    for folder in holding:
        while folder:
            folder, _, name = folder.rpartition('/')
            tree[folder].add(name)

    def unwrap(folder):
        """The first folder from this one on that holds several folders, or images."""
        while folder not in holding and len(tree[folder]) == 1:
            folder = os.path.join(folder, *tree[folder])
        return folder

    def below(folder):
        top = folder if unwrap(folder) in holding else unwrap(folder)
        first = os.fsencode(os.path.join(top, ''))
        end = bisect_left(names, first[:-1] + b'0') if top else len(names)  # 0 comes after /
        return top, slice(bisect_left(names, first), end)

    top = unwrap('')
    splits = choose_splits(tree[top])
    if len(splits) == 2:
        return [below(os.path.join(top, folder)) for folder in splits]
    unclear = splits or sorted(folder for folder in tree if choose_splits(tree[folder]))
    inside = {frozenset(tree[os.path.join(top, folder)]) for folder in tree[top]}
    if labelled and len(tree[top]) > 1 and len(inside) == 1 and len(*inside) > 1:
        unclear = unclear or sorted(tree[top])  # all hold the same folders
    if unclear:
        raise InputError(
            f'{path}: are {shorten(unclear)} splits, or classes? Name a folder of training images '
            'by --data_path and one of validation images by --val_path, or lists with classes'
        )
    match = SPLIT.fullmatch(top.partition('/')[0])  # a lone train/ is a split, too
    return [below(match[0] if match and match[2] and not match[1] else '')]


def divide(path, names, make, labelled, tars=None, places=None, labels=None):
    """Images below path, by their sorted names -> (training images, validation images or None).

    make: (root, names, read, class_names) -> images. tars, places and labels are those of
    load_index; without labels (N,), the first folders of names are classes.
    """
    parts = []
    for top, chosen in find_splits(path, names, labelled and labels is None):
        length = len(os.fsencode(os.path.join(top, '')))
        kept = [name[length:] for name in names[chosen]]
        found = [name.rpartition(b'/')[0].partition(b'/')[0] for name in kept]
        read = read_file if tars is None else functools.partial(read_member, tars, places[chosen])
        root = os.path.join(path, top) if top else path
        parts.append(make(root, kept, read, found if labels is None else labels[chosen]))
    return (*parts, None)[:2]


def number_classes(names, classes=None):
    """Class names of images (N,), as bytes -> (names of the classes, in order; labels (N,)).

    Whole numbers are sorted by value. Unicode's spellings of one name are one class.
    """
    spelled = {name: unicodedata.normalize('NFC', os.fsdecode(name)) for name in set(names)}
    if classes is None:
        classes = sorted(set(spelled.values()))
        if all(map(str.isdecimal, classes)):
            classes.sort(key=int)
    order = {unicodedata.normalize('NFC', name): number for number, name in enumerate(classes)}
    numbers = {name: order[spelling] for name, spelling in spelled.items()}
    return classes, np.array([numbers[name] for name in names])


def read_file(source, index):
    with open(os.open(source.path(index), os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:
        return file.read()  # a pipe would block


# --- Tar files, read in place ---------------------------------------------------------------------


def tar_folders(path, names):
    """Names of tars below path -> {path: folder that it stands for}, and whether they are shards.

    Shards are numbered pieces of one set, not classes such as n01440764: x-train-0000 stands for
    x-train/x-train-0000.
    """
    tars, numbers = {}, defaultdict(list)
    for name in map(os.fsdecode, names):
        stem = name[: -len('.tar')]
        prefix, number = re.fullmatch(r'(.*?)[ ._-]*(\d*)(?:-of-\d+)?', stem, re.DOTALL).groups()
        numbers[prefix].append(int(number or -1))
        tars[os.path.join(path, name)] = stem, os.path.join(prefix, os.path.basename(stem))
    dense = [len(n) for n in numbers.values() if min(n) >= 0 and max(n) - min(n) < 10 * len(n)]
    shards = len(dense) == len(numbers) or max(dense, default=0) > 1
    return {tar: folders[shards] for tar, folders in tars.items()}, shards


def load_index(tars, cache_dir, label_key='label'):
    """Where the images are in tars, {path: folder that it stands for}; a tar in a tar is a folder.

    The index is kept in cache_dir, and built again if a tar changes.

    Returns names (M,), bytes, sorted like those of an unpacked folder; places (M, 3), number of the
    tar, offset and size in bytes; and labels (M,), bytes, as WebDataset has them: what NAME.cls
    says, or else 'label' in NAME.json; for another label_key only the latter; b'' for none.
    Raises InputError if a tar cannot be read to its end.
    """
    with as_input_error():
        key = [
            (os.path.realpath(path), os.path.getsize(path), os.stat(path).st_mtime_ns, folder)
            for path, folder in tars.items()
        ]
    name = hashlib.sha256(os.fsencode(f'{key} {label_key} {ENDING}')).hexdigest()[:16]
    cache = os.path.join(cache_dir, f'tar-index-{name}.npz')
    with contextlib.suppress(Exception):  # not there, or damaged
        return tuple(np.load(cache, allow_pickle=False).values())
    index = build_index(tars, label_key)
    try:
        os.makedirs(cache_dir, exist_ok=True)
        mine = f'{cache}.{os.urandom(4).hex()}'  # other processes may write theirs
        with open(mine, 'wb') as file:
            np.savez(file, *index)
        os.replace(mine, cache)
    except OSError as error:
        say(f'{cache}: {error.strerror}; the index is not kept (--download_dir)')
    return index


def build_index(tars, label_key):
    """What load_index returns."""
    places, labels = {}, {}
    say(f'Indexing {len(tars)} tar files, once')
    for number, (path, folder) in enumerate(tqdm(tars.items(), 'index', disable=None)):
        try:
            with as_input_error(path), open(path, 'rb') as file:
                for name, offset, size in members(file):
                    name = os.fsencode(os.path.join(folder, name))
                    stem, kind = os.path.splitext(name)
                    if kind.lower() in ENDINGS:  # of equal names the last, as in unpacking
                        places[name] = number, offset, size
                    elif kind in (b'.cls', b'.json') and size < 1e6:
                        content = os.pread(file.fileno(), size, offset)
                        label = read_label(content, kind, label_key)
                        if label and (kind == b'.cls' or stem not in labels):
                            labels[stem] = label
        except (tarfile.TarError, RecursionError) as error:
            raise InputError(f'{path}: cut off, damaged, or not a plain tar ({error})') from None
    names = sorted(places)
    found = [labels.get(os.path.splitext(name)[0], b'') for name in names]
    places = np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 3)
    return np.array(names, dtype=bytes), places, np.array(found, dtype=bytes)


def read_label(content, kind, key):
    """The class in a .cls file, or in a .json file at a key, as bytes; b'' for none."""
    if kind == b'.cls':
        return content.strip() if key == 'label' else b''
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return as_class(json.loads(content)[key])
    return b''


def as_class(value):
    """A class as JSON or a table gives it -> bytes, b'' for none, such as a table's NaN."""
    return os.fsencode(str(value)) if isinstance(value, (int, str)) else b''


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


@functools.lru_cache(256)  # fewer than the files that a process may have open
def open_tar(path):
    return open(path, 'rb', buffering=0)


def read_member(tars, places, source, index):
    """The bytes of an image. No file position moves: forked workers share the open files."""
    number, offset, size = places[index].tolist()
    return os.pread(open_tar(tars[number]).fileno(), size, offset)


# --- Lists ----------------------------------------------------------------------------------------


def read_list(path):
    """(name, class or '') of the images that a text file lists, one on each line.

    A line is a path, relative to the list or absolute, and after a tab, a comma or a space the
    class, if it has one. '#' starts a comment. A header is left out.
    """
    with as_input_error(path), open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        text = file.read(4096)
        lines = [] if '\0' in text else [line.strip() for line in (text + file.read()).split('\n')]
    lines = [line for line in lines if line and line[0] != '#']
    is_image = [bool(re.search(ENDING, line, re.IGNORECASE)) for line in lines[:2]]
    lines = lines[is_image == [False, True] :]  # without a header
    matches = [LINE.fullmatch(line) for line in lines]
    return [match.groups('') if match else (line, '') for line, match in zip(lines, matches)]
