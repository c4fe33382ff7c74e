"""Pictures of a model: reconstructions, fusion weights, frequency content of its features, and the curves of a run.

    python -m util.visualize reconstruct CHECKPOINT IMAGE [IMAGE ...] --seed 1
    python -m util.visualize curves OUTPUT_DIR [OUTPUT_DIR ...]
    python -m util.visualize fusion CHECKPOINT [CHECKPOINT ...]
    python -m util.visualize spectrum CHECKPOINT [CHECKPOINT ...] --images IMAGE [IMAGE ...]

Checkpoints are of any origin that util/weights.py knows. The functions return matplotlib figures, for notebooks.
"""

import argparse
import itertools
import os

import torch
from matplotlib.figure import Figure

from models_mff import create_untrained_encoder
from util import log, transforms
from util.args import ArgumentParser, InputError, number, run
from util.features import block_features, depth_colour, load_encoder, load_model, spectrum_figure, titles


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio=0.75, noise=None):
    """What the model makes of imgs (N, C, H, W), normalised: (masked, reconstruction, pasted), like imgs.

    With norm_pix_loss the model predicts each patch up to its mean and deviation. Both are taken from the true
    patch (of PixMIM's target, where that was the aim), masked ones included: that leaks the target's coarse colours
    into the picture. pasted shows the visible patches as they were. MAE, figure 2.
    """
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise)  # (N, L, p*p*C), (N, L)
    if model.norm_pix_loss:
        target = model.patchify(model.low_frequency_target(imgs) if getattr(model, 'lowpass', False) else imgs)
        pred = pred.float() * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    reconstruction = model.unpatchify(pred.float())
    removed = model.unpatchify(mask.unsqueeze(-1).expand_as(pred))  # 1 where removed
    return imgs * (1 - removed), reconstruction, imgs * (1 - removed) + reconstruction * removed


