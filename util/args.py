"""Argument files, the flags that every job has, and one-line error messages."""

import argparse
import math
import multiprocessing
import os
import shlex
import signal
import sys

import torch

from util import data, distributed
from util.errors import INTERRUPTED, InputError, Interrupted, RunError


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reads recipes: @FILE stands for the flags in FILE, '#' starts a comment."""

    def __init__(self, description=None, **kwargs):
        kwargs.setdefault('formatter_class', HelpFormatter)
        kwargs.setdefault('usage', '%(prog)s [@RECIPE] [--FLAG VALUE ...]')
        super().__init__(
            description=description, fromfile_prefix_chars='@', allow_abbrev=False, **kwargs
        )

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n' if distributed.local_rank() == 0 else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds each flag's default to its help."""

    def _get_help_string(self, action):
        hidden = action.default in (None, False, argparse.SUPPRESS) or '(default' in action.help
        return action.help if hidden else f'{action.help} (default: %(default)s)'


def run_job(main, parser, argv=None):
    """Parse the flags and run a job, main(args).

    InputError: one line and exit code 2. RunError, a training that diverged, a GPU out of memory,
    a lost loader worker: one line and exit code 1. Anything else is a bug and keeps its trace.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has none
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files need not be UTF-8
    try:
        args = parser.parse_args(argv)
    except (ValueError, RecursionError) as error:  # an open quote, or a file that names itself
        parser.error(f'argument file: {error}')
    code, message = 0, None
    try:
        main(args)
        sys.stdout.flush()
    except SystemExit as request:
        code = request.code or 0
    except Interrupted:
        code = INTERRUPTED
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (InputError, FloatingPointError) as error:  # on all processes alike
        code = 2 if isinstance(error, InputError) else 1
        message = str(error) if distributed.local_rank() == 0 else None
    except RuntimeError as error:
        known = isinstance(error, (RunError, torch.OutOfMemoryError))
        if not known and 'DataLoader worker' not in str(error):
            raise
        code, message = 1, f'process {distributed.world()[0]}: {str(error).splitlines()[0]}'
    if message:
        print(f'{parser.prog}: error: {message}', file=sys.stderr)
    if distributed.joined or (code and multiprocessing.active_children()):
        # Python's clean-up could wait forever for a lock that a killed worker holds, or abort when
        # a thread of gloo needs the GIL to free a tensor.
        data.kill_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


# --- Types of flags -------------------------------------------------------------------------------


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float from low to high."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f'{text} is not in {low} to {high}')
        return value

    parse.__name__ = {int: 'whole number', float: 'number'}[kind]  # in argparse's messages
    return parse


class ImageSize(argparse.Action):
    """'224' -> [224, 224]; '192 256' -> [192, 256], height first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, 'takes one side, or height and width')
        setattr(namespace, self.dest, [values[0], values[-1]])


class Model(argparse.Action):
    """--model NAME. Later flags win: a recipe's sizes before it no longer count."""

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, self.dest, value)
        for name in SIZES:
            if hasattr(namespace, name):
                setattr(namespace, name, None)


# --- Flags that jobs share; names are MAE's where MAE has them ------------------------------------

SIZES = {
    'patch_size': 'side of a patch in pixels',
    'embed_dim': 'width of the encoder',
    'depth': 'blocks of the encoder',
    'num_heads': 'attention heads of the encoder',
    'mlp_ratio': 'width of the feed-forward layers over that of the encoder',
    'decoder_embed_dim': 'width of the decoder',
    'decoder_depth': 'blocks of the decoder',
    'decoder_num_heads': 'attention heads of the decoder',
    'fuse_layers': 'fused blocks from 0; the last alone: plain MAE',
}


def add_model_arguments(parser, models, decoder=False):
    """The size of the model. A flag that is not given follows --init_from, or else --model."""
    count, real = number(int, 1), number(float)
    group = 'model (flags not given follow --init_from, then --model)'
    add = parser.add_argument_group(group).add_argument
    add('--model', action=Model, help=f'{", ".join(models)} (default: vit_base_patch16)')
    add(
        '--input_size',
        action=ImageSize,
        type=count,
        nargs='+',
        metavar='SIDE',
        help='or H W, pixels',
    )
    add('--in_chans', type=count, help='channels: 3, 1 for grey, others from .npy (default: 3)')
    add('--mean', type=real, nargs='+', help='per channel, of pixels in 0..1 (default: ImageNet)')
    add('--std', type=number(float, 1e-6), nargs='+', help='per channel, of pixels in 0..1')
    for name, text in SIZES.items():
        if decoder or not name.startswith(('decoder', 'fuse')):
            kind = {'mlp_ratio': number(float, 0.1), 'fuse_layers': number(int, 0)}.get(name, count)
            add(f'--{name}', type=kind, nargs='+' if name == 'fuse_layers' else None, help=text)


