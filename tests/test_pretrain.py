"""Runs of main_pretrain.py, whole: what they write, and that nothing but the recipe decides it."""

import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Processes, Result, read_val, same_weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import v2

import engine
import main_finetune
import main_linprobe
import main_pretrain
from models_mff import MaskedAutoencoderMFF, model_sizes
from util import checkpoint, data
from util.errors import InputError
from util.log import Log
from util.shapes import Shapes
from util.sources import Part

CPU = torch.device('cpu')


# --- What a run leaves ----------------------------------------------------------------------------


def test_a_run_trains_and_leaves_everything(whole):
    losses, val_losses = (list(whole.values(name).values()) for name in ('loss', 'val_loss'))
    assert len(losses) == 12 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert len(val_losses) == 3 and val_losses[2] < val_losses[0]
    assert sum(whole.entries[-1][f'fusion/layer_0{i}'] for i in range(4)) == pytest.approx(1)
    state = whole.checkpoint
    assert state['step'] == 12 and state['args']['model'] == 'vit_nano_patch4'
    assert state['sizes']['img_size'] == [16, 16] and state['num_images'] == 64
    assert Image.open(whole.output_dir / 'reconstruction.png').size > (100, 100)

    events = EventAccumulator(str(whole.output_dir))
    events.Reload()
    tags = events.Tags()
    assert {'train/lr', 'train/grad_norm', 'val/loss', 'fusion/layer_03'} <= set(tags['scalars'])
    assert tags['images'] == ['reconstruction']
    written = {event.step: event.value for event in events.Scalars('train/loss')}
    assert written == pytest.approx(whole.losses)


LOGGED = [[0, 1], [2, 3], [4], [5], [6, 7], [8, 9]]  # steps of a line: two, or the end of an epoch


@pytest.fixture(scope='module')
def watched(folder, tmp_path_factory):
    """(Result, losses of the micro-batches of each step, its norm of the gradient) of a run.

    Two epochs of five steps, each of two micro-batches of six images. The clock stands still but
    for 0.1 s for each image that is loaded, and 1 + i s for a forward pass of step i.
    """
    clock, losses, norms = [0.0], [[] for _ in range(10)], []
    step, get_sample = engine.optimizer_step, data.Samples.__getitem__

    def keep_norm(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters)))

    def watched_step(run, loss_fn, loader):
        def watched_loss(*batch):
            clock[0] += 1 + run.step
            losses[run.step].append(loss_fn(*batch))
            return losses[run.step][-1]

        hook = run.optimizer.register_step_pre_hook(keep_norm)
        result = step(run, watched_loss, loader)
        hook.remove()
        return result

    def sample(samples, key):
        clock[0] += 0.1
        return get_sample(samples, key)

    output_dir = tmp_path_factory.mktemp('watched')
    flags = (
        '--model vit_nano_patch4 --input_size 16 --depth 2 --total_batch_size 12 --batch_size 6 '
        '--warmup_epochs 1 --epochs 2 --lr 0.01 --min_lr 1e-3 --log_every 2 --num_workers 0 '
        '--device cpu --mean 0.3 0.4 0.5 --std 0.2 0.25 0.35 --knn_every 2 --keep_every 1 '
        f'--data_path {folder} --output_dir {output_dir}'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, 'optimizer_step', watched_step)
        patch.setattr(data.Samples, '__getitem__', sample)
        patch.setattr('time.perf_counter', lambda: clock[0])
        main_pretrain.main(main_pretrain.get_parser().parse_args(flags.split()))
    return Result(output_dir), losses, norms


