"""Argument files, the flags that every job has, and the one line that a user's mistake gets."""

import argparse
import contextlib
import gc
import math
import multiprocessing
import os
import shlex
import signal


class InputError(ValueError):
    """A mistake that the user can mend. The mains print it as one line and exit with code 2."""


class RunError(RuntimeError):
    """A fault while running, such as unreadable images. The mains print it as one line and exit with code 1."""

    def __str__(self):  # from a loader's worker it comes with the traceback there
        return super().__str__().splitlines()[-1].removeprefix(f'{__name__}.RunError: ')


INTERRUPTED = 75  # exit code of a run that was asked to stop and has saved: the same command goes on from there


@contextlib.contextmanager
def as_input_error():
    """Turn a ValueError within into an InputError: where the values are the user's."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reads recipes: @FILE stands for the flags in FILE, '#' starts a comment, later flags win."""

    def __init__(self, description=None, **kwargs):
        super().__init__(description=description, fromfile_prefix_chars='@', allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message, code=2):
        first = os.environ.get('LOCAL_RANK', '0') == '0'  # once per machine, not once per process
        self.exit(code, f'{self.prog}: error: {message}\n' if first else None)


def run(main, parser, argv=None):
    """Parse and run a job: main(args). An InputError becomes one line and exit code 2, a RunError, the loss of a
    loader's worker, or a divergence one line and exit code 1.
    """
    try:
        args = parser.parse_args(argv)
    except (ValueError, RecursionError) as error:  # not UTF-8, an open quote, a file that names itself
        parser.error(f'argument file: {error}')
    try:
        main(args)
    except InputError as error:
        parser.error(str(error))
    except FloatingPointError as error:  # on all processes alike
        parser.error(str(error), code=1)
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, '\n')
    except RuntimeError as error:
        lost = str(error).startswith('DataLoader worker')  # torch says so of a worker that died, wherever we are then
        if not lost and not isinstance(error, RunError):
            raise
        advice = (
            ' Memory may have run out: try fewer --num_workers, or more shared memory (/dev/shm; docker run --shm-size)'
        )
        fail(parser, str(error) + advice * lost)
    finally:
        end_workers()


def fail(parser, message):
    """Exit with code 1 and a line that names this process, if there are several: the others may not have the fault."""
    from util import distributed  # which needs this module

    rank, world_size = distributed.world()
    parser.exit(1, f'{parser.prog}: error: {f"process {rank}: " * (world_size > 1)}{message}\n')


def end_workers():
    """Kill loader workers that a fault left running: they ignore SIGTERM, by which Python would end them.

    One may have held the lock of its loader's event, on which the loader would wait for ever as it is deleted.
    """
    workers = multiprocessing.active_children()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error for each
    for process in workers:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)
    for thing in gc.get_objects() if workers else []:
        if type(thing).__name__ == '_MultiProcessingDataLoaderIter':
            thing._workers_done_event = multiprocessing.Event()


def number(kind, low=None, high=None):
    """An argparse type: a finite number within bounds, whose error says what was expected."""
    noun = 'a whole number' if kind is int else 'a number'
    bounds = ' '.join([f'from {low}'] * (low is not None) + [f'to {high}'] * (high is not None))

    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        if not finite or (low is not None and value < low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun} {bounds}".rstrip())
        return value

    return parse


def save_interval(text):
    """'500' (steps), '10min' or '2ep' -> (number, unit)."""
    unit = next(unit for unit in ('min', 'ep', '') if text.endswith(unit))
    try:
        return number(*((float, 0) if unit == 'min' else (int, 1)))(text.removesuffix(unit)), unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is not N steps, Nmin or Nep, such as 500, 10min or 1ep") from None


