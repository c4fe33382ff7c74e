"""Runs of main_pretrain.py, whole: what they write, and that their course depends on nothing but the recipe."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import Result, command

import main_pretrain
from util import checkpoint, data, distributed, sources, transforms, visualize
from util.args import run_job


def test_a_run_trains_and_leaves_everything(pretrain, capsys):
    result = pretrain('run', '--epochs', '6')
    losses = list(result.losses.values())
    assert len(losses) == 24 and sum(losses[-4:]) < 0.97 * sum(losses[:4])
    entry = result.entries[-2]
    assert {'step', 'epoch', 'loss', 'lr', 'grad_norm', 'images_per_s', 'data_wait', 'fusion/layer_00'} <= entry.keys()
    assert sum(value for name, value in entry.items() if name.startswith('fusion/')) == pytest.approx(1)
    val_losses = [entry['val_loss'] for entry in result.entries if 'val_loss' in entry]
    assert len(val_losses) == 6 and val_losses[-1] < val_losses[0]
    files = {path.name for path in result.output_dir.iterdir()}
    assert {'checkpoint-last.pth', 'log.jsonl', 'reconstruction.png'} <= files
    assert any(name.startswith('events.out.tfevents') for name in files)
    state = result.checkpoint
    assert (
        state['step'] == 24
        and state['epoch'] == 6
        and state['args']['model'] == 'vit_nano_patch4'
        and state['sizes']['img_size'] == [16, 16]
    )
    printed = capsys.readouterr().out
    assert 'Done' in printed and 'tensorboard --logdir' in printed and 'reconstruct' in printed


def test_tensorboard_holds_the_curves(pretrain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = pretrain('run', '--epochs', '1')
    events = EventAccumulator(str(result.output_dir))
    events.Reload()
    tags = events.Tags()
    assert {'train/loss', 'train/lr', 'train/grad_norm', 'val/loss', 'fusion/layer_03'} <= set(tags['scalars'])
    assert tags['images'] == ['reconstruction']
    written = {event.step: event.value for event in events.Scalars('train/loss')}
    assert written == pytest.approx(result.losses)


def test_number_of_workers_changes_nothing(pretrain):
    runs = [pretrain(f'workers{n}', '--num_workers', str(n)) for n in (0, 1, 3)]
    assert runs[0].losses == runs[1].losses == runs[2].losses


@pytest.mark.parametrize('accumulation, processes', [(2, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_number_of_processes_changes_nothing(pretrain, small_run, tmp_path, accumulation, processes):
    alone = pretrain('alone', '--batch_size', '4')  # one process, four accumulation steps
    arguments = small_run('many', '--batch_size', '4')
    done = command('main_pretrain.py', *arguments, torchrun=processes)
    assert done.returncode == 0, done.stderr
    assert f'4 x {processes} processes x {accumulation} accumulated' in done.stdout
    assert Result(tmp_path / 'many').losses == pytest.approx(alone.losses, rel=1e-5)
    theirs = Result(tmp_path / 'many').checkpoint['model']
    for name, tensor in alone.checkpoint['model'].items():
        if not name.endswith('qkv.bias'):  # the key's third has no gradient but rounding, which Adam amplifies
            assert torch.allclose(tensor, theirs[name], atol=2e-5), name


def test_resumed_in_mid_epoch_is_uninterrupted(pretrain, kill_after_saving):
    whole = pretrain('whole')
    kill_after_saving(pretrain, 'cut', '--save_every', '3', '--num_workers', '1')
    resumed = pretrain('cut', '--num_workers', '2', '--batch_size', '16')
    assert resumed.losses == whole.losses  # 12 steps, each once
    for name, tensor in whole.checkpoint['model'].items():
        assert torch.equal(tensor, resumed.checkpoint['model'][name]), name


def test_resumed_from_a_device_without_fused_kernels(pretrain):
    """As from MPS: AdamW's step may be on the CPU and of any type, and fused kernels want it where the weights are."""
    whole = pretrain('whole', '--epochs', '2')
    half = pretrain('cut', '--epochs', '2', '--keep_every', '1').output_dir / 'checkpoint-0001.pth'
    state = torch.load(half, weights_only=True)
    for group in state['optimizer']['param_groups']:
        group['fused'] = False
    for values in state['optimizer']['state'].values():
        values['step'] = values['step'].double()
    torch.save(state, half)
    resumed = pretrain('resumed', '--epochs', '2', '--resume', str(half), '--keep_every', '1')
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 4}
    optimizer = resumed.checkpoint['optimizer']
    assert all(group['fused'] for group in optimizer['param_groups'])
    assert {values['step'].dtype for values in optimizer['state'].values()} == {torch.float32}


