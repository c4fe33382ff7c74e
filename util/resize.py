"""A copy of a data set, resized once: --crop simple starts with the same resize of every image in every epoch.

    python -m util.resize IMAGENET IMAGENET_224 --size 224                 # JPEG of quality 95
    python -m util.resize IMAGENET IMAGENET_224 --size 224 --lossless      # the very pixels, seven times the size
    python main_pretrain.py @recipes/vit_base_300e_pretrain.txt --data_path IMAGENET_224

The copy is an ordinary folder of images: names, order and labels are those of the source, which is anything that
--data_path takes and that has files. The smallest size that covers --size is kept, so that a crop has as much choice
as before. Killed and run again, it goes on; what cannot be read is left out and listed in DST/bad_images.txt.
"""

import fcntl
import io
import json
import os

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from util import data
from util.args import ArgumentParser, ImageSize, InputError, RunError, number, run
from util.transforms import Cover

SUFFIXES = {'.jpg': ('.jpg', '.jpeg'), '.bmp': ('.bmp',), '.npy': ('.npy',)}  # a name that has one keeps it


def get_parser():
    parser = ArgumentParser('Copy a data set, resized to what --crop simple resizes each image to.')
    add, count = parser.add_argument, number(int, 1)
    add('src', metavar='SRC', help='a folder of images, a tar or a folder of them, or a .txt file that lists images')
    add('dst', metavar='DST', help='folder for the copy')
    add(
        '--size',
        action=ImageSize,
        type=count,
        nargs='+',
        metavar='SIDE',
        default=[224, 224],
        help='the --input_size of the training: one side, or H and W (default: 224)',
    )
    add('--quality', type=number(int, 1, 100), default=95, help='of the JPEG files (default: %(default)s)')
    add('--lossless', action='store_true', help='BMP: larger than JPEG, faster to read than PNG or WebP')
    add('--in_chans', type=count, default=3, help='channels; arrays of other than 1 or 3 stay .npy (default: 3)')
    add('--max_bad', type=number(float, 0, 1), default=0.01, metavar='SHARE', help='as of main_pretrain.py')
    add('--num_workers', type=number(int, 0), help='processes (default: the CPU cores, at most 16)')
    add('--download_dir', default='data', help='for the indices of tar files and folders (default: %(default)s)')
    return parser


def main(args):
    sources = [
        data.open_source(args.src, split, args.in_chans, download_dir=args.download_dir) for split in data.SPLITS
    ]
    sources = {split: source for split, source in zip(data.SPLITS, sources) if source is not None}
    if not all(isinstance(source, data.ImageFiles) for source in sources.values()):
        raise InputError(f'{args.src}: only images in files can be copied')
    lock = open_destination(args)
    for split, source in sources.items():
        copies = Copies(source, args, split if len(sources) > 1 else '')
        copy(copies, args)
        if copies.listed:
            copies.write_list(os.path.join(args.dst, os.path.basename(args.src)))
    lock.close()


def open_destination(args):
    """DST/resize.json, open and locked until it is closed. InputError if DST is in use, or holds anything else."""
    src, path = os.path.realpath(args.src), os.path.join(args.dst, 'resize.json')
    if os.path.commonpath([src, os.path.realpath(args.dst)]) == src:
        raise InputError(f'{args.dst} lies inside {args.src}; choose a folder elsewhere')
    try:
        os.makedirs(args.dst, exist_ok=True)
        if os.listdir(args.dst) and not os.path.exists(path):
            raise InputError(f'{args.dst}: not empty, and not a copy that could be gone on with')
        file = open(path, 'a+')
    except OSError as error:
        raise InputError(f'{error.filename}: {error.strerror}') from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f'{path}: in use by another process, or it cannot be locked ({error.strerror})') from None
    ours = {name: vars(args)[name] for name in ('size', 'quality', 'lossless', 'in_chans')}
    ours['src'] = src
    file.seek(0)
    text = file.read()
    if not text:
        file.write(json.dumps(ours) + '\n')
        file.flush()
    elif json.loads(text) != ours:
        raise InputError(f'{args.dst} was made with {text.strip()}; choose another folder')
    return file


