"""Launchers: what they say of the processes, what these compare, and how they end."""

import os
import re
import signal
import time

import pytest
import torch
from conftest import Processes

import engine
import main_pretrain
from util import data, distributed
from util.args import ArgumentParser, run_job
from util.errors import InputError, RunError


def other_precision(rank):
    """As --amp auto finds it on two generations of GPUs."""
    mixed = engine.mixed_precision
    engine.mixed_precision = lambda _, device: mixed(('fp16', 'bf16')[rank], device)


def own_disk(rank):
    find = engine.checkpoint.Saver.find
    engine.checkpoint.Saver.find = lambda saver: (None, None) if rank else find(saver)


@pytest.mark.parametrize(
    'flags, before, named',
    [
        (['--lr', '2e-3'], None, 'lr: [0.001, 0.002]'),
        ([], other_precision, 'float16'),
        ([], own_disk, '[4, 0]'),
    ],
    ids=['flags', 'precision', 'step'],
)
def test_processes_that_differ_are_refused(flags, before, named, whole, small_run, tmp_path):
    """Averaged gradients would be wrong, without a word."""
    (tmp_path / 'run').mkdir()
    state = whole.checkpoint | {'step': 4}
    torch.save(state, tmp_path / 'run/checkpoint-last.pth')
    job = Processes(main_pretrain, small_run('run'), small_run('run', *flags), before=before)
    assert job.wait() == [2, 2], job.printed(errors=True)
    error = job.printed(errors=True)
    assert re.fullmatch(r'\S+: error: .+\n', error) and named in error, error
    assert job.printed(1, errors=True) == ''  # the first of a machine speaks


def test_a_mistake_on_the_first_process_reaches_all(small_run, tmp_path):
    (tmp_path / 'run/lock').mkdir(parents=True)
    job = Processes(main_pretrain, *[small_run('run')] * 2)
    assert job.wait() == [2, 2] and '--output_dir' in job.printed(errors=True)


@pytest.mark.parametrize('size', ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'])
def test_mpirun_alone_is_refused(size, monkeypatch, pretrain, error_of):
    """It would train one model in each process."""
    monkeypatch.setenv(size, '2')
    assert 'torchrun' in error_of(pretrain, 'run')
    monkeypatch.setenv('WORLD_SIZE', '1')  # of torchrun, which mpirun starts on each machine
    assert distributed.world() == (0, 1)


def test_srun_needs_an_address(monkeypatch, pretrain, error_of):
    """test_processes_and_micro_batches_change_nothing starts processes as srun does."""
    monkeypatch.setenv('SLURM_NTASKS', '4')
    error = error_of(pretrain, 'run')
    assert '4 processes' in error and 'MASTER_ADDR' in error


@pytest.mark.parametrize('visible, device', [(1, 'cuda:0'), (4, 'cuda:1')])
def test_a_task_may_see_its_own_gpu_only(visible, device, monkeypatch):
    """srun --gpus-per-task=1: local rank 5 of a machine, of which this process sees one device."""
    monkeypatch.setenv('SLURM_LOCALID', '5')
    chosen = []
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert distributed.start('cuda') == torch.device(device) == chosen[0]


@pytest.mark.parametrize('name', ['cuda:1', 'mps'])
def test_one_device_is_not_for_several_processes(name, monkeypatch):
    """Also cuda:0, say: each process would take it."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: None)
    with pytest.raises(InputError, match=f'{name} .* 2 processes'):
        distributed.start(name)


@pytest.mark.parametrize(
    'end, code', [(None, 0), (InputError('a'), 2), (RunError('b'), 1), (KeyboardInterrupt(), 130)]
)
def test_a_process_of_a_group_ends_without_cleaning_up(end, code, monkeypatch):
    """In Python's clean-up gloo's threads may abort the process."""

    def main(args):
        if end is not None:
            raise end

    ended = []
    monkeypatch.setattr(distributed, 'joined', ['a process group'])
    monkeypatch.setattr(os, '_exit', ended.append)
    try:
        run_job(main, ArgumentParser(), [])
    except SystemExit:  # after the _exit that did not exit
        pass
    assert ended == [code]


@pytest.mark.parametrize('action', ['kill', 'error'])
def test_a_loader_worker_that_fails_ends_the_run_in_one_line(action, small_run):
    """An error also where another hangs."""

    def lose_workers(rank):
        read = data.Samples.__getitem__

        def lost(samples, key):
            worker = torch.utils.data.get_worker_info()
            if worker is None:
                return read(samples, key)
            if action == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600 * worker.id)
            raise RunError('the disk is gone')

        data.Samples.__getitem__ = lost

    job = Processes(main_pretrain, small_run('run', '--num_workers', '2'), before=lose_workers)
    assert job.wait(60) == [1]
    error = job.printed(errors=True)
    assert ('DataLoader worker' if action == 'kill' else 'the disk is gone') in error
    assert re.fullmatch(r'\S+: error: .+\n', error), error
