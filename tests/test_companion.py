"""What lets a reader check the paper's claims: the paper's alternatives, figures of features, the ablation's tables."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from huggingface_hub import ModelCard
from matplotlib.colors import to_rgba
from PIL import Image
from test_model import SMALL, layer_norm, linear, relative
from util.design_choices import DesignChoices

import main_finetune
import main_linprobe
import main_pretrain
import models_mff
from benchmarks import ablation, ablation_report
from util import checkpoint, design_choices, features, visualize
from util.args import InputError, run
from util.export import export

# --- The paper's alternatives, computed a second way -----------------------------------------------------------


def shaken(**choices):
    """A small model with these choices, its parameters moved away from the symmetric start."""
    torch.manual_seed(1)
    model = DesignChoices(**{**SMALL, **choices})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plain_fuse(s, levels, fuse_proj, fusion, heads=3):
    """z (N, T, D) by the formulas, from the state s; levels: K tensors (N, T, D)."""
    y = []
    for k, x in enumerate(levels):
        if k < len(levels) - 1 and fuse_proj == 'linear':
            x = linear(s, f'fuse_projs.{k}', x)
        elif k < len(levels) - 1 and fuse_proj == 'mlp':
            hidden = linear(s, f'fuse_projs.{k}.0', x)
            x = linear(s, f'fuse_projs.{k}.2', hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        y.append(x)
    if fusion == 'average':
        weights = s['fuse_logits'].flatten().exp()
        return sum(w / weights.sum() * x for w, x in zip(weights, y))
    if fusion == 'uniform':
        return sum(y) / len(y)
    normed = [layer_norm(s, 'fuse_norm', x) for x in y]
    q, k, v = zip(*(linear(s, 'fuse_attn.qkv', x).chunk(3, dim=-1) for x in normed))
    out = []
    for i in range(len(y)):  # each level asks all levels of the same token, head by head
        parts = []
        for columns in torch.arange(y[0].shape[-1]).chunk(heads):
            scores = [(q[i] * k_j)[..., columns].sum(-1, keepdim=True) / math.sqrt(len(columns)) for k_j in k]
            total = sum(score.exp() for score in scores)
            parts.append(sum(score.exp() / total * v_j[..., columns] for score, v_j in zip(scores, v)))
        out.append(y[i] + linear(s, 'fuse_attn.proj', torch.cat(parts, dim=-1)))
    return sum(out) / len(out)


@pytest.mark.parametrize('fuse_proj', ['linear', 'none', 'mlp'])
@pytest.mark.parametrize('fusion', ['average', 'uniform', 'attention'])
def test_projection_and_fusion_are_the_formula(fuse_proj, fusion):
    model = shaken(fuse_proj=fuse_proj, fusion=fusion)
    levels = [torch.randn(2, 5, 24) for _ in range(3)]
    expected = plain_fuse(model.state_dict(), levels, fuse_proj, fusion)
    assert relative(model.fuse(levels), expected) < 1e-5
    weights = model.fusion_weights
    assert weights.tolist() == pytest.approx([1 / 3] * 3) if fusion == 'uniform' else len(weights) in (0, 3)
    model(torch.randn(2, 3, 32, 32))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    trained = {name for name, _ in model.named_parameters() if name.startswith('fuse_logits')}
    assert trained == ({'fuse_logits'} if fusion == 'average' else set())


@pytest.mark.parametrize('size', [(32, 32), (16, 40)])
def test_low_frequency_target_is_pixmims(size):
    """FACTS of PixMIM: |IFFT2(fftshift(FFT2(x)) M)| of the un-normalised image, M a disc; here by sums over waves."""
    statistics = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    model = shaken(target='lowpass', statistics=statistics, img_size=size)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in statistics)
    pixels = np.random.default_rng(0).random((3, *size))
    (H, W), (rows, columns) = size, np.mgrid[: size[0], : size[1]]
    kept = np.zeros((3, *size), dtype=complex)
    for u in range(H):
        for v in range(W):
            if ((u - (H - 1) / 2) / H) ** 2 + ((v - (W - 1) / 2) / W) ** 2 <= (40 / 224) ** 2:
                f, g = u - H // 2, v - W // 2  # the frequency at (u, v) once zero is in the middle
                amplitude = (pixels * np.exp(-2j * np.pi * (f * rows / H + g * columns / W))).sum((1, 2), keepdims=True)
                kept += amplitude * np.exp(2j * np.pi * (u * rows / H + v * columns / W)) / (H * W)
    imgs = torch.from_numpy((pixels - mean) / std).float()[None]
    expected = torch.from_numpy((np.abs(kept) - mean) / std).float()
    target = model.low_frequency_target(imgs)[0]
    assert relative(target, expected) < 1e-5 and relative(target, imgs[0]) > 0.1
    loss, pred, mask = model(imgs)  # the loss is the plain model's against that target
    plain = models_mff.MaskedAutoencoderMFF(**{**SMALL, 'img_size': size})
    assert torch.equal(loss, plain.forward_loss(model.low_frequency_target(imgs), pred, mask))


def test_low_frequencies_at_224_are_the_disc_of_40():
    rows, columns = np.mgrid[:224, :224] - 111.5
    assert torch.equal(design_choices.low_frequencies(224, 224), torch.tensor(np.hypot(rows, columns) <= 40).float())


def test_default_choices_are_the_plain_model(small_run):
    args = main_pretrain.get_parser().parse_args(small_run('run'))
    torch.manual_seed(0)
    ours = design_choices.create_model(args)
    torch.manual_seed(0)
    plain = models_mff.create_model(args.model, args.input_size)
    assert type(ours) is models_mff.MaskedAutoencoderMFF
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in plain.state_dict().items())
    args.fuse_proj = args.fusion = args.target = None  # as exported from a checkpoint that is older than these flags
    assert type(design_choices.create_model(args)) is models_mff.MaskedAutoencoderMFF
    args.fuse_layers, args.fusion = [11], 'uniform'
    with pytest.raises(ValueError, match='plain MAE'):
        design_choices.create_model(args)


@pytest.mark.parametrize('choice', ['--fusion attention', '--fuse_proj mlp --fusion uniform', '--target lowpass'])
def test_a_run_with_choices(pretrain, tmp_path, choice):
    result = pretrain('run', '--epochs', '2', *choice.split())
    losses = list(result.losses.values())
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert any('fusion/layer_00' in entry for entry in result.entries) == ('attention' not in choice)
    with pytest.raises(SystemExit):  # another architecture, or another target
        pretrain('run', '--epochs', '2')
    encoder = models_mff.create_encoder('vit_tiny_patch4', (16, 16))
    assert 'left out' in checkpoint.load_weights(encoder, result.output_dir / 'checkpoint-last.pth')
    if 'target' not in choice:
        with pytest.raises(InputError, match='fuse_|fusion'):
            name = str(result.output_dir / 'checkpoint-last.pth')
            checkpoint.load_weights(models_mff.create_model('mff_vit_tiny_patch4', 16), name, whole=True)
    export(result.output_dir / 'checkpoint-last.pth', tmp_path / 'exported')
    card = ModelCard.load(tmp_path / 'exported/README.md')  # as the hub reads it
    assert (card.data.license, card.data.library_name) == ('unknown', 'timm')
    assert card.data.pipeline_tag == 'image-feature-extraction' and '| training images | 64 |' in card.text
    name, value = choice.removeprefix('--').split()[:2]
    assert f'| {name} | {value} |' in card.text and '@inproceedings' in card.text


# --- Figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_pix_loss', [True, False])
@pytest.mark.parametrize('target', ['pixels', 'lowpass'])
def test_reconstruction_of_a_perfect_model(norm_pix_loss, target):
    """Whose prediction is the target, patch by patch, by torch's unfold: the picture shows it in its place."""
    statistics = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    model = DesignChoices(target=target, statistics=statistics, **{**SMALL, 'norm_pix_loss': norm_pix_loss})
    (height, width), p = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    imgs = torch.randn(4, 3, height, width)
    goal = model.low_frequency_target(imgs) if target == 'lowpass' else imgs
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
    caption = figure.get_supxlabel()
    assert caption.startswith('50% ') and ('true mean' in caption) == norm_pix_loss
    assert ('PixMIM' in caption) == (target == 'lowpass')
    titles = ['input', 'masked', 'reconstruction', 'with visible patches']
    assert [axes.get_title() for axes in figure.axes] == titles
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    shades = [pictures * std + mean for pictures in (imgs, masked, reconstruction, pasted)]
    low, high = shades[0].min().clamp(max=0), shades[0].max().clamp(min=1)
    for axes, expected in zip(figure.axes, shades):
        expected = ((expected - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1)
        shown = np.asarray(axes.images[0].get_array()).reshape(4, -1, width, 3)  # below each image a white gap
        assert np.abs(shown[:, :height] - expected.numpy()).max() < 1e-5 and (shown[:, height:] == 1).all()


def test_reconstruction_takes_seed_and_ratio(pretrain, folder):
    path = pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    images = list(map(str, sorted((folder / 'val').rglob('*.png'))[:3]))
    seen = []
    for seed, ratio in ((0, 0.75), (0, 0.75), (1, 0.75), (1, 0.5)):
        flags = ['reconstruct', str(path), *images, '--seed', str(seed), '--mask_ratio', str(ratio)]
        axes = visualize.draw_reconstruction(visualize.get_parser().parse_args(flags)).axes
        inputs, masked = (np.asarray(axes[k].images[0].get_array()).reshape(3, -1, 16, 3)[:, :16] for k in (0, 1))
        seen.append((inputs == masked).all(-1).reshape(3, 4, 4, 4, 4).all((2, 4)))  # (image, row, column of patches)
        assert seen[-1].sum((1, 2)).tolist() == [round(16 * (1 - ratio))] * 3
    assert (seen[0] == seen[1]).all() and (seen[0] != seen[2]).any() and (seen[0][0] != seen[0][1]).any()


def test_random_weights_are_those_that_pre_training_starts_from():
    encoder = models_mff.create_untrained_encoder('vit_tiny_patch4', 16)
    assert torch.equal(encoder.pos_embed, models_mff.create_model('mff_vit_tiny_patch4', 16).pos_embed)
    for name, weight in encoder.state_dict().items():
        if name.endswith('weight') and weight.ndim == 2:  # xavier: uniform, of variance 2 / (inputs + outputs)
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.99 * bound < weight.max() <= bound and -bound <= weight.min() < -0.99 * bound, name
        elif name.endswith('bias') and 'mlp' not in name and 'patch' not in name:
            assert not weight.any()


def test_spectrum_of_a_constant_and_of_waves():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    constant = features.relative_log_amplitude(torch.full((2, 3, 8, 8), 5.0))
    assert constant.tolist() == pytest.approx([0] + [math.log(1e-6) - math.log(5 * 64)] * 4)
    for k in range(1, 5):  # 2 + 0.5 cos: amplitude 0.5 / 2 at +-k, both in one place at the highest
        wave = 2 + 0.5 * torch.cos(2 * math.pi * k * (rows + columns) / 8)
        spectrum = features.relative_log_amplitude(wave.expand(2, 3, 8, 8))
        assert spectrum[k].item() == pytest.approx(math.log((0.25 if k < 4 else 0.5) / 2), abs=1e-4)
        assert all(spectrum[other] < -10 for other in range(1, 5) if other != k)


def test_spectrum_of_white_noise():
    """Flat, but that zero and the highest are real Gaussians, with a mean logarithm lower by ln(2) / 2."""
    noise = torch.randn(200, 100, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [0, *[math.log(2) / 2] * 3, 0]
    assert features.relative_log_amplitude(noise).tolist() == pytest.approx(expected, abs=0.03)
    wide = torch.cat([noise[:2], torch.zeros(2, 100, 8, 5)], dim=-1)  # a rectangle counts as its square
    assert torch.equal(features.relative_log_amplitude(wide), features.relative_log_amplitude(noise[:2]))


def test_features_are_the_blocks_outputs_from_any_origin(pretrain):
    path = str(pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth')
    state = checkpoint.load_run(path)['model']
    imgs = torch.randn(5, 3, 16, 16)
    x = torch.einsum('ncrpsq,dcpq->nrsd', imgs.reshape(5, 3, 4, 4, 4, 4), state['patch_embed.proj.weight'])
    x = x.flatten(1, 2) + state['patch_embed.proj.bias'] + state['pos_embed'][:, 1:]
    x = torch.cat([(state['cls_token'] + state['pos_embed'][:, :1]).expand(5, -1, -1), x], dim=1)
    encoder, flags = features.load_encoder(path)
    maps = features.block_features(encoder, imgs, batch_size=2)
    with torch.no_grad():
        for block, ours in zip(encoder.blocks, maps, strict=True):
            x = block(x)
            assert relative(ours, x[:, 1:].transpose(1, 2).reshape(5, -1, 4, 4)) < 1e-5

    foreign = path.replace('last', 'foreign')  # tensors alone, as other projects store them
    torch.save({'model': state}, foreign)
    again, found = features.load_encoder(foreign)
    assert (found.model, found.input_size) == ('mff_vit_tiny_patch4', [16, 16]) and flags.input_size == [16, 16]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    noise = torch.rand(5, 16)
    preds = [features.load_model(file)[0](imgs, 0.75, noise)[1] for file in (path, foreign)]
    assert torch.equal(*preds)
    attention = {'fuse_attn.qkv.weight': torch.ones(2, 2)}  # of a kind of fusion that no flag names
    torch.save({'model': {name: t for name, t in state.items() if name != 'fuse_logits'} | attention}, foreign)
    with pytest.raises(InputError, match='--fusion must be those of the file'):
        features.load_model(foreign)
    torch.save({'model': {name: tensor for name, tensor in state.items() if 'decoder' not in name}}, foreign)
    with pytest.raises(InputError, match='lacks decoder'):
        features.load_model(foreign)
    torch.save({'model': {name: tensor for name, tensor in state.items() if not name.startswith('blocks.11')}}, foreign)
    with pytest.raises(InputError, match='11 blocks, patch 4, which is no size'):
        features.load_encoder(foreign)


def test_commands_draw(pretrain, folder, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = pretrain('run', '--epochs', '2', '--keep_every', '1').output_dir
    checkpoints = [path / 'checkpoint-0001.pth', path / 'checkpoint-last.pth']
    images = ['--images', *(folder / 'val').rglob('*.png')]
    board = ['--tensorboard', tmp_path / 'board']
    for figure, *flags in [('spectrum', *checkpoints, '--random', *images, *board), ('fusion', *checkpoints)]:
        out = tmp_path / f'{figure}.png'
        run(visualize.main, visualize.get_parser(), list(map(str, [figure, *flags, '--out', out])))
        assert out.stat().st_size > 5000 and str(out) in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / 'board'))
    events.Reload()
    assert events.Tags()['images'] == ['spectrum']
    figure = visualize.fusion_figure({'a': {0: 0.25, 11: 0.75}, 'b': {0: 0.5, 5: 0.3, 11: 0.2}})
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[0.25, 0.75], [0.5, 0.3, 0.2]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['0', '5', '11']
    panels = visualize.spectrum_figure({'a': [torch.randn(2, 3, 4, 4) for _ in range(2)]}).axes
    assert len(panels) == 2 and len(panels[0].lines) == 2 and len(panels[1].lines[0].get_xdata()) == 2


def test_mistakes_with_pictures_get_one_line(pretrain, folder, tmp_path, capsys):
    mff = str(pretrain('mff', '--epochs', '1').output_dir / 'checkpoint-last.pth')
    mae = str(pretrain('mae', '--epochs', '1', '--fuse_layers', '11').output_dir / 'checkpoint-last.pth')
    attention = str(pretrain('attention', '--epochs', '1', '--fusion', 'attention').output_dir / 'checkpoint-last.pth')
    image = str(next((folder / 'val').rglob('*.png')))
    missing = str(tmp_path / 'missing/picture.png')
    for flags, message in [
        (['reconstruct', mff, image, '--no-norm_pix_loss'], 'says itself'),
        (['reconstruct', mff, image, '--seed', str(2**64)], '--seed'),
        (['fusion', mff, mae], f'{mae}: no fusion weights'),
        (['fusion', attention], 'no fusion weights'),
        (['curves', str(folder)], 'no log.jsonl'),
        (['fusion', mff, '--out', str(folder)], 'is a folder'),
        (['fusion', mff, '--out', missing], f'{missing}: No such file'),
        (['fusion', mff, '--out', str(tmp_path / 'a.jpeg2000')], 'not supported'),
        (['fusion', mff, '--out', str(tmp_path / 'a'), '--tensorboard', image], f'--tensorboard {image}'),
    ]:
        with pytest.raises(SystemExit) as exit:
            run(visualize.main, visualize.get_parser(), flags)
        printed = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and message in printed[-1], (flags, printed)
    run(visualize.main, visualize.get_parser(), ['fusion', mff, mff, '--out', str(tmp_path / 'b')])
    assert (tmp_path / 'b.png').exists() and f'wrote {tmp_path / "b.png"}' in capsys.readouterr().out


def test_titles_tell_apart():
    for paths, expected in [
        (['a/run/checkpoint-last.pth'], ['run']),
        (['a/run/checkpoint-0001.pth', 'a/run/checkpoint-last.pth'], ['checkpoint-0001', 'checkpoint-last']),
        (['a/mae/checkpoint-0001.pth', 'a/mff/checkpoint-0002.pth'], ['mae/checkpoint-0001', 'mff/checkpoint-0002']),
        (
            ['a/mae/run/checkpoint-0001.pth', 'a/mae/run/checkpoint-last.pth', 'a/mff/run/checkpoint-last.pth'],
            ['mae/checkpoint-0001', 'mae/checkpoint-last', 'mff/checkpoint-last'],
        ),
        (['weights/mae.pth', 'other/mff.safetensors'], ['mae', 'mff.safetensors']),
        (['a/mae/pretrain/checkpoint-last.pth', 'a/mff/pretrain/checkpoint-last.pth'], ['mae', 'mff']),
        (['a/mae/pretrain', 'b/mae/pretrain', 'b/mff/pretrain'], ['a/mae', 'b/mae', 'b/mff']),
        (['run', 'other/run'], [ROOT.name, 'other']),
    ]:
        assert features.titles([str(ROOT / path) for path in paths]) == expected


def test_curves_of_folders_of_the_same_name(tmp_path):
    for name, weights in (('mae', {23: 1.0}), ('mff', {0: 0.15, 20: 0.25, 23: 0.6})):
        fusion = {f'fusion/layer_{layer:02d}': weight for layer, weight in weights.items()}
        write_log(tmp_path / name / 'pretrain', [{'step': 1, 'epoch': 1, 'loss': 0.5, **fusion}])
    loss, course, final = visualize.curves_figure([str(tmp_path / name / 'pretrain') for name in ('mae', 'mff')]).axes
    assert [line.get_label() for line in loss.lines] == ['mae, loss', 'mff, loss']
    assert [[bar.get_height() for bar in group] for group in final.containers] == [[0.15, 0.25, 0.6]]
    colours = {line.get_label(): line.get_color() for line in course.lines if line.get_label().startswith('layer')}
    assert list(colours) == ['layer 0', 'layer 20', 'layer 23'] and len(set(colours.values())) == 3
    drawn = [line for line in course.lines if len(line.get_xdata())]
    assert [line.get_ydata()[-1] for line in drawn] == [0.15, 0.25, 0.6]
    assert [line.get_color() for line in drawn] == list(colours.values())
    styles = {line.get_label(): line.get_linestyle() for line in course.lines}
    assert styles['mff'] == '--' == drawn[0].get_linestyle() and 'mae' not in styles  # of whose weight is 1
    assert final.containers[0].patches[0].get_facecolor() == to_rgba('C1') == to_rgba(loss.lines[1].get_color())
    assert len(visualize.curves_figure([str(tmp_path / 'mae/pretrain')]).axes) == 1
    with pytest.raises(InputError, match='no log.jsonl'):
        visualize.curves_figure([str(tmp_path / 'mae/pretrain'), str(tmp_path)])


def test_pictures_of_arrays_of_any_range(pretrain, tmp_path):
    """Floats far outside of 0..1, as --mean and --std allow, and a PNG beside an array."""
    flags = ['--mean', '100', '100', '100', '--std', '50', '50', '50']
    np.save(tmp_path / 'wide.npy', np.linspace(0, 200, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3))
    np.save(tmp_path / 'unit.npy', np.full((16, 16, 3), 0.5, dtype=np.float32))
    Image.new('RGB', (16, 16), (51, 51, 51)).save(tmp_path / 'grey.png')
    args = main_pretrain.get_parser().parse_args(['--data_path', 'shapes', *flags])
    imgs = visualize.read_images([str(tmp_path / name) for name in ('unit.npy', 'grey.png')], args, (16, 16))
    assert imgs.mean((1, 2, 3)).tolist() == pytest.approx([(0.5 - 100) / 50, (0.2 - 100) / 50])
    imgs = visualize.read_images([str(tmp_path / 'wide.npy')], args, (16, 16))
    model = features.load_model(str(pretrain('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'))[0]
    shown = visualize.reconstruction_figure(model, imgs, ([100] * 3, [50] * 3)).axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1) and shown[8, 8, 0] == pytest.approx(0.5, abs=0.05)


# --- The ablation --------------------------------------------------------------------------------------------------


def write_log(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, [{'command': 'x'}, *entries])) + '\n')


