"""Runs that are killed, asked to stop, short of disk or of numbers: nothing is lost."""

import errno
import itertools
import os
import random
import resource
import signal
import time

import pytest
import torch
from conftest import Processes, Result, same_weights, wait_for

import engine
import main_pretrain
from models_mff import MaskedAutoencoderMFF
from util import checkpoint, distributed
from util.log import Log


def last_step(output_dir):
    """Of the newest checkpoint, 0 without one or while it is being replaced."""
    try:
        path = output_dir / 'checkpoint-last.pth'
        return torch.load(path, weights_only=True, mmap=True)['step']
    except (OSError, RuntimeError, EOFError):
        return 0


# --- Kills and signals ----------------------------------------------------------------------------


@pytest.mark.parametrize('kills, epochs', [(4, 4), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, epochs, small_run, pretrain, tmp_path):
    """Saving after every step, with any number of workers: the same bits, each step logged once."""
    generator, folder = random.Random(kills), tmp_path / 'killed'
    flags = '--epochs', str(epochs), '--save_every', '0', '--num_workers'
    for _ in range(kills):
        before = last_step(folder)
        job = Processes(main_pretrain, small_run('killed', *flags, generator.randrange(3)))
        wait_for(lambda n=before, p=job.jobs[0]: last_step(folder) > n or not p.is_alive())
        time.sleep(generator.random() * 0.15)
        job.send(signal.SIGKILL)
        assert job.wait() in ([-9], [0])
    killed, whole = (pretrain(name, '--epochs', str(epochs)) for name in ('killed', 'whole'))
    assert same_weights(killed, whole)
    assert list(killed.losses) == list(range(1, 4 * epochs + 1))


def test_a_signal_saves_and_the_run_goes_on_from_there(pretrain, stop_at, whole, capsys):
    """Each kind of signal, within an epoch and at the end of one, whose evaluation comes later."""
    flags = 'cut', '--keep_every', '2'
    for step, number in zip((3, 4, 8), distributed.StopRequest.SIGNALS, strict=True):
        handler = signal.getsignal(number)
        stop_at(step, pretrain, *flags, number=number)
        assert f'Stopped after step {step}' in capsys.readouterr().out
        assert signal.getsignal(number) == handler
    result = pretrain(*flags)
    assert same_weights(result, whole) and result.losses == whole.losses
    assert list(result.values('val_loss')) == [4, 8, 12]
    assert (result.output_dir / 'checkpoint-0002.pth').exists()


def test_a_signal_at_all_processes_of_a_run(small_run, tmp_path):
    """As a terminal or SLURM sends it: at the loader's workers too."""
    flags = '--num_workers', '2', '--save_every', '0', '--epochs', '300'
    job = Processes(main_pretrain, small_run('cut', *flags))
    wait_for(lambda: last_step(tmp_path / 'cut'))
    os.killpg(job.jobs[0].pid, signal.SIGTERM)
    assert job.wait() == [75], job.printed(errors=True)
    assert last_step(tmp_path / 'cut') > 0


def test_a_second_signal_exits_at_once(monkeypatch):
    now, codes = [0.0], []
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    monkeypatch.setattr(os, '_exit', codes.append)
    with distributed.StopRequest() as stop:
        assert not stop()
        for seconds in (0, 0.5):  # torchrun passes on what the terminal has sent to all
            now[0] = seconds
            os.kill(os.getpid(), signal.SIGTERM)
            assert not codes
        now[0] = 2.0
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [128 + signal.SIGINT]
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)  # from then on the run saves, and ignores it
    assert codes == [128 + signal.SIGINT]