@pytest.mark.parametrize(
    'agreed, message',
    [([], 'the step of the checkpoint to resume (is --output_dir shared?): [0, 1]'), ([0], 'images: [64, 65]')],
)
def test_processes_must_agree(agreed, message, pretrain, monkeypatch, capsys):
    """On the step, and on the number of images: the other process has one more."""
    monkeypatch.setattr(distributed, 'gather', lambda value: [value, value + (value not in agreed)])
    with pytest.raises(SystemExit) as exit:
        pretrain('run')
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_complete_run_has_nothing_to_do(pretrain, capsys):
    first = pretrain('run')
    before = first.checkpoint
    pretrain('run')
    assert 'already complete' in capsys.readouterr().out
    assert first.checkpoint['step'] == before['step'] and len(first.losses) == 12


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_mixed_precision_follows_fp32(pretrain, amp):
    full, mixed = pretrain('full', '--amp', 'none'), pretrain('mixed', '--amp', amp)
    assert mixed.losses == pytest.approx(full.losses, rel=0.02) and mixed.losses != full.losses
    assert ('loss_scale' in mixed.entries[0]) == (amp == 'fp16')


def test_divergence_stops_and_keeps_the_checkpoint(pretrain, capsys):
    before = pretrain('run', '--epochs', '1').checkpoint
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--epochs', '9', '--lr', '1e30', '--warmup_epochs', '0', '--force_resume')
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert '20 updates' in error and '.png' in error and '--amp bf16' in error and error.count('\n') == 1
    after = Result(Path(before['args']['output_dir'])).checkpoint
    assert all(tensor.isfinite().all() for tensor in after['model'].values())


def test_checkpoints_are_due(monkeypatch):
    """Every N steps, minutes or epochs, and at the end, on a clock of our own: a step takes 20 s and saving 3 s."""
    for every, expected in [
        ((4, ''), [4, 8, 12, 16, 20]),
        ((1.5, 'min'), [5, 10, 15, 20]),
        ((0.9, 'min'), [3, 6, 9, 12, 15, 18, 20]),
        ((2, 'ep'), [10, 20]),
        ((100, ''), [20]),
    ]:
        now, saved = [0.0], []
        monkeypatch.setattr('time.monotonic', lambda now=now: now[0])

        def save(state, output_dir, name, now=now, saved=saved):
            saved.append(state['step'])
            now[0] += 3

        monkeypatch.setattr(checkpoint, 'save', save)
        layer = torch.nn.Linear(1, 1)
        run = Namespace(
            args=Namespace(save_every=every, keep_every=None, output_dir='none'),
            schedule=Namespace(total_steps=20, steps_per_epoch=5),
            rank=0,
            scaler=torch.amp.GradScaler('cpu'),
            record={},
        )
        saver = checkpoint.Saver(run, layer, torch.optim.SGD(layer.parameters()), print)
        for step in range(1, 21):
            now[0] += 20
            if saver.due(step):
                saver.save(step)
        assert saved == expected, every


def test_kept_checkpoints(pretrain):
    result = pretrain('run', '--keep_every', '2', '--epochs', '4')
    steps = {path.name: torch.load(path, weights_only=True)['step'] for path in result.output_dir.glob('*.pth')}
    assert steps['checkpoint-0002.pth'] == 8 and steps['checkpoint-0004.pth'] == steps['checkpoint-last.pth'] == 16


