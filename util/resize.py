"""A copy of a folder of images, resized once: --crop simple starts with the same resize of every image in every epoch.

    python -m util.resize IMAGENET IMAGENET_224 --size 224                 # JPEG of quality 95
    python -m util.resize IMAGENET IMAGENET_224 --size 224 --lossless      # the same pixels, seven times the JPEGs
    python main_pretrain.py @recipes/vit_base_300e_pretrain.txt --data_path IMAGENET_224

The copy has the folders and names of the source. Each image keeps the smallest size that covers --size, so that a crop
has as much choice as before. The same command resumes a copy that was interrupted. Images that cannot be read are left
out and listed in DST/bad_images.txt.
"""

import io
import json
import os

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from util import data, workers
from util.args import ArgumentParser, ImageSize, number, run_job
from util.errors import InputError, RunError
from util.folders import EXTENSIONS, ImageFiles, Options, find_files
from util.images import WHITE
from util.sources import check_readable
from util.transforms import Cover

SUFFIXES = {'.jpg': ('.jpg', '.jpeg'), '.bmp': ('.bmp',), '.npy': ('.npy',)}  # a name that has one keeps it


def get_parser():
    parser = ArgumentParser('Copy a folder of images, resized to what --crop simple resizes each image to.')
    add, count = parser.add_argument, number(int, 1)
    add('src', metavar='SRC', help='a folder of images')
    add('dst', metavar='DST', help='folder for the copy')
    add('--size', action=ImageSize, type=count, nargs='+', default=[224, 224], help='the --input_size of the training')
    add('--quality', type=number(int, 1, 100), default=95, help='of the JPEG files')
    add('--lossless', action='store_true', help='BMP: larger than JPEG, faster to read than PNG or WebP')
    add('--in_chans', type=count, default=3, help='channels; arrays of other than 1 or 3 stay .npy (default: 3)')
    add('--background', type=number(int, 0, 255), nargs=3, default=list(WHITE), help='R G B behind transparent images')
    add('--max_bad', type=number(float, 0, 1), default=0.01, metavar='SHARE', help='as in main_pretrain.py')
    add('--num_workers', type=number(int, 0), help='processes (default: the CPU cores, at most 16)')
    return parser


def main(args):
    if not os.path.isdir(args.src):
        raise InputError(f'{args.src}: not a folder of images')
    names = find_files(args.src, EXTENSIONS)
    if not names:
        raise InputError(f'{args.src}: no image in it or in the folders below')
    source = ImageFiles(args.src, names, Options(args.in_chans, tuple(args.background)))
    check_readable(source, args.src, args.in_chans)
    copies = Copies(source, args)
    prepare(args)
    copy(copies, args)


def prepare(args):
    """Create DST with a note of the settings. Raises InputError if it holds anything but a copy with the same ones."""
    src, note = os.path.realpath(args.src), os.path.join(args.dst, 'resize.json')
    if os.path.commonpath([src, os.path.realpath(args.dst)]) == src:
        raise InputError(f'{args.dst} lies inside {args.src}; choose a folder elsewhere')
    settings = {name: vars(args)[name] for name in ('size', 'quality', 'lossless', 'in_chans', 'background')}
    settings = json.dumps({'src': src, **settings}) + '\n'
    try:
        os.makedirs(args.dst, exist_ok=True)
        if not [name for name in os.listdir(args.dst) if name[0] != '.']:
            write(note, settings.encode())
        with open(note) as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f'{args.dst}: not empty, and not a copy that this command made') from None
    except OSError as error:
        raise InputError(f'{error.filename}: {error.strerror}') from None
    if text != settings:
        raise InputError(f'{args.dst} was made with {text.strip()}; choose another folder')


class Copies(torch.utils.data.Dataset):
    """The images of a source and where they go: [index] copies one, and returns (problem or '', bytes before, after).

    Names stay as they are, except that they get the suffix of the new format if they have another.
    """

    def __init__(self, source, args):
        self.source, self.cover, self.quality, self.dst = source, Cover(args.size), args.quality, args.dst
        if source.dtype != torch.uint8 or args.in_chans not in (1, 3):
            self.suffix = '.npy'
        else:
            self.suffix = '.bmp' if args.lossless else '.jpg'
        names = source.names.tolist()
        suffix, kept = self.suffix.encode(), tuple(map(str.encode, SUFFIXES[self.suffix]))
        self.targets = np.array([name if name.lower().endswith(kept) else name + suffix for name in names])
        if len(np.unique(self.targets)) < len(names):
            raise InputError(f'{args.src}: two images would get one name, such as A.png and A.png{self.suffix}')

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        target, path = os.path.join(self.dst, os.fsdecode(self.targets[index])), self.source.path(index)
        try:
            if not os.path.exists(target):
                write(target, self.encode(self.cover(self.source[index][0])))
        except (ValueError, OSError) as error:  # OSError: more pixels per side than a JPEG can have
            return data.problem_line(error, path), 0, 0
        return '', os.path.getsize(path), os.path.getsize(target)

    def encode(self, image):
        """(C, H, W) -> the bytes of a file."""
        buffer = io.BytesIO()
        if self.suffix == '.npy':
            np.save(buffer, image.permute(1, 2, 0).numpy())
        else:
            to_pil_image(image).save(buffer, {'.jpg': 'JPEG', '.bmp': 'BMP'}[self.suffix], quality=self.quality)
        return buffer.getvalue()


def write(path, content):
    """Write a file that is either complete or not there. Raises RunError."""
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
    """Make all copies and print a summary. Raises RunError if more than --max_bad cannot be read."""
    bad, before, after = data.BadImages(len(copies), args.max_bad, args.dst), 0, 0
    num_workers = workers.default_workers() if args.num_workers is None else args.num_workers
    loader = torch.utils.data.DataLoader(copies, batch_size=16, collate_fn=list, **workers.worker_options(num_workers))
    with tqdm(desc=args.dst, total=len(copies), unit='image', disable=None) as bar:
        for results in workers.start_workers(loader):
            problems, sizes_before, sizes_after = zip(*results)
            before, after = before + sum(sizes_before), after + sum(sizes_after)
            bad.add(problems)
            bad.check(bad.count)
            bar.update(len(results))
    print(f'{len(copies) - bad.count} images, {before / 1e6:.1f} MB, in {args.dst} {after / 1e6:.1f} MB')
    if bad.count:
        print(f'Left out, as they cannot be read: {bad.count} (see {bad.file})')


if __name__ == '__main__':
    run_job(main, get_parser())
