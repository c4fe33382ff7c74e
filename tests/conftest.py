import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import main_finetune
import main_linprobe
import main_pretrain
from util import checkpoint
from util.args import run_job
from util.shapes import Shapes

torch.set_num_threads(1)  # what is run here is too small to share out

ROOT = Path(__file__).parent.parent

# A run of seconds: 64 images of 16 x 16 pixels, three epochs of four steps.
SMALL_RUN = (
    '--model vit_nano_patch4 --input_size 16 --total_batch_size 16 --epochs 3 --warmup_epochs 1 --lr 1e-3 '
    '--num_workers 0 --log_every 1 --device cpu'
).split()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """An image folder on disk: 64 drawn PNGs of 20 x 18 pixels in train/, 20 in val/."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 64), ('val', 20)):
        shapes = Shapes(split, (20, 18))
        for index in range(count):
            image, label = shapes[index]
            path = root / split / shapes.classes[label] / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    return root


@pytest.fixture
def small_run(folder, tmp_path):
    """small_run(name, *flags) -> the arguments of a small run of main_pretrain into tmp_path / name."""
    return lambda name, *flags: ['--data_path', str(folder), *SMALL_RUN, '--output_dir', str(tmp_path / name), *flags]


@pytest.fixture
def pretrain(small_run, tmp_path):
    """pretrain(name, *flags) -> Result of a small run of main_pretrain in this process."""
    return runner(main_pretrain, small_run, tmp_path)


@pytest.fixture
def finetune(small_run, tmp_path):
    """finetune(name, *flags) -> Result of a small run of main_finetune in this process."""
    return runner(main_finetune, small_run, tmp_path)


@pytest.fixture
def linprobe(small_run, tmp_path):
    """linprobe(name, *flags) -> Result of a small run of main_linprobe in this process."""
    return runner(main_linprobe, small_run, tmp_path, '--lr', '0.5')


@pytest.fixture
def kill_after_saving(monkeypatch):
    """kill_after_saving(start, ...): start(...), ended right after it has written its first checkpoint."""

    class Killed(Exception):
        pass

    save = checkpoint.save

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    def run_until_saved(start, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, 'save', save_and_die)
            with pytest.raises(Killed):
                start(*arguments)

    return run_until_saved


def runner(job, small_run, tmp_path, *defaults):
    def start(name, *flags):
        run_job(job.main, job.get_parser(), small_run(name, *defaults, *flags))
        return Result(tmp_path / name)

    return start


class Result:
    """What a run left in its output directory."""

    def __init__(self, output_dir):
        self.output_dir = output_dir

    @property
    def entries(self):
        return [json.loads(line) for line in (self.output_dir / 'log.jsonl').read_text().splitlines()[1:]]

    @property
    def losses(self):
        return {entry['step']: entry['loss'] for entry in self.entries if 'loss' in entry}

    @property
    def checkpoint(self):
        return torch.load(self.output_dir / 'checkpoint-last.pth', weights_only=True)


def command(*arguments, torchrun=0, timeout=300, **environment):
    """Run a script as a user does, one process or under torchrun; CompletedProcess with text."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}'] if torchrun else []
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
