"""The paper's alternatives, computed a second way; runs and report of an ablation; a rehearsal."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, Processes, Result, same_weights, wait_for
from test_model import SMALL, relative

import main_finetune
import main_pretrain
from ablation import gpu, pretrain, report, run, variants
from ablation.variants import VariantMFF
from models_mff import MaskedAutoencoderMFF
from tools import features
from util.args import run_job
from util.errors import InputError, RunError

# --- Alternatives ---------------------------------------------------------------------------------


def shaken(**choices):
    """A small model with these choices, its parameters moved away from the symmetric start."""
    torch.manual_seed(1)
    model = VariantMFF(**{**SMALL, **choices})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def linear(s, name, x):
    return x @ s[f'{name}.weight'].T + s[f'{name}.bias']


def plain_fuse(s, levels, fuse_proj, fusion, heads=3):
    """z (N, T, D) by the formulas, from the state s; levels: K tensors (N, T, D)."""
    y = [*levels]
    for k, x in enumerate(levels[:-1]):
        if fuse_proj == 'linear':
            y[k] = linear(s, f'fuse_projs.{k}', x)
        elif fuse_proj == 'mlp':
            hidden = linear(s, f'fuse_projs.{k}.0', x)
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            y[k] = linear(s, f'fuse_projs.{k}.2', hidden)
    if fusion == 'average':
        weights = s['fuse_logits'].flatten().exp()
        return sum(w / weights.sum() * x for w, x in zip(weights, y))
    if fusion == 'uniform':
        return sum(y) / len(y)
    normed = []
    for x in y:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        normed.append(x * s['fuse_norm.weight'] + s['fuse_norm.bias'])
    q, k, v = zip(*(linear(s, 'fuse_attn.qkv', x).chunk(3, dim=-1) for x in normed))
    out = []
    for i in range(len(y)):  # each level asks all levels of the same token, head by head
        parts = []
        for head in torch.arange(y[0].shape[-1]).chunk(heads):
            products = [(q[i] * key)[..., head].sum(-1, keepdim=True) for key in k]
            shares = [(product / math.sqrt(len(head))).exp() for product in products]
            parts.append(sum(a * value[..., head] for a, value in zip(shares, v)) / sum(shares))
        out.append(y[i] + linear(s, 'fuse_attn.proj', torch.cat(parts, dim=-1)))
    return sum(out) / len(out)


@pytest.mark.parametrize('fuse_proj', variants.CHOICES['fuse_proj'])
@pytest.mark.parametrize('fusion', variants.CHOICES['fusion'])
def test_projection_and_fusion_are_the_formula(fuse_proj, fusion):
    model = shaken(fuse_proj=fuse_proj, fusion=fusion)
    levels = [torch.randn(2, 5, 24) for _ in range(3)]
    expected = plain_fuse(model.state_dict(), levels, fuse_proj, fusion)
    assert relative(model.fuse(levels), expected) < 1e-5
    assert len(model.fusion_weights) == (0 if fusion == 'attention' else 3)
    model(torch.randn(2, 3, 32, 32))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert ('fuse_logits' in dict(model.named_parameters())) == (fusion == 'average')


@pytest.mark.parametrize('size', [(32, 32), (16, 40)])
def test_target_is_pixmims(size):
    """|IFFT2(fftshift(FFT2(x)) M)| of the un-normalised image, M a disc; here sums of waves."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    model = shaken(target='lowpass', mean=mean, std=std, img_size=size)
    mean, std = np.array(mean).reshape(3, 1, 1), np.array(std).reshape(3, 1, 1)
    pixels = np.random.default_rng(0).random((3, *size))
    (H, W), (rows, columns) = size, np.mgrid[: size[0], : size[1]]

    def wave(f, g):
        return np.exp(2j * np.pi * (f * rows / H + g * columns / W))

    kept = np.zeros((3, *size), dtype=complex)
    for u in range(H):
        for v in range(W):
            if ((u - (H - 1) / 2) / H) ** 2 + ((v - (W - 1) / 2) / W) ** 2 <= (40 / 224) ** 2:
                # The frequency at (u, v) once zero is in the middle
                amplitude = (pixels * wave(H // 2 - u, W // 2 - v)).sum((1, 2), keepdims=True)
                kept += amplitude * wave(u, v) / (H * W)
    imgs = torch.from_numpy((pixels - mean) / std).float()[None]
    expected = torch.from_numpy((np.abs(kept) - mean) / std).float()
    target = model.target_image(imgs)
    assert relative(target[0], expected) < 1e-5 and relative(target, imgs) > 0.1
    loss, pred, mask = model(imgs)  # the loss is the plain model's against that target
    plain = MaskedAutoencoderMFF(**{**SMALL, 'img_size': size})
    assert torch.equal(loss, plain.forward_loss(target, pred, mask))
    rows, columns = np.mgrid[:224, :224] - 111.5
    disc = torch.tensor(np.hypot(rows, columns) <= 40).float()
    assert torch.equal(variants.low_frequencies(224, 224), disc)


def test_the_first_choices_are_the_papers_own():
    models = []
    for kind in (VariantMFF, MaskedAutoencoderMFF):
        torch.manual_seed(0)
        models.append(kind(**SMALL))
    imgs = torch.randn(2, 3, 32, 32)
    losses = []
    for model in models:
        torch.manual_seed(1)
        losses.append(model(imgs)[0])
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match='several'):
        VariantMFF(fusion='uniform', **{**SMALL, 'fuse_layers': (3,)})


@pytest.mark.parametrize('choice', ['--fusion attention', '--fuse_proj mlp', '--target lowpass'])
def test_a_run_resumes_and_its_encoder_is_read(small_run, stop_at, tmp_path, capsys, choice):
    def start(name):
        run_job(pretrain.main, pretrain.get_parser(), small_run(name, *choice.split()))

    start('straight')
    stop_at(6, start, 'stopped')
    start('stopped')
    straight, stopped = Result(tmp_path / 'straight'), Result(tmp_path / 'stopped')
    assert same_weights(straight, stopped)
    assert straight.losses[12] < straight.losses[1]
    with pytest.raises(InputError):  # not the model of that job
        main_pretrain.main(main_pretrain.get_parser().parse_args(small_run('straight')))
    flags = ['--knn', '3', '--init_from', straight.last, '--num_workers', '0']
    flags += ['--data_path', small_run('')[1], '--device', 'cpu']
    features.main(features.get_parser().parse_args(list(map(str, flags))))
    assert '3-NN top-1' in capsys.readouterr().out


# --- Runs -----------------------------------------------------------------------------------------

PRINTED = """20-NN top-1 48.10 %  by the cls token, on 9 images
20-NN top-1 47.60 %  by the mean of patches, on 9 images
logistic regression top-1 52.00 %  by the cls token, on 9 images
logistic regression top-1 53.00 %  by the mean of patches, on 9 images
"""
JOBS = {'ablation.pretrain': pretrain, 'tools.features': features, 'main_finetune': main_finetune}
LOSSES = [{'epoch': e, 'val_loss': 0.9 - e / 10, 'fusion/layer_00': 0.5} for e in (1, 2, 3)]
LOGS = {
    'pretrain': [{'epoch': 0, 'val_knn_cls': 10.0}, {'epoch': 0.5, 'loss': 1.0}, *LOSSES],
    'finetune': [{'epoch': 1, 'val_top1': 60.0}, {'epoch': 2, 'val_top1': 61.0}],
}


@pytest.fixture
def jobs(monkeypatch):
    """Stands in for run.run_module: checks the flags, writes the log. A list of (job, flags)."""
    started = []

    def start(module, output, flags):
        args = JOBS[module].get_parser().parse_args(list(map(str, flags)))
        if 'MAE-seed1' in output and ('allow', None) not in started:
            raise RunError(f'{output} failed')
        started.append((module, args))
        if module != 'tools.features':
            os.makedirs(args.output_dir)
            lines = [{}, *LOGS[os.path.basename(args.output_dir)]]
            with open(os.path.join(args.output_dir, 'log.jsonl'), 'w') as file:
                file.writelines(json.dumps(line) + '\n' for line in lines)
        return PRINTED

    monkeypatch.setattr(run, 'run_module', start)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    return started


@pytest.fixture
def ablate(tmp_path):
    def start(*more):
        flags = ['--data_path', 'shapes', '--results', str(tmp_path / 'results')]
        flags += ['--output_dir', str(tmp_path / 'out'), '--finetune_flags', '--epochs 2']
        flags += ['--model_flags', '--model vit_nano_patch4 --depth 6', '--pretrain_flags']
        run.main(run.get_parser().parse_args([*flags, '--epochs 3 --knn_every 3', *more]))
        paths = (tmp_path / 'results').glob('*.json')
        return {path.name: json.loads(path.read_text()) for path in paths}

    return start


def test_a_run_is_trained_measured_and_fine_tuned_once(jobs, ablate, capsys):
    flags = ['--variants', 'random', 'MFF', '--seeds', '5', '--measure_every', '2']
    files = ablate(*flags)
    zero, mff = files['random-seed5.json'], files['MFF-seed5.json']
    assert mff['curves']['val_loss'] == [[1, 0.8], [2, 0.7], [3, 0.6]]
    assert mff['curves']['logistic_patches'] == [[2, 53.0], [3, 53.0]]
    assert mff['curves']['finetune'] == [[3, 61.0]]
    assert len(mff['curves']['fusion/layer_00']) == 3
    names = ('knn_cls', 'knn_patches', 'logistic_cls', 'logistic_patches', 'finetune')
    assert zero['curves'] == {n: [[0, v]] for n, v in zip(names, (48.1, 47.6, 52, 53, 61))}
    assert zero['seed'] == 5 and 'torch' in zero['versions']
    started = list(jobs)
    assert [job.split('.')[-1] for job, _ in started] == (
        'features main_finetune pretrain features features main_finetune'.split()
    )
    assert all(args.seed == 5 and args.data_path == 'shapes' for _, args in started)
    origins = [os.path.basename(args.init_from or '') for _, args in started]
    last = 'checkpoint-last.pth'
    assert origins == ['', '', '', 'checkpoint-0002.pth', last, last]
    assert all(args.depth == 6 for _, args in started[:3])  # from scratch
    ablate(*flags)
    assert len(jobs) == len(started) and 'done before' in capsys.readouterr().out


def test_variants_are_told_apart(jobs, ablate):
    ablate('--variants', *run.VARIANTS, '--seeds', '0')
    trained = [args for job, args in jobs if job == 'ablation.pretrain']
    told = {(str(a.fuse_layers), a.crop, a.fuse_proj, a.fusion, a.target) for a in trained}
    assert len(told) == len(trained) == len(run.VARIANTS) - 1
    assert [args.fuse_layers for args in trained[:2]] == [[5], None]


def test_one_failure_does_not_lose_the_others(jobs, ablate):
    both = ['--variants', 'MAE', 'MFF', '--seeds', '0', '1']
    with pytest.raises(RunError, match='1 of 4 runs failed'):
        ablate(*both)
    jobs.append(('allow', None))
    assert len(ablate(*both)) == 4
    with pytest.raises(InputError, match='--pretrain_flags'):
        ablate('--pretrain_flags', '--epochs 4')


def test_a_stopped_ablation_saves(folder, tmp_path):
    """SIGTERM reaches the commands that it has started."""
    flags = f'--data_path {folder} --results {tmp_path}/results --output_dir {tmp_path}/out'.split()
    flags += ['--variants', 'MAE', '--seeds', '0', '--num_workers', '0', '--pretrain_flags']
    job = Processes(run, [*flags, '--model vit_nano_patch4 --epochs 9999 --total_batch_size 16'])
    log = tmp_path / 'out/MAE-seed0/pretrain/log.jsonl'
    wait_for(lambda: log.exists() and 'val_loss' in log.read_text(), 200)
    job.send(signal.SIGTERM)
    assert job.wait() == [130] and 'ended with code 75' in job.printed()
    assert Result(log.parent).checkpoint['step'] >= 4


@pytest.mark.parametrize('path', sorted(ROOT.glob('recipes/ablation_*.txt')), ids=lambda p: p.stem)
def test_recipes(path):
    """Every flag of a recipe is one of the job that it is for."""
    args = run.get_parser().parse_args([f'@{path}', '--data_path', 'CIFAR10'])
    assert pretrain.get_parser().parse_args(run.pretrain_flags(args, 'MFF')).knn_every
    features.get_parser().parse_args([*args.model_flags, *args.measure_flags])
    main_finetune.get_parser().parse_args([*args.model_flags, *(args.finetune_flags or [])])


# --- Report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'path', sorted(ROOT.glob('results/*/table.md')), ids=lambda p: p.parent.name
)
def test_the_results_that_are_kept_give_their_tables(path):
    table = report.make_table(report.read_results(path.parent))
    assert table == path.read_text().rstrip('\n')


