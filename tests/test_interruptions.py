"""Runs that are killed, asked to stop, short of disk or numbers, alone and in several processes: nothing is lost."""

import errno
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, Result

import main_pretrain
from models_mff import MaskedAutoencoderMFF
from util import checkpoint, data, distributed
from util.args import run_job
from util.errors import INTERRUPTED, InputError
from util.log import Log, Meter


def same_weights(a, b):
    states = [result.checkpoint['model'] for result in (a, b)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def close_weights(a, b):
    states = [result.checkpoint['model'] for result in (a, b)]
    return all(
        torch.allclose(tensor, states[1][name], atol=2e-5)
        for name, tensor in states[0].items()
        if not name.endswith('qkv.bias')  # the key's third has no gradient but rounding, which Adam amplifies
    )


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): action() when n steps of a run are done, once."""

    def install(step, action):
        advance, acted = Log.advance, []

        def advance_and_act(log):
            advance(log)
            if log.steps_done == step and not acted:
                acted.append(True)
                action()

        monkeypatch.setattr(Log, 'advance', advance_and_act)

    return install


# --- Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', distributed.StopRequest.SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_from_there(number, pretrain, at_step, tmp_path, capsys):
    handler = signal.getsignal(number)
    at_step(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        pretrain('cut')
    assert exit.value.code == INTERRUPTED == 75
    assert 'Stopped after step 6 of 12' in capsys.readouterr().out
    assert Result(tmp_path / 'cut').checkpoint['step'] == 6
    assert signal.getsignal(number) == handler
    assert same_weights(pretrain('cut'), pretrain('whole'))


def test_a_signal_at_all_processes_of_a_run(pretrain, small_run, tmp_path):
    """As a terminal or SLURM sends it: at the loader's workers too."""
    child = fork(small_run('cut', '--num_workers', '2', '--save_every', '1', '--epochs', '8'))
    while not last_step(tmp_path / 'cut'):
        time.sleep(0.01)
    os.killpg(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == INTERRUPTED
    assert 0 < Result(tmp_path / 'cut').checkpoint['step'] < 32
    assert same_weights(pretrain('cut', '--save_every', '1', '--epochs', '8'), pretrain('whole', '--epochs', '8'))


def test_a_second_signal_exits_at_once(monkeypatch):
    now, codes = [0.0], []
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    monkeypatch.setattr(os, '_exit', codes.append)
    with distributed.StopRequest() as request:
        assert not request.agreed()
        for seconds in (0, 0.5):  # the second comes from torchrun, which passes on what the terminal has sent to all
            now[0] = seconds
            os.kill(os.getpid(), signal.SIGTERM)
            assert not codes
        now[0] = 2.0
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [128 + signal.SIGINT]
        assert request.agreed()
        os.kill(os.getpid(), signal.SIGINT)  # from then on the run saves: it is not to be disturbed
    assert codes == [128 + signal.SIGINT]


# A job whose checkpoints take a while to write; MARK appears when one begins.
SLOW_SAVE = """
import sys, time
import main_pretrain
from util import checkpoint
from util.args import run_job
save = checkpoint.save
def slow_save(*arguments):
    open(sys.argv.pop(), 'w').close()
    time.sleep(4)
    save(*arguments)
checkpoint.save = slow_save
run_job(main_pretrain.main, main_pretrain.get_parser(), sys.argv[1:-1])
"""


@pytest.mark.parametrize(
    'target', ['rank 1', 'torchrun', *(pytest.param(name, marks=pytest.mark.slow) for name in ('rank 0', 'all'))]
)
def test_all_processes_wait_until_the_checkpoint_is_written(target, small_run, tmp_path):
    """Two processes, a slow save, a signal at one of them or at their launcher, and more signals during the save."""
    script, mark, log = tmp_path / 'slow_save.py', tmp_path / 'mark', tmp_path / 'run/log.jsonl'
    script.write_text(SLOW_SAVE)
    flags = [script, *small_run('run', '--epochs', '300'), mark]
    if target == 'torchrun':
        launcher = torchrun('--standalone', '--nproc_per_node=2', *flags, stdout=subprocess.DEVNULL)
        targets = jobs = [launcher]
    else:
        where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}
        jobs = [
            subprocess.Popen(
                [sys.executable, *map(str, flags)],
                env={**os.environ, **where, 'PYTHONPATH': str(ROOT), 'RANK': rank, 'LOCAL_RANK': rank},
                stdout=subprocess.DEVNULL,
            )
            for rank in ('0', '1')
        ]
        targets = {'rank 0': jobs[:1], 'rank 1': jobs[1:], 'all': jobs}[target]
    wait_for(lambda: log.exists() and log.read_text().count('loss') > 2)
    for job in targets:
        job.send_signal(signal.SIGUSR1 if target == 'rank 1' else signal.SIGTERM)
    wait_for(mark.exists)
    time.sleep(1.5)  # after a second a further signal would end a process at once
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    codes = [job.wait(timeout=100) for job in jobs]
    assert codes == [75, 75] if target != 'torchrun' else codes[0] != 0
    assert Result(tmp_path / 'run').checkpoint['step'] > 2
    assert not (tmp_path / 'run/checkpoint-writing.tmp').exists()


