"""Checkpoints: plain files of tensors, numbers and strings, written whole or not at all, and read as data only.

    python -m util.checkpoint export OUTPUT_DIR/checkpoint-last.pth DIR     # for timm and the Hugging Face hub

Saving and resuming are here; the weights of any origin come in through util/weights.py and out through util/export.py.
"""

import contextlib
import fcntl
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from util.args import ArgumentParser, InputError, RunError, run
from util.weights import convert_state_dict, load_weights, read_file, read_weights  # noqa: F401 (the mains' way to them)

LAST, PREVIOUS, BEST = 'checkpoint-last.pth', 'checkpoint-previous.pth', 'checkpoint-best.pth'

# Flags that may change when a run goes on: they do not change what is trained.
FREE_FLAGS = {
    'batch_size',
    'data_path',
    'val_path',
    'num_workers',
    'max_bad',
    'device',
    'output_dir',
    'resume',
    'force_resume',
    'save_every',
    'keep_every',
    'log_every',
    'eval_every',
    'picture_every',
    'download_dir',
    'compile',
    'grad_checkpointing',
}


def save(state, output_dir, name=LAST):
    """Write state to output_dir/name; a checkpoint-last.pth that was there becomes checkpoint-previous.pth.

    state is whole on disk before it takes the name, so that a kill at any moment leaves a whole checkpoint.
    """
    path, temporary = os.path.join(output_dir, name), os.path.join(output_dir, 'checkpoint-writing.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind another
        raise (cause if isinstance(cause, OSError) else error) from None
    if name == LAST and os.path.exists(path):
        os.replace(path, os.path.join(output_dir, PREVIOUS))
    os.replace(temporary, path)


class Saver:
    """Saves a run when it is due: every --save_every, at the end of epochs, and at the end.

    Training waits while the state is copied; a thread writes it. The end of an epoch is passed over while saving
    would take more than a twentieth of the time since the last one. When nothing can be written, as on a full disk,
    that is said, training goes on, and it tries again every minute.

    say: prints a line.
    """

    def __init__(self, args, steps_per_epoch, model, optimizer, scaler, record, say, enabled=True):
        self.args, self.steps_per_epoch, self.record, self.enabled = args, steps_per_epoch, record, enabled
        self.model, self.optimizer, self.scaler, self.say = model, optimizer, scaler, say
        self.saved_at, self.seconds, self.failed = time.monotonic(), 0.0, False
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def due(self, step):
        if self.failed:
            return time.monotonic() - self.saved_at >= 60
        every, unit = self.args.save_every
        if unit == 'min':
            return time.monotonic() - self.saved_at >= 60 * every
        return step % (every if unit == '' else every * self.steps_per_epoch) == 0

    def __call__(self, step):
        """After each optimiser step; the last of an epoch is left to end_of_epoch."""
        if step % self.steps_per_epoch and self.due(step):
            self.save(step)

    def end_of_epoch(self, step):
        cheap = self.args.save_every[1] != 'ep' and time.monotonic() - self.saved_at >= 20 * self.seconds
        if cheap or self.keeps(step) or self.due(step):
            self.save(step, self.keeps(step))

    def keeps(self, step):
        epoch, steps = divmod(step, self.steps_per_epoch)
        return bool(self.args.keep_every) and not steps and epoch % self.args.keep_every == 0

    def save_now(self, step):
        """Before the run ends here. RunError if it cannot be saved."""
        self.save(step, self.keeps(step))
        self.wait()
        if self.failed:
            raise RunError(f'step {step} is not saved; make room, and the same command goes on from what there is')

    def save(self, step, keep=False, best=False):
        """checkpoint-last.pth, and first the copies that stay: a kill between them leaves nothing out on resuming."""
        if not self.enabled:
            return
        self.wait()
        self.saved_at, epoch = time.monotonic(), step // self.steps_per_epoch
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'step': step,
            'epoch': epoch,
            **self.record,
            'args': {name: plain(value) for name, value in vars(self.args).items()},
        }
        if not all(tensor.isfinite().all() for tensor in state['model'].values()):
            raise FloatingPointError(f'the weights are not finite after step {step}')
        names = [f'checkpoint-{epoch:04d}.pth'] * keep + [BEST] * best + [LAST]
        self.writing = self.thread.submit(self.write, on_cpu(state), names)

    def write(self, state, names):
        try:
            for name in names:
                save(state, self.args.output_dir, name)
            self.failed = False
        except (OSError, RuntimeError) as error:
            self.failed, reason = True, getattr(error, 'strerror', error)
            self.say(
                f'step {state["step"]}: cannot save in {self.args.output_dir} ({reason}); the last checkpoint stays'
            )
        self.seconds = time.monotonic() - self.saved_at

    def wait(self):
        """Until what save was given is on disk."""
        if self.writing is not None:
            self.writing.result()


