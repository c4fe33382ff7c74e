"""An embedded data set: drawn, labelled pictures of any size, for the demo and the tests.

Each shows a large shape, whose kind is the label, and a smaller one behind or before it, on a
background, all textured. Picture i of a split is drawn from a generator seeded by (split, i).
"""

import math

import numpy as np
import torch

CACHE_BYTES = 100e6  # of pictures kept by each process; drawing one takes twice a crop's time


def box(x, y, half_width, half_height):
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def polygon(x, y, sides):
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([x * np.cos(a) + y * np.sin(a) for a in angles], axis=0) - np.cos(np.pi / sides)


# (x, y, radius, angle) -> about the distance to the outline of a shape of radius 1, negative inside
SHAPES = {
    'bar': lambda x, y, r, a: box(x, y, 1, 0.3),
    'circle': lambda x, y, r, a: r - 0.9,
    'crescent': lambda x, y, r, a: np.maximum(r - 1, 0.8 - np.hypot(x - 0.5, y)),
    'cross': lambda x, y, r, a: np.minimum(box(x, y, 1, 0.3), box(x, y, 0.3, 1)),
    'flower': lambda x, y, r, a: r - 0.75 - 0.25 * np.cos(6 * a),
    'hexagon': lambda x, y, r, a: polygon(x, y, 6),
    'ring': lambda x, y, r, a: abs(r - 0.75) - 0.22,
    'square': lambda x, y, r, a: box(x, y, 0.8, 0.8),
    'star': lambda x, y, r, a: r - 0.65 - 0.4 * abs(np.mod(a * 5 / (2 * np.pi), 1) * 2 - 1) ** 1.5,
    'triangle': lambda x, y, r, a: polygon(x, y, 3),
}


class Shapes:
    """Labelled pictures (uint8 (3, H, W), label in 0..9) of a split ('train' or 'val')."""

    classes = list(SHAPES)

    def __init__(self, split='train', size=(32, 32)):
        self.stream, self.size = ['train', 'val'].index(split), tuple(size)
        self.labels = np.arange((20_000, 2_000)[self.stream]) % len(Shapes.classes)
        self.drawn = {}

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return str(index).encode()

    def path(self, index):
        return f'drawn picture {index}'

    def __getitem__(self, index):
        return self.picture_and_mask(index)[0], int(self.labels[index])

    def picture_and_mask(self, index):
        """uint8 (3, H, W), and uint8 (H, W): 1 + label where the large shape is seen, else 0."""
        pair = self.drawn.get(index) or self.draw(index)
        if 4 * math.prod(self.size) * len(self.drawn) < CACHE_BYTES:
            self.drawn[index] = pair
        return pair

    def draw(self, index):
        rng, label = np.random.default_rng((self.stream, index)), int(self.labels[index])
        y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in self.size)
        y, x = y[:, None], x[None]

        centre = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
        large = outline(x, y, rng, label, centre, rng.uniform(0.6, 0.8))
        away, angle = rng.uniform(0.5, 0.8), rng.uniform(0, 2 * math.pi)
        centre = away * math.cos(angle), away * math.sin(angle)
        small = outline(x, y, rng, rng.integers(len(SHAPES)), centre, rng.uniform(0.15, 0.25))

        image = texture(x, y, rng, 0.0, 0.4)
        layers = [(large, texture(x, y, rng, 0.6, 1.0)), (small, texture(x, y, rng, 0.3, 0.8))]
        small_in_front = rng.random() < 0.5
        for alpha, pixels in layers if small_in_front else layers[::-1]:
            image = image * (1 - alpha) + pixels * alpha
        seen = (large > 0.5) & ~(small_in_front & (small > 0.5))
        image, mask = (image.clip(0, 1) * 255).round(), seen * (1 + label)
        return tuple(torch.from_numpy(array.astype(np.uint8)) for array in (image, mask))


def outline(x, y, rng, label, centre, scale):
    """The coverage (H, W) in 0..1 of a shape, turned a little, with one pixel of anti-aliasing."""
    turn = rng.uniform(-0.5, 0.5)
    dx, dy = (x - centre[0]) / scale, (y - centre[1]) / scale
    dx, dy = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
    distance = SHAPES[Shapes.classes[label]](dx, dy, np.hypot(dx, dy), np.arctan2(dy, dx))
    return np.clip(0.5 - distance * scale * min(y.size, x.size) / 2, 0, 1)


def texture(x, y, rng, low, high):
    """Pixels (3, H, W): a colour with channels in low..high, a slight gradient and stripes."""
    colour, slope, depth = rng.random((3, 3, 1, 1), dtype=np.float32)
    angle, stripes, phase = (2 * np.pi * rng.random(3)).tolist()
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    waves = np.sin((4 + 1.3 * stripes) * across + phase)
    pixels = low + (high - low) * colour + (0.3 * slope - 0.15) * along
    return pixels + (0.14 * depth - 0.07) * waves