def test_table_of_known_numbers(tmp_path):
    results = []
    for variant, offset, knn_2 in (('MAE, simple', 0.0, 20.0), ('MFF, simple', 3.0, 30.0)):
        for seed, shift in enumerate((-2.0, 0.0, 2.0)):  # sample deviation 2
            folder = tmp_path / f'{variant}{seed}'
            fusion = {'fusion/layer_00': 0.4, 'fusion/layer_11': 0.6} if 'MFF' in variant else {'fusion/layer_11': 1.0}
            entries = [{'step': s, 'epoch': s, 'loss': 1 / s, **fusion} for s in (1, 2, 3, 4)]
            write_log(folder / 'pretrain', [*entries, {'step': 4, 'epoch': 4, 'val_loss': 0.5}])
            results.append(
                {'variant': variant, 'seed': seed, 'folder': str(folder), 'epochs': 4, 'loss': 0.5, 'knn_2': knn_2}
                | {'knn': 40 + offset + shift, 'linprobe': 50 + shift, 'finetune': 60 - offset * (seed - 1)}
            )
    pairs = [('MFF, simple', 'MAE, simple'), ('not', 'run')]
    report = tmp_path / 'report'
    table = ablation_report.write_report(report, 'the command', results, pairs).splitlines()
    assert table[0] == 'the command'
    assert '| MAE, simple | 0.500 ± 0.000 | 40.0 ± 2.0 | 50.0 ± 2.0 | 60.0 ± 0.0 |' in table
    assert '| MFF, simple | 0.500 ± 0.000 | 43.0 ± 2.0 | 50.0 ± 2.0 | 60.0 ± 3.0 |' in table
    assert '| MFF, simple less MAE, simple | +0.000 ± 0.000 | +3.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 3.0 |' in table
    # From (2, 30) to (4, 43 + shift), up to 40 + shift: 2 + 2 * (10 + shift) / (13 + shift)
    assert table[-3].endswith('MAE, simple, seed by seed: 3.5, 3.5, 3.6, of 4')
    assert json.loads((report / 'results.json').read_text()) == results
    assert {path.name for path in report.glob('*.png')} == {'curves.png', 'convergence.png', 'fusion.png'}
    assert len(ablation_report.loss_figure(results).axes[0].lines) == 6
    (panel,) = ablation_report.fusion_figure(results).axes
    assert panel.get_title() == 'MFF, simple' and len(panel.lines) == 6
    variants = [dict(result, variant=f'variant {result["seed"]}{copy}') for result in results[3:] for copy in (0, 1)]
    titles = [panel.get_title() for panel in ablation_report.fusion_figure(variants).axes]
    assert titles == [result['variant'] for result in variants]
    points = [
        bar.lines[0].get_xydata().tolist() for bar in ablation_report.convergence_figure(results).axes[0].containers
    ]
    assert points == [[[2, 20], [4, 40]], [[2, 30], [4, 43]]]


