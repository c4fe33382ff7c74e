"""Figures: what they show of a model or a run is computed a second way, and their commands."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from matplotlib.colors import to_rgba
from PIL import Image
from test_model import SMALL, relative

from util import checkpoint, visualize, weights
from util.args import run_job
from util.errors import InputError
from util.variants import VariantMFF


@pytest.mark.parametrize('norm_pix_loss', [True, False])
@pytest.mark.parametrize('target', ['pixels', 'lowpass'])
def test_reconstruction_of_a_perfect_model(norm_pix_loss, target):
    """Whose prediction is the target, patch by patch, by torch's unfold: the picture shows it in its place."""
    statistics = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    sizes = {**SMALL, 'norm_pix_loss': norm_pix_loss}
    model = VariantMFF(target=target, mean=statistics[0], std=statistics[1], **sizes)
    (height, width), p = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    imgs = torch.randn(4, 3, height, width)
    goal = model.target_image(imgs)
    patches = F.unfold(goal, p, stride=p).view(4, 3, p * p, -1).permute(0, 3, 2, 1).flatten(2)  # (N, L, p*p*C)
    if norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        patches = (patches - mean) / (var + 1e-6) ** 0.5
    forward, num_patches = model.forward, patches.shape[1]
    model.forward = lambda *inputs: (None, patches, forward(*inputs)[2])
    noise = torch.rand(4, num_patches)
    place = noise.argsort(1).argsort(1)  # the rank of each patch's noise
    hidden = (place >= num_patches // 2).view(4, 1, height // p, width // p)
    hidden = hidden.repeat_interleave(p, 2).repeat_interleave(p, 3)
    masked, reconstruction, pasted = visualize.reconstruct(model, imgs, 0.5, noise)
    assert torch.equal(masked, torch.where(hidden, 0.0, imgs))
    assert relative(reconstruction, goal) < 1e-5
    assert relative(pasted, torch.where(hidden, goal, imgs)) < 1e-5

    figure = visualize.reconstruction_figure(model, imgs, statistics, 0.5, noise)
    (caption,) = (text.get_text() for text in figure.texts)
    assert caption.startswith('50% ') and ('true mean' in caption) == norm_pix_loss
    titles = ['input', 'masked', 'reconstruction', 'with visible patches']
    assert [axes.get_title() for axes in figure.axes] == titles
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    shades = [pictures * std + mean for pictures in (imgs, masked, reconstruction, pasted)]
    low, high = shades[0].min().clamp(max=0), shades[0].max().clamp(min=1)
    for axes, expected in zip(figure.axes, shades):
        expected = ((expected - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1)
        shown = np.asarray(axes.images[0].get_array()).reshape(4, -1, width, 3)  # below each image a white gap
        assert np.abs(shown[:, :height] - expected.numpy()).max() < 1e-5 and (shown[:, height:] == 1).all()


@pytest.mark.parametrize('count, size', [(1, (32, 32)), (8, (32, 32)), (3, (16, 40)), (60, (32, 32))])
def test_margins_of_a_reconstruction_do_not_grow(count, size):
    model = VariantMFF(**{**SMALL, 'img_size': size})
    figure = visualize.reconstruction_figure(model, torch.randn(count, 3, *size), ((0.5,) * 3, (0.2,) * 3))
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    left, bottom, right, top = boxes[0].x0, boxes[0].y0, boxes[-1].x1, boxes[0].y1
    width, height = figure.get_size_inches() * figure.dpi
    assert max(left, width - right) < 20 and 20 < height - top < 45 and 20 < bottom < 45  # title and caption
    assert all(8 > after.x0 - before.x1 > 0 for before, after in zip(boxes, boxes[1:]))


def test_reconstruction_takes_seed_and_ratio(pretrain, folder):
    path = pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    images = list(map(str, sorted((folder / 'val').rglob('*.png'))[:3]))
    seen = []
    for seed, ratio in ((0, 0.75), (0, 0.75), (1, 0.75), (1, 0.5)):
        flags = ['reconstruct', str(path), '--images', *images, '--seed', str(seed), '--mask_ratio', str(ratio)]
        axes = visualize.draw_reconstruction(visualize.get_parser().parse_args(flags)).axes
        inputs, masked = (np.asarray(axes[k].images[0].get_array()).reshape(3, -1, 16, 3)[:, :16] for k in (0, 1))
        seen.append((inputs == masked).all(-1).reshape(3, 4, 4, 4, 4).all((2, 4)))  # (image, row, column of patches)
        assert seen[-1].sum((1, 2)).tolist() == [round(16 * (1 - ratio))] * 3
    assert (seen[0] == seen[1]).all() and (seen[0] != seen[2]).any() and (seen[0][0] != seen[0][1]).any()


def test_spectrum_of_a_constant_and_of_waves():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    constant = visualize.relative_log_amplitude(torch.full((2, 3, 8, 8), 5.0))
    assert constant.tolist() == pytest.approx([0] + [math.log(1e-6) - math.log(5 * 64)] * 4)
    for k in range(1, 5):  # 2 + 0.5 cos: amplitude 0.5 / 2 at +-k, both in one place at the highest
        wave = 2 + 0.5 * torch.cos(2 * math.pi * k * (rows + columns) / 8)
        spectrum = visualize.relative_log_amplitude(wave.expand(2, 3, 8, 8))
        assert spectrum[k].item() == pytest.approx(math.log((0.25 if k < 4 else 0.5) / 2), abs=1e-4)
        assert all(spectrum[other] < -10 for other in range(1, 5) if other != k)


def test_spectrum_of_white_noise():
    """Flat, but that zero and the highest are real Gaussians, with a mean logarithm lower by ln(2) / 2."""
    noise = torch.randn(200, 100, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [0, *[math.log(2) / 2] * 3, 0]
    assert visualize.relative_log_amplitude(noise).tolist() == pytest.approx(expected, abs=0.03)
    wide = torch.cat([noise[:2], torch.zeros(2, 100, 8, 5)], dim=-1)  # a rectangle counts as its square
    assert torch.equal(visualize.relative_log_amplitude(wide), visualize.relative_log_amplitude(noise[:2]))


def test_features_are_the_blocks_outputs(pretrain):
    path = str(pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth')
    state = checkpoint.load_run(path)['model']
    imgs = torch.randn(5, 3, 16, 16)
    x = torch.einsum('ncrpsq,dcpq->nrsd', imgs.reshape(5, 3, 4, 4, 4, 4), state['patch_embed.proj.weight'])
    x = x.flatten(1, 2) + state['patch_embed.proj.bias'] + state['pos_embed'][:, 1:]
    x = torch.cat([(state['cls_token'] + state['pos_embed'][:, :1]).expand(5, -1, -1), x], dim=1)
    encoder, _ = weights.load_encoder(path)
    maps = visualize.block_features(encoder, imgs, batch_size=2)
    with torch.no_grad():
        for block, ours in zip(encoder.blocks, maps, strict=True):
            x = block(x)
            assert relative(ours, x[:, 1:].transpose(1, 2).reshape(5, -1, 4, 4)) < 1e-5


@pytest.fixture
def draw(capsys):
    """draw(figure, ...) -> the file that the command says it wrote."""

    def start(*flags):
        run_job(visualize.main, visualize.get_parser(), list(map(str, flags)))
        return Path(capsys.readouterr().out.splitlines()[-1].removeprefix('wrote '))

    return start


def test_commands_draw(pretrain, draw, folder, tmp_path, monkeypatch):
    """The figure of one checkpoint or run goes into its folder, that of several into this one, or where asked."""
    first = pretrain('run', '--epochs', '2', '--keep_every', '1', '--knn_every', '1').output_dir
    last, kept = first / 'checkpoint-last.pth', first / 'checkpoint-0001.pth'
    monkeypatch.chdir(tmp_path)
    images = ['--images', folder / 'val', next((folder / 'train').rglob('*.png'))]
    for figure, flags, expected in [
        ('curves', [first], first / 'curves.png'),
        ('reconstruct', [last, *images], first / 'reconstruct.png'),
        ('fusion', [last], first / 'fusion.png'),
        ('fusion', [last, kept], Path('./fusion.png')),
        ('spectrum', [last, kept, '--random', *images], Path('spectrum.png')),
        ('fusion', [last, '--out', tmp_path / 'a'], tmp_path / 'a.png'),
        ('fusion', [last, '--out', folder], folder / 'fusion.png'),
    ]:
        assert draw(figure, *flags) == expected and expected.stat().st_size > 5000


def test_images_come_from_files_and_folders(folder):
    settings = SimpleNamespace(sizes={'img_size': (16, 16), 'in_chans': 3}, mean=(0.0,) * 3, std=(1.0,) * 3)
    paths = sorted(map(str, (folder / 'val').rglob('*.png')))
    read = visualize.read_images([str(folder / 'val'), paths[3]], settings, most=5)
    assert torch.equal(read, visualize.read_images([*paths[::4], paths[3]], settings))
    assert len(visualize.read_images([str(folder / 'val')], settings)) == 20


def test_figures_of_known_numbers():
    figure = visualize.fusion_figure({'a': {0: 0.25, 11: 0.75}, 'b': {0: 0.5, 5: 0.3, 11: 0.2}})
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[0.25, 0.75], [0.5, 0.3, 0.2]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['0', '5', '11']
    maps = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    block, last = visualize.spectrum_figure({'a': maps}).axes
    assert len(block.lines) == 3 and len(last.lines[0].get_xdata()) == 3
    for line, expected in zip(block.lines, maps):
        assert line.get_ydata() == pytest.approx(visualize.relative_log_amplitude(expected).tolist())
    assert all(tick == int(tick) for tick in last.get_xticks())


def test_legends_cover_nothing(tmp_path):
    entries = [{'step': s, 'epoch': s, 'loss': 1, 'val_top1': 5, **{f'fusion/layer_{b:02d}': 1 / 32 for b in range(32)}}
               for s in (1, 2)]  # fmt: skip
    write_log(tmp_path / 'run', entries)
    figure = visualize.curves_figure([str(tmp_path / 'run')])
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not any(legend.overlaps(other.get_window_extent()) for other in figure.axes)
        assert legend.y0 > -1


def test_mistakes_with_pictures_get_one_line(pretrain, folder, tmp_path, capsys):
    mff = str(pretrain('mff', '--epochs', '1').output_dir / 'checkpoint-last.pth')
    mae = str(pretrain('mae', '--epochs', '1', '--fuse_layers', '3').output_dir / 'checkpoint-last.pth')
    attention = str(pretrain('attention', '--epochs', '1', '--fusion', 'attention').output_dir / 'checkpoint-last.pth')
    image = str(next((folder / 'val').rglob('*.png')))
    missing, empty = str(tmp_path / 'missing/picture.png'), str(tmp_path / 'empty')
    Path(empty).mkdir()
    for flags, message in [
        (['reconstruct', mff, '--images', image, '--no-norm_pix_loss'], 'records how'),
        (['reconstruct', mff, '--images', image, '--seed', str(2**64)], '--seed'),
        (['reconstruct', mff, '--images', empty], f'no image in {empty}'),
        (['spectrum', mff, '--images', missing], f'{missing}: No such file'),
        (['fusion', mff, mae], f'{mae}: no fusion weights'),
        (['fusion', attention], 'no fusion weights'),
        (['curves', str(folder)], 'no log.jsonl'),
        (['fusion', mff, '--out', missing], f'{missing}: No such file'),
        (['fusion', mff, '--out', str(tmp_path / 'a.jpeg2000')], 'not supported'),
    ]:
        with pytest.raises(SystemExit) as exit:
            run_job(visualize.main, visualize.get_parser(), flags)
        printed = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and message in printed[-1], (flags, printed)


def test_titles_tell_apart():
    for paths, expected in [
        (['a/run/checkpoint-last.pth'], ['run']),
        (['a/weights/mae.pth'], ['mae']),
        (['a/run/checkpoint-0001.pth', 'a/run/checkpoint-last.pth'], ['checkpoint-0001', 'checkpoint-last']),
        (['a/mae/checkpoint-0001.pth', 'a/mff/checkpoint-0002.pth'], ['mae/checkpoint-0001', 'mff/checkpoint-0002']),
        (['weights/mae.pth', 'other/mff.safetensors'], ['weights/mae', 'other/mff.safetensors']),
        (['a/mae/pretrain/checkpoint-last.pth', 'a/mff/pretrain/checkpoint-last.pth'], ['mae', 'mff']),
        (['a/mae/pretrain', 'b/mae/pretrain', 'b/mff/pretrain'], ['a/mae', 'b/mae', 'b/mff']),
        (['run', 'other/run'], ['run', 'other/run']),
        (['run', 'run/run'], ['run', 'run/run']),
    ]:
        assert visualize.titles([str(ROOT / path) for path in paths]) == expected


def write_log(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, [{'command': 'x'}, *entries])) + '\n')


def test_curves_of_folders_of_the_same_name(tmp_path):
    for name, final in (('mae', {23: 1.0}), ('mff', {0: 0.15, 20: 0.25, 23: 0.6})):
        fusion = {f'fusion/layer_{layer:02d}': weight for layer, weight in final.items()}
        before = {**dict.fromkeys(fusion, 0.5), 'loss': 0.9}
        entries = [{'step': 1, 'epoch': 1, **before}, {'step': 2, 'epoch': 2, 'loss': 0.5, **fusion}]
        write_log(
            tmp_path / name / 'pretrain', [*entries, {'step': 2, 'epoch': 2, 'val_knn_cls': 31, 'val_knn_patches': 42}]
        )
    figure = visualize.curves_figure([str(tmp_path / name / 'pretrain') for name in ('mae', 'mff')])
    loss, accuracy, course, final = figure.axes
    assert [line.get_label() for line in loss.lines] == ['mae, loss', 'mff, loss']
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.9, 0.5]] * 2
    shown = [(line.get_label(), line.get_ydata()[0]) for line in accuracy.lines]
    assert shown[2:] == [('mff, 20-NN by the cls token', 31), ('mff, 20-NN by the mean of patches', 42)]
    assert [[bar.get_height() for bar in group] for group in final.containers] == [[0.15, 0.25, 0.6]]  # at the end
    colours = {line.get_label(): line.get_color() for line in course.lines if line.get_label().startswith('block')}
    assert list(colours) == ['block 0', 'block 20', 'block 23'] and len(set(colours.values())) == 3
    drawn = [line for line in course.lines if len(line.get_xdata())]
    assert [line.get_ydata()[-1] for line in drawn] == [0.15, 0.25, 0.6]
    assert [line.get_color() for line in drawn] == list(colours.values())
    styles = {line.get_label(): line.get_linestyle() for line in course.lines}
    assert styles['mff'] == '--' == drawn[0].get_linestyle() and 'mae' not in styles  # of whose weight is 1
    middles = [bar.get_x() + bar.get_width() / 2 for bar in final.containers[0]]
    assert middles == pytest.approx([0, 1, 2])  # nothing is kept free for MAE
    assert final.containers[0].patches[0].get_facecolor() == to_rgba('C1') == to_rgba(loss.lines[1].get_color())
    assert len(visualize.curves_figure([str(tmp_path / 'mae/pretrain')]).axes) == 2
    with pytest.raises(InputError, match='no log.jsonl'):
        visualize.curves_figure([str(tmp_path / 'mae/pretrain'), str(tmp_path)])


def test_pictures_of_arrays_of_any_range(tmp_path):
    """Floats far outside of 0..1, as --mean and --std allow, and a PNG beside an array."""
    wide = SimpleNamespace(sizes={'img_size': (16, 16), 'in_chans': 3}, mean=(100.0,) * 3, std=(50.0,) * 3)
    np.save(tmp_path / 'wide.npy', np.linspace(0, 200, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3))
    np.save(tmp_path / 'unit.npy', np.full((16, 16, 3), 0.5, dtype=np.float32))
    Image.new('RGB', (16, 16), (51, 51, 51)).save(tmp_path / 'grey.png')
    imgs = visualize.read_images([str(tmp_path / name) for name in ('unit.npy', 'grey.png')], wide)
    assert imgs.mean((1, 2, 3)).tolist() == pytest.approx([(0.5 - 100) / 50, (0.2 - 100) / 50])
    imgs = visualize.read_images([str(tmp_path / 'wide.npy')], wide)
    model = VariantMFF(**{**SMALL, 'img_size': 16})
    shown = visualize.reconstruction_figure(model, imgs, ([100] * 3, [50] * 3)).axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1) and shown[8, 8, 0] == pytest.approx(0.5, abs=0.05)
