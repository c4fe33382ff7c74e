"""Launchers: what they say of the processes, and what a process without its companions is told."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Result, command
from test_interruptions import close_weights, free_port

from util import distributed
from util.args import ArgumentParser, run_job
from util.errors import InputError, RunError

LAUNCHERS = {
    'srun': ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS'),
    'Open MPI': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE'),
    'MPICH': ('PMI_RANK', 'MPI_LOCALRANKID', 'PMI_SIZE'),
}


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_mpirun_in_a_batch_script_of_slurm(launcher, monkeypatch):
    """The script's own variables reach the processes that mpirun starts."""
    for name, value in zip(LAUNCHERS['srun'], '001'):
        monkeypatch.setenv(name, value)
    rank_name, local_name, size_name = LAUNCHERS[launcher]
    for name, value in {rank_name: '1', local_name: '1', size_name: '2'}.items():
        monkeypatch.setenv(name, value)
    assert distributed.world() == (1, 2) and distributed.from_launcher(distributed.LOCAL_RANK, 0) == 1


@pytest.mark.parametrize('launcher', ['srun', 'Open MPI', pytest.param('MPICH', marks=pytest.mark.slow)])
def test_a_launcher_starts_processes_without_torchrun(launcher, pretrain, small_run, tmp_path):
    """Two processes that its variables tell of each other train one model, as one process does."""
    rank_name, local_name, size_name = LAUNCHERS[launcher]
    port, jobs = str(free_port()), []
    for rank in ('0', '1'):
        environment = {
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': port,
            rank_name: rank,
            local_name: rank,
            size_name: '2',
        }
        flags = [sys.executable, 'main_pretrain.py', *small_run('two')]
        jobs.append(subprocess.Popen(flags, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    assert Result(tmp_path / 'two').losses == pytest.approx(pretrain('alone').losses, rel=1e-5)
    assert close_weights(Result(tmp_path / 'two'), pretrain('alone'))


def test_a_process_in_an_allocation_is_told_what_it_waits_for(small_run):
    done = command('main_pretrain.py', *small_run('run'), SLURM_NTASKS='4', SLURM_PROCID='0', SLURM_LOCALID='0')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'SLURM_NTASKS=4 says that 4 processes run' in line and 'MASTER_ADDR and MASTER_PORT' in line


@pytest.mark.parametrize('name', ['WORLD_SIZE', 'RANK', 'SLURM_NTASKS'])
def test_a_launcher_variable_that_is_no_number_is_one_line(name, monkeypatch, pretrain, capsys):
    monkeypatch.setenv(name, 'two')
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2 and re.fullmatch(f"[^\n]*error: {name}: [^\n]*'two'\n", capsys.readouterr().err)


def test_a_process_that_waits_says_so(monkeypatch, capsys):
    for name, value in {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'MASTER_ADDR': 'host', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise RuntimeError('connect failed\nand more')

    monkeypatch.setattr(torch.distributed, 'init_process_group', fail)
    with pytest.raises(RunError, match=r'cannot connect \(connect failed\).*GLOO_SOCKET_IFNAME'):
        distributed.start('cpu')
    assert 'Waiting for 4 processes (SLURM_NTASKS) at host' in capsys.readouterr().out
    assert distributed.start('cpu', join=False) == torch.device('cpu')


@pytest.mark.parametrize('visible, device', [(1, 'cuda:0'), (4, 'cuda:1')])
def test_a_task_may_see_its_own_gpu_only(visible, device, monkeypatch):
    """srun --gpus-per-task=1: local rank 5 of a machine, of which this process sees one device."""
    monkeypatch.setenv('SLURM_LOCALID', '5')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert distributed.start('cuda') == torch.device(device) == chosen[0]


def test_processes_do_not_share_an_apple_gpu(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match='--device cpu works'):
        distributed.start('mps')


def test_disagreeing_processes_are_stopped(monkeypatch):
    monkeypatch.setattr(distributed, 'gather', lambda value: [value, value + 1])
    with pytest.raises(InputError, match='do not agree on the step: \\[3, 4\\]'):
        distributed.check_equal(3, 'the step')


@pytest.mark.parametrize(
    'end, code',
    [(None, 0), (SystemExit(75), 75), (InputError('wrong'), 2), (RunError('lost'), 1), (KeyboardInterrupt(), 130)],
)
def test_a_process_of_a_group_ends_without_cleaning_up(end, code, monkeypatch):
    """In Python's clean-up gloo's threads may abort the process: one run in eight of two processes with torch 2.11."""

    def main(args):
        if end is not None:
            raise end

    ended = []
    monkeypatch.setattr(distributed, 'joined', ['a process group'])
    monkeypatch.setattr(os, '_exit', ended.append)
    run_job(main, ArgumentParser(), [])
    assert ended == [code]


def test_joining_a_group_is_remembered(monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', str(free_port()))
    monkeypatch.setattr(distributed, 'joined', [])
    distributed.join_group('cpu')
    distributed.stop()
    assert distributed.joined
