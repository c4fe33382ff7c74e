"""Save and resume a run. Checkpoints are plain files of tensors, numbers and strings, complete or not there at all."""

import contextlib
import fcntl
import os
import platform
import tempfile
import time

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from util.errors import InputError, RunError, as_input_error
from util.formats import read_file
from util.recognise import check_tensors

LAST, PREVIOUS, BEST = 'checkpoint-last.pth', 'checkpoint-previous.pth', 'checkpoint-best.pth'

# Flags that may change when a run is resumed: they do not change what is trained.
FREE_FLAGS = {
    'batch_size', 'compile', 'data_path', 'device', 'download_dir', 'eval_every', 'force_resume', 'grad_checkpointing',
    'keep_every', 'knn_every', 'log_every', 'max_bad', 'num_workers', 'output_dir', 'picture_every', 'resume',
    'save_every', 'val_path',
}  # fmt: skip

# --- Save ---------------------------------------------------------------------------------------------------------


def save(state, output_dir, name=LAST):
    """Write state to output_dir/name; a checkpoint-last.pth that was there becomes checkpoint-previous.pth.

    The file is complete on disk before it takes the name, so a kill at any moment leaves an intact checkpoint.
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
    """Saves a run on rank 0: when --save_every is due, copies for --keep_every, the best, and the end.

    When nothing can be written, as on a full disk, it says so, training continues, and it tries again every minute.

    Args:
        run: engine.Run; its record goes into every checkpoint.
        say: prints a line.
    """

    def __init__(self, run, model, optimizer, say):
        self.run, self.model, self.optimizer, self.say = run, model, optimizer, say
        self.saved_at, self.failed = time.monotonic(), False

    def due(self, step):
        """Whether to save after this many steps."""
        if step == self.run.schedule.total_steps or self.keeps(step):
            return True
        seconds = time.monotonic() - self.saved_at
        if self.failed:
            return seconds >= 60
        every, unit = self.run.args.save_every
        if unit == 'min':
            return seconds >= 60 * every
        return step % (every * self.run.schedule.steps_per_epoch if unit == 'ep' else every) == 0

    def keeps(self, step):
        """Whether --keep_every asks for a copy."""
        epochs, rest = divmod(step, self.run.schedule.steps_per_epoch)
        return bool(self.run.args.keep_every) and rest == 0 and epochs % self.run.args.keep_every == 0

    def save(self, step, best=None, required=False):
        """Write the copies that are kept, then checkpoint-last.pth: killed in between, a resumed run writes them again.

        best: {name: number}, for checkpoint-best.pth and, once that is written, the record.
        required: the last save of a run; RunError if it fails.
        """
        if self.run.rank != 0:
            return
        run, self.saved_at = self.run, time.monotonic()
        epoch = step // run.schedule.steps_per_epoch
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': run.scaler.state_dict(),
            'step': step,
            'epoch': epoch,
            **(run.record | (best or {})),
            'args': {name: plain(value) for name, value in vars(run.args).items()},
        }
        if not all(tensor.isfinite().all() for tensor in state['model'].values()):
            raise FloatingPointError(f'the weights are not finite after step {step}')
        names = [LAST]
        if best:
            names.insert(0, BEST)
        if self.keeps(step):
            names.insert(0, f'checkpoint-{epoch:04d}.pth')
        try:
            for name in names:
                save(state, run.args.output_dir, name)
                if name == BEST:
                    run.record |= best
            self.failed = False
        except (OSError, RuntimeError) as error:
            self.failed, reason = True, getattr(error, 'strerror', error)
            message = f'step {step}: cannot save in {run.args.output_dir} ({reason}); the last checkpoint is kept'
            if required:
                raise RunError(f'{message}; free some space, and the same command resumes from it') from None
            self.say(message)


def plain(value):
    """A value as a checkpoint holds it: numbers, strings, lists."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# --- The folder of a run ------------------------------------------------------------------------------------------