@pytest.mark.parametrize('number, ranks', [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_all_processes_wait_until_the_checkpoint_is_written(number, ranks, small_run, tmp_path):
    """Two processes, a slow disk, a signal at one or both, and more signals during the save."""
    saving, disk = tmp_path / 'saving', tmp_path / 'disk'

    def wait_for_disk(rank):
        write = checkpoint.write

        def slow_write(*arguments):
            saving.touch()
            wait_for(disk.exists)
            write(*arguments)

        checkpoint.write = slow_write

    flags = small_run('run', '--epochs', '300')
    job = Processes(main_pretrain, flags, flags, before=wait_for_disk)
    log = tmp_path / 'run/log.jsonl'
    wait_for(lambda: log.exists() and log.read_text().count('loss') > 2)
    job.send(number, *ranks)
    wait_for(saving.exists)
    time.sleep(1.2)  # a second later, a further signal would end a process at once
    job.send(signal.SIGTERM)
    disk.touch()
    assert job.wait() == [75, 75], job.printed(errors=True)
    assert last_step(tmp_path / 'run') > 2 and not list(tmp_path.glob('run/*.tmp'))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_ends_an_evaluation_which_the_same_command_does_again(
    processes, whole, small_run, pretrain, tmp_path
):
    def stop_in_evaluation(rank):
        forward, batches = MaskedAutoencoderMFF.forward, []

        def watched_forward(model, *arguments):
            if not model.training:
                batches.append(print('evaluated'))
                if len(batches) == 2 and rank == processes - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return forward(model, *arguments)

        MaskedAutoencoderMFF.forward = watched_forward

    flags = '--batch_size', '2', '--epochs', '1'  # 20 images: 10 or 5 batches
    job = Processes(
        main_pretrain, *[small_run('run', *flags)] * processes, before=stop_in_evaluation
    )
    assert job.wait() == [75] * processes, job.printed(errors=True)
    assert job.printed().count('evaluated') <= 1 + processes
    assert last_step(tmp_path / 'run') == 4
    losses = pretrain('run', *flags).values('val_loss')
    assert losses == {4: pytest.approx(whole.values('val_loss')[4], rel=1e-4)}


# --- One run in a directory -----------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_has_ended(small_run, pretrain, tmp_path):
    first = Processes(main_pretrain, small_run('run', '--epochs', '300', '--save_every', '0'))
    wait_for(lambda: last_step(tmp_path / 'run'))
    second = Processes(main_pretrain, small_run('run'))
    assert second.wait() == [2]
    assert f'in use by process {first.jobs[0].pid} on' in second.printed(errors=True)
    first.send(signal.SIGKILL)
    first.wait()
    assert len(pretrain('run', '--resume', 'none', '--epochs', '1').losses) == 4


# --- Disk -----------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / 'checkpoint-last.pth'
    checkpoint.write({'step': 1}, str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            checkpoint.write({'step': 2, 'model': torch.zeros(100_000)}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [path.name] and torch.load(path) == {'step': 1}


def fill_disk(monkeypatch, first, last=99):
    """The first to last writes of checkpoints fail, counted from 1."""
    write, numbers = checkpoint.write, itertools.count(1)

    def write_if_there_is_space(*arguments):
        if first <= next(numbers) <= last:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(*arguments)

    monkeypatch.setattr(checkpoint, 'write', write_if_there_is_space)


def test_training_goes_on_without_disk_and_saves_later(pretrain, monkeypatch, capsys):
    """Nor does the log stop it, which is said once."""
    create = Log.__init__

    def without_space(log, run):
        create(log, run)
        log.file = open('/dev/full', 'w')

    monkeypatch.setattr(Log, '__init__', without_space)
    fill_disk(monkeypatch, 2, 4)
    assert pretrain('run', '--save_every', '0').checkpoint['step'] == 12
    printed = capsys.readouterr().out
    assert printed.count('cannot save') == 3 and printed.count('cannot write the log') == 1


@pytest.mark.parametrize('stop', [False, True])
def test_the_end_that_cannot_be_saved_is_an_error(
    stop, pretrain, monkeypatch, at_step, tmp_path, error_of
):
    fill_disk(monkeypatch, 2)
    if stop:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    error = error_of(pretrain, 'run', '--epochs', '2', '--save_every', '0', code=1)
    assert f'step {6 if stop else 8}: cannot save' in error and 'No space left' in error
    assert last_step(tmp_path / 'run') == 1


# --- Numbers --------------------------------------------------------------------------------------


@pytest.fixture
def break_steps(monkeypatch):
    """break_steps(steps): on a rank, the loss of these steps or its gradient is not finite."""

    def install(steps, what='loss', rank=0):
        optimizer_step = engine.optimizer_step

        def broken_step(run, loss_fn, loader):
            def broken_loss(*batch):
                loss = loss_fn(*batch)
                if what == 'loss':
                    return loss + float('inf')  # whose gradient is finite
                loss.register_hook(lambda gradient: gradient * float('nan'))
                return loss

            broken = run.step + 1 in steps and distributed.world()[0] == rank
            return optimizer_step(run, broken_loss if broken else loss_fn, loader)

        monkeypatch.setattr(engine, 'optimizer_step', broken_step)

    return install


@pytest.mark.parametrize('what, amp', [('loss', 'none'), ('gradient', 'none'), ('loss', 'fp16')])
def test_a_step_that_is_not_finite_is_skipped(what, amp, pretrain, break_steps, stop_at, tmp_path):
    """The weights after such a last step are those of the step before."""
    flags = '--amp', amp, '--epochs', '1'
    break_steps([4], what)
    skipped = pretrain('skipped', *flags)
    assert skipped.values('skipped') == {4: 1} and skipped.losses[4] is None
    stop_at(3, pretrain, 'stopped', *flags)
    assert same_weights(skipped, Result(tmp_path / 'stopped'))


def test_a_run_ends_after_20_skipped_steps_in_a_row(pretrain, break_steps, error_of, tmp_path):
    """Not after 19; one that is finite begins the count anew."""
    break_steps({*range(3, 22), *range(23, 43)})
    error = error_of(pretrain, 'run', '--epochs', '11', '--log_every', '3', code=1)
    skipped = Result(tmp_path / 'run').values('skipped')
    assert '20 updates' in error and max(skipped) == 42 and sum(skipped.values()) == 39


def test_a_step_is_skipped_by_all_processes(pretrain, small_run, break_steps, tmp_path):
    """A loss that is infinite in one of two processes, and one that is so in one process."""
    flags = small_run('two', '--epochs', '2', '--batch_size', '8')
    job = Processes(main_pretrain, flags, flags, before=lambda _: break_steps([7], rank=1))
    assert job.wait() == [0, 0], job.printed(errors=True)
    break_steps([7])
    one, two = pretrain('one', '--epochs', '2'), Result(tmp_path / 'two')
    assert one.values('skipped') == two.values('skipped') == {7: 1}
    assert same_weights(one, two, atol=2e-5)