def add_input_arguments(parser):
    """Images and weights, and the device that works on them: of jobs, and of tools beside them."""
    add = parser.add_argument_group('data').add_argument
    add(
        '--data_path',
        help='a folder of images, with or without train/ and val/; tar files or WebDataset shards; '
        'a .txt or .csv list; a folder of parquet files or hf/NAME; torch/NAME; or "shapes"',
    )
    add('--val_path', help='validation images, where --data_path has none')
    add('--val_share', type=number(float, 0, 0.9), default=0.0, help='held out, if there are none')
    add('--download_dir', default='data', help='for torch/NAME data sets and indices of tar files')
    add('--label_key', default='label', help="of the labels in shards' .json files or parquet")
    add('--max_value', type=number(float, 0), help='of the pixels: files of 12 bits have 4095')
    colour = number(int, 0, 255)
    add('--background', type=colour, nargs=3, default=[255] * 3, help='R G B behind transparency')
    add('--num_workers', type=number(int, 0), help='loader processes (default: by CPU cores)')

    add = parser.add_argument_group('weights and device').add_argument
    add(
        '--init_from',
        help='.pth, .safetensors, a folder with config.json, or hf-hub:ORG/NAME: ours, '
        "mmpretrain's, mmsegmentation's, MAE's, timm's, transformers'",
    )
    add('--device', default='auto', help='cuda, mps or cpu (default: the first that is there)')
    amp = ['auto', 'bf16', 'fp16', 'none']
    add('--amp', choices=amp, default='auto', help='auto: bf16 or fp16 on CUDA, else none')
    add('--batch_size', type=number(int, 1), help='most images on a device at a time')


def add_common_arguments(parser, betas=None):
    """Flags that every job has. betas: the usual ones, for a job with AdamW."""
    add_input_arguments(parser)
    count, rate = number(int, 1), number(float, 0)
    add = parser.add_argument_group('optimisation').add_argument
    add('--total_batch_size', type=count, help='images per step, of all devices; accumulated')
    add('--epochs', type=count, default=300, help='passes over the images')
    add('--warmup_epochs', type=rate, help='of linear warm-up (default: a tenth of the epochs)')
    add('--blr', type=rate, default=1.5e-4, help='learning rate per 256 images of the total batch')
    add('--lr', type=rate, help='learning rate; overrides --blr')
    add('--min_lr', type=rate, default=0.0, help='learning rate at the end')
    add('--weight_decay', type=rate, default=0.05, help='not of norms and biases')
    if betas:
        add('--betas', type=number(float, 0, 0.999999), nargs=2, default=betas, help='of AdamW')
    add('--clip_grad', type=number(float, 1e-12), help='largest norm of the gradient')

    boolean, epochs = argparse.BooleanOptionalAction, {'type': count, 'metavar': 'EPOCHS'}
    add = parser.add_argument_group('run').add_argument
    add('--output_dir', default='output', help='for checkpoints, log.jsonl, TensorBoard')
    add('--resume', default='auto', help='auto: from --output_dir; none; or a checkpoint')
    add('--force_resume', action='store_true', help='also with flags that change the training')
    add('--seed', type=number(int, 0, 2**63 - 1), default=0, help='of all random numbers')
    add('--compile', action=boolean, default=False, help='torch.compile the model')
    add('--save_every', type=rate, default=10, metavar='MINUTES', help='between checkpoints')
    add('--keep_every', **epochs, help='between checkpoints that are kept')
    add('--log_every', type=count, default=20, metavar='STEPS', help='between log lines')
    add('--eval_every', **epochs, default=1, help='between evaluations')


def add_classifier_arguments(parser):
    """Flags of fine-tuning and probing."""
    add = parser.add_argument_group('classifier').add_argument
    add('--crop_pct', type=number(float, 0.01, 1), help='of a test image (default: 0.875)')
    modes = ['crop', 'pad']
    add(
        '--resize_mode', choices=modes, help='crop the centre, or pad to the aspect (default: crop)'
    )
    add('--class_weights', action='store_true', help='rare classes count more, up to ten times')
    add('--eval', action='store_true', help='only evaluate the weights of --init_from')
    add('--report', metavar='DIR', help='only evaluate; write classes, confusion and mistakes')
