"""Figures: reconstructions, curves of runs, fusion weights, frequency content of features.

    python -m util.visualize reconstruct CHECKPOINT --images IMAGE ...
    python -m util.visualize curves OUTPUT_DIR ...
    python -m util.visualize fusion CHECKPOINT ...
    python -m util.visualize spectrum CHECKPOINT ... --images IMAGE ...

Checkpoints are of any origin that util/weights.py knows; IMAGE is a file or a folder. The figure of one checkpoint or
run is written into its folder, that of several into the current one. The functions return matplotlib figures, for
notebooks.
"""

import argparse
import itertools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw

from util import log, transforms
from util.args import ArgumentParser, number, run_job
from util.errors import InputError
from util.sources import image_paths
from util.images import read_image
from util.weights import load_encoder, load_model, random_encoder

# --- Reconstruction -----------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio=0.75, noise=None):
    """What the model makes of imgs (N, C, H, W), normalised: (masked, reconstruction, pasted), like imgs.

    With norm_pix_loss the model predicts each patch up to its mean and deviation. Both are taken from the target,
    hidden patches included, which leaks its coarse colours into the picture. pasted shows the visible patches as they
    were. MAE, figure 2.
    """
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise)  # (N, L, p*p*C), (N, L)
    pred = pred.float()
    if model.norm_pix_loss:
        target_image = getattr(model, 'target_image', None)  # of the alternatives in util/variants.py
        target = model.patchify(target_image(imgs) if target_image else imgs)
        pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    reconstruction = model.unpatchify(pred)
    hidden = model.unpatchify(mask.unsqueeze(-1).expand_as(pred)) > 0
    return imgs.masked_fill(hidden, 0), reconstruction, torch.where(hidden, reconstruction, imgs)


