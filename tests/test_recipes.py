"""The recipe files against the published recipe (mmpretrain configs/mff, configs/mae)."""

from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
from models_mff import MaskedAutoencoderMFF
from util import weights

RECIPES = Path(__file__).parent.parent / 'recipes'


def read(name, *flags):
    recipe = f'@{RECIPES / name}'
    return main_pretrain.get_parser().parse_args([recipe, '--data_path', 'images', *flags])


@pytest.mark.parametrize('epochs', [300, 800])
def test_vit_base_is_the_published_recipe(epochs):
    args = read(f'vit_base_{epochs}e_pretrain.txt')
    assert args.model == 'vit_base_patch16' and args.fuse_layers == [0, 2, 4, 6, 8, 11]
    assert args.total_batch_size == 4096
    assert args.lr is None and args.blr * args.total_batch_size / 256 == pytest.approx(2.4e-3)
    assert args.betas == [0.9, 0.95] and args.weight_decay == 0.05
    assert (args.epochs, args.warmup_epochs, args.min_lr) == (epochs, 40, 0)
    assert args.amp == 'fp16' and args.clip_grad is None
    assert args.crop == 'simple' and args.input_size == [224, 224]
    assert args.mean is None and args.std is None  # ImageNet's
    assert args.mask_ratio == 0.75 and args.norm_pix_loss is True


@pytest.mark.parametrize(
    'size, layers', [('small', [3, 5, 7, 11]), ('large', [0, 4, 8, 12, 16, 20, 23])]
)
def test_other_sizes_share_the_recipe(size, layers):
    args, base = read(f'vit_{size}_300e_pretrain.txt'), read('vit_base_300e_pretrain.txt')
    differing = {name for name in vars(args) if getattr(args, name) != getattr(base, name)}
    assert differing == {'model', 'fuse_layers', 'output_dir', 'amp'}
    assert args.model == f'vit_{size}_patch16' and args.fuse_layers == layers


def test_one_gpu_keeps_the_learning_rate_rule():
    args, base = read('one_gpu_pretrain.txt'), read('vit_base_300e_pretrain.txt')
    assert args.blr == base.blr and args.total_batch_size % args.batch_size == 0


@pytest.mark.parametrize('path', sorted(RECIPES.glob('*_pretrain.txt')), ids=lambda path: path.stem)
def test_every_recipe_is_of_a_model(path):
    args = main_pretrain.get_parser().parse_args(
        [f'@{path}', *([] if 'data_path' in path.read_text() else ['--data_path', 'x'])]
    )
    sizes = weights.settings_of(args, None).sizes
    with torch.device('meta'):
        MaskedAutoencoderMFF(**sizes)
    assert args.output_dir == f'output/{path.stem}'


# --- Downstream: mmpretrain configs/mff/benchmarks ------------------------------------------------


def read_downstream(job, name):
    return job.get_parser().parse_args([f'@{RECIPES / name}'])


def test_vit_base_finetune_is_the_published_recipe():
    args = read_downstream(main_finetune, 'vit_base_finetune.txt')
    assert args.model == 'vit_base_patch16' and args.input_size == [224, 224]
    assert args.crop_pct == 224 / 256
    assert args.total_batch_size == 1024 and args.lr is None
    assert args.blr * args.total_batch_size / 256 == pytest.approx(2e-3)
    assert args.betas == [0.9, 0.999] and args.weight_decay == 0.05 and args.layer_decay == 0.65
    assert (args.epochs, args.warmup_epochs, args.min_lr) == (100, 5, 1e-6)
    assert args.drop_path == 0.1 and args.aa == 'rand-m9-mstd0.5-inc1' and args.reprob == 0.25
    assert (args.mixup, args.cutmix, args.smoothing) == (0.8, 1.0, 0.1)


def test_vit_base_linprobe_is_the_published_recipe():
    args = read_downstream(main_linprobe, 'vit_base_linprobe.txt')
    assert args.model == 'vit_base_patch16' and args.input_size == [224, 224]
    assert args.crop_pct == 224 / 256
    assert args.total_batch_size == 16384 and args.lr is None
    assert args.blr * args.total_batch_size / 256 == pytest.approx(6.4)
    assert args.momentum == 0.9 and args.weight_decay == 0
    assert (args.epochs, args.warmup_epochs, args.min_lr) == (90, 10, 0)


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_every_downstream_recipe_follows_vit_base(job):
    main = {'finetune': main_finetune, 'linprobe': main_linprobe}[job]
    base = vars(read_downstream(main, f'vit_base_{job}.txt'))
    free = {'model', 'output_dir', 'batch_size'}
    for path in sorted(RECIPES.glob(f'*_{job}.txt')):
        args = vars(read_downstream(main, path.name))
        assert args['output_dir'] == f'output/{path.stem}'
        changed = {name for name in args if args[name] != base[name]} - free
        if path.stem.startswith('vit_') or path.stem == 'one_gpu_finetune':
            assert not changed, path
        elif path.stem == 'one_gpu_linprobe':
            assert changed == {'total_batch_size'}
