"""Listing a folder of a million images, beside torchvision's ImageFolder: seconds, and the memory of each worker.

    python -m benchmarks.listing                         # 1.3 million files, as ImageNet has
    python -m benchmarks.listing --files 20000 --rounds 1

The files are hard links to small JPEGs, in class folders on the file system of --place, deleted afterwards. Seconds are
from the call to the first image, with warm kernel caches and the imports done. Memory is what a loader process does not
share with others (Private_Dirty, Linux) once it has read --images images: Python counts references in every string that
it touches, and so copies a list of them. The variants take turns, each in a process of its own.
"""

import multiprocessing
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from statistics import fmean

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from benchmarks import report
from util import data, transforms
from util.args import ArgumentParser, number, run

SIDE, CLASSES = 32, 1000


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add('--files', type=count, default=1_300_000, help='(default: %(default)s)')
    add('--workers', type=count, default=8, help='(default: %(default)s)')
    add('--images', type=count, default=1000, help='that a worker reads (default: %(default)s)')
    add('--rounds', type=count, default=3, help='(default: %(default)s)')
    add('--place', help='folder for the files (default: for temporary files)')
    add('--out', help='write OUT.md and OUT.json')
    return parser


def main(args):
    rounds = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        root, cache = os.path.join(folder, 'images'), os.path.join(folder, 'cache')
        make_files(root, args.files)
        for number_of_round in range(args.rounds):
            for variant in list(VARIANTS)[:: -1 if number_of_round % 2 else 1]:
                if variant == 'ours, kept':
                    time.sleep(2)  # a list that is as new as its folder is not kept
                    data.open_source(root, 'train', download_dir=cache)
                with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                    result = pool.submit(measure, variant, root, cache, args.workers, args.images).result()
                rounds[variant].append(result)
                print(f'{variant}: {result}', flush=True)
    report.publish(args.out, 'cpu', summarise(rounds), rounds)


def make_files(root, count):
    """count files in CLASSES folders: hard links to one JPEG each."""
    for number_of_class in range(CLASSES):
        folder = os.path.join(root, f'{number_of_class:04d}')
        os.makedirs(folder)
        share = range(number_of_class, count, CLASSES)
        for index in share:
            path = os.path.join(folder, f'image_{index:08d}.jpg')
            if index == share[0]:
                Image.new('RGB', (SIDE, SIDE), (number_of_class % 256, 128, 128)).save(path)
            else:
                os.link(os.path.join(folder, f'image_{share[0]:08d}.jpg'), path)


def theirs(root, cache):
    return ImageFolder(root, transforms.v2.PILToTensor())


def ours(root, cache):
    return data.open_source(root, 'train', size=(SIDE, SIDE), download_dir=cache)


VARIANTS = {
    'ImageFolder': theirs,
    'ours': lambda root, cache: ours(root, f'{cache}-{os.getpid()}'),
    'ours, kept': ours,
}


def measure(variant, root, cache, workers, images):
    """{'seconds': to the first image, 'megabytes': mean private memory of a worker}."""
    warnings.simplefilter('ignore')  # of more workers than cores: what they need is measured, not their speed
    began = time.perf_counter()
    source = VARIANTS[variant](root, cache)
    source[0]
    seconds = time.perf_counter() - began
    batches = [torch.randint(len(source), (50,)).tolist() for _ in range(workers * images // 50)]
    loader = torch.utils.data.DataLoader(source, batch_sampler=batches, **data.worker_options(workers))
    iterator = iter(loader)
    for _ in batches:
        next(iterator)
    return {'seconds': seconds, 'megabytes': fmean(map(private_memory, multiprocessing.active_children()))}


def private_memory(process):
    """MB that a process does not share with another (Linux)."""
    with open(f'/proc/{process.pid}/smaps_rollup') as file:
        return sum(int(line.split()[1]) / 1024 for line in file if line.startswith('Private_Dirty'))


def summarise(rounds):
    """Rows of the table, from {variant: what measure returns, of each round}."""
    rows = []
    for variant, results in rounds.items():
        ratios = [result['seconds'] / peer['seconds'] for result, peer in zip(results, rounds['ImageFolder'])]
        rows.append(
            {
                'by': variant,
                'seconds : ImageFolder': report.spread(ratios),
                'seconds': report.spread([result['seconds'] for result in results]),
                'private memory of a worker, MB': report.spread([result['megabytes'] for result in results]),
            }
        )
    return rows


if __name__ == '__main__':
    run(main, get_parser())
