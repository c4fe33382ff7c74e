"""The paper's alternatives, computed a second way; runs and report of an ablation; a rehearsal."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


def fused_by_torch(s, levels, fuse_proj, fusion, heads=3):
    """z (N, T, D) by torch's functions, from the state s; levels: K tensors (N, T, D)."""
    y = [*levels]
    for k, x in enumerate(levels[:-1]):
        for name in {'linear': [''], 'mlp': ['0.', '2.'], 'none': []}[fuse_proj]:
            x = F.gelu(x) if name == '2.' else x
            x = F.linear(x, *(s[f'fuse_projs.{k}.{name}{kind}'] for kind in ('weight', 'bias')))
        y[k] = x
    if fusion != 'attention':
        logits = s['fuse_logits'] if fusion == 'average' else torch.zeros(len(y))
        return torch.einsum('k,kntd->ntd', logits.flatten().softmax(0), torch.stack(y))
    D = y[0].shape[-1]
    norm = torch.nn.LayerNorm(D, eps=1e-6)
    norm.load_state_dict({kind: s[f'fuse_norm.{kind}'] for kind in ('weight', 'bias')})
    attention = torch.nn.MultiheadAttention(D, heads, batch_first=True)
    parts = {'in_proj_': 'qkv.', 'out_proj.': 'proj.'}
    attention.load_state_dict({
        theirs + kind: s[f'fuse_attn.{ours}{kind}']
        for theirs, ours in parts.items()
        for kind in ('weight', 'bias')
    })  # fmt: skip
    fused = torch.empty_like(y[0])
    for place in range(y[0].shape[1]):  # the levels of a token are the sequence
        x = torch.stack([level[:, place] for level in y], dim=1)  # (N, K, D)
        fused[:, place] = (x + attention(*[norm(x)] * 3)[0]).mean(1)
    return fused


@pytest.mark.parametrize('fuse_proj', variants.CHOICES['fuse_proj'])
@pytest.mark.parametrize('fusion', variants.CHOICES['fusion'])
def test_projection_and_fusion_are_the_formula(fuse_proj, fusion):
    torch.manual_seed(1)
    model = VariantMFF(**SMALL, fuse_proj=fuse_proj, fusion=fusion)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the symmetric start
            parameter.add_(0.1 * torch.randn_like(parameter))
        levels = [torch.randn(2, 5, 24) for _ in range(3)]
        expected = fused_by_torch(model.state_dict(), levels, fuse_proj, fusion)
    assert relative(model.fuse(levels), expected) < 1e-5
    assert len(model.fusion_weights) == (0 if fusion == 'attention' else 3)
    model(torch.randn(2, 3, 32, 32))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert ('fuse_logits' in dict(model.named_parameters())) == (fusion == 'average')


@pytest.mark.parametrize('size', [(224, 224), (16, 40)])
def test_target_is_pixmims(size):
    """|IFFT2(fftshift(FFT2(x)) M)| of the un-normalised image, M a disc of radius 40 at 224."""
    mean, std, sizes = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), SMALL | {'img_size': size}
    model = VariantMFF(**sizes, target='lowpass', mean=mean, std=std)
    rows, columns = ((np.arange(side) - (side - 1) / 2) * 224 / side for side in size)
    disc = np.hypot(rows[:, None], columns) <= 40
    pixels = np.random.default_rng(0).random((3, *size))
    spectrum = np.fft.fftshift(np.fft.fft2(pixels), axes=(1, 2))
    mean, std = np.array(mean).reshape(3, 1, 1), np.array(std).reshape(3, 1, 1)
    expected = (np.abs(np.fft.ifft2(spectrum * disc)) - mean) / std
    imgs = torch.from_numpy((pixels - mean) / std).float()[None]
    target = model.target_image(imgs)
    assert relative(target[0], torch.from_numpy(expected).float()) < 1e-5
    loss, pred, mask = model(imgs)  # the loss is the plain model's against that target
    assert torch.equal(loss, MaskedAutoencoderMFF(**sizes).forward_loss(target, pred, mask))


def test_the_first_choices_are_the_papers_own():
    losses = []
    for kind in (VariantMFF, MaskedAutoencoderMFF):
        torch.manual_seed(0)
        losses.append(kind(**SMALL)(torch.randn(2, 3, 32, 32))[0])
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
    """Every flag is one of the job that it is for, and the variants are all different."""
    args = run.get_parser().parse_args([f'@{path}', '--data_path', 'CIFAR10'])
    features.get_parser().parse_args([*args.model_flags, *args.measure_flags])
    main_finetune.get_parser().parse_args([*args.model_flags, *(args.finetune_flags or [])])
    flags = [run.pretrain_flags(args, variant) for variant in run.VARIANTS if variant != 'random']
    parsed = [pretrain.get_parser().parse_args(words) for words in flags]
    assert len({str(sorted(vars(args).items(), key=str)) for args in parsed}) == len(parsed)
    assert parsed[0].knn_every and parsed[0].fuse_layers[0] in (3, 5, 11)  # MAE: the last block


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
    axes, _ = report.make_figure(report.read_results(results)).axes
    lines = [list(line.get_ydata()) for line in axes.lines if line.get_color() == 'C1']
    assert lines == [[10, 30, 41], [10, 30, 43], [10, 30, 45], [10, 30, 43]]  # last: the mean
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