class ImageSize(argparse.Action):
    """'224' -> [224, 224]; '192 256' -> [192, 256], height first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, 'takes one side, or height and width')
        setattr(namespace, self.dest, [values[0], values[-1]])


def add_common_arguments(parser):
    """Flags that pre-training, fine-tuning and probing share. Names are MAE's where MAE has them."""
    count, rate = number(int, 1), number(float, 0)
    default = '(default: %(default)s)'

    data = parser.add_argument_group('data')
    data.add_argument(
        '--data_path',
        help='a folder of images, nested or flat, with or without train/ and val/, or the same in tar files; '
        'a .txt file that lists images; torch/NAME, a torchvision data set; or "shapes", which is drawn',
    )
    data.add_argument('--val_path', help='validation images, where they are not the val/ or test/ of --data_path')
    data.add_argument(
        '--download_dir', default='data', help=f'for torch/NAME data sets and indices of tar files {default}'
    )
    data.add_argument(
        '--input_size',
        action=ImageSize,
        type=count,
        nargs='+',
        metavar='SIDE',
        help='one side, or H and W, in pixels (default: that of the model)',
    )
    data.add_argument('--in_chans', type=count, default=3, help=f'channels: 3, 1 for grey, others from .npy {default}')
    data.add_argument(
        '--mean',
        type=number(float),
        nargs='+',
        metavar='M',
        help='per channel, of pixels in 0..1 (default: ImageNet, or 0.5 where there are not 3 channels)',
    )
    data.add_argument('--std', type=number(float, 1e-6), nargs='+', metavar='S', help='per channel, likewise')
    data.add_argument(
        '--max_bad',
        type=number(float, 0, 1),
        default=0.01,
        metavar='SHARE',
        help=f'share of the images that may be unreadable; they are replaced, and in evaluation left out {default}',
    )
    data.add_argument(
        '--num_workers',
        type=number(int, 0),
        help='loader processes per training process (default: the CPU cores shared out, at most 16)',
    )

    weights = parser.add_argument_group('weights')
    weights.add_argument(
        '--init_from', help="weights to start from, .pth or .safetensors: this project's, mmpretrain's, MAE's, timm's"
    )

    optim = parser.add_argument_group('optimisation')
    optim.add_argument(
        '--total_batch_size', type=count, default=4096, help=f'images of a step, on all devices {default}'
    )
    optim.add_argument(
        '--batch_size',
        type=count,
        help='images on one device at a time; the rest of the total is accumulated (default: total over processes)',
    )
    optim.add_argument('--epochs', type=count, default=300, help=default)
    optim.add_argument('--warmup_epochs', type=rate, default=40, help=default)
    optim.add_argument('--blr', type=rate, default=1.5e-4, help=f'learning rate per 256 images of the total {default}')
    optim.add_argument('--lr', type=rate, help='learning rate; overrides --blr')
    optim.add_argument('--min_lr', type=rate, default=0.0, help=f'learning rate at the end {default}')
    optim.add_argument('--weight_decay', type=rate, default=0.05, help=default)
    optim.add_argument(
        '--betas', type=number(float, 0, 0.999999), nargs=2, default=[0.9, 0.95], help=f'of AdamW {default}'
    )
    optim.add_argument(
        '--clip_grad', type=number(float, 1e-12), help='largest norm of the gradient (default: no clipping)'
    )

    run = parser.add_argument_group('run')
    run.add_argument('--output_dir', default='output', help=f'checkpoints, log.jsonl, TensorBoard {default}')
    run.add_argument(
        '--resume',
        default='auto',
        help='auto: from the newest whole checkpoint in --output_dir, if any; '
        f'none: start anew; or a checkpoint {default}',
    )
    run.add_argument('--force_resume', action='store_true', help='resume even with flags that change the training')
    run.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help=default)
    run.add_argument('--device', default='auto', help='cuda, mps or cpu (default: the first of them that is there)')
    run.add_argument(
        '--amp',
        choices=['auto', 'bf16', 'fp16', 'none'],
        default='auto',
        help='precision of the forward pass; auto: bf16 on a GPU that has it, fp16 on another, none on a CPU',
    )
    run.add_argument('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile the model')
    run.add_argument(
        '--save_every',
        type=save_interval,
        default='10min',
        metavar='N|Nmin|Nep',
        help=f'checkpoint every N steps, minutes or epochs, besides at the end of epochs {default}',
    )
    run.add_argument('--keep_every', type=count, metavar='EPOCHS', help='keep a copy of the checkpoint every so often')
    run.add_argument('--log_every', type=count, default=20, metavar='STEPS', help=default)