def wait_for(condition, seconds=100):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def test_a_signal_at_the_end_of_an_epoch_keeps_its_checkpoint(pretrain, at_step):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        pretrain('cut', '--keep_every', '1')
    result = pretrain('cut', '--keep_every', '1')
    assert torch.load(result.output_dir / 'checkpoint-0001.pth', weights_only=True)['step'] == 4
    assert [entry['step'] for entry in result.entries if 'val_loss' in entry] == [4, 8, 12]


# --- One run in a directory -----------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_has_ended(pretrain, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    hold = 'import sys, time; from util.checkpoint import lock; f = lock(sys.argv[1]); print("held"); time.sleep(600)'
    holder = subprocess.Popen(
        [sys.executable, '-u', '-c', hold, tmp_path / 'run'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(SystemExit) as exit:
            pretrain('run')
        assert exit.value.code == 2
        assert f'in use by process {holder.pid} on' in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert len(pretrain('run', '--epochs', '1').losses) == 4


# --- Disk -----------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    checkpoint.save({'step': 1}, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            checkpoint.save({'step': 2, 'model': torch.zeros(100_000)}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ['checkpoint-last.pth']
    assert torch.load(tmp_path / 'checkpoint-last.pth', weights_only=True) == {'step': 1}


def test_training_goes_on_without_disk_and_saves_later(pretrain, monkeypatch, capsys):
    save, calls = checkpoint.save, []

    def save_on_a_full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(*arguments)

    monkeypatch.setattr(checkpoint, 'save', save_on_a_full_disk)
    result = pretrain('run', '--save_every', '2')
    assert capsys.readouterr().out.count('cannot save') == 1
    assert result.checkpoint['step'] == len(result.losses) == 12


def test_the_end_that_cannot_be_saved_is_an_error(pretrain, monkeypatch, capsys, tmp_path):
    first = pretrain('run', '--epochs', '1').checkpoint
    full = OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save', lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--epochs', '2', '--force_resume')
    assert exit.value.code == 1
    assert 'step 8: cannot save in' in capsys.readouterr().err
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
    assert capsys.readouterr().out.count('cannot write the log') == 1 and result.checkpoint['step'] == 4


def test_a_log_that_cannot_be_opened_is_one_line(pretrain, capsys, tmp_path):
    (tmp_path / 'run/log.jsonl.tmp').mkdir(parents=True)
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2 and f'{tmp_path}/run: Is a directory\n' in capsys.readouterr().err


# --- Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_an_update_that_is_not_finite_is_skipped(what, pretrain, at_step, tmp_path, monkeypatch):
    """Step 12 fails, so the weights must be those after step 11, of a run that is stopped there."""
    broken = []
    at_step(11, lambda: broken.append(True))
    forward = MaskedAutoencoderMFF.forward_loss

    def forward_loss(self, imgs, pred, mask):
        loss = forward(self, imgs, pred, mask)
        if not broken or not torch.is_grad_enabled():
            return loss
        if what == 'loss':
            return loss + float('inf')  # whose gradient is finite
        pred.register_hook(lambda gradient: gradient * float('nan'))
        return loss

    monkeypatch.setattr(MaskedAutoencoderMFF, 'forward_loss', forward_loss)
    skipped = pretrain('skipped')
    entry = [entry for entry in skipped.entries if 'loss' in entry][-1]
    assert entry['skipped'] == 1 and entry['loss'] is None and skipped.checkpoint['step'] == 12
    monkeypatch.undo()
    at_step(11, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        pretrain('stopped')
    assert same_weights(skipped, Result(tmp_path / 'stopped'))


def test_skipped_steps_are_counted_in_a_row():
    run = Namespace(
        device=torch.device('cpu'),
        schedule=Namespace(num_images=1000, total_batch_size=4),
        args=Namespace(seed=3),
        scaler=distributed.UnitScaler('cpu', init_scale=1.0),
    )
    (keys,) = data.BatchStream(1000, 4, 4, 3, 20, 21)
    first = ', '.join(f'{index}.png' for _, index in keys)
    source = Namespace(path=lambda index: f'{index}.png')
    loader = Namespace(batches=Namespace(dataset=Namespace(source=source)))
    meter = Meter(run, loader, print)
    meter.check_skipped(list(range(0, 19)))
    meter.check_skipped(list(range(20, 39)))
    with pytest.raises(FloatingPointError, match=f'20 updates in a row, steps 21 to 40, .* Step 21 began with {first}'):
        meter.check_skipped([39])


# --- Several processes ----------------------------------------------------------------------------------------

# A job that does something at a step of one process, once.
VICTIM = """
import os, signal, sys
import main_pretrain
from util.args import run_job
from util.errors import RunError
from util.log import Log
advance = Log.advance
def advance_and_act(log):
    advance(log)
    if os.environ['RANK'] == '1' and log.steps_done == 6 and not os.path.exists(MARK):
        open(MARK, 'w').close()
        ACTION
Log.advance = advance_and_act
run_job(main_pretrain.main, main_pretrain.get_parser())
"""


def victim(tmp_path, action):
    path = tmp_path / 'victim.py'
    path.write_text(VICTIM.replace('MARK', repr(str(tmp_path / 'mark'))).replace('ACTION', action))
    return path


def torchrun(*arguments, stdout=subprocess.PIPE, **variables):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def test_a_process_that_fails_stops_all_with_its_message(small_run, tmp_path):
    script = victim(tmp_path, 'raise RunError("the disk of this process is gone")')
    job = torchrun('--standalone', '--nproc_per_node=2', script, *small_run('failed'))
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 1
    assert 'error: process 1: the disk of this process is gone' in output


def test_a_signal_at_one_process_stops_all(pretrain, small_run, tmp_path):
    script = victim(tmp_path, 'os.kill(os.getpid(), signal.SIGUSR1)')
    job = torchrun('--standalone', '--nproc_per_node=2', script, *small_run('cut'))
    output, _ = job.communicate(timeout=300)
    assert 'Stopped after step 7 of 12' in output  # agreed on a step later
    assert Result(tmp_path / 'cut').checkpoint['step'] == 7
    assert close_weights(pretrain('cut'), pretrain('whole'))


BREAK_THE_NEXT_LOSS = """
from models_mff import MaskedAutoencoderMFF
forward_loss = MaskedAutoencoderMFF.forward_loss
def forward_loss_once(self, *arguments):
    MaskedAutoencoderMFF.forward_loss = forward_loss
    return forward_loss(self, *arguments) + float('inf')
MaskedAutoencoderMFF.forward_loss = forward_loss_once
"""


def test_an_update_is_skipped_by_all_processes(pretrain, small_run, at_step, tmp_path):
    """A loss that is infinite in one of two processes, against one process, whose loss is infinite then."""
    script = victim(tmp_path, f'exec({BREAK_THE_NEXT_LOSS!r}, {{}})')
    job = torchrun('--standalone', '--nproc_per_node=2', script, *small_run('two'))
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    at_step(6, lambda: exec(BREAK_THE_NEXT_LOSS, {}))
    one, two = pretrain('one'), Result(tmp_path / 'two')
    for result in (one, two):
        assert [entry['step'] for entry in result.entries if entry.get('skipped') == 1] == [7]
    assert close_weights(one, two)


def test_torchrun_restarts_a_killed_process(pretrain, small_run, tmp_path):
    script = victim(tmp_path, 'os.kill(os.getpid(), signal.SIGKILL)')
    flags = (
        '--standalone',
        '--nproc_per_node=2',
        '--max_restarts=1',
        script,
        *small_run('killed', '--save_every', '2'),
    )
    output, _ = torchrun(*flags, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1').communicate(timeout=300)
    assert re.findall(r'steps (\d+) to 12', output) == ['0', '4'], output
    job = torchrun('--standalone', '--nproc_per_node=2', 'main_pretrain.py', *small_run('unharmed'))
    job.communicate(timeout=300)
    assert same_weights(Result(tmp_path / 'killed'), Result(tmp_path / 'unharmed'))


def test_restarts_that_would_fail_are_refused(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    with pytest.raises(InputError, match='unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'):
        distributed.start('cpu')


@pytest.mark.parametrize('rendezvous', ['c10d', pytest.param('static', marks=pytest.mark.slow)])
def test_two_machines_train_as_one_process(rendezvous, pretrain, small_run, tmp_path):
    """Two torchrun agents on loopback with two processes each."""
    port = free_port()
    flags = small_run('machines', '--batch_size', '4')
    agents = []
    for node in (0, 1):
        where = {
            'c10d': ['--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=7'],
            'static': [f'--node_rank={node}', '--master_addr=127.0.0.1', f'--master_port={port}'],
        }[rendezvous]
        agents.append(torchrun('--nnodes=2', '--nproc_per_node=2', *where, 'main_pretrain.py', *flags))
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert any('4 x 4 processes x 1 accumulated' in output for output in outputs)
    alone = pretrain('alone')
    assert Result(tmp_path / 'machines').losses == pytest.approx(alone.losses, rel=1e-5)
    assert close_weights(Result(tmp_path / 'machines'), alone)


# --- Killed again and again -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kills, epochs', [(4, 6), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, epochs, pretrain, small_run, tmp_path):
    """SIGKILL at random moments, saving after every step, each time with another number of workers."""
    whole = pretrain('whole', '--epochs', str(epochs))
    rng = random.Random(kills)
    survived = 0
    while True:
        flags = small_run(
            'killed', '--epochs', str(epochs), '--save_every', '1', '--num_workers', str(rng.randrange(3))
        )
        child = fork(flags)
        if survived < kills:
            before, began = last_step(tmp_path / 'killed'), time.monotonic()
            while last_step(tmp_path / 'killed') <= before and time.monotonic() - began < 60:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        survived += 1
    assert survived == kills
    assert same_weights(whole, Result(tmp_path / 'killed'))
    steps = [entry['step'] for entry in Result(tmp_path / 'killed').entries if 'loss' in entry]
    assert steps == list(range(1, 4 * epochs + 1))


def fork(flags):
    """Start main_pretrain in a process group of its own; a fork of this process, which has everything imported."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    code = 1
    try:
        run_job(main_pretrain.main, main_pretrain.get_parser(), flags)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        os._exit(code)


def last_step(output_dir):
    """Of the newest whole checkpoint, 0 without one; a file that is just being replaced counts as before."""
    path = output_dir / 'checkpoint-last.pth'
    try:
        return torch.load(path, weights_only=True)['step']
    except (OSError, RuntimeError, EOFError):
        return 0
