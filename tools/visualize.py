"""Figures: reconstructions, frequency content of features, attention.

    python -m tools.visualize reconstruct CHECKPOINT --images IMAGE ...
    python -m tools.visualize spectrum CHECKPOINT ... --images IMAGE ...
    python -m tools.visualize attention CHECKPOINT --images IMAGE ...

Checkpoints are of any origin that util/weights.py knows; IMAGE is a file or a folder. Curves and
fusion weights over time are in TensorBoard. The functions return matplotlib figures.
"""

import argparse
import copy
import os

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from timm.utils import AttentionExtract

from models_mff import random_encoder
from util.args import ArgumentParser, number, run_job
from util.errors import InputError, as_input_error
from util.files import image_paths
from util.images import read_image
from util.transforms import centre_transform, normalise
from util.visualize import reconstruction_figure, to_pixels
from util.weights import load_encoder, load_model

# --- Frequency content of features ----------------------------------------------------------------


@torch.no_grad()
def block_features(encoder, imgs):
    """The patch tokens after each block: a list of (N, D, h, w), of imgs (N, C, H, W)."""
    return encoder.forward_intermediates(imgs, intermediates_only=True)


def relative_log_amplitude(maps):
    """Log amplitude of the Fourier transform of maps (N, D, h, w), relative to frequency zero.

    The mean over images and channels of log |FFT2|, along the diagonal of the largest square, of
    side s = min(h, w), at the frequencies 2 pi k / s: (1 + s // 2,). The lower the end, the less
    fine detail. Park and Kim, arXiv 2202.06709; the MFF paper's analysis is of this kind.
    """
    side = min(maps.shape[-2:])
    amplitude = torch.fft.fft2(maps[..., :side, :side].double()).abs()
    diagonal = amplitude.diagonal(dim1=-2, dim2=-1)[..., : side // 2 + 1]  # (N, D, F)
    log_amplitude = (diagonal + 1e-6).log().mean((0, 1))
    return log_amplitude - log_amplitude[0]


def spectrum_figure(features):
    """Figure of the relative log amplitude, by frequency for each block, and at the highest.

    features: {title: list of (N, D, h, w), one per block}, as block_features gives them.
    """
    figure = Figure(figsize=(3.2 * (len(features) + 1), 4), layout='constrained', dpi=100)
    *panels, last = figure.subplots(1, len(features) + 1, sharey=True)
    for axes, (title, blocks) in zip(panels, features.items()):
        curves = [relative_log_amplitude(maps).tolist() for maps in blocks]
        frequency = [2 * k / min(blocks[0].shape[-2:]) for k in range(len(curves[0]))]
        for depth, curve in enumerate(curves):
            colour = colormaps['viridis'](depth / len(curves))
            axes.plot(frequency, curve, color=colour, label=f'block {depth}')
        axes.set(title=title, xlabel='frequency / π', ylabel='relative log amplitude')
        last.plot([curve[-1] for curve in curves], 'o-', markersize=3, label=title)
    last.set(title='at the highest frequency', xlabel='block')
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=1 if axes is last else 3)
    return figure


# --- Attention ------------------------------------------------------------------------------------


@torch.no_grad()
def attention(encoder, imgs):
    """Where the cls token looks, of imgs (N, C, H, W): timm's VisionTransformer in eval mode.

    Returns:
        heads: (N, heads, h, w), its attention in the last block.
        rollout: (N, h, w), over all blocks: the product of the means over heads, each half and
            half with the identity for the residual. Abnar and Zuidema, arXiv 2005.00928.
    """
    encoder = copy.deepcopy(encoder)  # which keeps the hooks, and attends more slowly
    for block in encoder.blocks:
        block.attn.fused_attn = False  # the fused kernel has no weights to show
    maps = AttentionExtract(encoder, method='hook')(imgs)  # a (N, heads, 1+L, 1+L) per block
    grid = encoder.patch_embed.grid_size
    rollout = identity = torch.eye(1 + encoder.patch_embed.num_patches, device=imgs.device)
    for index in range(len(encoder.blocks)):
        weights = maps[f'blocks.{index}.attn.attn_drop']
        rollout = (weights.mean(1) + identity) / 2 @ rollout
    return weights[:, :, 0, 1:].unflatten(-1, grid), rollout[:, 0, 1:].unflatten(-1, grid)


