"""Argument files, the flags that every job has, and one-line error messages."""

import argparse
import difflib
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys

import torch

from util import distributed, workers
from util.errors import InputError, RunError


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reads recipes: @FILE stands for the flags in FILE, '#' starts a comment, later flags win."""

    def __init__(self, description=None, **kwargs):
        kwargs.setdefault('formatter_class', HelpFormatter)
        super().__init__(description=description, fromfile_prefix_chars='@', allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        unknown = re.match(r'unrecognized arguments: (\S+)', message)
        missing = re.match(r"\[Errno \d+\] (.+): '(.+)'", message)  # of an argument file
        if unknown and unknown[1].endswith('.txt'):
            message += f'; a recipe has an @ before its name: @{unknown[1]}'
        elif unknown:
            message += did_you_mean(unknown[1], self._option_string_actions)
        elif missing:
            folder = os.path.dirname(missing[2])
            names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
            known = [os.path.join(folder, name) for name in names if name.endswith('.txt')]
            message = f'@{missing[2]}: {missing[1]}{did_you_mean(missing[2], known)}'
        self.exit(2, f'{self.prog}: error: {message}\n' if is_first() else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds each flag's default to its help, unless that says it."""

    def _get_help_string(self, action):
        default = action.default
        says = default is None or default is False or default == argparse.SUPPRESS or '(default' in action.help
        return action.help if says else f'{action.help} (default: %(default)s)'


def is_first():
    """Whether this process speaks for those of its machine."""
    return distributed.from_launcher(distributed.LOCAL_RANK, 0) == 0


def did_you_mean(word, known):
    """'; did you mean X?' for the closest of the known words, or ''."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean {close[0]}?' if close else ''


def run_job(main, parser, argv=None):
    """Parse the flags and run a job, main(args).

    An InputError becomes one line and exit code 2; a RunError, a diverged training or the loss of a loader's worker
    one line and exit code 1. Anything else is a bug and keeps its stack trace.
    """
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files need not be UTF-8
    try:
        args = parser.parse_args(argv)
    except (ValueError, RecursionError) as error:  # not UTF-8, an open quote, a file that names itself
        parser.error(f'argument file: {error}')
    code, message = 0, None
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except SystemExit as request:
        code = request.code or 0
    except (InputError, FloatingPointError) as error:  # on all processes alike
        code = 2 if isinstance(error, InputError) else 1
        message = str(error) if is_first() else None
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except RuntimeError as error:
        code, message = 1, str(error)
        if message.startswith('DataLoader worker'):  # torch raises this wherever we are when a worker dies
            message += (
                '; memory may have run out: try fewer --num_workers, or more shared memory '
                '(/dev/shm; docker run --shm-size)'
            )
        elif isinstance(error, torch.OutOfMemoryError):  # of a GPU
            message = f'{message.splitlines()[0]}; try a smaller --batch_size: the rest of a step is accumulated'
        elif not isinstance(error, RunError):
            raise
        rank, world_size = distributed.world()
        if world_size > 1:
            message = f'process {rank}: {message}'
    if message:
        print(f'{parser.prog}: error: {message}', file=sys.stderr)
    if code or distributed.joined:
        leave(code)


def leave(code):
    """Exit, at once where Python's clean-up could hang or abort.

    It could wait forever for a lock that a killed loader worker holds, or abort when a thread of gloo needs the GIL to
    free a tensor.
    """
    if not multiprocessing.active_children() and not distributed.joined:
        sys.exit(code)
    workers.kill_workers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- Types of flags -----------------------------------------------------------------------------------------------


def number(kind, low=None, high=None):
    """An argparse type: a finite int or float from low to high, whose error says what was expected."""
    expected = 'a whole number' if kind is int else 'a number'
    if low is not None:
        expected += f' from {low}'
    if high is not None:
        expected += f' to {high}'

    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        if not finite or (low is not None and value < low) or (high is not None and value > high):
            hint = '; put spaces between several numbers' if ',' in text else ''
            raise argparse.ArgumentTypeError(f"'{text}' is not {expected}{hint}")
        return value

    return parse


def save_interval(text):
    """'500' (steps), '10min' or '2ep' -> (number, unit)."""
    unit = next(unit for unit in ('min', 'ep', '') if text.endswith(unit))
    kind = number(float, 0) if unit == 'min' else number(int, 1)
    try:
        return kind(text.removesuffix(unit)), unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is not N steps, Nmin or Nep, such as 500, 10min or 1ep") from None


class ImageSize(argparse.Action):
    """'224' -> [224, 224]; '192 256' -> [192, 256], height first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, 'takes one side, or height and width')
        setattr(namespace, self.dest, [values[0], values[-1]])


# --- Flags that jobs share; names are MAE's where MAE has them ----------------------------------------------------


