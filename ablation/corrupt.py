"""Corrupted copies of small test images, laid out as ImageNet-C: OUT/corruption/severity/class.

    python -m ablation.corrupt CIFAR10/test CIFAR10-OURS-C --per_class 200
    python -m tools.robustness --imagenet_c CIFAR10-OURS-C --init_from CHECKPOINT

Five corruptions of torchvision's at five severities. They are ours, chosen for 32 x 32 pixels: this
is not CIFAR-10-C, and its errors are not comparable with published ones.
"""

import os

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from util import data
from util.args import ArgumentParser, number, run_job
from util.errors import InputError, as_input_error
from util.images import EXTENSIONS, read_image


def noise(image, deviation):
    noisy = functional.gaussian_noise(image.float() / 255, sigma=deviation, clip=True)
    return (255 * noisy).round().to(torch.uint8)


def blur(image, deviation):
    return functional.gaussian_blur(image, kernel_size=9, sigma=deviation)


def pixelate(image, share):
    small = [max(1, round(side * share)) for side in image.shape[-2:]]
    reduced = functional.resize(image, small, antialias=True)
    return functional.resize(reduced, image.shape[-2:], InterpolationMode.NEAREST)


# Name: (function of an image uint8 (C, H, W) and a strength, the strengths of severity 1 to 5)
CORRUPTIONS = {
    'our-noise': (noise, (0.02, 0.04, 0.06, 0.09, 0.12)),  # of pixels in 0..1
    'our-blur': (blur, (0.5, 0.7, 0.9, 1.2, 1.6)),  # pixels
    'our-contrast': (functional.adjust_contrast, (0.7, 0.5, 0.35, 0.25, 0.15)),
    'our-pixelate': (pixelate, (0.9, 0.75, 0.6, 0.5, 0.4)),  # share of the pixels of a side
    'our-jpeg': (functional.jpeg, (70, 45, 30, 20, 10)),  # quality
}


def get_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument('images', help='a folder of class folders')
    parser.add_argument('out', metavar='OUT', help='a new folder')
    parser.add_argument('--per_class', type=number(int, 1), help='images (default: all)')
    return parser


def main(args):
    with as_input_error():
        classes = sorted(entry.name for entry in os.scandir(args.images) if entry.is_dir())
        os.makedirs(args.out)
    names = []
    for label in classes:
        files = sorted(os.listdir(os.path.join(args.images, label)))
        kept = [file for file in files if file.lower().endswith(EXTENSIONS)][: args.per_class]
        names += [os.path.join(label, file) for file in kept]
    if not names:
        raise InputError(f'{args.images}: no folder of images')
    for index, name in enumerate(tqdm(names, disable=None)):
        image = read_image(os.path.join(args.images, name))
        for corruption, (change, strengths) in CORRUPTIONS.items():
            for severity, strength in enumerate(strengths, 1):
                data.seed_generators(index, severity)
                path = os.path.join(args.out, corruption, str(severity), name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                picture = functional.to_pil_image(change(image, strength))
                picture.save(f'{os.path.splitext(path)[0]}.png')


if __name__ == '__main__':
    run_job(main, get_parser())
