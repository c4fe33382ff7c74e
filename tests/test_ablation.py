"""The ablation: which commands its runs are made of, and what its report says of known numbers."""

import json
import os

import pytest
from conftest import ROOT
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from benchmarks import ablation, ablation_report
from util import args as util_args
from util.errors import InputError, RunError

PRINTED = """20-nearest-neighbour top-1 48.10 %  by the cls token, on 9 images; x
20-nearest-neighbour top-1 47.60 %  by the mean of patches, on 9 images; x
logistic-regression top-1 52.00 %  by the cls token, on 9 images; x
logistic-regression top-1 53.00 %  by the mean of patches, on 9 images; x
"""


def log_of(variant, job):
    if job == 'finetune':
        return [{'step': 1, 'epoch': 1, 'val_top1': 60.0}, {'step': 2, 'epoch': 2, 'val_top1': 61.0}]
    fusion = {} if variant == 'MAE' else {'fusion/layer_00': 0.5, 'fusion/layer_03': 0.5}
    return [
        {'step': 0, 'epoch': 0, 'val_knn_cls': 10.0, 'val_knn_patches': 11.0},
        {'step': 1, 'epoch': 0.5, 'loss': 1.0, **fusion},
        *({'step': 2 * e, 'epoch': e, 'loss': 0.5, 'val_loss': 0.9 - e / 10, **fusion} for e in (1, 2, 3)),
        {'step': 6, 'epoch': 3, 'val_knn_cls': 30.0, 'val_knn_patches': 31.0},
    ]


@pytest.fixture
def jobs(monkeypatch):
    """Stands in for ablation.run_script: checks the flags, writes the log, trains nothing. A list of (job, flags)."""
    started = []

    def start(job, output, flags):
        main = {'pretrain': main_pretrain, 'linprobe': main_linprobe, 'finetune': main_finetune}[job]
        args = main.get_parser().parse_args(flags)
        if any(word in output for word in jobs.failing):
            raise InputError(f'{output} failed')
        started.append((job, args))
        if job == 'linprobe':
            return PRINTED
        os.makedirs(args.output_dir)
        variant = os.path.basename(os.path.dirname(output)).partition('-seed')[0]
        with open(os.path.join(args.output_dir, 'log.jsonl'), 'w') as file:
            file.writelines(json.dumps(entry) + '\n' for entry in [{'command': 'x'}, *log_of(variant, job)])
        return ''

    def jobs():
        return started

    jobs.failing = []
    monkeypatch.setattr(ablation, 'run_script', start)
    monkeypatch.setattr('signal.signal', lambda *_: None)
    monkeypatch.setattr(ablation, 'write_report', lambda folder: f'the report of {folder}')  # tested below
    return jobs


@pytest.fixture
def run_ablation(tmp_path):
    def start(*more):
        flags = ['--data_path', 'shapes', '--results', str(tmp_path / 'results'), '--output_dir', str(tmp_path / 'out')]
        flags += ['--model_flags', '--model vit_nano_patch4 --depth 6', '--finetune_flags', '--epochs 2']
        flags += ['--pretrain_flags', '--epochs 3 --knn_every 3 --crop none', *more]
        ablation.main(ablation.get_parser().parse_args(flags))
        return {path.name: path.read_text() for path in (tmp_path / 'results').iterdir()}

    return start