def add_model_arguments(parser, models, decoder=False):
    """The size of the model. A flag that is not given follows from --init_from, or else from --model."""
    count = number(int, 1)
    add = parser.add_argument_group('model (flags not given follow --init_from, then --model)').add_argument
    add('--model', help=f'{", ".join(models)} (default: vit_base_patch16)')
    add('--input_size', action=ImageSize, type=count, nargs='+', metavar='SIDE', help='one side, or H and W, in pixels')
    add('--in_chans', type=count, help='channels: 3, 1 for grey, others from .npy (default: 3)')
    add('--mean', type=number(float), nargs='+', metavar='M', help='per channel, of pixels in 0..1 (default: ImageNet)')
    add('--std', type=number(float, 1e-6), nargs='+', metavar='S', help='per channel, of pixels in 0..1')
    add('--patch_size', type=count, help='side of a patch in pixels')
    add('--embed_dim', type=count, help='width of the encoder')
    add('--depth', type=count, help='blocks of the encoder')
    add('--num_heads', type=count, help='attention heads of the encoder')
    add('--mlp_ratio', type=number(float, 0.1), help='width of the feed-forward layers over that of the encoder')
    if decoder:
        add('--decoder_embed_dim', type=count, help='width of the decoder')
        add('--decoder_depth', type=count, help='blocks of the decoder')
        add('--decoder_num_heads', type=count, help='attention heads of the decoder')
        add('--fuse_layers', type=number(int, 0), nargs='+', help='fused blocks from 0; the last alone: plain MAE')


def add_common_arguments(parser, betas=None):
    """Flags of data, weights, optimisation and run that every job has. betas: the usual ones, for a job with AdamW."""
    count, rate, share, colour = number(int, 1), number(float, 0), number(float, 0, 1), number(int, 0, 255)

    add = parser.add_argument_group('data').add_argument
    add(
        '--data_path',
        help='a folder of images, nested or flat, with or without train/ and val/, or the same in tar files; a .txt '
        'file that lists images; torch/NAME, a torchvision data set; or "shapes", which is drawn',
    )
    add('--val_path', help='validation images, where they are not the val/ or test/ of --data_path')
    add('--val_share', type=number(float, 0, 0.9), default=0.0, metavar='SHARE', help='held out, if there are none')
    add('--download_dir', default='data', help='for torch/NAME data sets and indices of tar files')
    add('--background', type=colour, nargs=3, metavar=('R', 'G', 'B'), default=[255] * 3, help='behind transparency')
    add('--max_bad', type=share, default=0.01, metavar='SHARE', help='share of the images that may be unreadable')
    add('--num_workers', type=number(int, 0), help='loader processes per training process (default: by CPU cores)')

    add = parser.add_argument_group('weights').add_argument
    add('--init_from', help="start from .pth or .safetensors: ours, mmpretrain's, mmsegmentation's, MAE's, timm's")

    add = parser.add_argument_group('optimisation').add_argument
    add('--total_batch_size', type=count, help='images per step, all devices (default: as published, less for few)')
    add('--batch_size', type=count, help='most images on a device at a time; the rest is accumulated (default: all)')
    add('--epochs', type=count, default=300, help='passes over the images')
    add('--warmup_epochs', type=rate, help='epochs of linear warm-up (default: a tenth of the epochs)')
    add('--blr', type=rate, default=1.5e-4, help='learning rate per 256 images of the total batch')
    add('--lr', type=rate, help='learning rate; overrides --blr')
    add('--min_lr', type=rate, default=0.0, help='learning rate at the end')
    add('--weight_decay', type=rate, default=0.05, help='not of norms and biases')
    if betas:
        add('--betas', type=number(float, 0, 0.999999), nargs=2, default=betas, help='of AdamW')
    add('--clip_grad', type=number(float, 1e-12), help='largest norm of the gradient (default: no clipping)')

    add = parser.add_argument_group('run').add_argument
    add('--output_dir', default='output', help='for checkpoints, log.jsonl, TensorBoard')
    add('--resume', default='auto', help='auto: the newest intact checkpoint in --output_dir; none; or a checkpoint')
    add('--force_resume', action='store_true', help='resume even with flags that change the training')
    add('--seed', type=number(int, 0, 2**63 - 1), default=0, help='of all random numbers')
    add('--device', default='auto', help='cuda, mps or cpu (default: the first of them that this machine has)')
    add('--amp', choices=['auto', 'bf16', 'fp16', 'none'], default='auto', help='auto: bf16 or fp16 on CUDA, else none')
    add('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile the model')
    add('--save_every', type=save_interval, default='10min', metavar='N|Nmin|Nep', help='N: steps; or minutes, epochs')
    add('--keep_every', type=count, metavar='EPOCHS', help='keep a copy of the checkpoint every so many epochs')
    add('--log_every', type=count, default=20, metavar='STEPS', help='steps between log lines')
    add('--eval_every', type=count, default=1, metavar='EPOCHS', help='epochs between evaluations')
    add('--picture_every', type=count, default=20, metavar='EPOCHS', help='epochs between pictures')
