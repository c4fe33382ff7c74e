"""What a run reports, on rank 0: a progress bar or lines, log.jsonl, TensorBoard."""

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

from util import distributed
from util.errors import as_input_error

MAX_SKIPPED = 20  # in a row; fp16 may need 16 to bring its loss scale down from 65536 to 1


class Log:
    """The numbers of the steps, and any others. They stay on the device until they are written.

    output_dir/log.jsonl: a first line with command, versions and flags, then a line per entry. A
    resumed run drops the entries after the step it resumes from, here and in TensorBoard.
    """

    def __init__(self, run):
        self.run, self.args, start = run, run.args, run.step
        self.failed, self.skipped = False, 0
        self.enabled = distributed.is_first()
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, for one process

        path = os.path.join(self.args.output_dir, 'log.jsonl')
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
        versions['python'] = platform.python_version()
        header = {'command': shlex.join(sys.argv), **versions, 'args': vars(self.args)}
        with as_input_error(path):
            lines = [json.dumps(header), *map(json.dumps, entries_before(path, start))]
            with open(f'{path}.tmp', 'w') as file:
                file.writelines(f'{line}\n' for line in lines)
            os.replace(f'{path}.tmp', path)
            self.file = open(path, 'a')
        self.board = SummaryWriter(self.args.output_dir, purge_step=start + 1 if start else 0)
        self.board.add_text('run', json.dumps(header), start)
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=run.schedule.total_steps,
            initial=start,
            unit='step',
            dynamic_ncols=True,
            file=sys.stderr if self.on_terminal else open(os.devnull, 'w'),
        )

    def say(self, text):
        """Print a line."""
        if self.enabled:
            tqdm.write(text)
            sys.stdout.flush()

    # --- Steps ------------------------------------------------------------------------------------

    def begin(self):
        """Steps follow: what came before them, such as an evaluation, is not their time."""
        self.losses, self.norms, self.began = [], [], time.perf_counter()

    def step(self, loss, norm, loader):
        """A step is done; loss and norm are on the device. Every --log_every steps, an entry.

        Raises:
            FloatingPointError: after MAX_SKIPPED updates in a row that were not finite.
            RunError: if too many images cannot be read.
        """
        self.losses.append(loss)
        self.norms.append(norm)
        if self.enabled:
            self.bar.update()
        run, schedule, done = self.run, self.run.schedule, self.run.step
        if done % self.args.log_every and done % schedule.steps_per_epoch:
            if done != schedule.total_steps:
                return
        sums = torch.stack([*self.losses, torch.full_like(loss, loader.num_bad)]).float()
        *losses, bad = distributed.sum_over_processes(sums).tolist()  # waits for the device
        norms = torch.stack(self.norms).tolist()
        seconds, on_gpu = time.perf_counter() - self.began, run.device.type == 'cuda'
        waited = sum(a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in loader.waits)
        world_size = distributed.world()[1]
        used = [loss / world_size for loss, norm in zip(losses, norms) if math.isfinite(norm)]
        values = {
            'loss': sum(used) / len(used) if used else math.nan,
            'lr': max(group['lr'] for group in run.optimizer.param_groups),
            'grad_norm': norms[-1],
            'images_per_s': len(losses) * schedule.total_batch_size / seconds,
            'data_wait': waited / seconds,
            **({'loss_scale': run.scaler.get_scale()} if run.fp16_scaler else {}),
            **({'bad_images': int(bad)} if bad else {}),
            **({'skipped': len(losses) - len(used)} if len(used) < len(losses) else {}),
        }
        self.entry(done, values)
        loader.check_bad(int(bad))
        self.check_skipped(norms)
        loader.waits.clear()
        self.begin()

    def check_skipped(self, norms):
        """Count the latest updates in a row that were skipped."""
        for norm in norms:
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped == MAX_SKIPPED:
                raise FloatingPointError(
                    f'{MAX_SKIPPED} updates in a row, near step {self.run.step}, were skipped: '
                    'loss or gradient was not finite; try --force_resume with --amp bf16 or none, '
                    'a lower --blr, or --clip_grad 1'
                )

    # --- Entries ----------------------------------------------------------------------------------

    def entry(self, step, values):
        """Write {name: number} of the moment after `step` steps."""
        if not self.enabled or not values:
            return
        epoch = step / self.run.schedule.steps_per_epoch
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.tolerate_full_disk():
            line = {'step': step, 'epoch': round(epoch, 4), **finite}
            self.file.write(json.dumps(line) + '\n')
            self.file.flush()
        with self.tolerate_full_disk():
            for name, value in values.items():
                self.board.add_scalar(tensorboard_tag(name), value, step)
        shown = {name: f'{value:.4g}' for name, value in values.items() if '/' not in name}
        if self.on_terminal and 'loss' in values:
            self.bar.set_postfix({name: shown[name] for name in ('loss', 'images_per_s')})
        elif shown:
            progress = self.bar.format_dict
            words = [f'epoch {epoch:.2f}  step {step}/{progress["total"]}']
            words += [f'{name} {value}' for name, value in shown.items()]
            if progress['rate']:
                left = (progress['total'] - progress['n']) / progress['rate']
                words.append(f'ETA {tqdm.format_interval(left)}')
            self.say('  '.join(words))

    def figure(self, name, figure, step):
        """A matplotlib figure, to output_dir/NAME.png and to TensorBoard."""
        if self.enabled:
            with self.tolerate_full_disk():
                figure.savefig(os.path.join(self.args.output_dir, f'{name}.png'))
                self.board.add_figure(name, figure, step)

    @contextlib.contextmanager
    def tolerate_full_disk(self):
        """A log that cannot be written is reported once and does not stop the run."""
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


def entries_before(path, start):
    """The entries of log.jsonl to keep: an epoch that ends at step `start` is evaluated again."""
    entries = []
    if start and os.path.exists(path):
        with open(path, errors='replace') as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # a kill cut it off
                    entries.append(json.loads(line))
    return [
        entry
        for entry in entries
        if 0 <= entry.get('step', -1) < start or (entry.get('step') == start and 'loss' in entry)
    ]