def make_output_dir(path):
    """Create --output_dir. Raises InputError if nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f'--output_dir {path}: cannot write there ({error.strerror})') from None


def lock(output_dir):
    """Claim output_dir until this process ends, however it ends. The loader's workers do not inherit the claim.

    Returns:
        The open file that holds it.

    Raises:
        InputError: if another process has it.
    """
    with as_input_error():
        file = open(os.path.join(output_dir, 'lock'), 'a+')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or 'another process'
        raise InputError(f'--output_dir {output_dir} is in use by {holder}; wait for it, or choose another') from None
    except OSError as error:
        print(f'{output_dir}: this file system has no locks ({error.strerror}); make sure that one run writes there')
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}\n')
    file.flush()
    return file


# --- Resume -------------------------------------------------------------------------------------------------------


def load_run(path):
    """Read a checkpoint of a training run of this project. Raises InputError, as read_file does, or if it is none."""
    state = read_file(path)
    kinds = {'model': dict, 'optimizer': dict, 'scaler': dict, 'step': int, 'args': dict}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()) or state['step'] < 0:
        raise InputError(f'{path}: not a checkpoint of a training run of this project')
    with as_input_error(path):
        check_tensors(state['model'])
    return state


def find(resume, output_dir):
    """The checkpoint to resume: --resume PATH, or the newest intact one for 'auto'; None to start anew."""
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
                print(f'{problem}; resuming from {path} instead')
            return state
    if problems:
        raise InputError(f'{"; ".join(problems)}; to start again, remove it or choose another --output_dir')
    return None


def check_same_run(state, args, model, record):
    """Refuse to resume from a checkpoint of another architecture, or with flags or data that change the training.

    Args:
        record: 'num_images', 'batch_size' (images on a device at a time) and 'classes' of this run.

    Raises:
        InputError: naming a tensor that differs, or, without --force_resume, each change with its old and new value.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state['model'].items()}
    odd = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if odd:
        name = min(odd)
        raise InputError(
            f'the checkpoint to resume has another architecture: {len(odd)} tensors differ, such as {name} '
            f'({theirs.get(name, "absent")} there, {ours.get(name, "absent")} here); use its --model, --input_size and '
            '--fuse_layers, another --output_dir, or --resume none'
        )
    now, then = vars(args), state['args']
    changes = [
        f'--{name} {then[name]} -> {now[name]}'
        for name in now
        if name not in FREE_FLAGS and name in then and plain(now[name]) != then[name]
    ]
    numbers = {'num_images': 'images in --data_path'}
    if any(isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm) for module in model.modules()):
        numbers['batch_size'] = 'images on a device at a time (--batch_size), which BatchNorm averages over'
    for name, meaning in numbers.items():
        if state.get(name, record[name]) != record[name]:
            changes.append(f'{state[name]} -> {record[name]} {meaning}')
    if state.get('classes') != record.get('classes'):
        changes.append('other classes, or another order of them')
    if changes and not args.force_resume:
        raise InputError(
            f'this run was started with other settings: {", ".join(changes)}; use those it was started with, another '
            '--output_dir, or --force_resume'
        )


def restore(state, model, optimizer, scaler):
    """Give model, optimizer and scaler their states of a checkpoint; rates and options stay those of the flags."""
    model.load_state_dict(state['model'])
    saved = state['optimizer']
    try:
        # The options decide where AdamW keeps its step, which fused kernels want on the device.
        groups = [new | {'params': old['params']} for new, old in zip(optimizer.param_groups, saved['param_groups'])]
        optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
        for parameter, kept in optimizer.state.items():
            if any(number.dim() and number.shape != parameter.shape for number in kept.values()):
                raise ValueError  # a fused kernel would write beyond its end
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError('the checkpoint has the optimiser of another run; --resume none starts anew') from None
    if state['scaler']:  # empty where there was no fp16
        scaler.load_state_dict(state['scaler'])