def test_the_log_tells_of_all_images(watched):
    """Loss: the mean since the last line. Norm of the gradient: the last step's. Rates, speed."""
    result, losses, norms = watched
    rates = [0.01 * (1e-4 + (1 - 1e-4) * step / 4) for step in range(5)]
    rates += [0.001 + 0.009 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    for steps in LOGGED:
        seconds = sum(1.2 + 2 * (1 + step) for step in steps)
        expected = {
            'loss': sum(sum(losses[step]).item() for step in steps) / (2 * len(steps)),
            'grad_norm': norms[steps[-1]],
            'lr': rates[steps[-1]],
            'images_per_s': 12 * len(steps) / seconds,
            'data_wait': 1.2 * len(steps) / seconds,
        }
        found = {name: result.values(name)[steps[-1] + 1] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3)
    assert len(result.losses) == len(LOGGED)


def test_validation_is_that_of_the_files(watched, folder):
    """With the masks that (seed 0, epoch 0, index) draw."""
    result, *_ = watched
    model = MaskedAutoencoderMFF(**model_sizes('vit_nano_patch4', img_size=16, depth=2))
    _, images, _ = read_val(folder, 16, v2.InterpolationMode.BILINEAR)
    noise = []
    for index in range(20):
        data.seed_generators(0, 0, index)
        noise.append(torch.rand(16))
    expected = {}
    for epoch in (1, 2):
        path = result.output_dir / f'checkpoint-000{epoch}.pth'
        model.load_state_dict(torch.load(path, weights_only=True)['model'])
        expected[5 * epoch] = model(images, 0.75, torch.stack(noise))[0].item()
    assert result.values('val_loss') == pytest.approx(expected, rel=1e-4)
    assert result.values('val_knn_cls').keys() == result.values('val_knn_patches').keys() == {0, 10}


# --- What changes nothing -------------------------------------------------------------------------


def test_number_of_workers_changes_nothing(whole, pretrain):
    """Nor does computing activations again."""
    other = pretrain('other', '--num_workers', '2', '--grad_checkpointing')
    assert same_weights(other, whole) and other.values('val_loss') == whole.values('val_loss')


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_and_micro_batches_change_nothing(processes, whole, small_run, tmp_path):
    """Two as torchrun starts them, four as srun does."""

    def by_srun(rank):
        pairs = {'RANK': 'PROCID', 'LOCAL_RANK': 'LOCALID', 'WORLD_SIZE': 'NTASKS'}
        for ours, slurms in pairs.items():
            os.environ[f'SLURM_{slurms}'] = os.environ.pop(ours)

    flags = small_run('many', '--batch_size', '4')
    before = by_srun if processes == 4 else None
    job = Processes(main_pretrain, *[flags] * processes, before=before)
    assert job.wait() == [0] * processes, job.printed(errors=True)
    micro_steps = 4 // processes
    assert f'= 4 x {processes} processes x {micro_steps} accumulated' in job.printed()
    many = Result(tmp_path / 'many')
    assert many.losses == pytest.approx(whole.losses, rel=1e-5)
    assert many.values('val_loss') == pytest.approx(whole.values('val_loss'), rel=1e-5)
    assert same_weights(many, whole, atol=2e-5)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_mixed_precision_follows_fp32_and_resumes_exactly(amp, whole, pretrain, stop_at):
    flags = '--amp', amp, '--epochs', '1'
    mixed, fp32 = pretrain('mixed', *flags), list(whole.losses.values())[:4]
    assert list(mixed.losses.values()) == pytest.approx(fp32, rel=0.02)
    assert list(mixed.losses.values()) != fp32
    assert ('loss_scale' in mixed.entries[0]) == (amp == 'fp16')
    stop_at(2, pretrain, 'cut', *flags)
    assert pretrain('cut', *flags).losses == mixed.losses


@pytest.mark.slow
def test_compiled_follows_eager(whole, pretrain):
    compiled = pretrain('compiled', '--compile', '--grad_checkpointing')
    assert compiled.losses == pytest.approx(whole.losses, rel=1e-4)
    assert compiled.checkpoint['model'].keys() == whole.checkpoint['model'].keys()


def test_compiling_without_a_compiler_is_one_line(pretrain, monkeypatch, error_of):
    def compiled(*_):
        raise RuntimeError('InvalidCxxCompiler: no C++ compiler\nSet TORCHDYNAMO_VERBOSE=1')

    monkeypatch.setattr(torch, 'compile', lambda function: compiled)
    assert 'no C++ compiler' in error_of(pretrain, 'run', '--compile')


def test_other_inputs_and_models(pretrain):
    flags = '--input_size 12 16 --in_chans 1 --crop rrc --fuse_layers 3 --epochs 1'
    state = pretrain('run', *flags.split()).checkpoint
    assert state['model']['patch_embed.proj.weight'].shape == (64, 1, 4, 4)
    assert state['model']['pos_embed'].shape == (1, 1 + 3 * 4, 64)
    assert not [name for name in state['model'] if 'fuse' in name] and state['mean'] == [0.5]


@pytest.mark.parametrize('chunk', [2**25, 200])
def test_nearest_neighbours_by_hand(chunk, monkeypatch):
    """Votes of exp(cosine / 0.07) of the k nearest, also when the bank comes in chunks."""
    torch.manual_seed(0)
    bank, queries, labels = torch.randn(50, 8), torch.randn(20, 8), torch.randint(0, 5, (50,))
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=-1)
    expected = []
    for row in cosine:
        nearest, votes = row.argsort(descending=True)[:7], [0.0] * 5
        for index in nearest.tolist():
            votes[labels[index]] += math.exp(row[index] / 0.07)
        expected.append(votes.index(max(votes)))
    monkeypatch.setattr(engine, 'MOST_COSINES', chunk)
    assert engine.nearest_neighbours(bank, labels, queries, 7, CPU).tolist() == expected
    part = engine.spread(labels.numpy(), 10)
    assert len(set(part)) == 10 and len(labels[part].unique()) == 5