def reconstruction_figure(model, imgs, statistics, mask_ratio=0.75, noise=None):
    """Figure with a row for each of imgs (N, C, H, W): input, masked, reconstruction, with visible patches pasted."""
    columns = {
        'input': imgs,
        **dict(zip(['masked', 'reconstruction', 'with visible patches'], reconstruct(model, imgs, mask_ratio, noise))),
    }
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in statistics)
    inputs = imgs.float().cpu() * std + mean
    low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=1)  # 0 and 1, but for arrays of another range
    aspect = imgs.shape[2] / imgs.shape[3]
    figure = Figure(figsize=(7, 1.75 * aspect * len(imgs) + 0.7), layout='constrained', dpi=100)
    axes = figure.subplots(len(imgs), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        shades = (pictures.float().cpu() * std + mean - low) / (high - low)
        for row, picture in enumerate(shades.numpy()):
            grey = picture.shape[0] != 3
            shown = picture.mean(0) if grey else picture.transpose(1, 2, 0)
            axes[row, column].imshow(shown.clip(0, 1), cmap='gray' if grey else None, vmin=0, vmax=1)
            axes[row, column].axis('off')
    figure.supxlabel(
        f'{mask_ratio:.0%} of the patches hidden; '
        + (
            'predictions un-normalised with the true mean and deviation of each patch (leaks them)'
            if model.norm_pix_loss
            else 'pixels as predicted'
        ),
        fontsize=8,
    )
    return figure


def curves_figure(output_dirs):
    """Figure of loss and fusion weights over training, and the final weights, from log.jsonl of one or more runs.

    The MFF paper's weights of the fused levels in the course of training.
    """
    figure = Figure(figsize=(12, 3.5), layout='constrained', dpi=100)
    loss_axes, weight_axes, final_axes = figure.subplots(1, 3)
    weights = {}  # of each run, {layer: points}
    for run_index, (title, output_dir) in enumerate(zip(titles(output_dirs), output_dirs)):
        entries = [entry for entry in log.read(os.path.join(output_dir, 'log.jsonl')) if 'step' in entry]
        for name in sorted({name for entry in entries for name in entry}):
            points = [(entry['epoch'], entry[name]) for entry in entries if name in entry]
            if name in ('loss', 'val_loss'):
                style = '-' if name == 'loss' else 'o--'
                loss_axes.plot(*zip(*points), style, color=f'C{run_index}', markersize=4, label=f'{title}, {name}')
            elif name.startswith('fusion/'):
                weights.setdefault(title, {})[int(name.removeprefix('fusion/layer_'))] = points
    layers = sorted({layer for lines in weights.values() for layer in lines})
    for layer in layers:  # a colour a layer, a line style a run
        styles = zip(itertools.cycle(['-', '--', ':', '-.']), weights.values())
        runs = [(style, lines[layer]) for style, lines in styles if layer in lines]
        for index, (style, points) in enumerate(runs):
            label = None if index else f'layer {layer}'
            weight_axes.plot(*zip(*points), style, color=depth_colour(layer, layers[-1]), label=label)
    loss_axes.set(xlabel='epoch', ylabel='loss')
    weight_axes.set(xlabel='epoch', ylabel='fusion weight')
    final = {title: {layer: points[-1][1] for layer, points in lines.items()} for title, lines in weights.items()}
    draw_fusion_weights(final_axes, final)
    for axes in (loss_axes, weight_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def fusion_figure(weights):
    """Figure of fusion weights {title: {layer: weight}} by layer. The MFF paper's weight of each fused level."""
    figure = Figure(figsize=(5, 3.5), layout='constrained', dpi=100)
    draw_fusion_weights(figure.subplots(), weights)
    return figure


def draw_fusion_weights(axes, weights):
    """Bars of {title: {layer: weight}}, a group a layer, a colour a title."""
    layers = sorted({layer for values in weights.values() for layer in values})
    width = 0.8 / max(1, len(weights))
    for index, (title, values) in enumerate(weights.items()):
        places = [layers.index(layer) + (index - (len(weights) - 1) / 2) * width for layer in values]
        axes.bar(places, list(values.values()), width, label=title)
    axes.set(xlabel='layer', ylabel='fusion weight at the end', xticks=range(len(layers)), xticklabels=layers)
    axes.grid(alpha=0.3, axis='y')
    if weights:
        axes.legend(fontsize=8)


def read_images(paths, flags, size):
    """Images as the model of a run with these flags takes them: (N, C, H, W), normalised. Raises InputError."""
    transform = transforms.centre_transform(size)
    images = [transform(transforms.read_given_image(path, flags.in_chans)) for path in paths]
    statistics = transforms.pixel_statistics(flags)
    return torch.stack([transforms.normalise(image, *statistics) for image in images])  # some may be uint8, some float


# --- Command: one function a figure -------------------------------------------------------------------------------


def draw_reconstruction(args):
    model, flags = load_model(args.checkpoint)
    model.norm_pix_loss = model.norm_pix_loss if args.norm_pix_loss is None else args.norm_pix_loss
    imgs = read_images(args.images, flags, model.patch_embed.img_size)
    noise = torch.rand(len(imgs), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
    mask_ratio = flags.mask_ratio if args.mask_ratio is None else args.mask_ratio
    return reconstruction_figure(model, imgs, transforms.pixel_statistics(flags), mask_ratio, noise)


def draw_curves(args):
    for output_dir in args.output_dirs:
        if not log.read(os.path.join(output_dir, 'log.jsonl')):
            raise InputError(f'{output_dir}: no log.jsonl in it')
    return curves_figure(args.output_dirs)


def draw_fusion(args):
    models = [load_model(path)[0] for path in args.checkpoints]
    for path, model in zip(args.checkpoints, models):
        if not len(model.fusion_weights):
            raise InputError(f'{path}: it fuses by attention, which has no weights of its own to show')
    weights = [dict(zip(model.fuse_layers, model.fusion_weights.tolist())) for model in models]
    return fusion_figure(dict(zip(titles(args.checkpoints), weights)))


def draw_spectrum(args):
    encoders = dict(zip(titles(args.checkpoints), map(load_encoder, args.checkpoints)))
    if args.random:
        torch.manual_seed(args.seed)
        flags = next(iter(encoders.values()))[1]
        name = flags.model.removeprefix('mff_')
        encoders['random weights'] = create_untrained_encoder(name, flags.input_size, flags.in_chans).eval(), flags
    features = {}
    for title, (encoder, flags) in encoders.items():
        features[title] = block_features(encoder, read_images(args.images, flags, encoder.patch_embed.img_size))
    return spectrum_figure(features)


def main(args):
    figure, out = args.draw(args), args.out or f'{args.figure}.png'
    try:
        figure.savefig(out)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(args.tensorboard) as board:
                board.add_figure(args.figure, figure)
    except (OSError, ValueError) as error:
        raise InputError(f'{out}: {error}') from None
    print(f'wrote {out}')


def get_parser():
    parser = ArgumentParser('Pictures of a model')
    figures = parser.add_subparsers(dest='figure', required=True)

    def add_figure(name, draw, text):
        one = figures.add_parser(name, help=text)
        one.set_defaults(draw=draw)
        one.add_argument('--out', help=f'(default: {name}.png)')
        one.add_argument('--tensorboard', metavar='DIR', help='also write it there, for TensorBoard')
        return one

    one = add_figure('reconstruct', draw_reconstruction, 'input, masked, reconstruction')
    one.add_argument('checkpoint')
    one.add_argument('images', nargs='+')
    one.add_argument('--mask_ratio', type=number(float, 0, 0.999), help='(default: that of the training)')
    one.add_argument('--seed', type=number(int, 0), default=0, help='of the masks')
    boolean = argparse.BooleanOptionalAction
    one.add_argument('--norm_pix_loss', action=boolean, help='for files that do not say it (default: yes)')
    one = add_figure('curves', draw_curves, 'loss and fusion weights over training')
    one.add_argument('output_dirs', nargs='+')
    one = add_figure('fusion', draw_fusion, 'fusion weights by layer')
    one.add_argument('checkpoints', nargs='+')
    one = add_figure('spectrum', draw_spectrum, 'frequency content of the features of each block')
    one.add_argument('checkpoints', nargs='+')
    one.add_argument('--images', nargs='+', required=True, metavar='IMAGE')
    one.add_argument('--random', action='store_true', help='beside them, the first network with random weights')
    one.add_argument('--seed', type=number(int, 0), default=0, help='of the random weights')
    return parser


if __name__ == '__main__':
    run(main, get_parser())
