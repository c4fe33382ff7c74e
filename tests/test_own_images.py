"""The road from a folder of one's own images to a classifier (docs/own_images.md), and the mistakes made on it."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Result
from timm.models.vision_transformer import VisionTransformer

import engine
import main_finetune
import main_linprobe
import main_pretrain
from models_mff import MaskedAutoencoderMFF, model_sizes
from util import export, log, sources
from util.args import run_job
from util.images import read_image
from util.optim import make_schedule

JOBS = {'pretrain': main_pretrain, 'finetune': main_finetune, 'linprobe': main_linprobe}

# Two blocks x 32 for the recipe's six x 192, one epoch of three steps.
TINY = (
    '--input_size 16 --patch_size 4 --embed_dim 32 --depth 2 --num_heads 2 --decoder_embed_dim 32 --decoder_depth 1 '
    '--decoder_num_heads 2'
).split()
SHORT = '--epochs 1 --total_batch_size 16 --num_workers 0 --device cpu'.split()


def start(job, *flags):
    run_job(JOBS[job].main, JOBS[job].get_parser(), list(map(str, flags)))


@pytest.fixture(scope='module')
def images(folder, tmp_path_factory):
    """The 64 labelled images of `folder`, without a validation split."""
    return shutil.copytree(folder / 'train', tmp_path_factory.mktemp('own') / 'images')


@pytest.fixture(scope='module')
def pretrained(images, tmp_path_factory):
    """Result of recipes/small_pretrain.txt on them, at another size."""
    out = tmp_path_factory.mktemp('own_run')
    start('pretrain', '@recipes/small_pretrain.txt', *TINY, *SHORT, '--data_path', images, '--output_dir', out)
    return Result(out)


@pytest.fixture(scope='module')
def finetuned(pretrained, images, tmp_path_factory):
    out = tmp_path_factory.mktemp('own_finetuned')
    flags = ['--data_path', images, '--init_from', pretrained.output_dir / 'checkpoint-last.pth', '--output_dir', out]
    start('finetune', '@recipes/small_finetune.txt', *SHORT, *flags)
    return Result(out)


# --- The road ---------------------------------------------------------------------------------------------------


def test_sizes_of_the_command_line_are_those_of_all_that_follows(pretrained, finetuned, tmp_path):
    sizes = {'img_size': [16, 16], 'patch_size': 4, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    for result in (pretrained, finetuned):
        assert {name: result.checkpoint['sizes'][name] for name in sizes} == sizes
    assert pretrained.checkpoint['sizes']['fuse_layers'] == [0, 1]
    run_job(
        export.main, export.get_parser(), [str(pretrained.output_dir / 'checkpoint-last.pth'), str(tmp_path / 'dir')]
    )
    in_timm = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True)
    assert torch.equal(in_timm.blocks[1].mlp.fc2.weight, pretrained.checkpoint['model']['blocks.1.mlp.fc2.weight'])


def test_both_recipes_hold_out_the_same_images(pretrained, finetuned):
    assert pretrained.checkpoint['num_images'] == finetuned.checkpoint['num_images'] < 64
    assert pretrained.checkpoint['args']['val_share'] == finetuned.checkpoint['args']['val_share'] == 0.1


def test_small_recipes_say_no_size_downstream():
    """They follow the checkpoint of small_pretrain.txt; a rate of --blr would be far too low for their batch."""
    args = {job: JOBS[job].get_parser().parse_args([f'@recipes/small_{job}.txt']) for job in JOBS}
    for job in ('finetune', 'linprobe'):
        assert not [name for name in ('model', 'input_size', 'embed_dim', 'depth') if getattr(args[job], name)]
        assert args[job].init_from == f'{args["pretrain"].output_dir}/checkpoint-last.pth'
    assert all(value.lr and value.total_batch_size <= 64 for value in args.values())


def test_pretraining_ends_with_a_command_that_works(images, pretrained, capsys):
    flags = ['--data_path', images, '--output_dir', pretrained.output_dir]
    start('pretrain', '@recipes/small_pretrain.txt', *TINY, *SHORT, *flags)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if 'main_linprobe.py' in line)
    start('linprobe', *line.split('main_linprobe.py')[1].split(), '--num_workers', '0')
    assert 'on 10 images' in capsys.readouterr().out  # a tenth of each of ten classes of six or seven: one


def test_predictions_of_a_folder_with_a_bad_image(images, finetuned, tmp_path, capsys):
    for name in ('bar/0.png', 'circle/1.png'):
        shutil.copy(images / name, tmp_path)
    (tmp_path / '00.png').write_bytes(b'no image')
    with pytest.raises(SystemExit) as stopped:
        start('finetune', '--predict', tmp_path, '--json', '--init_from', finetuned.output_dir / 'checkpoint-last.pth')
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line['image'] for line in lines] == [str(tmp_path / '0.png'), str(tmp_path / '1.png')]
    assert all(len(line['classes']) == 5 and set(line['classes']) <= set(sources.Shapes.classes) for line in lines)
    assert stopped.value.code == 1 and err == f'{tmp_path / "00.png"}: not an image of a known format\n'


def test_predictions_whose_reader_has_seen_enough(images, finetuned):
    flags = f'--predict {images} --device cpu --init_from {finetuned.output_dir / "checkpoint-last.pth"}'
    shell = f'{sys.executable} main_finetune.py {flags} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ''


def test_features_belong_to_their_names(images, pretrained, tmp_path):
    """Also where an image in between cannot be read: each row against timm's ViT on that image alone."""
    own = shutil.copytree(images, tmp_path / 'own')
    (own / 'circle/0.png').write_bytes(b'no image')
    checkpoint = pretrained.output_dir / 'checkpoint-last.pth'
    out = tmp_path / 'features.npz'
    start('linprobe', '--features', out, '--data_path', own, '--init_from', checkpoint, '--crop_pct', '1',
          '--num_workers', '0', '--device', 'cpu')  # fmt: skip
    found = np.load(out)
    assert len(found['names']) == len(found['labels']) == len(found['cls_token']) == 64
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    state = pretrained.checkpoint['model']
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})
    mean, std = (torch.tensor(pretrained.checkpoint[name])[:, None, None] for name in ('mean', 'std'))
    for row in (0, 20, 63):
        name = found['names'][row]
        assert f'/{found["classes"][found["labels"][row]]}/' in name
        image = read_image(name)  # 20 x 18: the shorter side becomes 16, then the middle
        resized = torch.nn.functional.interpolate(image[None].float(), (17, 16), mode='bicubic', antialias=True)
        tokens = vit.forward_features((resized[:, :, :16].clamp(0, 255) / 255 - mean) / std)
        assert np.abs(tokens[0, 0].detach().numpy() - found['cls_token'][row]).max() < 0.1