def test_epochs_to_reach():
    points = [(2, 30.0), (4, 40.0), (6, 38.0)]
    needed = [ablation_report.epochs_to_reach(points, accuracy) for accuracy in (20, 30, 35, 39, 40, 41)]
    assert needed == ['at most 2', 'at most 2', '3.0', '3.8', '4.0', None]


class FakeMains:
    """Stands in for ablation.Processes: its mains check their flags, write their log, and train nothing."""

    def __init__(self):
        self.started = []

    def run(self, job, output, *flags):
        main = {'pretrain': main_pretrain, 'linprobe': main_linprobe, 'finetune': main_finetune}[job]
        args = main.get_parser().parse_args(flags)
        self.started.append(args)
        entry = {'step': 1, 'epoch': 1, 'loss': 2.0, 'fusion/layer_00': 0.5, 'fusion/layer_11': 0.5}
        if job == 'linprobe' and args.knn:
            return (
                '20-nearest-neighbour top-1 48.10 %  by the cls token, on 9 images; x\n'
                '20-nearest-neighbour top-1 47.60 %  by the mean of patches, on 9 images; x\n'
            )
        (ROOT / args.output_dir).mkdir(parents=True, exist_ok=True)
        write_log(ROOT / args.output_dir, [entry, {'step': 1, 'epoch': 1, 'val_loss': 0.7, 'val_top1': 61.0}])
        return ''