class Copies(torch.utils.data.Dataset):
    """The images of a source and where they go: [index] copies one, and returns (problem or '', bytes before, after).

    Names stay as they are, but for a suffix of the new format where they have another.
    """

    def __init__(self, source, args, split):
        self.source, self.cover, self.quality = source, Cover(args.size), args.quality
        self.root, self.listed = args.dst, False
        names = [os.fsdecode(name) for name in source.names.tolist()]
        if isinstance(source, data.TarImages):
            names = [os.path.join(split, name) for name in names]
        elif os.path.isdir(args.src):
            folder = os.path.relpath(source.root, args.src)  # train, or what its val/ is called, or nothing
            names = [os.path.normpath(os.path.join(folder, name)) for name in names]
        else:
            self.listed = True
            paths = [os.path.abspath(os.path.join(source.root, name)) for name in names]
            top = os.path.commonpath([os.path.dirname(path) for path in paths])
            names = [path[len(top) :].lstrip(os.sep) for path in paths]
        images = source.dtype == torch.uint8 and args.in_chans in (1, 3)
        self.suffix = '.npy' if not images else '.bmp' if args.lossless else '.jpg'
        kept = SUFFIXES[self.suffix]
        targets = [name if name.lower().endswith(kept) else name + self.suffix for name in names]
        self.targets = np.array([os.fsencode(name) for name in targets])
        self.indices = np.unique(self.targets, return_index=True)[1]  # a list may name an image twice
        if len(self.indices) < len(set(names)):
            raise InputError(f'{args.src}: two images would get one name, such as A.png and A.png{self.suffix}')

    def __len__(self):
        return len(self.indices)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.targets[index]))

    def __getitem__(self, number):
        index = int(self.indices[number])
        try:
            if not os.path.exists(self.path(index)):
                write(self.path(index), self.encode(self.cover(self.source[index][0])))
        except ValueError as error:
            return data.describe(error, self.source.path(index)), 0, 0
        return '', self.source.size(index), os.path.getsize(self.path(index))

    def encode(self, image):
        """(C, H, W) -> the bytes of a file."""
        buffer = io.BytesIO()
        if self.suffix == '.npy':
            np.save(buffer, image.permute(1, 2, 0).numpy())
        else:
            to_pil_image(image).save(buffer, {'.jpg': 'JPEG', '.bmp': 'BMP'}[self.suffix], quality=self.quality)
        return buffer.getvalue()

    def write_list(self, path):
        """The list of the source, of what has been copied."""
        classes = self.source.classes
        with open(path, 'w', encoding='utf-8', errors='surrogateescape') as file:
            for index, (name, label) in enumerate(zip(self.targets.tolist(), self.source.labels.tolist())):
                if os.path.exists(self.path(index)):
                    file.write(os.fsdecode(name) + (f'\t{classes[label]}' if classes else '') + '\n')


def write(path, content):
    """A file that is whole or not there. Raises RunError."""
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f'.{name}.tmp')  # hidden: nothing takes it for an image
    try:
        os.makedirs(folder, exist_ok=True)
        with open(unfinished, 'wb') as file:
            file.write(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise RunError(f'{path}: {error.strerror}') from None


def copy(copies, args):
    """Make all copies, and say what came of it. Raises RunError if more than --max_bad cannot be read."""
    bad, before, after = data.BadImages(len(copies), args.max_bad, args.dst), 0, 0
    num_workers = data.default_workers() if args.num_workers is None else args.num_workers
    loader = torch.utils.data.DataLoader(copies, batch_size=16, collate_fn=list, **data.worker_options(num_workers))
    with tqdm(desc=args.dst, total=len(copies), unit='image', disable=None) as bar:
        for results in loader:
            problems, *sizes = zip(*results)
            before, after = before + sum(sizes[0]), after + sum(sizes[1])
            bad.add(problems)
            bad.check(bad.count)
            bar.update(len(results))
    left_out = f', {bad.count} that cannot be read left out (see {bad.file})' * (bad.count > 0)
    print(f'{len(copies) - bad.count} images, {before / 1e6:.1f} MB, in {args.dst} {after / 1e6:.1f} MB{left_out}')


if __name__ == '__main__':
    run(main, get_parser())
