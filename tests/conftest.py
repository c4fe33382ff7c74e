import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util.args import run_job
from util.log import Log
from util.shapes import Shapes
from util.weights import convert_state_dict

torch.set_num_threads(1)  # what is run here is too small to share out

ROOT = Path(__file__).parent.parent
MAINS = main_pretrain, main_finetune, main_linprobe, main_segment
JOBS = {main.__name__.removeprefix('main_'): main for main in MAINS}

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
            v2.functional.to_pil_image(image).save(path)
    return root


@pytest.fixture
def small_run(folder, tmp_path, monkeypatch):
    """small_run(name, *flags) -> the arguments of a small run into tmp_path / name.

    It draws no picture, which would take as long as all of its training.
    """
    monkeypatch.setattr(Log, 'figure', lambda *_: None)
    monkeypatch.setattr('util.visualize.reconstruction_figure', lambda *_: None)

    def arguments(name, *flags):
        output_dir = tmp_path / name
        places = ['--data_path', folder, '--output_dir', output_dir]
        return [str(word) for word in [*places, *SMALL_RUN, *flags]]

    return arguments


@pytest.fixture(scope='session')
def whole(folder, tmp_path_factory):
    """Result of a small run of main_pretrain that nothing interrupts."""
    output_dir = tmp_path_factory.mktemp('whole')
    flags = ['--data_path', str(folder), *SMALL_RUN, '--output_dir', str(output_dir)]
    run_job(main_pretrain.main, main_pretrain.get_parser(), flags)
    return Result(output_dir)


def job_fixture(job, *defaults):
    """A fixture: start(name, *flags) -> Result of a small run of a job in this process."""

    @pytest.fixture
    def fixture(small_run, tmp_path):
        def start(name, *flags):
            run_job(job.main, job.get_parser(), small_run(name, *defaults, *flags))
            return Result(tmp_path / name)

        return start

    return fixture


pretrain = job_fixture(main_pretrain)
finetune = job_fixture(main_finetune)
linprobe = job_fixture(main_linprobe, '--lr', '0.5')


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): action() once, when a run in this process has done n steps."""

    def install(step, action):
        log_step, acted = Log.step, []

        def log_and_act(log, *arguments):
            log_step(log, *arguments)
            if log.run.step == step and not acted:
                acted.append(True)
                action()

        monkeypatch.setattr(Log, 'step', log_and_act)

    return install


@pytest.fixture
def stop_at(at_step):
    """stop_at(n, start, *arguments): start a run, which a signal stops after step n."""

    def stopped(step, start, *arguments, number=signal.SIGTERM):
        at_step(step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            start(*arguments)
        assert stop.value.code == 75

    return stopped


@pytest.fixture
def error_of(capsys):
    """error_of(start, *arguments, code=2): the one line with which a run ends that fails."""

    def failed(start, *arguments, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            start(*arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == code, error
        assert re.fullmatch(r'(unreadable: .*\n)*\S+: error: .+\n', error), error
        return error.splitlines()[-1]

    return failed


class Result:
    """What a run left in its output directory."""

    def __init__(self, output_dir):
        self.output_dir = output_dir
        self.last = output_dir / 'checkpoint-last.pth'

    @property
    def entries(self):
        lines = (self.output_dir / 'log.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines[1:]]

    def values(self, name):
        """{step: value} of the log's entries that have it."""
        return {entry['step']: entry[name] for entry in self.entries if name in entry}

    @property
    def losses(self):
        return self.values('loss')

    @property
    def checkpoint(self):
        return torch.load(self.last, weights_only=True)


def same_weights(a, b, atol=0.0):
    """Whether the last checkpoints of two Results have the same bits, or nearly so."""
    states = [result.checkpoint['model'] for result in (a, b)]
    return all(
        torch.allclose(tensor, states[1][name], rtol=0.0, atol=atol)
        for name, tensor in states[0].items()
        if not (atol and name.endswith('qkv.bias'))  # the key's has no gradient but rounding
    )


def read_val(folder, side, interpolation):
    """(paths, images (20, 3, 16, 16), labels) of val/ by PIL and torchvision, resized to a side."""
    paths = sorted((folder / 'val').rglob('*.png'))
    names = [path.parent.name for path in paths]
    transform = v2.Compose([
        v2.PILToTensor(),
        v2.Resize(side, interpolation, antialias=True),
        v2.CenterCrop(16),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.3, 0.4, 0.5), (0.2, 0.25, 0.35)),
    ])  # fmt: skip
    images = torch.stack([transform(Image.open(path)) for path in paths])
    return paths, images, torch.tensor([sorted(set(names)).index(name) for name in names])


def our_names(values, state):
    """{name of a parameter in state: any value} with this project's names."""
    names = list(state)
    marks = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    origins = {new: names[int(mark[0])] for new, mark in convert_state_dict(marks).items()}
    return {new: values[name] for new, name in origins.items() if name in values}


class Processes:
    """A job in forks of this process, which has everything imported: a start takes no time.

    Args:
        job: a module with main and get_parser.
        arguments: of each process, a list per rank.
        before: called with the rank in each process, to patch what it likes.
    """

    def __init__(self, job, *arguments, before=None):
        count, fork = len(arguments), multiprocessing.get_context('fork')
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            port = str(sock.getsockname()[1])
        meet = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': str(count)}
        self.environment = meet if count > 1 else {}
        self.files = [tempfile.TemporaryFile('w+') for _ in range(2 * count)]
        self.jobs = []
        for rank, flags in enumerate(arguments):
            self.jobs.append(fork.Process(target=self.run, args=(job, flags, rank, before)))
            self.jobs[-1].start()

    def run(self, job, flags, rank, before):
        os.setpgid(0, 0)
        for number, file in enumerate(self.files[2 * rank : 2 * rank + 2], 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, 'w') for number in (1, 2))
        if self.environment:
            os.environ.update(self.environment, RANK=str(rank), LOCAL_RANK=str(rank))
        if before:
            before(rank)
        run_job(job.main, job.get_parser(), flags)

    def send(self, signal_number, *ranks):
        for rank in ranks or range(len(self.jobs)):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(self.jobs[rank].pid, signal_number)

    def wait(self, timeout=100):
        """The exit codes, -N for a signal N."""
        end = time.monotonic() + timeout
        while None in [job.exitcode for job in self.jobs]:  # join would wait for workers, too
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        return [job.exitcode for job in self.jobs]

    def printed(self, rank=0, errors=False):
        file = self.files[2 * rank + errors]
        file.seek(0)
        return file.read()


def wait_for(condition, seconds=60):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
