"""A user's mistakes in all jobs: one line, exit code 2, before any training starts."""

import re

import pytest

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util.args import run_job

ALL = main_pretrain, main_finetune, main_linprobe, main_segment
TRAINING = main_pretrain, main_finetune, main_linprobe
LABELLED = main_finetune, main_linprobe

MISTAKES = [  # jobs, flags, what the line names
    (ALL, ['--data_path', 'nowhere'], 'nowhere'),
    (ALL, ['--epochs', 'many'], 'many'),
    (ALL, ['--epochs', '0'], '--epochs'),
    (ALL, ['--lr', 'nan'], '--lr'),
    (ALL, ['--model', 'vit'], 'vit_nano_patch4'),
    (ALL, ['--mask_ration', '0.5'], '--mask_ration'),
    (ALL, ['@missing.txt'], 'missing.txt'),
    (ALL, ['--device', 'abacus'], 'abacus'),
    (ALL, ['--device', 'cuda'], 'cuda'),
    (ALL, ['--init_from', 'missing.pth'], 'missing.pth'),
    (ALL, ['--init_from', '{text}'], 'list.txt'),
    (TRAINING, ['--data_path', '{empty}'], 'empty'),
    (TRAINING, ['--data_path', '{broken}'], 'broken'),
    (TRAINING, ['--input_size', '18'], '18 x 18'),
    (TRAINING, ['--input_size', '16', '16', '16'], '--input_size'),
    (TRAINING, ['--mean', '0.5', '0.5'], 'mean'),
    (TRAINING, ['--in_chans', '4'], '4'),
    (TRAINING, ['--total_batch_size', '65'], '64'),
    (TRAINING, ['--batch_size', '6', '--total_batch_size', '17'], '17'),
    (TRAINING, ['--warmup_epochs', '9'], 'warm-up'),
    (TRAINING, ['--min_lr', '2'], '--min_lr'),
    (TRAINING, ['--output_dir', '/dev/null/output'], '/dev/null/output'),
    (TRAINING, ['--resume', 'missing.pth'], 'missing.pth'),
    ([main_pretrain], ['--fuse_layers', '0', '4'], '[0, 4]'),
    ([main_pretrain], ['--mask_ratio', '0.99'], '0.99'),
    ([main_pretrain], ['--knn_every', '1', '--data_path', '{flat}'], '--knn_every'),
    (LABELLED, ['--data_path', '{flat}', '--val_share', '0.2'], 'label'),
    (LABELLED, ['--eval'], '--init_from'),
    (LABELLED, ['--crop_pct', '2'], '--crop_pct'),
    ([main_finetune], ['--predict', '{flat}'], '--init_from'),
    ([main_finetune], ['--aa', 'random'], 'random'),
    ([main_finetune], ['--batch_size', '1'], '--batch_size'),
    ([main_segment], ['--eval', '--data_path', 'shapes'], '--init_from'),
]


@pytest.fixture(scope='module')
def places(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp('places')
    for name in ('empty', 'broken', 'flat'):
        (root / name).mkdir()
    for index in range(3):
        (root / f'broken/{index}.jpg').write_text('not an image')
    for path in sorted(folder.rglob('*.png'))[:30]:
        (root / 'flat' / path.name).write_bytes(path.read_bytes())
    (root / 'list.txt').write_text('\n# nothing\n')
    return {name: root / name for name in ('empty', 'broken', 'flat')} | {'text': root / 'list.txt'}


@pytest.mark.parametrize(
    'job, flags, named',
    [
        pytest.param(job, flags, named, id=f'{job.__name__} {" ".join(flags)}')
        for jobs, flags, named in MISTAKES
        for job in jobs
    ],
)
def test_a_mistake_is_one_line(job, flags, named, places, small_run, monkeypatch, capsys):
    monkeypatch.setattr('engine.train_epoch', lambda *_: pytest.fail('training has started'))
    arguments = small_run('run', *(flag.format(**places) for flag in flags))
    with pytest.raises(SystemExit) as exit:
        run_job(job.main, job.get_parser(), arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2, line
    assert re.fullmatch(r'[^\n]*: error: [^\n]+\n', line) and named in line, line


def test_model_after_sizes_wins(tmp_path):
    """Later flags win: a recipe's sizes do not change a model that is named after it."""
    recipe = tmp_path / 'recipe.txt'
    recipe.write_text('# small\n--embed_dim 192 --depth 6\n--fuse_layers 0 5  # two\n--lr 1e-3\n')
    parse = main_pretrain.get_parser().parse_args
    args = parse([f'@{recipe}', '--model', 'vit_tiny_patch4', '--num_heads', '6'])
    assert (args.embed_dim, args.depth, args.fuse_layers, args.num_heads) == (None, None, None, 6)
    assert args.lr == 1e-3 and parse([f'@{recipe}', '--depth', '7']).depth == 7


def test_output_that_has_no_encoding(monkeypatch, capsys):
    """As a notebook's, which also cannot be reconfigured."""

    class Plain:
        def write(self, text):
            pass

        def flush(self):
            pass

    monkeypatch.setattr('sys.stdout', Plain())
    run_job(lambda args: print('done'), main_pretrain.get_parser(), [])