@pytest.fixture
def results(tmp_path):
    """Three seeds of MAE and MFF with known curves, and random weights."""
    for seed, shift in enumerate((-2.0, 0.0, 2.0)):  # sample deviation 2
        for variant, offset in (('MAE', 0), ('MFF', 3), ('random', 0)):
            middle = 30.0 if variant == 'MFF' else 20.0
            curves = {
                'val_loss': [[2, 0.75], [4, 0.5 + shift / 1000]],
                'val_knn_patches': [[0, 10], [2, middle], [4, 40 + offset + shift]],
            }
            if variant == 'random':
                curves = {'knn_cls': [[0, 25 + shift]]}
            result = {'variant': variant, 'seed': seed, 'curves': curves}
            result |= {'command': 'the command', 'device': 'a CPU', 'versions': 'torch 0'}
            (tmp_path / f'{variant}-seed{seed}.json').write_text(json.dumps(result))
    return tmp_path


def test_report_of_known_numbers(results, capsys):
    run_job(report.main, report.get_parser(), [str(results)])
    table = capsys.readouterr().out.splitlines()
    assert table == (results / 'table.md').read_text().splitlines()
    assert table[0] == '|  | validation loss | 20-NN, mean of patches, subset | 20-NN, cls token |'
    assert table[2:6] == [
        '| random weights |  | 10.0 ± 0.0 | 25.0 ± 2.0 |',
        '| MAE | 0.500 ± 0.002 | 40.0 ± 2.0 |  |',
        '| MFF | 0.500 ± 0.002 | 43.0 ± 2.0 |  |',
        '| MFF - MAE | +0.000 ± 0.000 | +3.0 ± 0.0 |  |',
    ]
    # From (2, 30) to (4, 43 + shift), up to 40 + shift: 2 + 2 * (10 + shift) / (13 + shift)
    assert any(line.endswith('seed by seed: 3.5, 3.5, 3.6, of 4') for line in table)
    assert table[-2:] == ['the command  ', 'a CPU; torch 0']
    assert (results / 'summary.png').stat().st_size > 5000
    _, axes = report.make_figure(report.read_results(results), report.MEASURES).axes
    lines = {}
    for line in axes.lines:
        lines.setdefault(line.get_color(), []).append(list(line.get_ydata()))
    assert lines['C1'] == [[10, 30, 41], [10, 30, 43], [10, 30, 45], [10, 30, 43]]  # last: the mean
    assert lines['grey'][0][0] == 10 and len(lines['C0']) == 4
    with pytest.raises(InputError, match='no results'):
        report.write_report(results / 'nothing')


