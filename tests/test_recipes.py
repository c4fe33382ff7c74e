"""The recipes against the published ones (mmpretrain configs/mff and mae), and their reader."""

import io
import sys

import pytest
import torch
from conftest import JOBS, ROOT

from models_mff import MaskedAutoencoderMFF, create_encoder, model_sizes
from util import weights
from util.args import ArgumentParser, run_job

RECIPES = ROOT / 'recipes'


def read(name, *flags):
    job = JOBS[name.split('_')[-1].removesuffix('.txt')]
    return job.get_parser().parse_args([f'@{RECIPES / name}', *flags])


PUBLISHED = {  # rate: the learning rate of the whole batch
    'pretrain': dict(
        rate=2.4e-3, total_batch_size=4096, fuse_layers=[0, 2, 4, 6, 8, 11], betas=[0.9, 0.95],
        weight_decay=0.05, warmup_epochs=40, min_lr=0, amp='fp16', clip_grad=None, crop='simple',
        mask_ratio=0.75, norm_pix_loss=True, mean=None, std=None,
    ),
    'finetune': dict(
        rate=2e-3, total_batch_size=1024, epochs=100, crop_pct=224 / 256, betas=[0.9, 0.999],
        weight_decay=0.05, layer_decay=0.65, warmup_epochs=5, min_lr=1e-6, drop_path=0.1,
        aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
    ),
    'linprobe': dict(
        rate=6.4, total_batch_size=16384, epochs=90, crop_pct=224 / 256, momentum=0.9,
        weight_decay=0, warmup_epochs=10, min_lr=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', ['300e_pretrain', '800e_pretrain', 'finetune', 'linprobe'])
def test_vit_base_is_trained_by_the_published_recipe(name):
    args, expected = read(f'vit_base_{name}.txt'), PUBLISHED[name.split('_')[-1]].copy()
    assert args.blr * args.total_batch_size / 256 == pytest.approx(expected.pop('rate'))
    expected |= dict(model='vit_base_patch16', input_size=[224, 224], lr=None)
    expected |= {'epochs': int(name[:3])} if 'pretrain' in name else {}
    assert vars(args) == vars(args) | expected


@pytest.mark.parametrize(
    'size, layers', [('small', [3, 5, 7, 11]), ('large', [0, 4, 8, 12, 16, 20, 23])]
)
def test_other_sizes_share_the_recipe(size, layers):
    args, base = read(f'vit_{size}_300e_pretrain.txt'), read('vit_base_300e_pretrain.txt')
    differing = {name for name in vars(args) if getattr(args, name) != getattr(base, name)}
    assert differing == {'model', 'fuse_layers', 'output_dir', 'amp'}
    assert args.model == f'vit_{size}_patch16' and args.fuse_layers == layers


@pytest.mark.parametrize('job', JOBS)
def test_every_recipe_builds_its_model(job):
    built = []
    for path in RECIPES.glob(f'*_{job}.txt'):
        args = read(path.name)
        assert args.output_dir == f'output/{path.stem}'
        sizes = weights.settings_of(args, None).sizes
        if sizes not in built:
            built.append(sizes)
            with torch.device('meta'):
                MaskedAutoencoderMFF(**sizes) if job == 'pretrain' else create_encoder(sizes)


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_other_classifiers_share_the_recipe(job):
    base = read(f'vit_base_{job}.txt')
    for name in (f'vit_small_{job}.txt', f'one_gpu_{job}.txt'):
        changed = {key for key, value in vars(read(name)).items() if value != getattr(base, key)}
        assert changed <= {'model', 'output_dir', 'batch_size', 'total_batch_size'}


def test_comments_quotes_and_later_flags(tmp_path):
    recipe = tmp_path / 'recipe.txt'
    recipe.write_text('# a comment\n--data_path "a folder"  # another\n\n--epochs 5 --lr 1e-3\n')
    args = JOBS['pretrain'].get_parser().parse_args([f'@{recipe}', '--epochs', '7'])
    assert (args.data_path, args.epochs, args.lr) == ('a folder', 7, 1e-3)


def test_a_later_model_wins_over_the_sizes_of_a_recipe(tmp_path):
    recipe = tmp_path / 'recipe.txt'
    recipe.write_text('--model vit_nano_patch4 --depth 6 --embed_dim 192 --fuse_layers 0 5')
    parse = JOBS['pretrain'].get_parser().parse_args
    args = parse([f'@{recipe}', '--model', 'vit_base_patch16'])
    assert weights.settings_of(args, None).sizes == model_sizes('vit_base_patch16')
    args = parse([f'@{recipe}', '--model', 'vit_base_patch16', '--depth', '2'])
    sizes = weights.settings_of(args, None).sizes
    assert (sizes['embed_dim'], sizes['depth'], sizes['fuse_layers']) == (768, 2, (0, 1))


def test_stdout_of_a_notebook(monkeypatch):
    """It has no reconfigure; a terminal's has, as a name of a file need not be UTF-8."""
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    run_job(lambda args: print('done'), ArgumentParser(), [])
    assert sys.stdout.getvalue() == 'done\n'
    terminal = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    monkeypatch.setattr(sys, 'stdout', terminal)
    run_job(lambda args: print('not \udcff UTF-8'), ArgumentParser(), [])
    assert terminal.buffer.getvalue() == b'not \\udcff UTF-8\n'