@pytest.mark.parametrize('workers', ['0', '2'])
def test_bad_images_are_replaced_listed_and_limited(workers, pretrain, folder, tmp_path, capsys):
    images = sorted((folder / 'train').rglob('*.png'))
    names = [f'broken{number}.png' for number in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(images[5].read_bytes()[:60])
    (tmp_path / 'list.txt').write_text('\n'.join([*map(str, images[:40]), *names]))
    flags = ['--data_path', str(tmp_path / 'list.txt'), '--total_batch_size', '45', '--num_workers', workers]
    result = pretrain('run', *flags, '--max_bad', '0.2')
    assert [entry['bad_images'] for entry in result.entries if 'loss' in entry] == [5, 5, 5]
    lines = (result.output_dir / 'bad_images.txt').read_text().splitlines()  # each once in three epochs
    assert sorted(line.split('\t')[0] for line in lines) == [str(tmp_path / name) for name in names]
    with pytest.raises(SystemExit) as exit:
        pretrain('stopped', *flags, '--num_workers', '0')  # an exit with workers would end the tests
    assert exit.value.code == 1
    assert '5 of 45 images cannot be read, more than --max_bad 0.01' in capsys.readouterr().err


@pytest.mark.parametrize('count', [1, 5, 8, 2000])
def test_pictures_are_of_different_images(count):
    source = sources.Shapes('val')
    source.labels = source.labels[:count]
    samples = data.Samples(source, transforms.centre_transform((32, 32)), 64)
    imgs, noise = main_pretrain.examples(samples, (torch.zeros(3), torch.ones(3)), torch.device('cpu'))
    assert len(imgs) == len(noise) == len(imgs.flatten(1).unique(dim=0)) == min(8, count)


def test_resume_notices_other_data(pretrain, folder, capsys):
    pretrain('run', '--epochs', '1')
    with pytest.raises(SystemExit):
        pretrain('run', '--epochs', '1', '--data_path', str(folder / 'val'))
    assert '64 -> 20 images' in capsys.readouterr().err


def test_fp16_resumes_exactly(pretrain):
    whole = pretrain('whole', '--amp', 'fp16', '--epochs', '2')
    pretrain('cut', '--amp', 'fp16', '--epochs', '2', '--keep_every', '1')
    half = str(whole.output_dir.parent / 'cut/checkpoint-0001.pth')
    resumed = pretrain('again', '--amp', 'fp16', '--epochs', '2', '--resume', half, '--force_resume')
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 4}


def test_rectangles_greyscale_and_mae_crop(pretrain):
    result = pretrain('run', '--input_size', '12', '16', '--in_chans', '1', '--crop', 'rrc', '--fuse_layers', '3')
    assert result.checkpoint['model']['patch_embed.proj.weight'].shape == (64, 1, 4, 4)
    assert result.checkpoint['model']['pos_embed'].shape == (1, 1 + 3 * 4, 64)
    assert not [name for name in result.checkpoint['model'] if 'fuse' in name]


def test_visualize_reads_the_checkpoint(pretrain, folder, tmp_path):
    from PIL import Image

    output_dir = pretrain('run', '--epochs', '1').output_dir
    image = next((folder / 'val').rglob('*.png'))
    flags = [
        'reconstruct',
        str(output_dir / 'checkpoint-last.pth'),
        '--images',
        str(image),
        '--out',
        str(tmp_path / 'a.png'),
    ]
    run_job(visualize.main, visualize.get_parser(), flags)
    run_job(visualize.main, visualize.get_parser(), ['curves', str(output_dir), '--out', str(tmp_path / 'b.png')])
    for name in ('a.png', 'b.png'):
        assert min(Image.open(tmp_path / name).size) > 100


def test_grad_checkpointing_changes_nothing(pretrain):
    flags = '--epochs', '1', '--amp', 'bf16'
    assert pretrain('checkpointed', *flags, '--grad_checkpointing').losses == pretrain('plain', *flags).losses


@pytest.mark.slow
@pytest.mark.parametrize('flags', [[], ['--grad_checkpointing']], ids=' '.join)
def test_compiled_follows_eager(pretrain, flags):
    eager, compiled = pretrain('eager'), pretrain('compiled', '--compile', *flags)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    assert compiled.checkpoint['model'].keys() == eager.checkpoint['model'].keys()


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_epoch(pretrain):
    """With validation, whose last batch is smaller, and a picture."""
    from torch._dynamo.utils import counters

    def graphs(epochs):
        torch._dynamo.reset()
        counters.clear()
        pretrain(f'{epochs} epochs', '--compile', '--epochs', epochs)
        return counters['stats']['unique_graphs']

    assert graphs('3') == graphs('1') > 1


