"""What the layers of an encoder hold: a model from any checkpoint, its features by block, their frequency content."""

import argparse
import os

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from models_mff import MODELS, create_encoder
from util import checkpoint, design_choices, weights
from util.args import InputError, as_input_error

# --- Models -----------------------------------------------------------------------------------------------------


def read_flags(path):
    """The flags of the run that made a checkpoint of any known origin; read off the tensors where none are stored.

    Raises:
        InputError: as weights.read_weights, or if it is of no size in MODELS.
    """
    usual = {'in_chans': 3, 'mean': None, 'std': None, 'fuse_layers': None, 'norm_pix_loss': None, 'mask_ratio': 0.75}
    args = weights.read_file(path).get('args')
    if isinstance(args, dict) and 'model' in args:
        return argparse.Namespace(**usual | args)
    state, origin, grid = weights.read_with_grid(path)
    width, in_chans, patch_size, _ = state['patch_embed.proj.weight'].shape
    depth = 1 + max(int(name.split('.')[1]) for name in state if name.startswith('blocks.'))
    for name, size in MODELS.items():
        sizes = {'patch_size': 16, **size.keywords}
        if (sizes['embed_dim'], sizes['depth'], sizes['patch_size']) == (width, depth, patch_size):
            fused = any(tensor_name.startswith('fuse_') for tensor_name in state)
            fusion = {} if fused else {'fuse_layers': [depth - 1]}
            found = {'model': name, 'in_chans': in_chans, 'input_size': [side * patch_size for side in grid]}
            return argparse.Namespace(**usual | found | fusion)
    raise InputError(f'{path}: {origin}, {width} wide, {depth} blocks, patch {patch_size}, which is no size in MODELS')


def load_model(path):
    """(pre-training model, flags) of a checkpoint of any known origin. InputError if it has no decoder, or as above.

    Files that do not say how their pixels were predicted count as standardised in each patch; flags keep the None.
    """
    flags = read_flags(path)
    flags.model = 'mff_' + flags.model.removeprefix('mff_')
    with as_input_error():
        model = design_choices.create_model(flags)
    model.norm_pix_loss = flags.norm_pix_loss is not False
    weights.load_weights(model, path, whole=True)
    return model.eval(), flags


def load_encoder(path):
    """(timm's VisionTransformer without a head, flags) of a checkpoint of any known origin: nothing is masked."""
    flags = read_flags(path)
    state, _ = weights.read_weights(path)
    name, global_pool = flags.model.removeprefix('mff_'), 'avg' if 'fc_norm.weight' in state else 'token'
    with as_input_error():
        model = create_encoder(name, flags.input_size, flags.in_chans, global_pool).eval()
    weights.load_weights(model, path)
    return model, flags


def titles(paths):
    """What tells checkpoints or folders apart: their names, else the folders they are in, else both."""
    folders, names = zip(*(os.path.split(os.path.abspath(path).removesuffix('.pth')) for path in paths))
    checkpoints = any(name.startswith('checkpoint-') for name in names)  # whose names say nothing about the run
    if len(set(names)) == len(names) and not (checkpoints and len(set(folders)) > 1):
        if names != (os.path.splitext(checkpoint.LAST)[0],):
            return list(names)
    ends = different_ends(folders)
    return ends if len(set(names)) == 1 else [os.path.join(*both) for both in zip(ends, names)]


def different_ends(folders):
    """The shortest ends of absolute paths that differ where these do, without a last part that all share."""
    parts = [folder.split(os.sep) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        ends = [part[-length:] for part in parts]
        if len(set(map(tuple, ends))) == len(set(folders)):
            break
    while len({end[-1] for end in ends}) == 1 and min(map(len, ends)) > 1:
        ends = [end[:-1] for end in ends]
    return list(map(os.sep.join, ends))


# --- Features -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_features(encoder, imgs, batch_size=64):
    """The patch tokens behind each block, in their places: a list of (N, D, h, w), of imgs (N, C, H, W) normalised."""
    chunks = [encoder.forward_intermediates(chunk, intermediates_only=True) for chunk in imgs.split(batch_size)]
    return [torch.cat(parts) for parts in zip(*chunks)]


def relative_log_amplitude(maps):
    """Log amplitude of the Fourier transform of maps (N, D, h, w) by frequency, less that of frequency zero.

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


def depth_colour(block, last):
    """The colour of a block, from dark for the first to light for the last, in every figure of blocks or levels."""
    return colormaps['viridis'](block / (last + 1))


def spectrum_figure(features):
    """Figure of the relative log amplitude by frequency and block, checkpoints side by side, and the highest by block.

    features: {title: list of (N, D, h, w), a block each}, as block_features gives them. The MFF paper's analysis of
    MAE's and MFF's features by frequency; the last panel is Park and Kim's high-frequency amplitude by depth.
    """
    figure = Figure(figsize=(3.2 * (len(features) + 1), 3.3), layout='constrained', dpi=100)
    *axes, last = figure.subplots(1, len(features) + 1, sharey=True)
    for panel, (title, blocks) in zip(axes, features.items()):
        curves = [relative_log_amplitude(maps) for maps in blocks]
        frequency = 2 * torch.arange(len(curves[0])) / min(blocks[0].shape[-2:])
        for depth, curve in enumerate(curves):
            panel.plot(frequency, curve, color=depth_colour(depth, len(curves) - 1), label=f'block {depth}')
        panel.set(title=title, xlabel='frequency / π')
        last.plot([curve[-1] for curve in curves], 'o-', markersize=3, label=title)
    axes[0].set(ylabel='relative log amplitude')
    axes[-1].legend(fontsize=6, ncols=2)
    last.set(title='at the highest frequency', xlabel='block')
    last.legend(fontsize=8)
    for panel in (*axes, last):
        panel.grid(alpha=0.3)
    return figure