# --- Resuming -------------------------------------------------------------------------------------


def test_resumed_in_mid_epoch_is_uninterrupted(whole, pretrain, stop_at, tmp_path):
    """With other workers, another batch per device, and from one without fused kernels, as MPS:
    AdamW's step may be of any type, and fused kernels want theirs."""
    stop_at(6, pretrain, 'cut')
    path = tmp_path / 'cut/checkpoint-last.pth'
    state = torch.load(path, weights_only=True)
    for group in state['optimizer']['param_groups']:
        group['fused'] = False
    for values in state['optimizer']['state'].values():
        values['step'] = values['step'].double()
    torch.save(state, path)
    resumed = pretrain('cut', '--num_workers', '2', '--batch_size', '16')
    assert same_weights(resumed, whole) and resumed.losses == whole.losses
    assert all(group['fused'] for group in resumed.checkpoint['optimizer']['param_groups'])


def test_a_run_of_an_early_version_resumes_and_loads(pretrain, finetune, tmp_path):
    old = torch.load(Path(__file__).parent / 'data/old_run.pt', weights_only=True)
    (tmp_path / 'run').mkdir()
    torch.save(old['checkpoint'], tmp_path / 'run/checkpoint-last.pth')
    sizes = '--embed_dim 16 --depth 2 --num_heads 2 --decoder_embed_dim 8 --decoder_num_heads 2 '
    result = pretrain('run', *sizes.split(), '--patch_size', '4')
    theirs = {step: loss for step, loss in old['losses'].items() if step > 4}
    assert result.losses == pytest.approx(theirs, rel=1e-4)
    torch.save(old['checkpoint'], tmp_path / 'old.pth')
    frozen = '--epochs 1 --lr 0 --min_lr 0 --init_from'.split()
    tuned = finetune('tuned', *frozen, tmp_path / 'old.pth')
    block = 'blocks.1.mlp.fc1.weight'
    assert torch.equal(tuned.checkpoint['model'][block], old['checkpoint']['model'][block])


FREE = {  # what may change when a run is resumed
    'batch_size', 'compile', 'data_path', 'device', 'download_dir', 'eval_every', 'force_resume',
    'grad_checkpointing', 'keep_every', 'knn_every', 'log_every', 'num_workers', 'output_dir',
    'picture_every', 'report', 'resume', 'save_every', 'val_path',
}  # fmt: skip


@pytest.mark.parametrize('job', [main_pretrain, main_finetune, main_linprobe])
def test_resuming_compares_every_flag_that_changes_the_training(job):
    saver = object.__new__(checkpoint.Saver)
    saver.args = job.get_parser().parse_args([])
    saver.record = {'num_images': 64, 'classes': ['a'], 'batch_size': 8, 'total_batch_size': 16}
    then = {name: checkpoint.plain(value) for name, value in vars(saver.args).items()}
    others = {'num_images': 65, 'classes': ['b'], 'batch_size': 4, 'total_batch_size': 12}
    saver.check_same_run({'args': then, **saver.record})
    for name in then:
        state = {'args': then | {name: 'another'}, **saver.record}
        if name in FREE:
            saver.check_same_run(state)
        else:
            with pytest.raises(InputError, match=f'--{name} another -> '):
                saver.check_same_run(state)
    for name, value in others.items():
        with pytest.raises(InputError, match=re.escape(f'{value} -> {saver.record[name]}')):
            saver.check_same_run({'args': then, **saver.record, name: value})
    saver.args.force_resume = True
    saver.check_same_run({'args': then | {'seed': 9}, **saver.record})