def test_compiling_without_a_compiler_is_said(small_run, tmp_path):
    flags = small_run('run', '--compile')
    done = command('main_pretrain.py', *flags, CXX='/no/compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    assert done.returncode == 2
    assert re.search(r'^main_pretrain.py: error: --compile does not work .*; --no-compile [^\n]+$', done.stderr, re.M)
    assert 'Traceback' not in done.stderr
    assert not main_pretrain.get_parser().parse_args([*flags, '--no-compile']).compile


# --- A user's mistakes: one line, exit code 2, before anything is started --------------------------------------

MISTAKES = {
    'no such folder or file': ['--data_path', 'nowhere'],
    'no image in it': ['--data_path', '{empty}'],
    'none of its first 3 images can be read': ['--data_path', '{broken}'],
    'no such data set': ['--data_path', 'torch/imaginary'],
    'download failed': ['--data_path', 'torch/cifar10', '--download_dir', '{empty}'],
    'not a text file that lists images': ['--data_path', '{empty_list}'],
    'not a multiple of patch size': ['--input_size', '18'],
    'image size 2 x 2': ['--input_size', '2'],
    'one side, or height and width': ['--input_size', '16', '16', '16'],
    "no model 'vit'; there are vit_nano_patch4": ['--model', 'vit'],
    'unrecognized arguments: --mask_ration': ['--mask_ration', '0.5'],
    'must end with the last block, which is 3': ['--fuse_layers', '0', '4'],
    'must be increasing': ['--fuse_layers', '2', '1', '3'],
    "'many' is not a whole number": ['--epochs', 'many'],
    "'nan' is not a number": ['--lr', 'nan'],
    "'1.5' is not a number from 0 to 1": ['--mask_ratio', '1.5'],
    'leaves none visible': ['--mask_ratio', '0.99'],
    '--batch_size 1, 17 would do': ['--batch_size', '6', '--total_batch_size', '17'],
    'too few for one step': ['--total_batch_size', '65'],
    '--mean has 2 numbers': ['--mean', '0.5', '0.5'],
    'an image file has 1 or 3 channels': ['--in_chans', '4'],
    'cannot write there': ['--output_dir', '/dev/null/output'],
    'missing.pth: No such file': ['--resume', 'missing.pth'],
    'not a weights file': ['--resume', '{broken}/0.jpg'],
    'missing.txt: No such file': ['@missing.txt'],
    'no such device': ['--device', 'abacus'],
}


@pytest.mark.parametrize('message', MISTAKES)
def test_a_mistake_gets_one_line_and_code_2(message, pretrain, tmp_path, capsys, monkeypatch):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    for index in range(3):
        (tmp_path / f'broken/{index}.jpg').write_text('not an image')
    (tmp_path / 'list.txt').write_text('\n# nothing\n')
    monkeypatch.setattr('util.distributed.start', lambda name: pytest.fail('a device was started'))
    places = {'empty': tmp_path / 'empty', 'broken': tmp_path / 'broken', 'empty_list': tmp_path / 'list.txt'}
    with pytest.raises(SystemExit) as exit:
        pretrain('run', *(flag.format(**places) for flag in MISTAKES[message]))
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert message in printed.err and re.fullmatch(r'[^\n]*error: [^\n]+\n', printed.err), printed.err


def test_total_batch_that_does_not_divide_over_processes(pretrain, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--total_batch_size', '17')
    assert exit.value.code == 2 and '17 cannot be split over 2 processes; 16 or 18 can' in capsys.readouterr().err


def test_damaged_checkpoint_falls_back_to_the_previous(pretrain, capsys):
    result = pretrain('run', '--save_every', '2', '--epochs', '2')
    whole = result.checkpoint
    last = result.output_dir / 'checkpoint-last.pth'
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    last.write_bytes(content)
    again = pretrain('run', '--save_every', '2', '--epochs', '2')
    assert 'damaged' in capsys.readouterr().out
    assert all(torch.equal(tensor, again.checkpoint['model'][name]) for name, tensor in whole['model'].items())


def test_parser_reads_recipes_with_comments(tmp_path):
    recipe = tmp_path / 'recipe.txt'
    recipe.write_text('# a comment\n--data_path "a folder"  # another\n\n--epochs 5 --lr 1e-3\n')
    args = main_pretrain.get_parser().parse_args([f'@{recipe}', '--epochs', '7'])
    assert (args.data_path, args.epochs, args.lr) == ('a folder', 7, 1e-3)