@pytest.mark.parametrize(
    'classes, keep_every, checkpoints', [({}, None, 2), ({'classes': ['a', 'b']}, None, 3), ({}, 2, 4)]
)
def test_disk_is_that_of_the_files(classes, keep_every, checkpoints):
    sizes = model_sizes('vit_nano_patch4', embed_dim=256, depth=6)
    model = MaskedAutoencoderMFF(**sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 32, 32))[0].backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, file)
    args = types.SimpleNamespace(
        total_batch_size=2,
        batch_size=None,
        epochs=5,
        warmup_epochs=None,
        keep_every=keep_every,
        lr=1e-3,
        min_lr=0,
        data_path='',
        output_dir='OUT',
    )
    schedule = make_schedule(args, 4)
    record = {'sizes': sizes, **classes}
    job = types.SimpleNamespace(
        args=args, schedule=schedule, record=record, world_size=1, start=0, device=torch.device('cpu')
    )
    (line,) = (line for line in engine.describe(job, model, '').splitlines() if 'disk' in line)
    count, megabytes = map(int, re.findall(r'\d+', line))
    assert count == checkpoints and 60 < megabytes == pytest.approx(len(file.getvalue()) / 1e6, abs=1)


# --- Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'job, flags, message',
    [
        ('pretrain', ['--data_pth', 'x'], '--data_pth x; did you mean --data_path?'),
        ('pretrain', ['--fuse_layers', '0,5,11'], "'0,5,11' is not a whole number from 0; put spaces between"),
        ('pretrain', ['@recipes/smal_pretrain.txt'], 'directory; did you mean recipes/small_pretrain.txt'),
        ('pretrain', ['@recipes/small_pretrain'], 'did you mean recipes/small_pretrain.txt?'),
        ('pretrain', ['recipes/demo_pretrain.txt'], 'a recipe has an @ before its name: @recipes/demo_pretrain.txt'),
        ('finetune', ['--data_path', '{images}'], 'hold some out with --val_share 0.1'),
        ('finetune', ['--data_path', '{images}', '--init_from', '{run}'], 'such as {run}/checkpoint-last.pth'),
        ('linprobe', ['--data_path', '{images}', '--features', 'out'], '--features out: must end in .npz'),
        ('linprobe', ['--data_path', '{images}', '--features', '{folder}'], '.npz: Is a directory'),
        ('finetune', ['--eval', '--data_path', '{renamed}', '--init_from', '{best}'], 'squares only in'),
        ('linprobe', ['--data_path', '{images}', '--val_path', '{renamed}', '--features', 'o.npz'], 'squares only in'),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(job, flags, message, images, pretrained, finetuned, tmp_path, capsys):
    renamed = shutil.copytree(images, tmp_path / 'renamed')
    (renamed / 'square').rename(renamed / 'squares')
    best = finetuned.output_dir / 'checkpoint-best.pth'
    folder = tmp_path / 'folder.npz'
    folder.mkdir()
    names = {'images': images, 'run': pretrained.output_dir, 'best': best, 'renamed': renamed, 'folder': folder}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start(job, *(flag.format(**names) for flag in flags))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert message.format(**names) in err and err.count('\n') == 1


def test_evaluation_on_training_images_says_so(images, finetuned, capsys):
    flags = ['--eval', '--data_path', f'{images}/', '--init_from', finetuned.output_dir / 'checkpoint-best.pth']
    start('finetune', *flags, '--num_workers', '0')
    assert 'Most of these images were trained on; --val_share 0.1 evaluates the others' in capsys.readouterr().out
    start('finetune', *flags, '--num_workers', '0', '--val_share', '0.1')
    out = capsys.readouterr().out
    assert 'trained on' not in out and 'on 10 images' in out


@pytest.mark.parametrize('job', JOBS)
def test_help_starts_with_commands(job):
    first = JOBS[job].get_parser().format_help().splitlines()[:8]
    assert first[0].startswith('usage:') and sum(f'python main_{job}.py' in line for line in first) >= 2


def test_time_to_go_is_that_of_the_steps(tmp_path, monkeypatch, capsys):
    """Neither what came before the first step, nor that step, in which workers start, counts for the others."""
    clock = [0.0]
    monkeypatch.setattr(log, 'time', types.SimpleNamespace(time=lambda: clock[0]))
    args, schedule = types.SimpleNamespace(output_dir=str(tmp_path)), types.SimpleNamespace(total_steps=105)
    record = log.Log(types.SimpleNamespace(rank=0, start=0, args=args, schedule=schedule))
    record.entry(0, 0.0, {'val_loss': 1.0})
    for seconds in (1000, 2, 2, 2, 2):
        clock[0] += seconds
        record.advance()
    record.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith('ETA ?') and lines[1].startswith('about 03:20 left')  # 100 steps of two seconds