def reconstruction_figure(model, imgs, statistics, mask_ratio=0.75, noise=None):
    """Figure with a row for each of imgs (N, C, H, W): input, masked, reconstruction, with visible patches pasted.

    statistics: (mean, std) by which imgs are normalised.
    """
    masked, reconstruction, pasted = reconstruct(model, imgs, mask_ratio, noise)
    columns = {'input': imgs, 'masked': masked, 'reconstruction': reconstruction, 'with visible patches': pasted}
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in statistics)
    inputs = imgs.float().cpu() * std + mean
    low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=1)  # 0 and 1, but for arrays of another range
    rows, channels, height, width = imgs.shape
    gap = max(1, height // 16)

    column = 1.65 * rows * (height + gap) / width  # inches; title and caption take the same space at any height
    figure = Figure(figsize=(7, column + 0.7), dpi=100)
    figure.subplots_adjust(0.015, 0.35 / (column + 0.7), 0.985, 1 - 0.3 / (column + 0.7), wspace=0.04)
    for axes, (title, pictures) in zip(figure.subplots(1, len(columns)), columns.items()):
        shades = ((pictures.float().cpu() * std + mean - low) / (high - low)).clamp(0, 1)
        if channels != 3:
            shades = shades.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        shades = F.pad(shades, (0, 0, 0, gap), value=1)  # white below each
        axes.imshow(shades.permute(0, 2, 3, 1).flatten(0, 1).numpy())
        axes.set_title(title, fontsize=10)
        axes.axis('off')
    how = 'with the true mean and deviation of each patch' if model.norm_pix_loss else 'pixels as predicted'
    caption = f'{mask_ratio:.0%} of the patches hidden, and only these are trained; {how}'
    figure.text(0.5, 0.1 / (column + 0.7), caption, fontsize=8, ha='center')
    return figure


# --- Curves and fusion weights ------------------------------------------------------------------------------------


def curves_figure(output_dirs):
    """Figure of one or more runs, from log.jsonl: losses, accuracies, and fusion weights in training and at its end.

    The last two are the MFF paper's weights of the fused levels; plain MAE has none. Raises InputError where there is
    no log.
    """
    runs = dict(zip(titles(output_dirs), map(read_curves, output_dirs)))
    for output_dir, curves in zip(output_dirs, runs.values()):
        if not curves:
            raise InputError(f'{output_dir}: no log.jsonl with a loss in it')
    weights = {title: fusion_curves(curves) for title, curves in runs.items()}
    accuracy = any(name in ACCURACIES for curves in runs.values() for name in curves)
    fusion = any(weights.values())
    columns = 1 + accuracy + 2 * fusion
    figure = Figure(figsize=(4 * columns, 4), layout='constrained', dpi=100)
    panels = iter(figure.subplots(1, columns, squeeze=False)[0])
    draw_curves_of(next(panels), runs, LOSSES, 'loss')
    if accuracy:
        draw_curves_of(next(panels), runs, ACCURACIES, 'accuracy, %')
    if fusion:
        draw_fusion_curves(next(panels), weights)
        final = {title: {layer: points[-1][1] for layer, points in lines.items()} for title, lines in weights.items()}
        draw_fusion_weights(next(panels), final)
    return figure


LOSSES = {'loss': ('loss', '-'), 'val_loss': ('validation loss', 'o--')}  # name in the log: title, line style
ACCURACIES = {
    'val_top1': ('top-1', 'o-'),
    'val_miou': ('mIoU', 'o-'),
    'val_knn_cls': ('20-NN by the cls token', 'o--'),
    'val_knn_patches': ('20-NN by the mean of patches', 's-'),
}


def read_curves(output_dir):
    """{name: [(epoch, value)]} of losses, accuracies and fusion weights in a run's log.jsonl; {} if there is none."""
    curves = {}
    for entry in log.read(os.path.join(output_dir, 'log.jsonl')):
        for name, value in entry.items():
            if name in LOSSES or name in ACCURACIES or name.startswith('fusion/'):
                curves.setdefault(name, []).append((entry['epoch'], np.nan if value is None else value))
    return curves


def fusion_curves(curves):
    """{layer: points} out of read_curves; none of plain MAE, whose one weight is always 1."""
    lines = {int(name[-2:]): points for name, points in curves.items() if name.startswith('fusion/layer_')}
    return lines if len(lines) > 1 else {}


def draw_curves_of(axes, runs, names, ylabel):
    """Lines of {title: curves}: a colour per run, a line style per name."""
    for index, (title, curves) in enumerate(runs.items()):
        for name, (text, style) in names.items():
            if name in curves:
                label = f'{title}, {text}'
                axes.plot(*zip(*curves[name]), style, color=f'C{index}', markersize=3, label=label)
    finish(axes, 'epoch', ylabel)


def draw_fusion_curves(axes, weights):
    """Lines of {title: {layer: points}}: a colour per layer, a line style per title."""
    layers = sorted({layer for lines in weights.values() for layer in lines})
    styles = dict(zip(weights, itertools.cycle(['-', '--', ':', '-.'])))
    for layer in layers:
        colour = depth_colour(layer, layers[-1])
        axes.plot([], [], color=colour, label=f'block {layer}')
        for title, lines in weights.items():
            if layer in lines:
                axes.plot(*zip(*lines[layer]), styles[title], color=colour)
    for title, lines in weights.items():
        if lines and len(weights) > 1:
            axes.plot([], [], styles[title], color='grey', label=title)
    finish(axes, 'epoch', 'fusion weight', ncols=3)


def fusion_figure(weights):
    """Figure of fusion weights {title: {layer: weight}}. The MFF paper's weight of each fused level."""
    figure = Figure(figsize=(5, 4), layout='constrained', dpi=100)
    draw_fusion_weights(figure.subplots(), weights)
    return figure


def draw_fusion_weights(axes, weights):
    """Bars of {title: {layer: weight}}: a group per layer, a colour per title."""
    layers = sorted({layer for values in weights.values() for layer in values})
    colours = {title: f'C{index}' for index, title in enumerate(weights)}  # as in the other panels of curves_figure
    shown = {title: values for title, values in weights.items() if values}
    width = 0.8 / len(shown)
    for index, (title, values) in enumerate(shown.items()):
        places = [layers.index(layer) + (index - (len(shown) - 1) / 2) * width for layer in values]
        axes.bar(places, list(values.values()), width, color=colours[title], label=title)
    axes.set(xticks=range(len(layers)), xticklabels=layers)
    finish(axes, 'fused block', 'fusion weight at the end')


# --- Frequency content of features --------------------------------------------------------------------------------


@torch.no_grad()
def block_features(encoder, imgs, batch_size=64):
    """The patch tokens after each block, in their places: a list of (N, D, h, w), of imgs (N, C, H, W) normalised."""
    chunks = [encoder.forward_intermediates(chunk, intermediates_only=True) for chunk in imgs.split(batch_size)]
    return [torch.cat(parts) for parts in zip(*chunks)]


def relative_log_amplitude(maps):
    """Log amplitude of the Fourier transform of maps (N, D, h, w) by frequency, relative to that of frequency zero.

    The mean over images and channels of log |FFT2|, along the diagonal of the largest square, of side s = min(h, w), at
    the frequencies 2 pi k / s from zero to the highest, pi where s is even: (1 + s // 2,). 0 at frequency zero by
    definition; the lower the end, the less fine detail. Park and Kim, "How Do Vision Transformers Work?"
    (arXiv 2202.06709), Fourier analysis of feature maps; the MFF paper's analysis by frequency is of this kind.
    """
    side = min(maps.shape[-2:])
    amplitude = torch.fft.fft2(maps[..., :side, :side].double()).abs()
    diagonal = amplitude.diagonal(dim1=-2, dim2=-1)[..., : side // 2 + 1]  # (N, D, F)
    log_amplitude = (diagonal + 1e-6).log().mean((0, 1))
    return log_amplitude - log_amplitude[0]


def spectrum_figure(features):
    """Figure of the relative log amplitude by frequency and block, side by side, and at the highest frequency by block.

    features: {title: list of (N, D, h, w), one per block}, as block_features gives them. The MFF paper's analysis of
    MAE's and MFF's features by frequency; the last panel is Park and Kim's high-frequency amplitude by depth.
    """
    figure = Figure(figsize=(3.2 * (len(features) + 1), 4), layout='constrained', dpi=100)
    *panels, last = figure.subplots(1, len(features) + 1, sharey=True)
    for axes, (title, blocks) in zip(panels, features.items()):
        curves = [relative_log_amplitude(maps) for maps in blocks]
        frequency = 2 * torch.arange(len(curves[0])) / min(blocks[0].shape[-2:])
        for depth, curve in enumerate(curves):
            axes.plot(frequency, curve, color=depth_colour(depth, len(curves) - 1), label=f'block {depth}')
        axes.set_title(title)
        finish(axes, 'frequency / π', 'relative log amplitude', ncols=3)
        last.plot([curve[-1] for curve in curves], 'o-', markersize=3, label=title)
    last.set_title('at the highest frequency')
    last.xaxis.get_major_locator().set_params(integer=True)
    finish(last, 'block', '')
    return figure


# --- Segmentation -------------------------------------------------------------------------------------------------


def palette(num_classes):
    """(K, 3) uint8, a colour for each class: neighbouring numbers have distant hues."""
    hsv = [((0.6 + 0.61 * i) % 1, (0.4, 0.8)[i % 2], (0.5, 0.95, 0.75)[i % 3]) for i in range(num_classes)]
    return np.round(255 * hsv_to_rgb(hsv)).astype(np.uint8)


def paint(labels, num_classes):
    """Class numbers (H, W) -> their colours (H, W, 3) uint8; numbers above the classes are white."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[:num_classes] = palette(num_classes)
    return colours[np.asarray(labels)]


def as_rgb(image):
    """image (C, H, W), uint8 or float in 0..1 -> (H, W, 3) uint8 array, grey unless C is 3."""
    if image.dtype != torch.uint8:
        image = (255 * image).round().clamp(0, 255).to(torch.uint8)
    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


def segmentation_figure(rows, classes):
    """Figure with a row for each of rows: (image (C, H, W), mask (H, W), prediction (H, W)), and a legend."""
    ratios = [len(mask) / mask.shape[1] for _, mask, _ in rows]
    height = 1.7 * sum(ratios)
    figure = Figure(figsize=(7, height + 0.3), dpi=100)
    figure.subplots_adjust(0.01, 0.01, 0.75, 1 - 0.3 / (height + 0.3), wspace=0.03, hspace=0.03)
    grid = figure.subplots(len(rows), 3, squeeze=False, height_ratios=ratios)
    shown = set()
    for axes, (image, mask, predicted) in zip(grid, rows):
        shown |= {*np.unique(mask).tolist(), *np.unique(predicted).tolist()}
        pictures = (as_rgb(image), paint(mask, len(classes)), paint(predicted, len(classes)))
        for axis, picture in zip(axes, pictures):
            axis.imshow(picture, aspect='auto')
            axis.axis('off')
    for axis, title in zip(grid[0], ('image', 'mask', 'prediction')):
        axis.set_title(title, fontsize=10)
    colours = palette(len(classes)) / 255
    patches = [Patch(color=colours[label], label=classes[label]) for label in sorted(shown) if label < len(classes)]
    figure.legend(handles=patches[:40], loc='upper left', bbox_to_anchor=(0.76, 0.98), fontsize=9, frameon=False)
    return figure


def overlay(image, labels, classes):
    """PIL image: image (C, H, W) under the colours of labels (H, W), and beside it a legend of these classes."""
    pixels = as_rgb(image) // 2 + paint(labels, len(classes)) // 2
    numbers, counts = np.unique(labels, return_counts=True)
    lines = [
        (label, f'{classes[label]}  {count / labels.size:.0%}')
        for count, label in sorted(zip(counts.tolist(), numbers.tolist()), reverse=True)
    ]
    size, colours = 16, palette(len(classes))
    width = 2 * size + max(math.ceil(ImageDraw.Draw(Image.new('L', (1, 1))).textlength(text)) for _, text in lines)
    canvas = Image.new('RGB', (pixels.shape[1] + width, max(pixels.shape[0], size * len(lines) + 4)), 'white')
    canvas.paste(Image.fromarray(pixels))
    draw = ImageDraw.Draw(canvas)
    for row, (label, text) in enumerate(lines):
        left, top = pixels.shape[1] + 4, size * row + 4
        draw.rectangle((left, top, left + 10, top + 10), fill=tuple(colours[label].tolist()))
        draw.text((left + size, top), text, fill='black')
    return canvas


# --- What the figures share ---------------------------------------------------------------------------------------


def depth_colour(block, last):
    """The colour of a block, from dark for the first to light for the last, in every figure of blocks or levels."""
    return colormaps['viridis'](block / (last + 1))


def finish(axes, xlabel, ylabel, ncols=1):
    """Labels, grid, and, if ncols, a legend below the axes, where it covers nothing."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if not ncols:
        return
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=ncols, fontsize=8, frameon=False)


def titles(paths):
    """Short names of checkpoints or folders: without what all have in common at the start and at the end."""
    parts = [os.path.abspath(path).removesuffix('.pth').split(os.sep) for path in paths]
    if len(parts) == 1:
        *_, folder, name = parts[0]
        return [folder if name.startswith('checkpoint-') else name]
    while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ['/'.join(part) for part in parts]


def read_images(paths, settings, most=None):
    """Images as the model of these settings takes them, (N, C, H, W) normalised; of a folder `most`, spread over it.

    Raises:
        InputError: if there are none, or one cannot be read.
    """
    transform = transforms.centre_transform(settings.sizes['img_size'])
    images = [transform(read_image(path, settings.sizes['in_chans'])) for path in image_paths(paths, most)]
    return torch.stack([transforms.normalise(image, settings.mean, settings.std) for image in images])


# --- Command: one function per figure -----------------------------------------------------------------------------


def draw_reconstruction(args):
    (path,) = args.paths
    model, settings = load_model(path)
    if args.norm_pix_loss is not None:
        if settings.flags.norm_pix_loss not in (None, args.norm_pix_loss):
            raise InputError(f'{path} records how its pixels were predicted; leave out --norm_pix_loss')
        model.norm_pix_loss = args.norm_pix_loss
    imgs = read_images(args.images, settings, most=8)
    noise = torch.rand(len(imgs), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
    mask_ratio = settings.flags.mask_ratio if args.mask_ratio is None else args.mask_ratio
    return reconstruction_figure(model, imgs, (settings.mean, settings.std), mask_ratio, noise)


def draw_fusion(args):
    weights = {}
    for title, path in zip(titles(args.paths), args.paths):
        model, _ = load_model(path)
        if len(model.fusion_weights) < 2:
            raise InputError(f'{path}: no fusion weights to show; it is plain MAE, or fuses by attention')
        weights[title] = dict(zip(model.fuse_layers, model.fusion_weights.tolist()))
    return fusion_figure(weights)


def draw_spectrum(args):
    encoders = dict(zip(titles(args.paths), map(load_encoder, args.paths)))
    if args.random:
        torch.manual_seed(args.seed)
        _, settings = next(iter(encoders.values()))
        encoders['random weights'] = random_encoder(settings.sizes), settings
    features = {
        title: block_features(encoder, read_images(args.images, settings, most=100))
        for title, (encoder, settings) in encoders.items()
    }
    return spectrum_figure(features)


def main(args):
    args.paths = list(dict.fromkeys(args.paths))
    figure, out = args.draw(args), args.out
    if out is None:
        first = args.paths[0]
        folder = first if os.path.isdir(first) else os.path.dirname(first)
        out = folder if len(args.paths) == 1 and folder else '.'
    if os.path.isdir(out):
        out = os.path.join(out, f'{args.figure}.png')
    elif not os.path.splitext(out)[1]:
        out += '.png'
    try:
        figure.savefig(out)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f'{out}: {getattr(error, "strerror", None) or error}') from None
    print(f'wrote {out}')


def get_parser():
    parser = ArgumentParser('Figures of checkpoints and runs')
    figures = parser.add_subparsers(dest='figure', required=True)

    def add_figure(name, draw, text, paths='checkpoint', nargs='+'):
        one = figures.add_parser(name, help=text, description=text)
        one.set_defaults(draw=draw)
        one.add_argument('paths', nargs=nargs, metavar=paths.upper())
        one.add_argument('--out', help=f'(default: {name}.png in the folder of the {paths})')
        return one

    def add_images(one, seed):
        one.add_argument('--images', nargs='+', required=True, metavar='IMAGE', help='image files, or folders of them')
        one.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help=seed)

    one = add_figure('reconstruct', draw_reconstruction, 'input, masked, reconstruction', nargs=1)
    add_images(one, 'of the masks')
    one.add_argument('--mask_ratio', type=number(float, 0, 0.999), help='(default: as in training)')
    boolean = argparse.BooleanOptionalAction
    one.add_argument('--norm_pix_loss', action=boolean, help='for files that do not record it (default: yes)')
    add_figure('curves', lambda args: curves_figure(args.paths), 'losses, accuracies, fusion weights', 'output_dir')
    add_figure('fusion', draw_fusion, 'fusion weights by block')
    one = add_figure('spectrum', draw_spectrum, 'frequency content of the features of each block')
    add_images(one, 'of the random weights')
    one.add_argument('--random', action='store_true', help='draw the first network with random weights, too')
    return parser


if __name__ == '__main__':
    run_job(main, get_parser())
