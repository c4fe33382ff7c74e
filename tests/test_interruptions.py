"""Runs that are killed, asked to stop, short of disk or numbers: nothing is lost."""

import errno
import os
import random
import resource
import signal
import time

import pytest
import torch
from conftest import Processes, Result, close_weights, same_weights, wait_for

import engine
import main_pretrain
from models_mff import MaskedAutoencoderMFF
from util import checkpoint, distributed
from util.errors import INTERRUPTED, RunError
from util.log import MAX_SKIPPED, Log

# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', distributed.StopRequest.SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_from_there(
    number, whole, pretrain, at_step, tmp_path, capsys
):
    handler = signal.getsignal(number)
    at_step(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        pretrain('cut')
    assert exit.value.code == INTERRUPTED == 75
    assert 'Stopped after step 6' in capsys.readouterr().out
    assert Result(tmp_path / 'cut').checkpoint['step'] == 6
    assert signal.getsignal(number) == handler
    resumed = pretrain('cut')
    assert same_weights(resumed, whole) and resumed.losses == whole.losses


def test_a_signal_at_all_processes_of_a_run(pretrain, small_run, tmp_path):
    """As a terminal or SLURM sends it: at the loader's workers too."""
    flags = ['--save_every', '0', '--epochs', '8']
    job = Processes(main_pretrain, small_run('cut', '--num_workers', '2', *flags))
    wait_for(lambda: last_step(tmp_path / 'cut') > 0)
    os.killpg(job.jobs[0].pid, signal.SIGTERM)
    assert job.wait() == [INTERRUPTED]
    assert 0 < Result(tmp_path / 'cut').checkpoint['step'] < 32
    assert same_weights(pretrain('cut', *flags), pretrain('whole', *flags))


def test_a_second_signal_exits_at_once(monkeypatch):
    now, codes = [0.0], []
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    monkeypatch.setattr(os, '_exit', codes.append)
    with distributed.StopRequest() as request:
        assert not request()
        for seconds in (0, 0.5):  # torchrun passes on what the terminal has sent to all
            now[0] = seconds
            os.kill(os.getpid(), signal.SIGTERM)
            assert not codes
        now[0] = 2.0
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [128 + signal.SIGINT]
        assert request()
        os.kill(os.getpid(), signal.SIGINT)  # from then on the run saves: it is not disturbed
    assert codes == [128 + signal.SIGINT]


@pytest.mark.parametrize('target', [0, 1])
def test_all_processes_wait_until_the_checkpoint_is_written(target, small_run, tmp_path):
    """Two processes, a slow disk, a signal at one of them, and more signals during the save."""
    mark = tmp_path / 'mark'

    def slow_disk(rank):
        write = checkpoint.write

        def slow_write(*arguments):
            mark.touch()
            time.sleep(3)
            write(*arguments)

        checkpoint.write = slow_write

    flags = small_run('run', '--epochs', '300')
    job = Processes(main_pretrain, flags, flags, before=slow_disk)
    log = tmp_path / 'run/log.jsonl'
    wait_for(lambda: log.exists() and log.read_text().count('loss') > 2)
    job.send(signal.SIGUSR1, target)
    wait_for(mark.exists)
    time.sleep(1.2)  # after a second, a further signal would end a process at once
    job.send(signal.SIGTERM)
    assert job.wait() == [INTERRUPTED, INTERRUPTED]
    assert Result(tmp_path / 'run').checkpoint['step'] > 2
    assert not list((tmp_path / 'run').glob('*.tmp'))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_ends_an_evaluation(processes, small_run, tmp_path, folder):
    """Of 20 images one at a time, after the second; the same command evaluates again."""

    def slow_evaluation(rank):
        evaluate = engine.evaluate

        def evaluate_slowly(model, loader, measure, run):
            def measure_slowly(*batch):
                (tmp_path / 'mark').touch()
                time.sleep(0.3)
                return measure(*batch)

            return evaluate(model, loader, measure_slowly, run)

        engine.evaluate = evaluate_slowly

    flags = small_run('run', '--epochs', '1', '--batch_size', '1')
    job = Processes(main_pretrain, *[flags] * processes, before=slow_evaluation)
    wait_for((tmp_path / 'mark').exists)
    began = time.monotonic()
    job.send(signal.SIGTERM, 0)
    assert job.wait() == [INTERRUPTED] * processes
    assert time.monotonic() - began < 0.3 * 20 / processes  # not all of the images
    result = Result(tmp_path / 'run')
    assert result.checkpoint['step'] == 4
    assert not [entry for entry in result.entries if 'val_loss' in entry]
    assert Processes(main_pretrain, *[flags] * processes).wait() == [0] * processes
    assert [entry['step'] for entry in result.entries if 'val_loss' in entry] == [4]


def test_a_signal_at_one_process_stops_all(whole, small_run, tmp_path):
    def signal_at_step(rank):
        step = Log.step

        def step_and_signal(log, done, *arguments):
            step(log, done, *arguments)
            if rank == 1 and done == 6:
                os.kill(os.getpid(), signal.SIGUSR1)

        Log.step = step_and_signal

    flags = small_run('cut')
    job = Processes(main_pretrain, flags, flags, before=signal_at_step)
    assert job.wait() == [INTERRUPTED, INTERRUPTED]
    assert Result(tmp_path / 'cut').checkpoint['step'] == 7  # agreed on a step later
    assert Processes(main_pretrain, flags, flags).wait() == [0, 0]
    assert close_weights(Result(tmp_path / 'cut'), whole)


def test_a_process_that_fails_says_why(small_run):
    def fail(rank):
        if rank == 1:
            step = Log.step

            def step_and_fail(log, done, *arguments):
                step(log, done, *arguments)
                raise RunError('the disk of this process is gone')

            Log.step = step_and_fail

    flags = small_run('failed')
    job = Processes(main_pretrain, flags, flags, before=fail)
    job.jobs[1].join(60)
    job.jobs[0].kill()  # as torchrun ends those that are left
    assert job.wait()[1] == 1
    assert 'process 1: the disk of this process is gone' in job.printed(1, errors=True)


# --- One run in a directory -----------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_has_ended(small_run, tmp_path):
    flags = small_run('run', '--epochs', '300', '--save_every', '0')
    first = Processes(main_pretrain, flags)
    wait_for(lambda: last_step(tmp_path / 'run') > 0)
    second = Processes(main_pretrain, flags)
    assert second.wait() == [2]
    assert f'in use by process {first.jobs[0].pid} on' in second.printed(errors=True)
    first.send(signal.SIGKILL)
    first.wait()
    third = Processes(main_pretrain, flags)
    time.sleep(1)
    third.send(signal.SIGTERM)
    assert third.wait() in ([INTERRUPTED], [-signal.SIGTERM])  # not 2: the lock has gone


# --- Disk -----------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    last = str(tmp_path / checkpoint.LAST)
    checkpoint.write({'step': 1}, last)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            checkpoint.write({'step': 2, 'model': torch.zeros(100_000)}, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [checkpoint.LAST]
    assert torch.load(last, weights_only=True) == {'step': 1}


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(numbers): writing a checkpoint fails the first time, the second, and so on."""

    def install(*numbers):
        write, calls = checkpoint.write, []

        def write_or_fail(*arguments):
            calls.append(arguments)
            if len(calls) in numbers:
                raise OSError(errno.ENOSPC, 'No space left on device')
            write(*arguments)

        monkeypatch.setattr(checkpoint, 'write', write_or_fail)

    return install


def test_training_goes_on_without_disk_and_saves_later(pretrain, full_disk, capsys):
    full_disk(2)
    result = pretrain('run', '--save_every', '0')
    assert capsys.readouterr().out.count('cannot save') == 1
    assert result.checkpoint['step'] == len(result.losses) == 12


def test_the_end_that_cannot_be_saved_is_an_error(pretrain, full_disk, capsys, tmp_path):
    first = pretrain('run', '--epochs', '1').checkpoint
    full_disk(1)
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--epochs', '2', '--force_resume')
    assert exit.value.code == 1
    assert 'step 8: cannot save' in capsys.readouterr().err
    assert Result(tmp_path / 'run').checkpoint['step'] == first['step']


def test_a_log_that_cannot_be_written_is_said_once(pretrain, monkeypatch, capsys):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, 'No space left on device')

        def close(self):
            pass

    init = Log.__init__

    def without_file(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.file = Full()

    monkeypatch.setattr(Log, '__init__', without_file)
    result = pretrain('run', '--epochs', '1')
    assert capsys.readouterr().out.count('cannot write the log') == 1
    assert result.checkpoint['step'] == 4


# --- Numbers --------------------------------------------------------------------------------------


def break_loss(kind, broken):
    """A forward_loss that is infinite, or has gradients that are not numbers, while broken."""
    forward = MaskedAutoencoderMFF.forward_loss

    def forward_loss(self, imgs, pred, mask):
        loss = forward(self, imgs, pred, mask)
        if not broken or not torch.is_grad_enabled():
            return loss
        if kind == 'loss':
            return loss + float('inf')  # whose gradient is finite
        pred.register_hook(lambda gradient: gradient * float('nan'))
        return loss

    return forward_loss


@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_an_update_that_is_not_finite_is_skipped(
    kind, pretrain, at_step, stop_at, tmp_path, monkeypatch
):
    """Step 12 fails, so the weights must be those after step 11, of a run that stops there."""
    broken = []
    at_step(11, lambda: broken.append(True))
    monkeypatch.setattr(MaskedAutoencoderMFF, 'forward_loss', break_loss(kind, broken))
    skipped = pretrain('skipped')
    entry = [entry for entry in skipped.entries if 'loss' in entry][-1]
    assert entry['skipped'] == 1 and entry['loss'] is None and skipped.checkpoint['step'] == 12
    monkeypatch.undo()
    stop_at(11, pretrain, 'stopped')
    assert same_weights(skipped, Result(tmp_path / 'stopped'))


def test_all_processes_skip_an_update(small_run, tmp_path):
    """A loss that is infinite in one of two processes."""

    def break_step_7(rank):
        broken, step = [], Log.step

        def log_step(log, done, *arguments):
            step(log, done, *arguments)
            broken[:] = [True] if rank == 1 and done == 6 else []

        Log.step = log_step
        MaskedAutoencoderMFF.forward_loss = break_loss('loss', broken)

    flags = small_run('two')
    assert Processes(main_pretrain, flags, flags, before=break_step_7).wait() == [0, 0]
    result = Result(tmp_path / 'two')
    assert [entry['step'] for entry in result.entries if entry.get('skipped')] == [7]
    assert all(tensor.isfinite().all() for tensor in result.checkpoint['model'].values())


def test_a_run_ends_after_many_skipped_updates(pretrain, monkeypatch, capsys, tmp_path):
    before = pretrain('run', '--epochs', '1').checkpoint
    monkeypatch.setattr(MaskedAutoencoderMFF, 'forward_loss', break_loss('loss', [True]))
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--epochs', '9', '--force_resume')
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert f'{MAX_SKIPPED} updates' in error and error.count('\n') == 1
    entries = Result(tmp_path / 'run').entries
    assert sum(entry.get('skipped', 0) for entry in entries) == MAX_SKIPPED
    after = Result(tmp_path / 'run').checkpoint
    assert all(torch.equal(after['model'][name], before['model'][name]) for name in after['model'])


# --- Killed again and again -----------------------------------------------------------------------


@pytest.mark.parametrize('kills, epochs', [(4, 6), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, epochs, pretrain, small_run, tmp_path):
    """SIGKILL, saving after every step, each time with another number of workers."""
    whole = pretrain('whole', '--epochs', str(epochs))
    rng = random.Random(kills)
    for _ in range(kills):
        before = last_step(tmp_path / 'killed')
        flags = ['--epochs', epochs, '--save_every', 0, '--num_workers', rng.randrange(3)]
        job = Processes(main_pretrain, small_run('killed', *flags))
        wait_for(lambda before=before: last_step(tmp_path / 'killed') > before)
        time.sleep(rng.random() * 0.5)
        job.send(signal.SIGKILL)
        if job.wait() == [0]:
            break
    assert Processes(main_pretrain, small_run('killed', '--epochs', epochs)).wait() == [0]
    killed = Result(tmp_path / 'killed')
    assert same_weights(whole, killed)
    steps = [entry['step'] for entry in killed.entries if 'loss' in entry]
    assert steps == list(range(1, 4 * epochs + 1))


def last_step(output_dir):
    """Of the newest whole checkpoint, 0 without one."""
    try:
        return torch.load(output_dir / checkpoint.LAST, weights_only=True)['step']
    except (OSError, RuntimeError, EOFError):  # none, or one that is just being replaced
        return 0
