"""Save and resume a run. A checkpoint is a plain file of tensors, numbers and strings."""

import contextlib
import fcntl
import os
import platform
import time

import torch

from util import distributed, weights
from util.errors import InputError, RunError, as_input_error

LAST, PREVIOUS, BEST = 'checkpoint-last.pth', 'checkpoint-previous.pth', 'checkpoint-best.pth'

# Flags that may change when a run is resumed: they do not change what is trained. --batch_size is
# compared where the images on a device at a time matter (Run.record).
FREE_FLAGS = {
    'batch_size', 'compile', 'data_path', 'device', 'download_dir', 'eval_every', 'force_resume',
    'grad_checkpointing', 'keep_every', 'knn_every', 'log_every', 'num_workers', 'output_dir',
    'picture_every', 'report', 'resume', 'save_every', 'val_path',
}  # fmt: skip


def write(state, path):
    """torch.save; the file is complete on disk before it takes its name.

    So a kill at any moment leaves an intact checkpoint. What LAST was becomes PREVIOUS.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        cause = error.__context__  # torch.save hides a full disk behind an error of its own
        raise (cause if isinstance(cause, OSError) else error) from None
    if os.path.basename(path) == LAST and os.path.exists(path):
        os.replace(path, os.path.join(os.path.dirname(path), PREVIOUS))
    os.replace(temporary, path)


class Saver:
    """The checkpoints of a run, which rank 0 writes.

    Every --save_every minutes, for --keep_every and the best, at the end, and at a stop request.

    Args:
        scaler: of fp16, or None.
        record: what every checkpoint holds beside the states: numbers, strings and lists.
    """

    def __init__(self, args, model, optimizer, scaler, record, total_steps):
        self.args, self.model, self.optimizer, self.scaler = args, model, optimizer, scaler
        self.record, self.total_steps, self.saved_at = record, total_steps, time.monotonic()
        distributed.on_first(self.claim)

    def claim(self):
        """Create --output_dir and lock it until this process ends, however it ends."""
        folder = self.args.output_dir
        with as_input_error(f'--output_dir {folder}'):
            os.makedirs(folder, exist_ok=True)
            self.lock = open(os.path.join(folder, 'lock'), 'a+')
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            raise InputError(f'--output_dir {folder} is in use by {self.lock.read()}') from None
        except OSError as error:
            print(f'{folder}: no locks here ({error.strerror}); let only one run write there')
        self.lock.truncate(0)
        self.lock.write(f'process {os.getpid()} on {platform.node()}')
        self.lock.flush()

    # --- Save -------------------------------------------------------------------------------------

    def save(self, step, *names, best=None, required=False):
        """Write checkpoints. One that cannot be written is reported, and training continues.

        best: {name: score}, which enters the record once BEST is written.
        required: it is the last of this run; raises RunError if it cannot be written.
        """
        if not distributed.is_first():
            return
        self.saved_at = time.monotonic()
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict() if self.scaler else {},
            'step': step,
            'args': {name: plain(value) for name, value in vars(self.args).items()},
            **(self.record | (best or {})),
        }
        if not all(tensor.isfinite().all() for tensor in state['model'].values()):
            raise FloatingPointError(f'the weights are not finite after step {step}')
        try:
            for name in names:
                write(state, os.path.join(self.args.output_dir, name))
                if name == BEST:
                    self.record |= best
        except (OSError, RuntimeError) as error:
            message = f'step {step}: cannot save {name} ({error}); the last checkpoint is kept'
            if required:
                raise RunError(message) from None
            print(message, flush=True)

    def save_if_due(self, step):
        if time.monotonic() - self.saved_at >= 60 * self.args.save_every:
            self.save(step, LAST)

    def end_epoch(self, epoch, step, best=None):
        """After the evaluation of an epoch: keep the copies that are asked for.

        best: {name: score}; the checkpoint with the largest is BEST, and records it.
        """
        names = [LAST]  # last: a run that is killed before writes the others again
        if self.args.keep_every and epoch % self.args.keep_every == 0:
            names.insert(0, f'checkpoint-{epoch:04d}.pth')
        if best and all(best[name] > self.record.get(name, -1.0) for name in best):
            names.insert(0, BEST)
        else:
            best = None
        is_end = step == self.total_steps
        if names != [LAST] or is_end:
            self.save(step, *names, best=best, required=is_end)

    # --- Resume -----------------------------------------------------------------------------------

    def resume(self):
        """Restore what --resume asks for; the number of steps that it has done, 0 for a new run.

        Raises:
            InputError: if the checkpoint is of another run, or none is intact.
        """
        state, path = self.find()
        if state is None:
            return 0
        self.check_same_run(state)
        with as_input_error(path):
            self.restore(state)
        if os.path.samefile(os.path.dirname(path) or '.', self.args.output_dir):
            if os.path.exists(os.path.join(self.args.output_dir, BEST)):
                self.record |= {key: state[key] for key in state if key.startswith('best_')}
        if state['step'] > self.total_steps:
            raise InputError(f'{path}: step {state["step"]} of a run of {self.total_steps} steps')
        return state['step']

    def find(self):
        """(state, path) of --resume PATH, or of the newest intact one in --output_dir, or None."""
        if self.args.resume == 'none':
            return None, None
        if self.args.resume != 'auto':
            return load(self.args.resume), self.args.resume
        paths = [os.path.join(self.args.output_dir, name) for name in (LAST, PREVIOUS)]
        problems = []
        for path in filter(os.path.exists, paths):
            try:
                state = load(path)
                if problems:
                    print(f'{problems[0]}; resuming from {path}', flush=True)
                return state, path
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(f'{"; ".join(problems)}; --resume none starts anew')
        return None, None

    def check_same_run(self, state):
        """Raise InputError, with old and new values, where flags or data change the training."""
        now = {f'--{key}': plain(value) for key, value in vars(self.args).items()}
        then = {f'--{key}': value for key, value in state['args'].items()}
        for key in FREE_FLAGS:
            now.pop(f'--{key}', None)
        for key in ('num_images', 'classes', 'total_batch_size', 'batch_size'):
            if self.record[key] is not None:
                now[key], then[key] = self.record[key], state.get(key, self.record[key])
        changes = [
            f'{key} {then[key]} -> {now[key]}'
            for key in now
            if key in then and then[key] != now[key]
        ]
        if changes and not self.args.force_resume:
            raise InputError(
                f'{self.args.output_dir} holds a run with other settings: {", ".join(changes)}; '
                'use those it was started with, another --output_dir, or --force_resume'
            )

    def restore(self, state):
        """Load the states; rates and options of the optimiser stay those of the flags."""
        saved, groups = state['optimizer'], self.optimizer.param_groups
        try:
            self.model.load_state_dict(state['model'])
            kept = [
                new | {'params': old['params']} for new, old in zip(groups, saved['param_groups'])
            ]
            self.optimizer.load_state_dict({'state': saved['state'], 'param_groups': kept})
            for parameter, values in self.optimizer.state.items():
                if any(value.dim() and value.shape != parameter.shape for value in values.values()):
                    raise ValueError('other shapes')  # a fused kernel would write out of bounds
        except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f'model or optimiser of another run ({error!r:.200})') from None
        if self.scaler and state['scaler']:
            self.scaler.load_state_dict(state['scaler'])


def load(path):
    """A checkpoint of a training run of this project. Raises InputError if it is none."""
    state = weights.read_file(path)
    if not {'model', 'optimizer', 'scaler', 'step', 'args'} <= state.keys():
        raise InputError(f'{path}: not a checkpoint of a training run of this project')
    return state


def plain(value):
    """A value as a checkpoint holds it: numbers, strings, lists."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
