"""Images per second of the input alone: the plain pipeline, ours, and ours on a copy that util.resize made.

    python -m benchmarks.loader --data_path IMAGES
    python -m benchmarks.loader --data_path IMAGES --workers 1 8 16 --batch_size 256 --images 20000

Plain is what most projects have: PIL, torchvision's v1 transforms to normalised float, torch's DataLoader. The variants
take turns, in alternating order. "one core" is the CPU time in which this process makes batches as a worker does,
whatever else runs on the machine. The others are wall-clock time: normalised float batches on the device, counted once
every worker has delivered a batch.
"""

import io
import itertools
import math
import os
import tempfile
import time

import torch
from PIL import Image
from torchvision import transforms as v1

from benchmarks import report
from util import data, distributed, resize, sources, transforms
from util.args import ArgumentParser, number, run_job

SIDE = 224
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add('--data_path', required=True, help='a folder of images')
    add('--resized', help='a copy by util.resize (default: one is made, and deleted afterwards)')
    add('--crops', choices=list(PLAIN), nargs='+', default=list(PLAIN), help='(default: simple rrc)')
    add('--workers', type=count, nargs='*', default=[1, 2], help='numbers of workers (default: 1 2; none: one core)')
    add('--batch_size', type=count, default=32, help='images per batch')
    add('--images', type=count, default=600, help='images per turn')
    add('--rounds', type=count, default=5, help='turns of each variant')
    add('--device', default='auto', help='cuda or cpu (default: the first of them that is there)')
    add('--out', help='write OUT.md and OUT.json')
    return parser


def main(args):
    device = torch.device(distributed.choose_device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        copy = args.resized
        if not copy:
            copy = os.path.join(folder, 'copy')
            resize.main(resize.get_parser().parse_args([args.data_path, copy, '--size', str(SIDE), '--max_bad', '1']))
        source, resized = sources.open_source(args.data_path), sources.open_source(copy)
        print(difference(source, resized), flush=True)
        rounds = {(crop, workers): [] for crop in args.crops for workers in [0, *args.workers]}
        for number_of_round, (crop, workers) in itertools.product(range(args.rounds), rounds):
            samples = {'plain': Plain(source, crop), 'ours': ours(source, crop), 'resized': ours(resized, crop)}
            rates = {}
            for name in reversed(samples) if number_of_round % 2 else samples:
                rates[name] = images_per_second(samples[name], workers, device, args)
            rounds[crop, workers].append(rates)
            print(crop, by(workers), {name: round(rate) for name, rate in rates.items()}, flush=True)
    named = {f'{crop}, {by(workers)}': results for (crop, workers), results in rounds.items()}
    report.publish(args.out, str(device), summarise(rounds), named)


def difference(source, resized, count=300):
    """One line: how far the pixels of a copy are from what --crop simple resizes the images of its source to."""
    names = zip(source.names.tolist(), resized.names.tolist())
    if len(source) != len(resized) or not all(copy.startswith(name) for name, copy in names):
        return 'pixels of the copy: not compared, as its images are not those of the source'
    cover = transforms.Cover((SIDE, SIDE))
    pairs = [(cover(source[index][0]), resized[index][0]) for index in range(min(count, len(source)))]
    differences = torch.cat([(ours.float() - copied).flatten() for ours, copied in pairs])
    mean, square = differences.abs().mean(), differences.square().mean()
    return f'pixels of the copy: mean difference {mean:.3g} of 255, root mean square {square.sqrt():.3g}'


def by(workers):
    return {0: 'one core', 1: '1 worker'}.get(workers, f'{workers} workers')


PLAIN = {
    'simple': [v1.Resize(SIDE), v1.RandomCrop(SIDE, padding=4, padding_mode='reflect')],
    'rrc': [v1.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=v1.InterpolationMode.BICUBIC)],
}


class Plain(torch.utils.data.Dataset):
    """(epoch, index) -> (normalised float image (3, SIDE, SIDE), 0)."""

    def __init__(self, source, crop):
        self.source = source
        to_float = [v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(*STATISTICS)]
        self.transform = v1.Compose([*PLAIN[crop], *to_float])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        image = Image.open(io.BytesIO(self.source.content(key[1]))).convert('RGB')
        return self.transform(image), 0


def ours(source, crop):
    """The samples of main_pretrain.py, masks included."""
    return data.Samples(source, transforms.pretrain_transform((SIDE, SIDE), crop), num_patches=(SIDE // 16) ** 2)


def batches_on(device, samples, keys, workers):
    """Normalised batches on the device."""
    if not isinstance(samples, Plain):
        return iter(data.Loader(samples, keys, device, STATISTICS, workers))
    pinned = device.type == 'cuda'
    loader = torch.utils.data.DataLoader(samples, batch_sampler=keys, num_workers=workers, pin_memory=pinned)
    return ([x.to(device, non_blocking=True) for x in batch] for batch in loader)


def images_per_second(samples, workers, device, args):
    size, first = min(args.batch_size, len(samples)), max(1, workers)
    keys = data.BatchStream(len(samples), size, size, 0, 0, first + math.ceil(args.images / size))
    if workers:
        batches, clock = batches_on(device, samples, keys, workers), time.perf_counter
    else:
        batches, clock = iter(torch.utils.data.DataLoader(samples, batch_sampler=keys)), time.process_time
    for _ in range(first):
        next(batches)
    began, count = clock(), 0
    for images, *_ in batches:
        count += len(images)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return count / (clock() - began)


def summarise(rounds):
    """Rows of the table, from the {variant: images/s} of each round by (crop, workers)."""
    rows = []
    for (crop, workers), results in rounds.items():
        rates = {name: [result[name] for result in results] for name in ('plain', 'ours', 'resized')}
        ratios = {name: [r / p for r, p in zip(rates[name], rates['plain'])] for name in ('ours', 'resized')}
        rows.append(
            {'crop': crop, 'by': by(workers)}
            | {f'{name} : plain': report.spread(values) for name, values in ratios.items()}
            | {f'{name}, images/s': report.spread(values) for name, values in rates.items()}
        )
    return rows


if __name__ == '__main__':
    run_job(main, get_parser())