def test_a_run_is_trained_measured_and_fine_tuned_once(jobs, run_ablation, tmp_path, capsys):
    flags = ['--variants', 'random', 'MAE', 'MFF', '--seeds', '5', '--measure_every', '2']
    files = run_ablation(*flags)
    assert files.keys() == {'random-seed5.json', 'MAE-seed5.json', 'MFF-seed5.json'}
    curves = json.loads(files['MFF-seed5.json'])['curves']
    assert curves['val_knn_cls'] == [[0, 10], [3, 30]] and curves['val_loss'] == [[1, 0.8], [2, 0.7], [3, 0.6]]
    assert curves['knn_cls'] == [[2, 48.1], [3, 48.1]] and curves['logistic_patches'] == [[2, 53.0], [3, 53.0]]
    assert curves['finetune'] == [[3, 61.0]] and [epoch for epoch, _ in curves['fusion/layer_00']] == [1, 2, 3]
    zero = json.loads(files['random-seed5.json'])
    assert zero['curves'] == {
        'knn_cls': [[0, 48.1]], 'knn_patches': [[0, 47.6]], 'logistic_cls': [[0, 52]], 'logistic_patches': [[0, 53]],
        'finetune': [[0, 61.0]],
    }  # fmt: skip
    assert zero['seed'] == 5 and 'torch' in zero['versions'] and 'benchmarks.' in zero['command']
    started = jobs()
    assert [job for job, _ in started] == [
        'linprobe',
        'finetune',
        *['pretrain', 'linprobe', 'linprobe', 'finetune'] * 2,
    ]
    assert all(args.seed == 5 and args.data_path == 'shapes' for _, args in started)
    origins = [os.path.basename(args.init_from or '') for job, args in started if job != 'pretrain']
    trained = ['checkpoint-0002.pth', 'checkpoint-last.pth', 'checkpoint-last.pth']
    assert origins == ['', '', *trained, *trained]
    assert all(args.model == 'vit_nano_patch4' and args.depth == 6 for _, args in started[:2])  # from scratch
    run_ablation(*flags)
    assert len(jobs()) == len(started)  # nothing is repeated
    printed = capsys.readouterr().out
    assert 'done before' in printed and f'the report of {tmp_path}' in printed


def test_variants_are_told_apart(jobs, run_ablation):
    run_ablation('--variants', *ablation.VARIANTS, '--seeds', '0')
    trained = [args for job, args in jobs() if job == 'pretrain']
    choices = {(str(a.fuse_layers), a.crop, a.fuse_proj, a.fusion, a.target) for a in trained}
    assert len(choices) == len(trained) == len(ablation.VARIANTS) - 1
    assert [args.fuse_layers for args in trained[:2]] == [[5], None]


def test_one_failure_does_not_lose_the_others(jobs, run_ablation, tmp_path, capsys):
    jobs.failing.append('MAE-seed1')
    with pytest.raises(RunError, match='1 of 4 runs failed'):
        run_ablation('--variants', 'MAE', 'MFF', '--seeds', '0', '1')
    assert 'MAE-seed1' in capsys.readouterr().out
    assert len(list((tmp_path / 'results').glob('*.json'))) == 3
    jobs.failing.clear()
    assert 'MAE-seed1.json' in run_ablation('--variants', 'MAE', 'MFF', '--seeds', '0', '1')
    with pytest.raises(InputError, match='other --pretrain_flags; name another --results'):
        run_ablation('--pretrain_flags', '--epochs 4')


def test_data_without_validation_images(jobs, run_ablation, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / 'images' / name / '1.png')
    with pytest.raises(InputError, match='no validation images'):
        run_ablation('--data_path', str(tmp_path / 'images'))
    assert not jobs()


@pytest.mark.parametrize('recipe', sorted(path.name for path in (ROOT / 'recipes').glob('ablation_*.txt')))
def test_recipes(recipe, monkeypatch, tmp_path):
    """Every flag of a recipe is one of the job that it is for."""
    monkeypatch.chdir(tmp_path)
    args = ablation.get_parser().parse_args([f'@{ROOT}/recipes/{recipe}', '--data_path', 'CIFAR10'])
    for variant in args.variants:
        assert main_pretrain.get_parser().parse_args(ablation.pretrain_flags(args, variant)).knn_every
    main_linprobe.get_parser().parse_args([*args.model_flags, *args.measure_flags])
    main_finetune.get_parser().parse_args([*args.model_flags, *(args.finetune_flags or [])])