@pytest.mark.parametrize('grid', ['fusion', 'choices'])
def test_grid_runs_each_once(folder, tmp_path, grid):
    flags = [f'@{ROOT}/recipes/ablation_quick.txt', '--data_path', str(folder), '--output_dir', str(tmp_path / 'out')]
    flags += ['--pretrain_flags', '--total_batch_size 16 --crop rrc --seed 7']  # undone by the grid's
    args = ablation.get_parser().parse_args([*flags, '--grid', grid, '--images', '32', '--labelled', '60'])
    args.data_path = str(tmp_path / 'mistyped')
    with pytest.raises(InputError, match='mistyped'):
        ablation.prepare(args)
    args.data_path, args.epochs = str(folder), 7
    ablation.prepare(args)
    args.epochs = 2  # nothing is trained yet
    ablation.prepare(args)
    args.images = 33
    with pytest.raises(InputError, match='another experiment: --images 32 -> 33;'):
        ablation.prepare(args)
    args.images = 32
    count = {name: len(list((tmp_path / 'out/data' / name).rglob('*.npy'))) for name in ('images', 'labelled', 'val')}
    assert count == {'images': 32, 'labelled': 60, 'val': 20}
    mains = FakeMains()
    for variant in ablation.GRIDS[grid]:
        for _ in range(2):
            result = ablation.train_and_measure(args, variant, 1, mains)
        assert {**result, 'folder': ''} == {
            'variant': variant, 'seed': 1, 'folder': '', 'epochs': 2,
            'loss': 0.7, 'knn_1': 47.6, 'knn': 47.6, 'linprobe': 61.0, 'finetune': 61.0,
        }  # fmt: skip
    assert len(mains.started) == 5 * len(ablation.GRIDS[grid])
    pretrained = [args for args in mains.started if hasattr(args, 'mask_ratio')]
    told_apart = {(str(a.fuse_layers), a.crop, a.fuse_proj, a.fusion, a.target) for a in pretrained}
    assert len(told_apart) == len(ablation.GRIDS[grid])
    assert all(a.seed == 1 and a.total_batch_size == 16 and a.epochs == 2 for a in pretrained)
    assert {name for pair in ablation.PAIRS[grid] for name in pair} <= ablation.GRIDS[grid].keys()
    ablation.prepare(args)
    args.epochs = 3
    with pytest.raises(InputError, match='another experiment: --epochs 2 -> 3'):
        ablation.prepare(args)


