"""Images a second of the input alone: the plain pipeline, ours, and ours on a copy that util.resize made.

    python -m benchmarks.loader --data_path IMAGES
    python -m benchmarks.loader --data_path IMAGES --workers 1 8 16 --batch_size 256 --images 20000

Plain is what most projects have: PIL, torchvision's v1 transforms to normalised float, torch's DataLoader. All give
normalised float batches on the device. The variants take turns, in alternating order, and a turn's clock starts once
every worker has given a batch. One worker is one core's work, while the main process collects.
"""

import io
import itertools
import os
import tempfile
import time

import torch
from PIL import Image
from torchvision import transforms as v1

from benchmarks import report
from benchmarks.step import synchronise
from util import data, distributed, resize, transforms
from util.args import ArgumentParser, InputError, number, run

SIDE = 224
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add('--data_path', required=True, help='images in files, as of main_pretrain.py')
    add('--resized', help='a copy by util.resize (default: one is made, and deleted afterwards)')
    add('--crops', choices=list(PLAIN), nargs='+', default=list(PLAIN), help='(default: simple rrc)')
    add('--workers', type=number(int, 0), nargs='+', default=[0, 1, 2], help='(default: 0 1 2)')
    add('--batch_size', type=count, default=32, help='(default: %(default)s)')
    add('--images', type=count, default=600, help='images of a turn (default: %(default)s)')
    add('--rounds', type=count, default=5, help='(default: %(default)s)')
    add('--device', default='auto', help='cuda or cpu (default: the first of them that is there)')
    add('--download_dir', default='data', help='as of main_pretrain.py')
    add('--out', help='write OUT.md and OUT.json')
    return parser


def main(args):
    device = torch.device(distributed.choose_device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        copy = args.resized or os.path.join(folder, 'copy')
        if not args.resized:
            flags = ['--size', str(SIDE), '--max_bad', '1', '--download_dir', args.download_dir]
            resize.main(resize.get_parser().parse_args([args.data_path, copy, *flags]))
        source, resized = (
            data.open_source(path, 'train', download_dir=args.download_dir) for path in (args.data_path, copy)
        )
        if not isinstance(source, data.ImageFiles):
            raise InputError(f'{args.data_path}: the plain pipeline needs images in files')
        rounds = {(crop, workers): [] for crop in args.crops for workers in args.workers}
        for number_of_round, (crop, workers) in itertools.product(range(args.rounds), rounds):
            variants = {'plain': (plain_loader, source), 'ours': (our_loader, source), 'resized': (our_loader, resized)}
            rates = {}
            for name in list(variants)[:: -1 if number_of_round % 2 else 1]:
                make_loader, images = variants[name]
                loader = make_loader(images, crop, workers, device, args)
                rates[name] = images_per_second(loader, workers, device)
            rounds[crop, workers].append(rates)
            print(crop, workers, 'workers', {name: round(rate) for name, rate in rates.items()}, flush=True)
    named = {f'{crop}, {workers} workers': results for (crop, workers), results in rounds.items()}
    report.publish(args.out, str(device), summarise(rounds), named)


def keys(source, args):
    """Shuffled batches of (epoch, index), one more than --images asks for each worker."""
    steps = -(-args.images // args.batch_size) + max(args.workers)
    size = min(args.batch_size, len(source))
    return data.BatchStream(len(source), size, size, 0, 0, steps)


def our_loader(source, crop, workers, device, args):
    """As main_pretrain.py has it, masks included."""
    samples = data.Samples(source, transforms.pretrain_transform((SIDE, SIDE), crop), num_patches=196)
    return data.Loader(samples, keys(source, args), device, STATISTICS, workers)


PLAIN = {
    'simple': [v1.Resize(SIDE), v1.RandomCrop(SIDE, padding=4, padding_mode='reflect')],
    'rrc': [v1.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=v1.InterpolationMode.BICUBIC)],
}


class Plain(torch.utils.data.Dataset):
    """(epoch, index) -> (normalised float image (3, SIDE, SIDE), label)."""

    def __init__(self, source, crop):
        self.source = source
        to_float = [v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(*STATISTICS)]
        self.transform = v1.Compose([*PLAIN[crop], *to_float])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        image = Image.open(io.BytesIO(self.source.content(key[1]))).convert('RGB')
        return self.transform(image), int(self.source.labels[key[1]])


def plain_loader(source, crop, workers, device, args):
    batches = torch.utils.data.DataLoader(
        Plain(source, crop),
        batch_sampler=keys(source, args),
        num_workers=workers,
        pin_memory=device.type == 'cuda',
    )
    return ([x.to(device, non_blocking=True) for x in batch] for batch in batches)


def images_per_second(loader, workers, device):
    """From the moment when every worker has given a batch to the end."""
    count, batches = 0, iter(loader)
    for _ in range(max(1, workers)):
        next(batches)
    synchronise(device)
    began = time.perf_counter()
    for images, _ in batches:
        count += len(images)
    synchronise(device)
    return count / (time.perf_counter() - began)


def summarise(rounds):
    """Rows of the table, from the {variant: images/s} of each round by (crop, workers)."""
    rows = []
    for (crop, workers), results in rounds.items():
        rates = {name: [result[name] for result in results] for name in ('plain', 'ours', 'resized')}
        ratios = {name: [r / p for r, p in zip(rates[name], rates['plain'])] for name in ('ours', 'resized')}
        rows.append(
            {'crop': crop, 'workers': workers}
            | {f'{name} : plain': report.spread(values) for name, values in ratios.items()}
            | {f'{name}, images/s': report.spread(values) for name, values in rates.items()}
        )
    return rows


if __name__ == '__main__':
    run(main, get_parser())
