"""Which image files there are, in folders, tar files and lists, and which split each belongs to."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import tarfile
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

from util.distributed import world
from util.errors import InputError, as_input_error
from util.images import EXTENSIONS

SPLIT = re.compile(  # 'Training', 'test_set', 'val2017', 'ILSVRC2012_img_val'
    r'(?:(.*)[^a-z])?'
    r'(?:(train|training)|(val|valid|validation|dev|eval|evaluation)|(test|testing))'
    r'(?:[ _-]?(?:set|data|images)|[ _-]?\d+)?',
    re.DOTALL | re.IGNORECASE,
)
ENDING = '|'.join(map(re.escape, EXTENSIONS))
LINE = re.compile(rf'(.*(?:{ENDING}))\s*[, ]\s*(.+)', re.IGNORECASE)  # name, class


def shorten(names):
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def say(text):
    if world()[0] == 0:
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
                if is_folder(entry):
                    scan(entry.path, prefix + entry.name + b'/', above | {this})
                elif entry.name.lower().endswith(endings):
                    names.append(prefix + entry.name)
                elif others is not None:
                    others[os.path.splitext(os.fsdecode(entry.name))[1].lower()] += 1

    with as_input_error():
        scan(os.fsencode(root), b'', frozenset())
    return sorted(names)


def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def image_paths(paths, most=None):
    """Paths that a user typed -> paths of images: a folder stands for those below it.

    most: how many of a folder, spread over it. Raises InputError if there are none.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            names = list_files(path, EXTENSIONS)
            count = min(len(names), most or len(names))
            chosen = [names[i * len(names) // count] for i in range(count)]
            found += [os.path.join(path, os.fsdecode(name)) for name in chosen]
        else:
            found.append(path)
    if not found:
        raise InputError(f'no image in {", ".join(paths)}')
    return found


def say_left_out(path, others):
    kinds = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:6]
    kinds = [f'{count} {kind or "without ending"}' for kind, count in kinds]
    if kinds:
        say(f'{path}: left out: {", ".join(kinds)}')


# --- Splits ---------------------------------------------------------------------------------------


def choose_splits(folders):
    """Names of folders -> ([those of training images], [those of validation images]), or None."""
    kinds = defaultdict(list)  # (what stands before the word, number of SPLIT's group): folders
    for folder in sorted(folders):
        match = SPLIT.fullmatch(folder)
        if match:
            kinds[(match[1] or '').lower(), match.lastindex].append(folder)
    for before in sorted({before for before, _ in kinds}):
        train, val, test = (kinds.get((before, group)) for group in (2, 3, 4))
        if train and (val or test):
            return train, val or test
    return None


def find_splits(path, names, labelled):
    """Sorted names of images -> for each split (folder that its names begin with, slice of names).

    Training images are the first; there may be no second. A folder that holds everything belongs
    to what its names begin with, unless it is the only class.

    Args:
        labelled: whether folders are classes.

    Raises:
        InputError: if it is not clear what the folders are.
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
    if splits:
        if len(splits[0] + splits[1]) > 2:
            raise InputError(f'{path}: which of {shorten(splits[0] + splits[1])}? Name it alone')
        return [below(os.path.join(top, folder)) for (folder,) in splits]
    deeper = sorted(folder for folder in list(tree) if choose_splits(tree[folder]))
    if deeper:
        raise InputError(f'{path}: has splits in {shorten(deeper)}; name one folder')
    inside = [sorted(tree[os.path.join(top, folder)]) for folder in tree[top]]
    alike = len(inside) > 1 and len(inside[0]) > 1 and all(item == inside[0] for item in inside)
    if labelled and alike:
        raise InputError(
            f'{path}: {shorten(sorted(tree[top]))} all hold {shorten(inside[0])}; if they are '
            'splits, name one by --data_path and one by --val_path, else list images and classes'
        )
    match = SPLIT.fullmatch(top.partition('/')[0])  # a lone train/ is a split, too
    lone = top in holding and match and match[2] and not match[1]
    return [below(match[0] if lone else '')]


def divide(path, names, make, labelled, tars=None, places=None, labels=None):
    """Images below path, by their sorted names -> (training images, validation images or None).

    Args:
        make: (root, names, read, class_names) -> images.
        tars, places: paths of tars, and where in these the images are, as load_index gives it.
        labels: (N,) bytes, b'' for none; without them, the first folders of names are classes.
    """
    parts = []
    for top, chosen in find_splits(path, names, labelled and labels is None):
        length = len(os.fsencode(os.path.join(top, '')))
        kept = [name[length:] for name in names[chosen]]
        if labels is None:
            found = [name.partition(b'/')[0] if b'/' in name else b'' for name in kept]
        else:
            found = labels[chosen]
        read = read_file if tars is None else functools.partial(read_member, tars, places[chosen])
        parts.append(make(os.path.join(path, top) if top else path, kept, read, found))
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
    stems = [os.fsdecode(name)[: -len('.tar')] for name in names]
    parts = [re.fullmatch(r'(.*?)[ ._-]*(\d*)(?:-of-\d+)?', stem, re.DOTALL) for stem in stems]
    numbers = defaultdict(list)
    for part in parts:
        numbers[part[1]].append(int(part[2] or -1))
    dense = [min(n) >= 0 and max(n) - min(n) < 10 * len(n) for n in numbers.values()]
    many = [len(n) > 1 for n in numbers.values()]
    shards = all(dense) or any(map(min, dense, many))
    tars = {}
    for name, stem, part in zip(names, stems, parts):
        folder = os.path.join(part[1], os.path.basename(stem)) if shards else stem
        tars[os.path.join(path, os.fsdecode(name))] = folder
    return tars, shards


def load_index(tars, cache_dir, label_key='label'):
    """Where the images are in tars, {path: folder that it stands for}; a tar in a tar is a folder.

    Read from cache_dir while the tars have not changed; else one process builds the index and keeps
    it there, and the others wait for it.

    Returns:
        names (M,): bytes, sorted like those of an unpacked folder.
        places (M, 3): number of the tar, offset and size in bytes.
        labels (M,): bytes, as WebDataset has them: what NAME.cls says, or label_key in NAME.json,
            which goes first where it is not 'label'; b'' for none.

    Raises:
        InputError: if a tar cannot be read to its end.
    """
    with as_input_error():
        versions = [(os.path.realpath(path), os.stat(path)) for path in tars]
    versions = [(path, status.st_size, status.st_mtime_ns) for path, status in versions]
    key = repr((versions, list(tars.values()), EXTENSIONS, label_key)).encode()
    cache = os.path.join(cache_dir, f'tar-index-{hashlib.sha256(key).hexdigest()[:16]}.npz')
    try:
        os.makedirs(cache_dir, exist_ok=True)
        file = open(os.open(cache, os.O_RDWR | os.O_CREAT, 0o644), 'r+b')
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f'{cache}: {error.strerror}; the index is not kept (--download_dir)')
        return build_index(tars, label_key)
    with file:
        with contextlib.suppress(Exception):  # new and empty, or cut off
            return tuple(np.load(file, allow_pickle=False).values())
        index = build_index(tars, label_key)
        try:
            file.seek(0)
            file.truncate()
            np.savez(file, *index)
            file.flush()
        except OSError as error:
            print(f'{cache}: {error.strerror}; the index is not kept')
    return index


def build_index(tars, label_key):
    """What load_index returns, with a progress bar."""
    places, labels, others, done = {}, {}, Counter(), 0
    sizes = [os.path.getsize(path) for path in tars]
    print(f'Indexing {len(tars)} tar files, {sum(sizes) / 1e9:.2f} GB, once', flush=True)
    with tqdm(desc='index', total=sum(sizes), unit='B', unit_scale=True, disable=None) as bar:
        for number, (path, folder) in enumerate(tars.items()):
            try:
                with open(path, 'rb') as file:
                    for name, offset, size in members(file):
                        bar.update(done + offset - bar.n)
                        name = os.path.join(folder, name)
                        kind = os.path.splitext(name)[1].lower()
                        if kind in EXTENSIONS:  # of equal names the last, as in unpacking
                            places[os.fsencode(name)] = number, offset, size
                        elif kind in ('.cls', '.json') and size < 1e6:
                            content = os.pread(file.fileno(), size, offset)
                            stem = os.path.splitext(os.fsencode(name))[0]
                            labels[stem, kind] = read_label(content, kind, label_key)
                        else:
                            others[kind] += 1
            except OSError as error:
                raise InputError(f'{path}: {error.strerror}') from None
            except (tarfile.TarError, RecursionError) as error:
                raise InputError(
                    f'{path}: cut off, damaged, or not a plain tar ({error})'
                ) from None
            done += sizes[number]
    say_left_out('tar files', others)
    kinds = ('.cls', '.json') if label_key == 'label' else ('.json', '.cls')
    names, found = sorted(places), []
    for name in names:
        stem = os.path.splitext(name)[0]
        found.append(labels.get((stem, kinds[0])) or labels.get((stem, kinds[1]), b''))
    places = np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 3)
    return np.array(names, dtype=bytes), places, np.array(found, dtype=bytes)


def read_label(content, kind, key):
    """The class in a .cls file, or in a .json file at a key, as bytes; b'' for none."""
    if kind == '.cls':
        return content.strip()
    try:
        return as_class(json.loads(content)[key])
    except (ValueError, LookupError, TypeError):
        return b''


def as_class(value):
    """A class as JSON or a table gives it -> bytes, b'' for none."""
    return os.fsencode(str(value)) if isinstance(value, (int, str)) else b''


def members(file):
    """Yield (name, offset, size) of the regular files in a tar and in the tars within it.

    Hidden ones are left out. Raises tarfile.TarError if it is no plain tar, cut off or damaged.
    """
    with tarfile.open(fileobj=file, mode='r:') as archive:
        while True:
            member = archive.next()
            if member is None:
                break
            archive.members.clear()  # it would keep them all
            if member.size < 0:
                raise tarfile.ReadError('a negative size')
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
    """(names, classes) of the images that a text file lists, one on each line; '' for no class.

    A line is a path, relative to the list or absolute, and after a tab, a comma or a space the
    class, if it has one. '#' starts a comment. A header is left out. Raises InputError.
    """
    with as_input_error(path), open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        text = file.read(4096)
        lines = [] if '\0' in text else [line.strip() for line in (text + file.read()).split('\n')]
    lines = [line for line in lines if line and line[0] != '#']
    if not lines:
        raise InputError(f'{path}: not a folder, and not a text file that lists images')
    is_image = [any(kind in line.lower() for kind in EXTENSIONS) for line in lines[:2]]
    if is_image == [False, True]:
        if len(re.findall('[,\t]', lines[0])) > 1:
            raise InputError(f'{path}: columns {lines[0]}; a list has two, path and class')
        lines = lines[1:]
    return zip(*map(split_line, lines))


def split_line(line):
    """A line of a list -> (name, class or '')."""
    name, tab, label = line.partition('\t')
    if tab or line.lower().endswith(EXTENSIONS):  # names may have spaces
        return name.strip(), label.strip()
    match = LINE.fullmatch(line)
    return match.groups() if match else (line, '')
