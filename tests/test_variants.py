"""The paper's alternatives (util/variants.py), computed a second way."""

import argparse
import math

import numpy as np
import pytest
import torch
from test_model import SMALL, layer_norm, linear, relative

from models_mff import MaskedAutoencoderMFF, create_encoder, model_sizes
from util import variants, weights
from util.errors import InputError
from util.variants import VariantMFF
from util.weights import Settings


def shaken(**choices):
    """A small model with these choices, its parameters moved away from the symmetric start."""
    torch.manual_seed(1)
    model = VariantMFF(**{**SMALL, **choices})
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
def test_target_image_is_pixmims(size):
    """FACTS of PixMIM: |IFFT2(fftshift(FFT2(x)) M)| of the un-normalised image, M a disc; here by sums over waves."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    model = shaken(target='lowpass', mean=mean, std=std, img_size=size)
    mean, std = np.array(mean).reshape(3, 1, 1), np.array(std).reshape(3, 1, 1)
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
    target = model.target_image(imgs)[0]
    assert relative(target, expected) < 1e-5 and relative(target, imgs[0]) > 0.1
    loss, pred, mask = model(imgs)  # the loss is the plain model's against that target
    plain = MaskedAutoencoderMFF(**{**SMALL, 'img_size': size})
    assert torch.equal(loss, plain.forward_loss(model.target_image(imgs), pred, mask))
    assert torch.equal(shaken(img_size=size).target_image(imgs), imgs)


def test_low_frequencies_at_224_are_the_disc_of_40():
    rows, columns = np.mgrid[:224, :224] - 111.5
    assert torch.equal(variants.low_frequencies(224, 224), torch.tensor(np.hypot(rows, columns) <= 40).float())


@pytest.mark.parametrize(
    'flags, default',
    [
        ({}, True),  # of a checkpoint that is older than these flags
        ({'fuse_proj': None, 'fusion': None, 'target': None}, True),
        ({'fuse_proj': 'linear', 'fusion': 'average', 'target': 'pixels'}, True),
        ({'fuse_proj': 'mlp'}, False),
        ({'fusion': 'uniform'}, False),
        ({'target': 'lowpass'}, False),
    ],
)
def test_choices_of_a_run(flags, default):
    args = argparse.Namespace(**flags, norm_pix_loss=False)
    assert variants.is_default(args) == default
    settings = Settings(sizes=model_sizes('vit_nano_patch4', img_size=16), mean=(0.5,) * 3, std=(0.2,) * 3)
    model = variants.create_model(args, settings)
    names = {name for name, _ in MaskedAutoencoderMFF(**settings.sizes).named_parameters()}
    assert ({name for name, _ in model.named_parameters()} == names) == (default or 'target' in flags)
    assert not model.norm_pix_loss and model.patch_embed.img_size == (16, 16)


@pytest.mark.parametrize('choice', [{'fuse_proj': 'none'}, {'fusion': 'uniform'}])
def test_a_choice_without_effect_is_refused(choice):
    with pytest.raises(ValueError, match='plain MAE'):
        VariantMFF(**choice, **{**SMALL, 'fuse_layers': (3,)})


@pytest.mark.parametrize('choice', ['--fusion attention', '--fuse_proj mlp --fusion uniform', '--target lowpass'])
def test_a_run_with_choices(pretrain, choice):
    result = pretrain('run', '--epochs', '2', *choice.split())
    losses = list(result.losses.values())
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert any('fusion/layer_00' in entry for entry in result.entries) == ('attention' not in choice)
    with pytest.raises(SystemExit):  # another architecture, or another target
        pretrain('run', '--epochs', '2')
    path = str(result.output_dir / 'checkpoint-last.pth')
    model, settings = weights.load_model(path)
    assert type(model) is VariantMFF and choice.split()[1] in vars(settings.flags).values()
    assert 'left out' in weights.load_weights(create_encoder(settings.sizes), path)
    if 'target' not in choice:
        with pytest.raises(InputError, match='fuse_|fusion'):
            weights.load_weights(MaskedAutoencoderMFF(**settings.sizes), path, complete=True)
