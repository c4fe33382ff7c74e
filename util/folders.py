"""Image files as a source (util/sources.py): in folders, named in a list, or in tar files."""

import os
import sys
from dataclasses import dataclass

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import to_dtype

from util import tar
from util.errors import InputError, as_input_error
from util.images import WHITE, decode_image, read_image

EXTENSIONS = (*IMG_EXTENSIONS, '.gif', '.npy')
SPLITS = {'train': ['train', 'training'], 'val': ['val', 'valid', 'validation', 'test']}


@dataclass(frozen=True)
class Options:
    """How images are found and decoded."""

    in_chans: int = 3
    background: tuple = WHITE  # (R, G, B) behind transparent images
    image_size: tuple = (224, 224)  # of pictures that are drawn
    download_dir: str = 'data'  # for torchvision's data sets and the index of tar files
    labelled: bool = False  # without the unlabelled training images of a data set such as STL-10


DEFAULTS = Options()


class ImageFiles:
    """Image files below a folder, given by their names relative to it, as bytes, and the name of each one's class.

    Without class_names the first folder of a name is its class, if all names have one.
    """

    def __init__(self, root, names, options=DEFAULTS, class_names=None):
        self.root, self.options = root, options
        self.names = np.asarray(names, dtype=bytes)  # one buffer, which forked workers share
        self.dtype = None  # of the pixels: that of the first image that can be read
        self.classes = self.labels = None
        names = self.names.tolist()
        if class_names is None and all(b'/' in name for name in names):
            class_names = [os.fsdecode(name.split(b'/')[0]) for name in names]
        if class_names:
            self.classes = sorted(set(class_names))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = np.array([numbers[name] for name in class_names])

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return bytes(self.names[index])

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def content(self, index):
        with open(os.open(self.path(index), os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:  # a pipe would block
            return file.read()

    def __getitem__(self, index):
        path = self.path(index)
        try:
            image = decode_image(self.content(index), path, self.options.in_chans, self.options.background)
        except OSError as error:
            raise ValueError(f'{path}: {error.strerror}') from None
        self.dtype = self.dtype or image.dtype
        wide = image.is_floating_point() and (image.min() < 0 or image.max() > 1)
        if wide and not self.dtype.is_floating_point:
            raise ValueError(f'{path}: values outside 0..1 among 8-bit images')
        return to_dtype(image, self.dtype, scale=True), -1 if self.labels is None else int(self.labels[index])


class TarImages(ImageFiles):
    """Images in tar files: names as they would be unpacked below root, and their places, as tar.load_index gives."""

    def __init__(self, root, names, options, tars, places):
        super().__init__(root, names, options)
        self.tars, self.places = tars, places

    def content(self, index):
        number, offset, size = self.places[index].tolist()
        return tar.read(self.tars[number], offset, size)


def open_folder(path, split, options):
    """All images below path, or below its train/ (or val/, valid/, validation/, test/) where it has splits.

    Where there are no image files but tar files, the images in these: a tar stands for a folder of its name, and
    ..._train.tar and ..._val.tar for train/ and val/.
    """
    with as_input_error(path):
        entries = [entry for entry in os.scandir(path) if entry.name[0] != '.']
    folders = {entry.name: entry.path for entry in entries if is_folder(entry)}
    tars, splits = {}, sum(SPLITS.values(), [])
    for entry in entries:
        name = entry.name[:-4].rpartition('_')[2]
        if entry.name.lower().endswith('.tar') and (not folders or name in splits):
            if name in tars and name in splits:
                raise InputError(f'{path}: two tar files for {name}, {entry.name} and {os.path.basename(tars[name])}')
            tars[name] = entry.path
    chosen = choose_split(tars | folders, split)
    if chosen is None and (folders or not tars):  # tars without splits may have them inside
        return None
    place = (tars | folders)[chosen] if chosen else path
    if os.path.isfile(place):
        return open_tars({place: ''}, place, None, options)
    names = find_files(place, EXTENSIONS)
    if names:
        return None if chosen is None else ImageFiles(place, names, options)
    names = map(os.fsdecode, find_files(place, ('.tar',)))
    tars = {os.path.join(place, name): name[:-4] for name in names}
    if tars:
        return open_tars(tars, place, None if chosen else split, options)
    raise InputError(f'{place}: no image in it or in the folders below; images end in {" ".join(EXTENSIONS)}, or .tar')


def choose_split(folders, split):
    """Which of the folders holds a split: its name, '' for all of them together, None for none."""
    found = {name: [folder for folder in SPLITS[name] if folder in folders] for name in SPLITS}
    if found['train'] and (found['val'] or len(folders) == 1):  # else 'train' is a class or a folder like others
        return next(iter(found[split]), None)
    return '' if split == 'train' else None


def find_files(root, extensions):
    """Names, as sorted bytes relative to root, of the files in root and the folders below that have an extension.

    Links are followed, except into a folder that they are in; hidden files and folders are left out.

    Raises:
        InputError: if a folder may not be read.
    """
    extensions = tuple(map(os.fsencode, extensions))
    names = []

    def scan(folder, prefix, above):
        status = os.stat(folder)
        this = status.st_dev, status.st_ino
        if this in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ord('.'):
                    continue
                if is_folder(entry):
                    scan(entry.path, prefix + entry.name + b'/', above | {this})
                elif entry.name.lower().endswith(extensions):
                    names.append(prefix + entry.name)

    try:
        scan(os.fsencode(root), b'', frozenset())
    except OSError as error:
        raise InputError(f'{os.fsdecode(error.filename)}: {error.strerror}') from None
    return sorted(names)


def image_paths(paths, most=None):
    """Paths that a user typed -> paths of images: a folder stands for those in it and below, or `most`, spread over it.

    Raises:
        InputError: if there are none.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            names = find_files(path, EXTENSIONS)
            count = min(len(names), most or len(names))
            found += [os.path.join(path, os.fsdecode(names[i * len(names) // count])) for i in range(count)]
        else:
            found.append(path)
    if not found:
        raise InputError(f'no image in {", ".join(paths)}')
    return found


def given_images(paths, in_chans, background):
    """Yield (path, image) of the images that a user named (image_paths).

    One that cannot be read is reported. SystemExit with code 1 at the end, if there were any.
    """
    failed = False
    for path in image_paths(paths):
        try:
            image = read_image(path, in_chans, background)
        except InputError as error:
            print(error, file=sys.stderr)
            failed = True
        else:
            yield path, image
    if failed:
        raise SystemExit(1)


def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def open_tars(tars, root, split, options):
    """The images in tars, {path: folder that it stands for}; those of a split, unless it is None.

    A folder that holds everything, as most tars have, is neither a class nor a split.
    """
    names, places = tar.load_index(tars, EXTENSIONS, options.download_dir)
    if not len(names):
        raise InputError(f'{root}: no image in it; images end in {" ".join(EXTENSIONS)}')
    names = names.tolist()
    top = os.path.commonprefix([names[0], names[-1]]).rpartition(b'/')[0]  # they are sorted
    if split:
        below = (name[len(top) :].strip(b'/') for name in names)
        chosen = choose_split({os.fsdecode(name.split(b'/')[0]) for name in below if b'/' in name}, split)
        if chosen is None:
            return None
        top = os.path.join(top, os.fsencode(chosen)) if chosen else top
    prefix = os.path.join(top, b'')
    kept = [name.startswith(prefix) for name in names]
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return TarImages(os.path.join(root, os.fsdecode(top)), names, options, list(tars), places[kept])


def open_list(path, options):
    """A text file that names an image on each line, relative to the file's folder or absolute, and after a tab its
    class, if it has one. '#' starts a comment line.

    The images are not looked for here: one that is missing is a bad image like any other.
    """
    with as_input_error(path), open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        text = file.read(4096)
        lines = [] if '\0' in text else [line.strip() for line in (text + file.read()).split('\n')]
    names = [line for line in lines if line and line[0] != '#']
    if not names:
        raise InputError(f'{path}: not a folder, and not a text file that lists images, one per line')
    names, class_names = zip(*(line.partition('\t')[::2] for line in names))
    names = [os.fsencode(name) for name in names]
    return ImageFiles(os.path.dirname(path), names, options, class_names if all(class_names) else [])
