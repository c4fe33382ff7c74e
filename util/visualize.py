"""Pictures of a model: reconstructions, fusion weights, frequency content of its features, and the curves of a run.

    python -m util.visualize reconstruct CHECKPOINT IMAGE [IMAGE ...] --seed 1
    python -m util.visualize curves OUTPUT_DIR [OUTPUT_DIR ...]
    python -m util.visualize fusion CHECKPOINT [CHECKPOINT ...]
    python -m util.visualize spectrum CHECKPOINT [CHECKPOINT ...] --images IMAGE [IMAGE ...]

Checkpoints are of any origin that util/weights.py knows. The functions return matplotlib figures, for notebooks: there
after `%matplotlib inline` (docs/companion.md has an example).
"""

import argparse
import itertools
import os

import torch
import torch.nn.functional as F
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
        target = model.patchify(model.low_frequency_target(imgs) if is_lowpass(model) else imgs)
        pred = pred.float() * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    reconstruction = model.unpatchify(pred.float())
    removed = model.unpatchify(mask.unsqueeze(-1).expand_as(pred))  # 1 where removed
    return imgs * (1 - removed), reconstruction, imgs * (1 - removed) + reconstruction * removed


def reconstruction_figure(model, imgs, statistics, mask_ratio=0.75, noise=None):
    """Figure with a row for each of imgs (N, C, H, W): input, masked, reconstruction, with visible patches pasted.

    statistics: (mean, std) by which imgs are normalised.
    """
    columns = {
        'input': imgs,
        **dict(zip(['masked', 'reconstruction', 'with visible patches'], reconstruct(model, imgs, mask_ratio, noise))),
    }
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in statistics)
    inputs = imgs.float().cpu() * std + mean
    low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=1)  # 0 and 1, but for arrays of another range
    rows, channels, height, width = imgs.shape
    gap = max(1, height // 16)
    figure = Figure(figsize=(7, 1.75 * (height + gap) / width * rows + 0.7), layout='constrained', dpi=100)
    for axes, (title, pictures) in zip(figure.subplots(1, len(columns)), columns.items()):
        axes.set_title(title, fontsize=10)
        shades = (pictures.float().cpu() * std + mean - low) / (high - low)
        shades = (shades if channels == 3 else shades.mean(1, keepdim=True).expand(-1, 3, -1, -1)).clamp(0, 1)
        shades = F.pad(shades, (0, 0, 0, gap), value=1)  # white below each
        axes.imshow(shades.permute(0, 2, 3, 1).flatten(0, 1).numpy())
        axes.axis('off')
    figure.supxlabel(
        f'{mask_ratio:.0%} of the patches hidden; '
        + (
            'predictions un-normalised with the true mean and deviation of each patch (leaks them)'
            if model.norm_pix_loss
            else 'pixels as predicted'
        )
        + "; PixMIM's target" * is_lowpass(model),
        fontsize=8,
    )
    return figure


def is_lowpass(model):
    """Whether its target is PixMIM's (util/design_choices.py)."""
    return getattr(model, 'lowpass', False)


def curves_figure(output_dirs):
    """Figure of loss and fusion weights over training, and the final weights, from log.jsonl of one or more runs.

    The MFF paper's weights of the fused levels in the course of training. Runs without fusion have their loss alone.
    Raises InputError where there is no log.
    """
    runs = {}  # title: {name: points}
    for title, output_dir in zip(titles(output_dirs), output_dirs):
        runs[title] = read_curves(output_dir)
        if not runs[title]:
            raise InputError(f'{output_dir}: no log.jsonl with a loss in it')
    weights = {title: fusion_curves(curves) for title, curves in runs.items()}
    columns = 3 if any(weights.values()) else 1
    figure = Figure(figsize=(4 * columns, 3.5), layout='constrained', dpi=100)
    loss_axes, *fusion_axes = figure.subplots(1, columns, squeeze=False)[0]
    for index, (title, curves) in enumerate(runs.items()):
        for name, style in (('loss', '-'), ('val_loss', 'o--')):
            if name in curves:
                label = f'{title}, {name}'
                loss_axes.plot(*zip(*curves[name]), style, color=f'C{index}', markersize=4, label=label)
    loss_axes.set(xlabel='epoch', ylabel='loss')
    loss_axes.grid(alpha=0.3)
    loss_axes.legend(fontsize=8)
    if fusion_axes:
        draw_fusion_curves(fusion_axes[0], weights)
        final = {title: {layer: points[-1][1] for layer, points in lines.items()} for title, lines in weights.items()}
        draw_fusion_weights(fusion_axes[1], final)
    return figure


def read_curves(output_dir):
    """{name: [(epoch, value)]} of the losses and fusion weights in a run's log.jsonl; nothing where there is none."""
    curves = {}
    for entry in log.read(os.path.join(output_dir, 'log.jsonl')):
        for name, value in entry.items():
            if name in ('loss', 'val_loss') or name.startswith('fusion/'):
                curves.setdefault(name, []).append((entry['epoch'], value))
    return curves


def fusion_curves(curves):
    """{layer: points} out of read_curves; none of plain MAE, whose one weight is always 1."""
    lines = {int(name[-2:]): points for name, points in curves.items() if name.startswith('fusion/layer_')}
    return lines if len(lines) > 1 else {}


def draw_fusion_curves(axes, weights):
    """Lines of {title: {layer: points}}: a colour a layer, a line style a title."""
    layers = sorted({layer for lines in weights.values() for layer in lines})
    styles = dict(zip(weights, itertools.cycle(['-', '--', ':', '-.'])))
    for layer in layers:
        colour = depth_colour(layer, layers[-1])
        axes.plot([], [], color=colour, label=f'layer {layer}')
        for title, lines in weights.items():
            if layer in lines:
                axes.plot(*zip(*lines[layer]), styles[title], color=colour)
    for title, lines in weights.items():
        if lines and len(weights) > 1:
            axes.plot([], [], styles[title], color='grey', label=title)
    axes.set(xlabel='epoch', ylabel='fusion weight')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def fusion_figure(weights):
    """Figure of fusion weights {title: {layer: weight}} by layer. The MFF paper's weight of each fused level."""
    figure = Figure(figsize=(5, 3.5), layout='constrained', dpi=100)
    draw_fusion_weights(figure.subplots(), weights)
    return figure


def draw_fusion_weights(axes, weights):
    """Bars of {title: {layer: weight}}, a group a layer, a colour a title."""
    layers = sorted({layer for values in weights.values() for layer in values})
    width = 0.8 / len(weights)
    for index, (title, values) in enumerate(weights.items()):
        places = [layers.index(layer) + (index - (len(weights) - 1) / 2) * width for layer in values]
        if values:
            axes.bar(places, list(values.values()), width, color=f'C{index}', label=title)
    axes.set(xlabel='layer', ylabel='fusion weight at the end', xticks=range(len(layers)), xticklabels=layers)
    axes.grid(alpha=0.3, axis='y')
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
    if args.norm_pix_loss is not None:
        if flags.norm_pix_loss not in (None, args.norm_pix_loss):
            raise InputError(f'{args.checkpoint} says itself how its pixels were predicted; leave --norm_pix_loss away')
        model.norm_pix_loss = args.norm_pix_loss
    imgs = read_images(args.images, flags, model.patch_embed.img_size)
    noise = torch.rand(len(imgs), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
    mask_ratio = flags.mask_ratio if args.mask_ratio is None else args.mask_ratio
    return reconstruction_figure(model, imgs, transforms.pixel_statistics(flags), mask_ratio, noise)


def draw_curves(args):
    return curves_figure(list(dict.fromkeys(args.output_dirs)))


def draw_fusion(args):
    paths, weights = list(dict.fromkeys(args.checkpoints)), []
    for path in paths:
        model, _ = load_model(path)
        if len(model.fusion_weights) < 2:
            raise InputError(f'{path}: no fusion weights to show; it is plain MAE, or fuses by attention')
        weights.append(dict(zip(model.fuse_layers, model.fusion_weights.tolist())))
    return fusion_figure(dict(zip(titles(paths), weights)))


def draw_spectrum(args):
    paths = list(dict.fromkeys(args.checkpoints))
    encoders = dict(zip(titles(paths), map(load_encoder, paths)))
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
    out = args.out or f'{args.figure}.png'
    if os.path.isdir(out) or not os.path.basename(out):
        raise InputError(f'--out {out} is a folder; name a file in it')
    out = out if os.path.splitext(out)[1] else f'{out}.png'
    figure = args.draw(args)
    try:
        figure.savefig(out)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f'{out}: {getattr(error, "strerror", None) or error}') from None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        try:
            with SummaryWriter(args.tensorboard) as board:
                board.add_figure(args.figure, figure)
        except OSError as error:
            raise InputError(f'--tensorboard {args.tensorboard}: {error.strerror}') from None
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
    one.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help='of the masks')
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
    one.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help='of the random weights')
    return parser


if __name__ == '__main__':
    run(main, get_parser())