def test_report_of_what_is_complete(folder, tmp_path, monkeypatch):
    """The sixth run fails: a report of the five before, a seed of all variants first; the same line ends it."""

    class FailingMains(FakeMains):
        failing = True

        def run(self, job, output, *flags):
            if self.failing and 'MFF-simple-seed1' in output:
                raise InputError('out of luck')
            return super().run(job, output, *flags)

        def stop(self):
            pass

    mains = FailingMains()
    monkeypatch.setattr(ablation, 'Processes', lambda args: mains)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    flags = [f'@{ROOT}/recipes/ablation_quick.txt', '--data_path', str(folder), '--output_dir', str(tmp_path)]
    args = ablation.get_parser().parse_args([*flags, '--jobs', '1', '--images', '32', '--val_images', '900'])
    with pytest.raises(InputError, match='out of luck'):
        ablation.main(args)
    table = (tmp_path / 'report_fusion/table.md').read_text()
    assert (
        'Complete runs: 5 of 8' in table
        and 'over seeds (1 or 2 each' in table
        and f'torch {torch.__version__}' in table
    )
    assert 'Pre-training: 32 images' in table and 'on 20 validation images' in table  # there are no 900
    assert '| MAE, simple | 0.700 ± 0.000 |' in table and '| MFF, rrc less MAE, rrc | +0.000 |' in table
    mains.failing = False
    ablation.main(args)
    assert 'Complete runs: 8 of 8' in (tmp_path / 'report_fusion/table.md').read_text()
    assert len(mains.started) == 5 * 8


