"""An embedded data set: procedurally drawn, labelled shapes of any size, for the demo and the tests.

Image i of a split is always the same picture: everything is drawn from a generator seeded by (split, i).
"""

import numpy as np
import torch


def _box(x, y, half_width, half_height):
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def _polygon(x, y, sides):
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([x * np.cos(a) + y * np.sin(a) for a in angles], axis=0) - np.cos(np.pi / sides)


# (x, y, radius, angle) -> about the distance to the outline of a shape of radius one, negative inside
SHAPES = {
    'bar': lambda x, y, r, a: _box(x, y, 1, 0.3),
    'circle': lambda x, y, r, a: r - 0.9,
    'crescent': lambda x, y, r, a: np.maximum(r - 1, 0.8 - np.hypot(x - 0.5, y)),
    'cross': lambda x, y, r, a: np.minimum(_box(x, y, 1, 0.3), _box(x, y, 0.3, 1)),
    'flower': lambda x, y, r, a: r - 0.75 - 0.25 * np.cos(6 * a),
    'hexagon': lambda x, y, r, a: _polygon(x, y, 6),
    'ring': lambda x, y, r, a: abs(r - 0.75) - 0.22,
    'square': lambda x, y, r, a: _box(x, y, 0.8, 0.8),
    'star': lambda x, y, r, a: r - 0.65 - 0.4 * abs(np.mod(a * 5 / (2 * np.pi), 1) * 2 - 1) ** 1.5,
    'triangle': lambda x, y, r, a: _polygon(x, y, 3),
}


def draw(label, rng, height, width):
    """One picture: a light shape, turned and moved a little, before a dark background, uint8 (3, height, width)."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing='ij')
    scale, turn, centre = rng.uniform(0.65, 0.85), rng.uniform(-0.8, 0.8), rng.uniform(-0.15, 0.15, 2)
    dx, dy = (x - centre[0]) / scale, (y - centre[1]) / scale
    dx, dy = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    distance = SHAPES[Shapes.classes[label]](dx, dy, np.hypot(dx, dy), np.arctan2(dy, dx))
    alpha = np.clip(0.5 - distance * scale * min(height, width) / 2, 0, 1)  # one pixel of anti-aliasing

    layers = []
    for colour in (rng.uniform(0, 0.4, 3), rng.uniform(0.6, 1, 3)):  # each with a slight gradient in some direction
        angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15, 3)
        along = x * np.cos(angle) + y * np.sin(angle)
        layers.append(colour[:, None, None] + slope[:, None, None] * along)
    image = layers[0] * (1 - alpha) + layers[1] * alpha
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


class Shapes:
    """length labelled images (uint8 (3, H, W), label in 0..9) of a split ('train' or 'val')."""

    classes = list(SHAPES)

    def __init__(self, split='train', size=(32, 32), length=None):
        self.stream, self.size = ['train', 'val'].index(split), size
        self.length = length or (2048, 400)[self.stream]
        self.labels = np.arange(self.length) % len(self.classes)

    def __len__(self):
        return self.length

    def name(self, index):
        return str(index).encode()

    def path(self, index):
        return f'drawn picture {index}'

    def __getitem__(self, index):
        label = index % len(self.classes)
        return torch.from_numpy(draw(label, np.random.default_rng((self.stream, index)), *self.size)), label