def attention_figure(encoder, imgs, statistics):
    """Figure with a row for each of imgs: input, rollout, attention of each head."""
    heads, rollout = attention(encoder, imgs)
    pixels = to_pixels(imgs, *statistics).permute(0, 2, 3, 1)
    columns = 2 + heads.shape[1]
    figure = Figure(figsize=(1.4 * columns, 1.5 * len(imgs)), layout='constrained', dpi=100)
    grid = figure.subplots(len(imgs), columns, squeeze=False)
    for axes, image, flow, maps in zip(grid, pixels, rollout, heads):
        axes[0].imshow(image.numpy())
        for axis, picture in zip(axes[1:], [flow, *maps]):
            axis.imshow(picture.cpu().numpy(), cmap='viridis')
    titles = ['input', 'rollout', *(f'head {head}' for head in range(heads.shape[1]))]
    for axis, title in zip(grid[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in grid.flat:
        axis.axis('off')
    return figure


# --- Command --------------------------------------------------------------------------------------


def read_images(paths, settings, most=None):
    """Images as the model of these settings takes them, (N, C, H, W) normalised.

    most: images of a folder, spread over it. Raises InputError if one cannot be read.
    """
    recorded = {'background', 'max_value'} & settings.args.keys()
    options = {name: settings.args[name] for name in recorded}
    transform, in_chans = centre_transform(settings.sizes['img_size']), settings.sizes['in_chans']
    images = [transform(read_image(path, in_chans, **options)) for path in image_paths(paths, most)]
    return torch.stack([normalise(image, settings.mean, settings.std) for image in images])


def draw(args):
    """The figure that the arguments ask for."""
    if args.figure == 'spectrum':
        return draw_spectrum(args)
    load = load_model if args.figure == 'reconstruct' else load_encoder
    model, settings = load(args.checkpoint[0])
    imgs, statistics = read_images(args.images, settings, most=8), (settings.mean, settings.std)
    if args.figure == 'attention':
        return attention_figure(model, imgs, statistics)
    if args.norm_pix_loss is not None:
        model.norm_pix_loss = args.norm_pix_loss
    draws = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(imgs), model.patch_embed.num_patches, generator=draws)
    mask_ratio = args.mask_ratio or settings.args.get('mask_ratio') or 0.75
    return reconstruction_figure(model, imgs, statistics, mask_ratio, noise)


def draw_spectrum(args):
    shared = os.path.commonpath([os.path.abspath(os.path.dirname(p)) for p in args.checkpoint])
    encoders = {os.path.relpath(path, shared): load_encoder(path) for path in args.checkpoint}
    if args.random:
        torch.manual_seed(args.seed)
        _, settings = next(iter(encoders.values()))
        encoders['random weights'] = random_encoder(settings.sizes), settings
    features = {}
    for title, (encoder, settings) in encoders.items():
        features[title] = block_features(encoder, read_images(args.images, settings, most=100))
    return spectrum_figure(features)


def get_parser():
    parser = ArgumentParser(__doc__, usage='%(prog)s FIGURE CHECKPOINT ... --images IMAGE ...')
    add = parser.add_argument
    add('figure', choices=['reconstruct', 'spectrum', 'attention'])
    add('checkpoint', nargs='+', help='spectrum takes several')
    add('--images', nargs='+', required=True, metavar='IMAGE', help='files, or folders of them')
    add('--out', help='(default: FIGURE.png in the folder of the checkpoint)')
    add('--seed', type=number(int, 0), default=0, help='of masks and random weights')
    add('--mask_ratio', type=number(float, 0.01, 0.99), help='(default: as in training)')
    boolean = argparse.BooleanOptionalAction
    add('--norm_pix_loss', action=boolean, help='for files that do not record it (default: yes)')
    add('--random', action='store_true', help='spectrum: the first network with random weights too')
    return parser


def main(args):
    if len(args.checkpoint) > 1 and args.figure != 'spectrum':
        raise InputError(f'{args.figure} takes one checkpoint')
    figure = draw(args)
    if args.out is None:
        folders = args.checkpoint[0], os.path.dirname(args.checkpoint[0])
        args.out = os.path.join(next(filter(os.path.isdir, folders), ''), f'{args.figure}.png')
    with as_input_error(args.out):
        figure.savefig(args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run_job(main, get_parser())
