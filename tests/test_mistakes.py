"""Users' mistakes, of all jobs: one line on stderr that names what decides, and exit code 2."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import JOBS, SMALL_RUN

from util.args import run_job

# (jobs, flags, what the line contains); {NAME} is a place below
MISTAKES = [
    # --- Flags
    ('all', 'recipes/demo_pretrain.txt', 'recipes/demo_pretrain.txt'),
    ('all', '@missing.txt', 'missing.txt'),
    ('all', '@{quote}', 'quotation'),
    ('all', '--epochs 0', '--epochs'),
    ('all', '--lr nan', 'nan'),
    ('all', '--model vit', "no model 'vit'"),
    ('all', '--input_size 16 16 16', '--input_size'),
    ('all', '--input_size 18', 'patch size 4'),
    ('all', '--device abacus', 'abacus'),
    ('all', '--device meta', 'meta'),
    ('all', '--mean 0.5 0.5', '3 channels'),
    ('all', '--num_heads 5', 'num_heads 5'),
    ('all', '--warmup_epochs 9', '9 epochs of warm-up'),
    ('all', '--lr 1e-3 --min_lr 2e-3', '0.002'),
    ('all', '--total_batch_size 65', '64 images'),
    ('all', '--batch_size 6 --total_batch_size 17', '17'),
    ('all', '--output_dir /dev/null/output', '/dev/null/output'),
    ('all', '--resume missing.pth', 'missing.pth'),
    ('all', '--resume {text}', 'damaged'),
    ('all', '--resume {weights}', 'not a checkpoint'),
    ('all', '--init_from missing.pth', 'missing.pth'),
    ('all', '--init_from {text}', 'damaged'),
    ('all', '--init_from {numbers}', 'numbers.pth'),
    ('pretrain', '--fuse_layers 0 4', '3'),
    ('pretrain', '--fuse_layers 1 0 3', 'increasing'),
    ('pretrain', '--embed_dim 66 --num_heads 3', 'multiple'),
    ('pretrain', '--mask_ratio 1.5', '1.5'),
    ('pretrain', '--mask_ratio 0.99', '0.99'),
    ('pretrain', '--input_size 4 --patch_size 2', '--crop simple'),
    ('pretrain', '--knn_every 1 --data_path {flat} --total_batch_size 2', '--knn_every'),
    ('finetune', '--aa random', 'random'),
    ('finetune', '--batch_size 1', '--mixup 0'),
    ('finetune', '--in_chans 5 --data_path {arrays}', '--aa none'),
    ('linprobe', '--batch_size 1', '--batch_size'),
    ('classes', '--crop_pct 2', '--crop_pct'),
    # --- Data
    ('all', '--data_path nowhere', 'nowhere'),
    ('all', '--data_path {empty}', 'empty'),
    ('all', '--val_path nowhere', 'nowhere'),
    ('images', '--data_path {broken}', 'broken'),
    ('images', '--data_path torch/imaginary', 'torch/imaginary'),
    ('images', '--data_path {list}', 'list.txt'),
    ('images', '--data_path {data}', 'data.zip'),
    ('images', '--in_chans 4', '4'),
    ('classes', '--data_path {flat} --val_path {flat}', 'no labels'),
    ('classes', '--data_path {one} --val_path {one}', 'only one class'),
    ('classes', '--val_path {other}', 'zebra'),
    ('classes', '--data_path {one}', '--val_share'),
    ('classes', '--eval', '--init_from'),
    ('classes', '--eval --init_from {weights}', 'not a classifier'),
    ('finetune', '--predict {one}', '--init_from'),
    ('finetune', '--split val', '--predict'),
    ('finetune', '--predict nowhere --init_from {classifier}', 'nowhere'),
    ('classes', '--report {empty}', '--init_from'),
    ('finetune', '--eval --data_path {other} --init_from {classifier}', 'zebra'),
    ('segment', '--data_path {flat}', 'flat'),
    ('segment', '--eval --data_path shapes', '--init_from'),
]
GROUPS = {
    'all': ['pretrain', 'finetune', 'linprobe'],
    'images': ['pretrain', 'finetune'],
    'classes': ['finetune', 'linprobe'],
}
CASES = [(job, *rest) for group, *rest in MISTAKES for job in GROUPS.get(group, [group])]


@pytest.fixture(scope='module')
def places(folder, whole, tmp_path_factory):
    root = tmp_path_factory.mktemp('places')
    for name in ('empty', 'broken', 'flat', 'one/bar', 'other'):
        (root / name).mkdir(parents=True)
    image = next((folder / 'train/bar').iterdir())
    for number in range(3):
        (root / f'broken/{number}.jpg').write_text('not an image')
        shutil.copy(image, root / f'flat/{number}.png')
        shutil.copy(image, root / f'one/bar/{number}.png')
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        (root / 'arrays' / name).mkdir(parents=True)
        for number in range(10):
            np.save(root / f'arrays/{name}/{number}.npy', np.eye(16, 80).reshape(16, 16, 5))
    shutil.copytree(folder / 'val', root / 'other', dirs_exist_ok=True)
    (root / 'other/bar').rename(root / 'other/zebra')
    (root / 'list.txt').write_text('\n# nothing\n')
    (root / 'quote.txt').write_text('--data_path "open')
    (root / 'text.pth').write_text('not weights')
    (root / 'data.zip').write_bytes(b'PK\x03\x04\xff\0')
    torch.save({'numbers': torch.zeros(3)}, root / 'numbers.pth')
    torch.save(whole.checkpoint['model'], root / 'weights.pth')
    flags = ['--data_path', str(folder), *SMALL_RUN, '--epochs', '1', '--output_dir', str(root)]
    JOBS['finetune'].main(JOBS['finetune'].get_parser().parse_args(flags))
    (root / 'checkpoint-last.pth').rename(root / 'classifier.pth')
    return {path.stem: path for path in root.iterdir()}


@pytest.mark.parametrize('job, flags, value', CASES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line_and_code_2(job, flags, value, places, small_run, monkeypatch, capfd):
    monkeypatch.setattr('engine.train_epoch', lambda *_: pytest.fail('the training has started'))
    given = [flag.format(**places) for flag in flags.split()]
    with pytest.raises(SystemExit) as stopped:
        run_job(JOBS[job].main, JOBS[job].get_parser(), small_run('run', *given))
    error = capfd.readouterr().err
    *notes, line = error.splitlines()
    assert stopped.value.code == 2 and re.match(r'\S+: error: ', line) and value in line, error
    assert not notes or '{classifier}' in flags  # whose origin is said
