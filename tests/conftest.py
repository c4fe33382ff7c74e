import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import main_finetune
import main_linprobe
import main_pretrain
from util.args import run_job
from util.log import Log
from util.shapes import Shapes
from util.weights import convert_state_dict

torch.set_num_threads(1)  # what is run here is too small to share out

ROOT = Path(__file__).parent.parent

# A run of seconds: 64 images of 16 x 16 pixels, three epochs of four steps.
SMALL_RUN = (
    '--model vit_nano_patch4 --input_size 16 --total_batch_size 16 --epochs 3 --warmup_epochs 1 '
    '--lr 1e-3 --num_workers 0 --log_every 1 --device cpu'
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
    """small_run(name, *flags) -> the arguments of a small run into tmp_path / name."""

    def arguments(name, *flags):
        output_dir = tmp_path / name
        places = ['--data_path', folder, '--output_dir', output_dir]
        return [str(word) for word in [*places, *SMALL_RUN, *flags]]

    return arguments


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


def runner(job, small_run, tmp_path, *defaults):
    def start(name, *flags):
        run_job(job.main, job.get_parser(), small_run(name, *defaults, *flags))
        return Result(tmp_path / name)

    return start


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): action() once, when a run in this process has done n steps."""

    def install(step, action):
        log_step, acted = Log.step, []

        def log_and_act(log, done, *arguments):
            log_step(log, done, *arguments)
            if done == step and not acted:
                acted.append(True)
                action()

        monkeypatch.setattr(Log, 'step', log_and_act)

    return install


@pytest.fixture
def stop_at(at_step):
    """stop_at(n, start, *arguments): start a run, which SIGTERM stops after step n."""

    def stopped(step, start, *arguments):
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            start(*arguments)
        assert stop.value.code == 75

    return stopped


class Result:
    """What a run left in its output directory."""

    def __init__(self, output_dir):
        self.output_dir = output_dir
        self.last = output_dir / 'checkpoint-last.pth'

    @property
    def entries(self):
        lines = (self.output_dir / 'log.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines[1:]]

    @property
    def losses(self):
        return {entry['step']: entry['loss'] for entry in self.entries if 'loss' in entry}

    @property
    def checkpoint(self):
        return torch.load(self.last, weights_only=True)


def same_weights(a, b):
    """Whether the last checkpoints of two Results have the same bits."""
    states = [result.checkpoint['model'] for result in (a, b)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def close_weights(a, b):
    states = [result.checkpoint['model'] for result in (a, b)]
    return all(
        torch.allclose(tensor, states[1][name], atol=2e-5)
        for name, tensor in states[0].items()
        if not name.endswith('qkv.bias')  # the key's third has no gradient but rounding
    )


def our_names(values, state):
    """{name of a parameter in state: any value} with this project's names."""
    names = list(state)
    marks = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    origins = {new: names[int(mark[0])] for new, mark in convert_state_dict(marks).items()}
    return {new: values[name] for new, name in origins.items() if name in values}


def command(*arguments, torchrun=0, timeout=300, **environment):
    """Run a script as a user does, one process or under torchrun; CompletedProcess with text."""
    process = start(*arguments, torchrun=torchrun, stderr=subprocess.PIPE, **environment)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(*arguments, torchrun=0, stderr=None, **environment):
    """As command, but it returns the running process."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}']
    return subprocess.Popen(
        [sys.executable, *(launcher if torchrun else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
