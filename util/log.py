"""What a run reports: a progress bar (plain lines where there is no terminal), log.jsonl, TensorBoard."""

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

from util import data, distributed


class Log:
    """The log of a run, on the process of rank 0; elsewhere every call does nothing.

    output_dir/log.jsonl: a first line with command, versions and flags, then one line per entry. A resumed run drops
    the entries after the step it resumes from, here and in TensorBoard.

    Args:
        run: engine.Run.
    """

    def __init__(self, run):
        self.enabled, self.total_steps, self.start_step = run.rank == 0, run.schedule.total_steps, run.start
        self.output_dir, self.steps_done, self.failed = run.args.output_dir, run.start, False
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and one process needs it

        path = os.path.join(self.output_dir, 'log.jsonl')
        kept = [entry for entry in read(path) if is_before(entry, run.start)]
        header = {
            'command': shlex.join(sys.argv),
            'python': platform.python_version(),
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'timm': timm.__version__,
            'args': vars(run.args),
        }
        with open(path + '.tmp', 'w') as file:
            file.writelines(json.dumps(line) + '\n' for line in [header, *kept])
        os.replace(path + '.tmp', path)
        self.file = open(path, 'a')
        self.board = SummaryWriter(self.output_dir, purge_step=run.start + 1 if run.start else 0)
        self.board.add_text('run', '\n\n'.join(f'**{key}** {value}' for key, value in header.items()), run.start)
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=self.total_steps, initial=run.start, unit='step', dynamic_ncols=True, disable=hidden)

    def say(self, text):
        """Print a line for the person watching."""
        if self.enabled:
            tqdm.write(text)
            sys.stdout.flush()

    def advance(self):
        """One optimiser step is done."""
        self.steps_done += 1
        if self.steps_done == self.start_step + 1:  # it took longer: workers were started, and --compile
            self.began = time.time()
        if not self.enabled:
            return
        self.bar.update()
        if self.bar.disable and self.steps_done == self.start_step + 5 < self.total_steps:
            self.say(f'about {self.eta()} left, estimated from 5 steps')

    def eta(self):
        """The time that is left, as text, at the pace of this run after its first step."""
        timed_steps = self.steps_done - self.start_step - 1
        if timed_steps < 1:
            return '?'
        pace = (time.time() - self.began) / timed_steps
        return tqdm.format_interval(pace * (self.total_steps - self.steps_done))

    def entry(self, step, epoch, values):
        """Write values {name: number} of the moment after `step` optimiser steps, which lies in `epoch` (a float)."""
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.tolerate_full_disk():
            self.file.write(json.dumps({'step': step, 'epoch': round(epoch, 4), **finite}) + '\n')
            self.file.flush()
        with self.tolerate_full_disk():
            for name, value in values.items():
                self.board.add_scalar(tensorboard_tag(name), value, step)
        shown = {name: f'{value:.4g}' for name, value in values.items() if '/' not in name}
        if self.bar.disable:
            numbers = '  '.join(f'{name} {value}' for name, value in shown.items())
            self.say(f'epoch {epoch:.2f}  step {step}/{self.total_steps}  {numbers}  ETA {self.eta()}')
        else:
            self.bar.set_description(f'epoch {epoch:.2f}', refresh=False)
            self.bar.set_postfix(
                {name: value for name, value in shown.items() if name in ('loss', 'images_per_s') or 'val' in name}
            )

    def figure(self, name, figure, step):
        """A matplotlib figure, to output_dir/NAME.png and to TensorBoard."""
        if self.enabled:
            with self.tolerate_full_disk():
                figure.savefig(os.path.join(self.output_dir, f'{name}.png'))
                self.board.add_figure(name, figure, step)

    @contextlib.contextmanager
    def tolerate_full_disk(self):
        """A log that cannot be written, as on a full disk, is reported once and does not stop the run."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.say(f'cannot write the log ({error.strerror}); training continues')
            self.failed = True

    def close(self):
        if self.enabled:
            self.bar.close()
            for file in (self.board, self.file):
                with self.tolerate_full_disk():
                    file.close()


def tensorboard_tag(name):
    """'loss' -> 'train/loss', 'val_loss' -> 'val/loss', 'fusion/layer_00' as it is."""
    if '/' in name:
        return name
    return name.replace('_', '/', 1) if name.startswith('val_') else f'train/{name}'


def is_before(entry, step):
    """Whether a log entry holds for a run that resumes from `step`; an epoch that ends there is evaluated again."""
    return 0 <= entry.get('step', -1) < step or (entry.get('step') == step and 'loss' in entry)


def read(path):
    """The entries of a log.jsonl, as dicts; lines that a kill cut off are left out, and a missing file is empty."""
    entries = []
    if os.path.exists(path):
        with open(path, errors='replace') as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


# --- The numbers of the steps ---

MAX_SKIPPED = 20  # updates in a row; fp16 may need 16 to bring its loss scale down from 65536 to 1


class Meter:
    """Losses and gradient norms since the last log line. They stay on the device until then.

    Args:
        loader: its bad.count is reported and checked.
        say: prints a line.
    """

    def __init__(self, run, loader, say):
        self.run, self.loader, self.say = run, loader, say
        self.skipped = []  # the latest steps in a row without an update
        self.warm, self.warned = False, False
        self.reset()

    def reset(self):
        self.losses, self.norms, self.waits, self.began = [], [], [], None

    def now(self):
        """The time; on a GPU, which may be busy while its process waits, an event that it reaches in its turn."""
        if self.run.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, batches):
        """Yield the batches; how long each took to arrive is counted."""
        batches = iter(batches)
        while True:
            if self.began is None:  # what came between the steps, such as an evaluation, is not their time
                self.began = time.perf_counter()
            asked = self.now()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits.append((asked, self.now()))
            yield batch

    def update(self, loss, norm):
        self.losses.append(loss)
        self.norms.append(norm)

    def flush(self, done, lr):
        """{name: number} of the steps since the last call, where `done` steps are done. Waits for the device."""
        bad, first = self.loader.bad, done - len(self.losses)
        sums = torch.stack([*self.losses, torch.full_like(self.losses[0], bad.count)]).float()
        *losses, bad_images = distributed.sum_over_processes(sums).tolist()
        bad.check(int(bad_images))
        norms = torch.stack(self.norms).tolist()
        seconds, on_gpu = time.perf_counter() - self.began, self.run.device.type == 'cuda'
        waited = sum(asked.elapsed_time(came) / 1000 if on_gpu else came - asked for asked, came in self.waits)
        finite = [loss / self.run.world_size for loss, norm in zip(losses, norms) if math.isfinite(norm)]
        values = {
            'loss': sum(finite) / len(finite) if finite else math.nan,
            'lr': lr,
            'grad_norm': norms[-1],
            'images_per_s': len(losses) * self.run.schedule.total_batch_size / seconds,
            'data_wait': waited / seconds,
        }
        if self.run.scaler.state_dict():
            values['loss_scale'] = self.run.scaler.get_scale()
        if bad_images:
            values['bad_images'] = int(bad_images)
        if len(finite) < len(losses):
            values['skipped'] = len(losses) - len(finite)
        self.check_skipped([first + i for i, norm in enumerate(norms) if not math.isfinite(norm)])
        if values['data_wait'] > 0.2 and self.warm and not self.warned:
            self.say(
                f'The device waits for data {values["data_wait"]:.0%} of the time; see "Slow data" in docs/data.md'
            )
            self.warned = True
        self.warm = True  # the first interval includes the start of the workers
        self.reset()
        return values

    def check_skipped(self, steps):
        """Count the latest steps in a row without an update; FloatingPointError if they are MAX_SKIPPED."""
        for step in steps:
            self.skipped = [*self.skipped, step] if self.skipped[-1:] == [step - 1] else [step]
        if len(self.skipped) < MAX_SKIPPED:
            return
        first, schedule = self.skipped[0], self.run.schedule
        total, seed = schedule.total_batch_size, self.run.args.seed
        (keys,) = data.BatchStream(schedule.num_images, total, total, seed, first, first + 1)
        images = [self.loader.batches.dataset.source.path(index) for _, index in keys[:4]]
        raise FloatingPointError(
            f'{len(self.skipped)} updates in a row, steps {first + 1} to {self.skipped[-1] + 1}, were skipped because '
            f'the loss or its gradient was not finite (loss scale {self.run.scaler.get_scale():g}); the weights are '
            f'still those of step {first}. Step {first + 1} began with {", ".join(images)}. Try --force_resume with '
            '--amp bf16 or none, a lower --blr, or --clip_grad 1'
        )