def on_cpu(state):
    """A copy in the memory of the CPU of nested dicts and lists of tensors, which may change meanwhile."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {name: on_cpu(value) for name, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


def make_output_dir(path):
    """Create --output_dir. Raises InputError if nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f'--output_dir {path}: cannot write there ({error.strerror})') from None


def lock(output_dir):
    """Claim output_dir until this process ends, however it ends. The claim is not inherited by the loader's workers.

    Returns:
        The open file that holds it.

    Raises:
        InputError: if another process has it.
    """
    file = open(os.path.join(output_dir, 'lock'), 'a+')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or 'another process'
        raise InputError(f'--output_dir {output_dir} is in use by {holder}; wait for it, or choose another') from None
    except OSError as error:
        print(f'{output_dir}: this file system has no locks ({error.strerror}); see that only one run writes there')
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}\n')
    file.flush()
    return file


def load_run(path):
    """Read a checkpoint of a training run of this project. Raises InputError, as read_file does, or if it is none."""
    state = read_file(path)
    if not {'model', 'optimizer', 'scaler', 'step', 'args'} <= state.keys():
        raise InputError(f'{path}: not a checkpoint of a training run of this project')
    return state


def find(resume, output_dir):
    """The checkpoint to go on from: of --resume PATH, or the newest whole one for 'auto'; None to start anew."""
    if resume != 'auto':
        return None if resume == 'none' else load_run(resume)
    problems = []
    for name in (LAST, PREVIOUS):
        path = os.path.join(output_dir, name)
        if os.path.exists(path):
            try:
                state = load_run(path)
            except InputError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                print(f'{problem}; going on from {path} instead')
            return state
    if problems:
        raise InputError(f'{"; ".join(problems)}; to start anew, remove it or choose another --output_dir')
    return None


def check_same_run(state, args, model, num_images):
    """Refuse to resume from a checkpoint of another architecture, or with flags or data that change the training.

    Raises:
        InputError: naming a tensor that differs, or, without --force_resume, each flag with its old and new value.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state['model'].items()}
    odd = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if odd:
        name = min(odd)
        raise InputError(
            f'the checkpoint to resume is of another architecture: {len(odd)} tensors differ, such as {name} '
            f'({theirs.get(name, "absent")} there, {ours.get(name, "absent")} here); use its --model, --input_size and '
            '--fuse_layers, another --output_dir, or --resume none'
        )
    now, then = vars(args), state['args']
    changed = [
        f'--{name} {then.get(name)} -> {now[name]}'
        for name in now
        if name not in FREE_FLAGS and plain(now[name]) != then.get(name)
    ]
    if state.get('num_images', num_images) != num_images:
        changed.append(f'{state["num_images"]} -> {num_images} images in --data_path')
    if changed and not args.force_resume:
        raise InputError(
            f'this run was started differently: {", ".join(changed)}; use what it was started with, another '
            '--output_dir, or --force_resume'
        )


def restore(state, model, optimizer, scaler):
    """Give model, optimizer and scaler their states of a checkpoint; rates and decay stay those of the flags."""
    model.load_state_dict(state['model'])
    options = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(state['optimizer'])
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)
    if state['scaler']:  # empty where there was no fp16
        scaler.load_state_dict(state['scaler'])


def plain(value):
    """A flag's value as a checkpoint holds it: numbers, strings, lists."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# --- Command --------------------------------------------------------------------------------------------------


def get_parser():
    parser = ArgumentParser('Checkpoints of this project')
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('export', help='write a folder that timm loads and the Hugging Face hub takes')
    one.add_argument('checkpoint', help='of pre-training or fine-tuning')
    one.add_argument('dir', metavar='DIR', help='for model.safetensors, config.json, README.md')
    return parser


def main(args):
    from util.export import export  # which needs this module

    print(export(args.checkpoint, args.dir))


if __name__ == '__main__':
    run(main, get_parser())