def test_a_damaged_checkpoint_gives_way_to_the_previous(pretrain, tmp_path, capsys, error_of):
    """One flipped bit in the last; then also in the one before."""

    def flip(name):
        content = bytearray((tmp_path / 'run' / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / 'run' / name).write_bytes(content)

    run = 'run', '--epochs', '1', '--save_every', '0'
    state = pretrain(*run).checkpoint['model']
    flip(checkpoint.LAST)
    again = pretrain(*run).checkpoint['model']
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
    assert f'resuming from {tmp_path}/run/{checkpoint.PREVIOUS}' in capsys.readouterr().out
    flip(checkpoint.LAST)
    error = error_of(pretrain, *run)
    assert all(name in error for name in (checkpoint.LAST, checkpoint.PREVIOUS, '--resume none'))


@pytest.mark.parametrize('change', ['shape', 'empty', 'groups', 'model'])
def test_the_state_of_another_run_is_refused(change, whole, pretrain, tmp_path, error_of):
    """A fused kernel would write beyond the end of a tensor of another shape."""
    state = whole.checkpoint
    if change == 'shape':
        state['optimizer']['state'][0]['exp_avg'] = torch.zeros(3)
    elif change == 'groups':
        state['optimizer']['param_groups'].pop()
    elif change == 'empty':
        state['optimizer'] = {}
    else:
        state['model'].popitem()
    torch.save(state, tmp_path / 'other.pth')
    flags = '--resume', tmp_path / 'other.pth', '--force_resume'
    assert 'other.pth' in error_of(pretrain, 'run', *flags)


# --- Checkpoints, pictures, bad images ------------------------------------------------------------


def test_checkpoints_are_saved_every_so_many_minutes_and_kept_every_so_many_epochs(
    pretrain, monkeypatch
):
    """On a clock of our own: a step takes 20 seconds."""
    now, saved = [0.0], []
    monkeypatch.setattr(checkpoint, 'time', Namespace(monotonic=lambda: now[0]))
    write, log_step = checkpoint.write, Log.step

    def watched_write(state, path):
        saved.append((os.path.basename(path), state['step']))
        write(state, path)

    def slow_step(log, *arguments):
        now[0] += 20
        log_step(log, *arguments)

    monkeypatch.setattr(checkpoint, 'write', watched_write)
    monkeypatch.setattr(Log, 'step', slow_step)
    pretrain('run', '--save_every', '1.5', '--keep_every', '2')
    names = 'checkpoint-last.pth', 'checkpoint-0002.pth'
    assert saved == [(names[0], 5), (names[1], 8), (names[0], 8), (names[0], 12)]


@pytest.mark.parametrize('count', [1, 5, 400])
def test_pictures_are_of_different_images(count):
    settings = Namespace(mean=(0.0,) * 3, std=(1.0,) * 3)
    samples = data.Samples(Part(Shapes('val', (32, 32)), range(count)), lambda image: image, 64)
    images, noise = engine.examples(samples, settings, CPU)
    assert len(images) == len(noise) == len(images.flatten(1).unique(dim=0)) == min(8, count)


@pytest.fixture
def broken(folder, tmp_path):
    """broken(n) -> a list of 40 images and n files that are none, and the flags of a run on it."""

    def make(count):
        paths = sorted(map(str, (folder / 'train').rglob('*.png')))[:40]
        bad = [tmp_path / f'broken{number}.png' for number in range(count)]
        for path in bad:
            path.write_bytes(Path(paths[5]).read_bytes()[:60])
        (tmp_path / 'list.txt').write_text('\n'.join([*paths, *map(str, bad)]))
        flags = ['--data_path', tmp_path / 'list.txt', '--val_path', folder / 'val']
        return [*flags, '--total_batch_size', str(40 + count - count % 2), '--epochs', '2']

    return make


def test_a_few_bad_images_are_reported_once_and_counted(broken, pretrain, capfd):
    result = pretrain('run', *broken(3), '--num_workers', '2')
    lines = [line for line in capfd.readouterr().err.splitlines() if 'unreadable' in line]
    assert len(lines) == 3 and all(f'broken{i}.png' in ''.join(lines) for i in range(3))
    counts = result.values('bad_images').values()
    assert len(counts) == 2 and set(counts) <= {2, 3}  # of 43 images, one is left out of an epoch


def test_too_many_bad_images_end_the_run(broken, small_run):
    """Two in each of two processes, of which each alone would go on; started by torchrun."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    job = [*torchrun, 'main_pretrain.py', *small_run('run', *broken(4))]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if 'main_pretrain.py: error' in line]
    assert errors == ['main_pretrain.py: error: process 0: 4 of 44 images cannot be read']