def test_images_are_decoded_once(folder, tmp_path):
    from util import data

    source = data.open_source(str(folder), 'val')
    ablation.write_arrays(source, 5, str(tmp_path / 'images'))
    arrays = data.open_source(str(tmp_path / 'images'), 'train')
    assert len(arrays) == 5
    originals = {source[index][0].numpy().tobytes(): source[index][1] for index in (0, 5, 10, 14, 19)}
    assert {image.numpy().tobytes() for image, _ in (arrays[i] for i in range(5))} == originals.keys()
    for i in range(5):
        image, label = arrays[i]
        assert int(arrays.classes[label]) == originals[image.numpy().tobytes()]


@pytest.mark.slow
def test_ablation_goes_on_after_a_kill(tmp_path):
    line = [sys.executable, '-m', 'benchmarks.ablation', f'@{ROOT}/recipes/ablation_quick.txt', '--data_path', 'shapes']
    line += ['--output_dir', str(tmp_path), '--seeds', '1']
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = process.stdout.readline()
    assert ': loss 0.' in first or ': loss 1.' in first
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    done = {path: path.read_text() for path in tmp_path.rglob('result.json')}
    assert done and not (tmp_path / 'report_fusion').exists()
    began = time.time()
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert first not in again.stdout and again.stdout.count(': loss ') == 4 - len(done)
    for path in done:  # pre-training was not repeated
        assert (path.parent / 'pretrain/checkpoint-last.pth').stat().st_mtime < began
    table = (tmp_path / 'report_fusion/table.md').read_text()
    assert all(f'| {name}' in table for name in ('MAE, simple', 'MFF, rrc', 'MFF, rrc less MAE, rrc'))
    assert (tmp_path / 'report_fusion/fusion.png').exists()
