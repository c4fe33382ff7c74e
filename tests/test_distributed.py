"""Processes: launchers, what all must agree on, and how a process of a group ends."""

import os
import re

import pytest
import torch
from conftest import Processes, Result, close_weights

import engine
import main_pretrain
from util import distributed
from util.args import ArgumentParser, run_job
from util.errors import InputError, RunError


def test_srun_starts_processes_without_torchrun(whole, small_run, tmp_path):
    """Two processes that SLURM's variables tell of each other train one model, as one does."""

    def as_slurm(rank):
        for ours, slurms in (
            ('RANK', 'PROCID'),
            ('LOCAL_RANK', 'LOCALID'),
            ('WORLD_SIZE', 'NTASKS'),
        ):
            os.environ[f'SLURM_{slurms}'] = os.environ.pop(ours)

    flags = small_run('two')
    processes = Processes(main_pretrain, flags, flags, before=as_slurm)
    assert processes.wait() == [0, 0], processes.printed(errors=True)
    assert close_weights(Result(tmp_path / 'two'), whole)


@pytest.mark.parametrize('size', ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'])
def test_mpirun_alone_is_refused(size, pretrain, monkeypatch, capsys):
    monkeypatch.setenv(size, '4')
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2 and re.fullmatch(r'.*torchrun.*\n', capsys.readouterr().err)
    monkeypatch.setenv('WORLD_SIZE', '1')  # torchrun under mpirun
    assert distributed.world() == (0, 1)


def test_an_allocation_without_an_address(pretrain, monkeypatch, capsys):
    for name, value in {'NTASKS': '4', 'PROCID': '0', 'LOCALID': '0'}.items():
        monkeypatch.setenv(f'SLURM_{name}', value)
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2 and re.fullmatch(r'.*MASTER_ADDR.*\n', capsys.readouterr().err)


@pytest.mark.parametrize('name', ['WORLD_SIZE', 'RANK', 'SLURM_NTASKS'])
def test_a_variable_that_is_no_number(name, pretrain, monkeypatch, capsys):
    monkeypatch.setenv(name, 'two')
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2
    assert re.fullmatch(f"[^\n]*error: {name}: [^\n]*'two'\n", capsys.readouterr().err)


@pytest.mark.parametrize('visible, device', [(1, 'cuda:0'), (4, 'cuda:1')])
def test_a_task_may_see_its_own_gpu_only(visible, device, monkeypatch):
    """srun --gpus-per-task=1: local rank 5 of a machine, of which this process sees one device."""
    monkeypatch.setenv('SLURM_LOCALID', '5')
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert distributed.start('cuda') == torch.device(device) == chosen[0]


@pytest.mark.parametrize('name', ['cuda:1', 'mps'])
def test_processes_do_not_share_one_device(name, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: None)
    with pytest.raises(InputError, match=f'--device {name}.* 2 processes'):
        distributed.start(name)


def other_precision(rank):
    """As where --amp auto finds bf16 on one GPU and not on the other."""
    mixed_precision = engine.mixed_precision
    amp = ['none', 'fp16'][rank]
    engine.mixed_precision = lambda _, device: mixed_precision(amp, device)


@pytest.mark.parametrize(
    'flags, before, named',
    [
        (['--lr', '2e-3'], None, 'lr: [0.001, 0.002]'),
        (['--seed', '1'], None, 'seed: [0, 1]'),
        ([], other_precision, 'precision: '),
    ],
    ids=['--lr', '--seed', 'precision'],
)
def test_processes_that_differ_are_refused(flags, before, named, small_run):
    """With fp16 on one and bf16 on the other, averaged gradients would be wrong."""
    ours, theirs = small_run('run'), small_run('run', *flags)
    processes = Processes(main_pretrain, ours, theirs, before=before)
    assert processes.wait() == [2, 2]
    line = processes.printed(errors=True)
    assert re.fullmatch(r'[^\n]*error: [^\n]+\n', line) and named in line, line
    assert processes.printed(1, errors=True) == ''  # the first process of a machine speaks


def test_what_differs_is_named_with_the_values_of_all(monkeypatch):
    monkeypatch.setattr(distributed, 'gather', lambda values: [values, {'device': 'cuda'}])
    with pytest.raises(InputError, match=r"device: \['cpu', 'cuda'\]"):
        distributed.check_equal({'device': 'cpu'})


def test_a_mistake_on_the_first_process_reaches_all(small_run, tmp_path):
    """Rank 0 alone finds that another run holds the folder."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/lock').mkdir()
    flags = small_run('run')
    processes = Processes(main_pretrain, flags, flags)
    assert processes.wait() == [2, 2] and '--output_dir' in processes.printed(errors=True)


@pytest.mark.parametrize(
    'end, code',
    [(None, 0), (SystemExit(75), 75), (InputError('a'), 2), (RunError('b'), 1)],
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
    except SystemExit:  # os._exit did not end it
        pass
    assert ended == [code]