# --- Report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Three seeds of MAE and MFF with known curves, and random weights."""
    for seed, shift in enumerate((-2.0, 0.0, 2.0)):  # sample deviation 2
        for variant, offset in (('MAE', 0), ('MFF', 3), ('random', 0)):
            curves = {'knn_cls': [[0, 25 + shift]], 'finetune': [[0, 30]]}
            if variant != 'random':
                middle = 20.0 if variant == 'MAE' else 30.0
                curves = {
                    'val_loss': [[2, 0.75], [4, 0.5 + shift / 1000]],
                    'val_knn_patches': [[0, 10], [2, middle], [4, 40 + offset + shift]],
                    'finetune': [[4, 60 - offset * (seed - 1)]],
                    **{f'fusion/layer_{block:02d}': [[2, 0.5], [4, 0.5]] for block in (0, 3) if variant == 'MFF'},
                }
            facts = {'command': 'the command', 'device': 'a CPU', 'versions': 'torch 0', 'settings': {}}
            result = {'variant': variant, 'seed': seed, 'curves': curves, **facts}
            (tmp_path / f'{variant}-seed{seed}.json').write_text(json.dumps(result))
    return tmp_path


def test_table_of_known_numbers(results, capsys):
    util_args.run_job(ablation_report.main, ablation_report.get_parser(), [str(results)])
    table = capsys.readouterr().out.splitlines()
    assert table == (results / 'table.md').read_text().splitlines()
    assert table[0] == '|  | validation loss | 20-NN, mean of patches, subset | 20-NN, cls token | fine-tuning |'
    assert table[2:6] == [
        '| random weights |  | 10.0 ± 0.0 | 25.0 ± 2.0 | 30.0 ± 0.0 |',
        '| MAE | 0.500 ± 0.002 | 40.0 ± 2.0 |  | 60.0 ± 0.0 |',
        '| MFF | 0.500 ± 0.002 | 43.0 ± 2.0 |  | 60.0 ± 3.0 |',
        '| MFF - MAE | +0.000 ± 0.000 | +3.0 ± 0.0 |  | +0.0 ± 3.0 |',
    ]
    # From (2, 30) to (4, 43 + shift), up to 40 + shift: 2 + 2 * (10 + shift) / (13 + shift)
    (epochs,) = [line for line in table if line.startswith('- Epochs until MFF reaches')]
    assert epochs.endswith('seed by seed: 3.5, 3.5, 3.6, of 4')
    assert table[-2:] == ['the command  ', 'a CPU; torch 0']
    assert (results / 'curves.png').stat().st_size > 5000 and (results / 'fusion.png').stat().st_size > 5000


def test_figures_of_known_numbers(results):
    groups = ablation_report.read_results(results)
    loss, neighbours = ablation_report.curves_figure(groups).axes
    lines = {}
    for line in neighbours.lines:
        lines.setdefault(line.get_color(), []).append(line.get_ydata())
    assert lines.keys() == {'grey', 'C0', 'C1'} and lines['grey'][0][0] == 10
    assert [seed.tolist() for seed in lines['C1'][:3]] == [[10, 30, 41], [10, 30, 43], [10, 30, 45]]
    assert lines['C1'][3].tolist() == pytest.approx([10, 30, 43]) and len(lines['C0']) == 4  # their mean
    assert 'grey' not in {line.get_color() for line in loss.lines}
    (panel,) = ablation_report.fusion_figure(groups).axes
    assert panel.get_title() == 'MFF' and sum(len(line.get_xdata()) == 2 for line in panel.lines) == 6


def test_epochs_to_reach():
    points = [(2, 30.0), (4, 40.0), (6, 38.0)]
    needed = [ablation_report.epochs_to_reach(points, accuracy) for accuracy in (20, 30, 35, 39, 40, 41)]
    assert needed == ['2.0', '2.0', '3.0', '3.8', '4.0', 'never']


def test_no_results(tmp_path):
    with pytest.raises(InputError, match='no results'):
        ablation_report.write_report(tmp_path)
