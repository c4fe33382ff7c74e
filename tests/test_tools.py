"""Figures and features: what they show and say, computed a second way; commands; the notebook."""

import math
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Processes
from nbclient import NotebookClient
from sklearn.linear_model import LogisticRegression
from test_model import SMALL, relative

from ablation.variants import VariantMFF
from models_mff import create_encoder, model_sizes
from tools import features, visualize
from util.args import run_job
from util.visualize import reconstruct, reconstruction_figure

STATISTICS = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.fixture
def tool(capsys):
    """tool(module, *flags) -> what the command prints."""

    def start(module, *flags):
        run_job(module.main, module.get_parser(), list(map(str, flags)))
        return capsys.readouterr().out

    return start


# --- Reconstruction -------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_pix_loss', [True, False])
@pytest.mark.parametrize('target', ['pixels', 'lowpass'])
def test_reconstruction_of_a_perfect_model(norm_pix_loss, target):
    """Whose prediction is the target, patch by patch: the picture shows it in its place."""
    sizes = {**SMALL, 'norm_pix_loss': norm_pix_loss}
    model = VariantMFF(target=target, mean=STATISTICS[0], std=STATISTICS[1], **sizes)
    (height, width), p = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    imgs = torch.randn(4, 3, height, width)
    goal = model.target_image(imgs)
    patches = F.unfold(goal, p, stride=p).view(4, 3, p * p, -1)
    patches = patches.permute(0, 3, 2, 1).flatten(2)  # (N, L, p*p*C)
    if norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        patches = (patches - mean) / (var + 1e-6) ** 0.5
    forward, num_patches = model.forward, patches.shape[1]
    model.forward = lambda *inputs: (None, patches, forward(*inputs)[2])
    noise = torch.rand(4, num_patches)
    place = noise.argsort(1).argsort(1)  # the rank of each patch's noise
    hidden = (place >= num_patches // 2).view(4, 1, height // p, width // p)
    hidden = hidden.repeat_interleave(p, 2).repeat_interleave(p, 3)
    masked, reconstruction, pasted = reconstruct(model, imgs, 0.5, noise)
    assert torch.equal(masked, torch.where(hidden, 0.0, imgs))
    assert relative(reconstruction, goal) < 1e-5
    assert relative(pasted, torch.where(hidden, goal, imgs)) < 1e-5

    figure = reconstruction_figure(model, imgs, STATISTICS, 0.5, noise)
    (caption,) = (text.get_text() for text in figure.texts)
    assert caption.startswith('50% ') and ('true mean' in caption) == norm_pix_loss
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    for axes, expected in zip(figure.axes, (imgs, masked, reconstruction, pasted), strict=True):
        expected = (expected * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
        shown = axes.images[0].get_array().reshape(4, -1, width, 3)
        assert np.abs(shown[:, :height] - expected.numpy()).max() < 1e-5
        assert (shown[:, height:] == 1).all()  # below each image a white gap


# --- Frequency content ----------------------------------------------------------------------------


def test_spectrum_of_constants_waves_and_rectangles():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    constant = visualize.relative_log_amplitude(torch.full((2, 3, 8, 8), 5.0))
    assert constant.tolist() == pytest.approx([0] + [math.log(1e-6) - math.log(5 * 64)] * 4)
    for k in range(1, 5):  # 2 + 0.5 cos: amplitude 0.5 / 2 at +-k, both in one place at the highest
        wave = 2 + 0.5 * torch.cos(2 * math.pi * k * (rows + columns) / 8).expand(2, 3, 8, 8)
        spectrum = visualize.relative_log_amplitude(wave)
        assert spectrum[k].item() == pytest.approx(math.log((0.25 if k < 4 else 0.5) / 2), abs=1e-4)
        assert all(spectrum[other] < -10 for other in range(1, 5) if other != k)
        wide = torch.cat([wave, torch.zeros(2, 3, 8, 5)], dim=-1)  # counts as its square
        assert torch.equal(visualize.relative_log_amplitude(wide), spectrum)


def test_spectrum_is_of_the_blocks_outputs():
    encoder, imgs = tiny_encoder(), torch.randn(5, 3, 16, 24)
    x = encoder.pos_drop(encoder._pos_embed(encoder.patch_embed(imgs)))
    maps = visualize.block_features(encoder, imgs)
    with torch.no_grad():
        for block, ours in zip(encoder.blocks, maps, strict=True):
            x = block(x)
            assert relative(ours, x[:, 1:].transpose(1, 2).reshape(5, -1, 4, 6)) < 1e-5
    one, other, last = visualize.spectrum_figure({'one': maps, 'other': maps[:2]}).axes
    assert (len(one.lines), len(other.lines), len(last.lines)) == (4, 2, 2)
    expected = [visualize.relative_log_amplitude(blocks).tolist() for blocks in maps]
    assert [line.get_ydata().tolist() for line in one.lines] == expected
    assert last.lines[0].get_ydata().tolist() == [curve[-1] for curve in expected]


# --- Attention ------------------------------------------------------------------------------------


def tiny_encoder():
    torch.manual_seed(0)
    encoder = create_encoder(model_sizes('vit_nano_patch4', img_size=(16, 24)), 'token').eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform attention
    return encoder


def test_attention_and_rollout_by_formula():
    """softmax(q k / sqrt(d)) of every block; rollout entry by entry, as a sum over all paths."""
    encoder, imgs = tiny_encoder(), torch.randn(2, 3, 16, 24)
    heads, rollout = visualize.attention(encoder, imgs)
    with torch.no_grad():
        x, flow = encoder._pos_embed(encoder.patch_embed(imgs)), None
        for block in encoder.blocks:
            y = block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias
            q, k, _ = y.view(2, 25, 3, 4, 16).permute(2, 0, 3, 1, 4)  # (N, heads, 1+L, d)
            weights = torch.einsum('nhid,nhjd->nhij', q, k / 16**0.5).softmax(-1)
            step = 0.5 * weights.mean(1) + 0.5 * torch.eye(25)
            step = step / step.sum(-1, keepdim=True)
            flow = step if flow is None else torch.einsum('nij,njk->nik', step, flow)
            x = block(x)
    assert relative(heads, weights[:, :, 0, 1:].view(2, 4, 4, 6)) < 1e-5
    assert relative(rollout, flow[:, 0, 1:].view(2, 4, 6)) < 1e-5
    assert (weights[:, :, 0].std(1) > 1e-3).any()  # the heads differ

    axes = visualize.attention_figure(encoder, imgs, STATISTICS).axes
    assert [axis.get_title() for axis in axes[:3]] == ['input', 'rollout', 'head 0']
    shown = [torch.tensor(axis.images[0].get_array()) for axis in axes]
    assert torch.equal(torch.stack(shown[7:12]), torch.cat([rollout[1:], heads[1]]))
    before = encoder(imgs)
    visualize.attention(encoder, imgs)
    assert torch.equal(encoder(imgs), before) and encoder.blocks[0].attn.fused_attn


# --- Features -------------------------------------------------------------------------------------


def clusters(count, seed, noise=0.8, width=6):
    """(features, labels) as extract gives them: the cls token tells four classes apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % 4
    x = torch.randn(count, width, generator=generator)
    told = centres[labels] + noise * torch.randn(count, 6, generator=generator)
    return {'cls token': torch.cat([told, x[:, 6:]], dim=1), 'mean of patches': x}, labels


@pytest.mark.parametrize('penalty', [1e-1, 1e-4])
def test_logistic_regression_agrees_with_scikit_learn(penalty):
    found, labels = clusters(300, 0)
    x = found['cls token'].double()
    model = torch.nn.Linear(6, 4).double()  # from anywhere: it is convex
    features.fit_logistic(model, x, labels, penalty)
    theirs = LogisticRegression(C=1 / (300 * penalty), tol=1e-8, max_iter=1000)
    theirs = torch.from_numpy(theirs.fit(x.numpy(), labels.numpy()).predict_proba(x.numpy()))
    assert torch.allclose(model(x).softmax(1), theirs, atol=1e-3)


def test_logistic_accuracy_chooses_a_penalty_and_standardises(monkeypatch):
    """Of few images in many dimensions, most of which say nothing: without one they are fitted."""
    train, val = clusters(200, 3, 1.2, 66), clusters(1800, 4, 1.2, 66)
    accuracy = features.logistic_accuracy(train, val)
    assert accuracy['cls token'] > 50 and accuracy['mean of patches'] < 35
    scaled = [({'cls token': part['cls token'] * 1000 + 5}, y) for part, y in (train, val)]
    again = features.logistic_accuracy(*scaled)['cls token']
    assert again == pytest.approx(accuracy['cls token'], abs=0.3)
    monkeypatch.setattr(features, 'PENALTIES', [1e-6])
    assert features.logistic_accuracy(train, val)['cls token'] < accuracy['cls token'] - 3


def test_features_as_a_file(whole, folder, tool, tmp_path):
    """Of every readable image, by a loop over the files; the classifiers see the same ones."""
    images = shutil.copytree(folder, tmp_path / 'images')
    (images / 'train/circle/damaged.png').write_bytes(b'no image')
    flags = ['--data_path', images, '--init_from', whole.last, '--crop_pct', '1']
    flags += ['--num_workers', '0', '--device', 'cpu', '--out', tmp_path / 'x.npz']
    printed = tool(features, '--knn', '3', '--logistic', *flags)
    found = np.load(tmp_path / 'x.npz')
    assert found['split'].tolist() == ['train'] * 64 + ['val'] * 20 and '84 images' in printed
    names = [Path(name).parent.name for name in found['names']]
    assert [found['classes'][label] for label in found['labels']] == names

    encoder, settings = visualize.load_encoder(str(whole.last))
    imgs = visualize.read_images(found['names'].tolist()[::7], settings)
    with torch.no_grad():
        tokens = encoder.forward_features(imgs)
    arrays = {name: torch.from_numpy(found[name]) for name in ('cls_token', 'mean_of_patches')}
    assert relative(arrays['cls_token'][::7], tokens[:, 0]) < 0.05  # bicubic
    assert relative(arrays['mean_of_patches'][::7], tokens[:, 1:].mean(1)) < 0.05

    labels, in_train = torch.from_numpy(found['labels']), found['split'] == 'train'
    pairs = [({'x': arrays['cls_token'][part]}, labels[part]) for part in (in_train, ~in_train)]
    top1 = features.logistic_accuracy(*pairs)['x']
    assert f'logistic regression top-1 {top1:.2f} %  by the cls token, on 20 images' in printed


def test_neighbours_are_the_same_on_two_processes(whole, folder, tool):
    flags = f'--knn 5 --data_path {folder} --init_from {whole.last} --num_workers 0 --device cpu'
    one = tool(features, *flags.split())
    assert one.count('5-NN top-1') == 2
    two = Processes(features, *[flags.split()] * 2)
    assert two.wait() == [0, 0] and two.printed() == one, two.printed(errors=True)


# --- Commands -------------------------------------------------------------------------------------


def test_commands_draw(whole, folder, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b'):
        Path(name).mkdir()
        Path(name, 'checkpoint-last.pth').symlink_to(whole.last)
    a, b = 'a/checkpoint-last.pth', 'b/checkpoint-last.pth'
    images = ['--images', folder / 'val', next((folder / 'train').rglob('*.png'))]
    for flags, expected in [
        (['reconstruct', a], 'a/reconstruct.png'),
        (['attention', a, '--out', 'x.svg'], 'x.svg'),
        (['spectrum', a, b, '--random'], 'a/spectrum.png'),
    ]:
        assert tool(visualize, *flags, *images) == f'wrote {expected}\n'
        assert Path(expected).stat().st_size > 5000
    args = visualize.get_parser().parse_args(['spectrum', a, b, '--random', *map(str, images)])
    titles = [axes.get_title() for axes in visualize.draw_spectrum(args).axes]
    assert titles[:3] == [a, b, 'random weights']


def test_a_reconstruction_takes_seed_and_ratio(whole, folder, monkeypatch):
    monkeypatch.setattr(visualize, 'reconstruction_figure', lambda *given: given)
    flags = ['reconstruct', str(whole.last), '--images', str(folder / 'val')]
    drawn = [
        visualize.draw(visualize.get_parser().parse_args([*flags, *more.split()]))
        for more in ('', '--seed 0', '--seed 1 --mask_ratio 0.5 --no-norm_pix_loss')
    ]
    models, imgs, _, ratios, noises = zip(*drawn)
    assert ratios == (0.75, 0.75, 0.5) and imgs[0].shape == (7, 3, 16, 16)  # every third of 20
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    assert [model.norm_pix_loss for model in models] == [True, True, False]


@pytest.mark.parametrize(
    'module, flags, told',
    [
        (visualize, 'attention {last} {last} --images {folder}', 'one checkpoint'),
        (visualize, 'reconstruct {last} --images {folder} --out {empty}/a/b.png', 'b.png'),
        (features, '--init_from {last} --data_path {folder}', '--knn'),
        (features, '--init_from {last} --data_path {folder} --out {empty}', '{empty}'),
        (features, '--init_from {last} --data_path {folder}/val/circle --knn 5', 'validation'),
    ],
)
def test_mistakes_get_one_line(module, flags, told, whole, folder, tmp_path, tool, capsys):
    places = {'last': whole.last, 'folder': folder, 'empty': tmp_path}
    with pytest.raises(SystemExit) as stop:
        tool(module, *flags.format(**places).split())
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and told.format(**places) in lines[-1]


# --- The notebook ---------------------------------------------------------------------------------


def kinds_of_outputs(notebook):
    """For each cell of code: pictures and text, without what libraries say on stderr."""
    return [
        {(output.output_type, output.get('name')) for output in cell.outputs}
        - {('stream', 'stderr')}
        for cell in notebook.cells
        if cell.cell_type == 'code'
    ]


def test_the_notebook_runs_and_is_stored_with_its_outputs(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / 'demo.ipynb', 4)
    stored = kinds_of_outputs(notebook)
    for name, value in {'MFF_DEMO_STEPS': 5, 'HF_HUB_OFFLINE': 1, 'TMPDIR': tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}}).execute()
    assert kinds_of_outputs(notebook) == stored and any(stored)