def test_epochs_to_reach():
    points = [(2, 30.0), (4, 40.0), (6, 38.0)]
    needed = [report.epochs_to_reach(points, value) for value in (20, 30, 35, 39, 40, 41)]
    assert needed == ['2.0', '2.0', '3.0', '3.8', '4.0', 'never']


# --- On a GPU -------------------------------------------------------------------------------------


def test_rehearsal(tmp_path):
    """Every stage at toy size; a second command repeats nothing; the page says what was found."""
    out, page = tmp_path / 'out', tmp_path / 'results.md'
    page.write_text(f'# Results\n\n## Before\n\n{gpu.HEADING}\n\nNot run.\n\n## After\n\ntext\n')
    for _ in range(2):
        job = Processes(gpu, [str(out), '--rehearse'])
        assert job.wait(500) == [0], job.printed(errors=True)[-2000:]
    lines = (out / 'lines.txt').read_text().splitlines()
    assert len(lines) == len(list(out.glob('*-*.json'))) >= 20
    assert all(json.loads(path.read_text())['error'] == '' for path in out.glob('*-*.json'))
    run_job(gpu.main, gpu.get_parser(), [str(out), '--write', str(page)])
    text = page.read_text()
    assert text.startswith('# Results\n\n## Before\n\n') and text.endswith('\n\n## After\n\ntext\n')
    assert 'Not run' not in text and '| all gradients | ' in text and '| MFF - MAE | ' in text
