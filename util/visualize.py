"""Pictures of a model: reconstructions, and the curves of a run.

    python -m util.visualize reconstruct OUTPUT_DIR/checkpoint-last.pth IMAGE [IMAGE ...] --out reconstruction.png
    python -m util.visualize curves OUTPUT_DIR [OUTPUT_DIR ...] --out curves.png

The functions return matplotlib figures, for notebooks.
"""

import argparse
import os

import torch
from matplotlib.figure import Figure

from models_mff import create_model
from util import checkpoint, log, transforms
from util.args import ArgumentParser, InputError, number, run


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio=0.75, noise=None):
    """What the model makes of imgs (N, C, H, W), normalised: (masked, reconstruction, pasted), like imgs.

    With norm_pix_loss the model predicts each patch up to its mean and deviation. Both are taken from the true
    patch, masked ones included: that leaks the target's coarse colours into the picture. pasted shows the visible
    patches as they were. Paper, appendix; MAE, figure 2.
    """
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise)  # (N, L, p*p*C), (N, L)
    if model.norm_pix_loss:
        target = model.patchify(imgs)
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
    aspect = imgs.shape[2] / imgs.shape[3]
    figure = Figure(figsize=(7, 1.75 * aspect * len(imgs) + 0.7), layout='constrained', dpi=100)
    axes = figure.subplots(len(imgs), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row, picture in enumerate((pictures.float().cpu() * std + mean).numpy()):
            grey = picture.shape[0] != 3
            shown = picture.mean(0) if grey else picture.transpose(1, 2, 0)
            axes[row, column].imshow(shown.clip(0, 1), cmap='gray' if grey else None, vmin=0, vmax=1)
            axes[row, column].axis('off')
    figure.supxlabel(
        'predicted patches un-normalised with the true mean and deviation of each patch (leaks them)'
        if model.norm_pix_loss
        else 'pixels as predicted',
        fontsize=8,
    )
    return figure


def curves_figure(output_dirs):
    """Figure of loss and fusion weights over training, from the log.jsonl of one or more runs."""
    figure = Figure(figsize=(9, 3.5), layout='constrained', dpi=100)
    loss_axes, weight_axes = figure.subplots(1, 2)
    labelled = set()
    for run_index, output_dir in enumerate(output_dirs):
        title = os.path.basename(os.path.normpath(output_dir))
        entries = [entry for entry in log.read(os.path.join(output_dir, 'log.jsonl')) if 'step' in entry]
        for name in sorted({name for entry in entries for name in entry}):
            points = [(entry['epoch'], entry[name]) for entry in entries if name in entry]
            if name in ('loss', 'val_loss'):
                style = '-' if name == 'loss' else 'o--'
                loss_axes.plot(*zip(*points), style, color=f'C{run_index}', markersize=4, label=f'{title}, {name}')
            elif name.startswith('fusion/'):  # a colour a layer, a line style a run
                layer, style = int(name.removeprefix('fusion/layer_')), ['-', '--', ':', '-.'][run_index % 4]
                label = None if layer in labelled else f'layer {layer}'
                weight_axes.plot(*zip(*points), style, color=f'C{layer % 10}', label=label)
                labelled.add(layer)
    loss_axes.set(xlabel='epoch', ylabel='loss')
    weight_axes.set(xlabel='epoch', ylabel='fusion weight')
    for axes in (loss_axes, weight_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def load_model(path):
    """(model, flags of the run) of a pre-training checkpoint of this project."""
    state = checkpoint.load_run(path)
    args = argparse.Namespace(**state['args'])
    model = create_model(args.model, args.input_size, args.in_chans, args.fuse_layers, args.norm_pix_loss)
    model.load_state_dict(state['model'])
    return model, args


def main(args):
    if args.figure == 'curves':
        for output_dir in args.output_dirs:
            if not log.read(os.path.join(output_dir, 'log.jsonl')):
                raise InputError(f'{output_dir}: no log.jsonl in it')
        figure = curves_figure(args.output_dirs)
    else:
        model, flags = load_model(args.checkpoint)
        statistics = transforms.pixel_statistics(flags)
        transform = transforms.centre_transform(model.patch_embed.img_size)
        images = [transform(transforms.read_given_image(path, flags.in_chans)) for path in args.images]
        imgs = transforms.normalise(torch.stack(images), *statistics)
        noise = torch.rand(len(imgs), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
        mask_ratio = flags.mask_ratio if args.mask_ratio is None else args.mask_ratio
        figure = reconstruction_figure(model, imgs, statistics, mask_ratio, noise)
    try:
        figure.savefig(args.out)
    except (OSError, ValueError) as error:
        raise InputError(f'--out {args.out}: {error}') from None
    print(f'wrote {args.out}')


def get_parser():
    parser = ArgumentParser('Pictures of a model')
    figures = parser.add_subparsers(dest='figure', required=True)
    one = figures.add_parser('reconstruct', help='input, masked, reconstruction')
    one.add_argument('checkpoint')
    one.add_argument('images', nargs='+')
    one.add_argument('--mask_ratio', type=number(float, 0, 0.999), help='(default: that of the training)')
    one.add_argument('--seed', type=number(int, 0), default=0, help='of the masks')
    one.add_argument('--out', default='reconstruction.png')
    one = figures.add_parser('curves', help='loss and fusion weights over training')
    one.add_argument('output_dirs', nargs='+')
    one.add_argument('--out', default='curves.png')
    return parser


if __name__ == '__main__':
    run(main, get_parser())
