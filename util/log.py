"""What a run tells: a progress bar (plain lines where there is no terminal), log.jsonl, TensorBoard."""

import contextlib
import json
import math
import os
import platform
import shlex
import sys
import time

import timm
import torch
import torchvision
from tqdm import tqdm


class Log:
    """The log of a run, on the process of rank 0; elsewhere every call does nothing.

    output_dir/log.jsonl: a first line with command, versions and flags, then one line an entry. A resumed run drops
    the entries after the step it goes on from, here and in TensorBoard.

    Args:
        total_steps, start_step: of the whole run, and where this one starts.
        enabled: whether this process writes.
    """

    def __init__(self, output_dir, total_steps, start_step, args, enabled=True):
        self.enabled, self.total_steps, self.start_step = enabled, total_steps, start_step
        self.began, self.failed = time.time(), False
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, needed on one process only

        path = os.path.join(output_dir, 'log.jsonl')
        kept = [entry for entry in read(path) if start_step and is_before(entry, start_step)]
        header = {
            'command': shlex.join(sys.argv),
            'python': platform.python_version(),
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'timm': timm.__version__,
            'args': vars(args),
        }
        with open(path + '.tmp', 'w') as file:
            file.writelines(json.dumps(line) + '\n' for line in [header, *kept])
        os.replace(path + '.tmp', path)
        self.file = open(path, 'a')
        self.board = SummaryWriter(output_dir, purge_step=start_step + 1 if start_step else 0)
        self.board.add_text('run', '\n\n'.join(f'**{key}** {value}' for key, value in header.items()), start_step)
        self.bar = tqdm(
            total=total_steps, initial=start_step, unit='step', dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, text):
        """A line for the person watching."""
        if self.enabled:
            tqdm.write(text)
            sys.stdout.flush()

    def advance(self):
        """One optimiser step is done."""
        if self.enabled:
            self.bar.update()

    def entry(self, step, epoch, values):
        """Write values {name: number} of the moment after `step` optimiser steps, which lies in `epoch` (a float)."""
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.going_on():
            self.file.write(json.dumps({'step': step, 'epoch': round(epoch, 4), **finite}) + '\n')
            self.file.flush()
        with self.going_on():
            for name, value in values.items():
                tag = name if '/' in name else name.replace('_', '/', 1) if name.startswith('val_') else f'train/{name}'
                self.board.add_scalar(tag, value, step)
        shown = {name: f'{value:.4g}' for name, value in values.items() if '/' not in name}
        if self.bar.disable:
            rate = (time.time() - self.began) / max(1, step - self.start_step)
            self.say(
                f'epoch {epoch:.2f}  step {step}/{self.total_steps}  {"  ".join(map(" ".join, shown.items()))}  '
                f'ETA {tqdm.format_interval(rate * (self.total_steps - step))}'
            )
        else:
            self.bar.set_description(f'epoch {epoch:.2f}', refresh=False)
            self.bar.set_postfix({name: shown[name] for name in ('loss', 'val_loss', 'images_per_s') if name in shown})

    def figure(self, name, figure, step):
        """A matplotlib figure, to TensorBoard."""
        if self.enabled:
            with self.going_on():
                self.board.add_figure(name, figure, step)

    @contextlib.contextmanager
    def going_on(self):
        """A log that cannot be written, as on a full disk, is said once and is no reason to stop."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.say(f'cannot write the log ({error.strerror}); training goes on')
            self.failed = True

    def close(self):
        if self.enabled:
            self.bar.close()
            for file in (self.board, self.file):
                with self.going_on():
                    file.close()


def is_before(entry, step):
    """Whether a log entry holds for a run that goes on from `step`; an epoch that ends there is measured again."""
    return 0 < entry.get('step', 0) < step or (entry.get('step') == step and 'loss' in entry)


def read(path):
    """The entries of a log.jsonl, as dicts; what a kill cut off is left out, and a missing file is empty."""
    entries = []
    if os.path.exists(path):
        with open(path, errors='replace') as file:
            for line in file:
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError:
                    pass
    return [entry for entry in entries if isinstance(entry, dict)]
