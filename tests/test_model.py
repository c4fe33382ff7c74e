"""The model against the reference's tensors, against plain formulas, and against timm."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from models_mff import MODELS, MaskedAutoencoderMFF, create_encoder, default_fuse_layers, model_sizes
from util.optim import param_groups
from util.weights import convert_state_dict

SMALL = {
    'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 4, 'num_heads': 3, 'fuse_layers': (0, 1, 3),
    'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 4,
}  # fmt: skip


@pytest.fixture(scope='module')
def reference():
    return torch.load(Path(__file__).parent / 'data/mff_tiny.pt', weights_only=True)


@pytest.fixture
def model(reference):
    c = reference['config']
    model = MaskedAutoencoderMFF(
        c['img'], c['patch'], 3, c['dim'], c['depth'], c['heads'], decoder_embed_dim=c['ddim'],
        decoder_depth=c['ddepth'], decoder_num_heads=c['dheads'], fuse_layers=c['out'], norm_pix_loss=c['norm_pix'],
    )  # fmt: skip
    model.load_state_dict(convert_state_dict(reference['state']))
    return model


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# --- Against mmpretrain's tensors -----------------------------------------------------------------------------


def test_forward_is_the_reference(reference, model):
    ratio, noise = reference['config']['mask'], reference['noise']
    loss, pred, mask = model(reference['imgs'], ratio, noise)
    latent, _, ids_restore = model.forward_encoder(reference['imgs'], ratio, noise)
    assert relative(loss, reference['loss']) < 1e-5
    assert relative(pred, reference['pred']) < 1e-5
    assert relative(latent, reference['latent']) < 1e-5
    assert relative(model.fusion_weights, reference['fusion_weights']) < 1e-5
    assert torch.equal(mask, reference['mask'])
    assert torch.equal(ids_restore, noise.argsort(1).argsort(1))


def test_every_gradient_is_the_reference(reference, model):
    model(reference['imgs'], reference['config']['mask'], reference['noise'])[0].backward()
    theirs = convert_state_dict(reference['grads'])
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        ours, expected = parameter.grad, theirs[name]
        if name.endswith('qkv.bias'):  # the key's third has no true gradient, only rounding
            ours, expected = (torch.cat([g.chunk(3)[0], g.chunk(3)[2]]) for g in (ours, expected))
        assert relative(ours, expected) < 1e-5, name


def test_ten_optimiser_steps_are_the_reference(reference, model):
    steps = reference['steps']
    groups = param_groups(model, steps['weight_decay'])
    skipped = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    expected = convert_state_dict(dict.fromkeys(steps['no_decay']))
    assert {name for name, p in model.named_parameters() if id(p) in skipped} == expected.keys()

    optimizer = torch.optim.AdamW(groups, steps['lr'], betas=steps['betas'], fused=True)
    for noise, expected_loss in zip(steps['noise'], steps['losses'], strict=True):
        loss = model(reference['imgs'], reference['config']['mask'], noise)[0]
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = convert_state_dict(steps['final'])
    for name, tensor in model.state_dict().items():
        ours, expected = tensor, theirs[name]
        if name.endswith('qkv.bias'):  # Adam amplifies the key's rounding to full steps
            ours, expected = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (ours, expected))
        assert (ours - expected).abs().max() < 2e-5, name


# --- Against the formulas, computed a second way --------------------------------------------------------------


def linear(state, name, x):
    return x @ state[f'{name}.weight'].T + state[f'{name}.bias']


def layer_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f'{name}.weight'] + state[f'{name}.bias']


def block(state, name, x, heads):
    N, T, D = x.shape
    q, k, v = linear(state, f'{name}.attn.qkv', layer_norm(state, f'{name}.norm1', x)).reshape(
        N, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # fmt: skip
    attention = (q @ k.transpose(-2, -1) / math.sqrt(D // heads)).softmax(-1)
    x = x + linear(state, f'{name}.attn.proj', (attention @ v).transpose(1, 2).reshape(N, T, D))
    hidden = linear(state, f'{name}.mlp.fc1', layer_norm(state, f'{name}.norm2', x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(state, f'{name}.mlp.fc2', hidden)


def plain_forward(model, imgs, ratio, noise, sizes):
    """The paper's equations, sample by sample, with no module of the model."""
    s, p = model.state_dict(), sizes['patch_size']
    columns = imgs.shape[-1] // p
    losses, preds = [], []
    for img, draw in zip(imgs, noise):
        patches = [img[:, i : i + p, j : j + p] for i in range(0, img.shape[1], p) for j in range(0, img.shape[2], p)]
        assert len(patches) == draw.numel() and len(patches) % columns == 0
        order = sorted(range(len(patches)), key=lambda index: draw[index].item())
        visible = order[: int(len(patches) * (1 - ratio))]
        kernel = s['patch_embed.proj.weight']
        embedded = {i: torch.einsum('chw,dchw->d', patches[i], kernel) + s['patch_embed.proj.bias'] for i in visible}
        tokens = [embedded[i] + s['pos_embed'][0, 1 + i] for i in visible]
        x = torch.stack([s['cls_token'][0, 0] + s['pos_embed'][0, 0], *tokens])[None]
        z, fused = 0, sizes['fuse_layers']
        logits = s['fuse_logits'].flatten() if len(fused) > 1 else torch.zeros(1)
        weights = logits.exp() / logits.exp().sum()
        for i in range(sizes['depth']):
            x = block(s, f'blocks.{i}', x, sizes['num_heads'])
            if i in fused:
                k = fused.index(i)
                z = z + weights[k] * (linear(s, f'fuse_projs.{k}', x) if k < len(fused) - 1 else x)
        y = linear(s, 'decoder_embed', layer_norm(s, 'norm', z))[0]
        tokens = [y[1 + visible.index(i)] if i in visible else s['mask_token'][0, 0] for i in range(len(patches))]
        y = torch.stack([y[0], *tokens])[None] + s['decoder_pos_embed']
        for i in range(sizes['decoder_depth']):
            y = block(s, f'decoder_blocks.{i}', y, sizes['decoder_num_heads'])
        pred = linear(s, 'decoder_pred', layer_norm(s, 'decoder_norm', y))[0, 1:]
        preds.append(pred)
        for i in set(range(len(patches))) - set(visible):
            target = patches[i].permute(1, 2, 0).flatten()
            if model.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            losses.append((pred[i] - target).square().mean())
    return torch.stack(losses).mean(), torch.stack(preds)


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'norm_pix_loss': False},
        {'fuse_layers': (3,)},
        {'fuse_layers': (0, 1, 2, 3)},
        {'img_size': (16, 40), 'in_chans': 5},
        {'depth': 2, 'fuse_layers': (0, 1), 'embed_dim': 32, 'num_heads': 2, 'decoder_depth': 3, 'patch_size': 4},
    ],
    ids=str,
)
@pytest.mark.parametrize('ratio', [0.75, 0.4])
def test_forward_is_the_formula(change, ratio):
    torch.manual_seed(1)
    sizes = {**SMALL, **change}
    model = MaskedAutoencoderMFF(**sizes)
    with torch.no_grad():  # away from the symmetric start
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    height, width = model.patch_embed.img_size
    imgs = torch.randn(3, model.in_chans, height, width)
    noise = torch.rand(3, model.patch_embed.num_patches)
    loss, pred, mask = model(imgs, ratio, noise)
    expected_loss, expected_pred = plain_forward(model, imgs, ratio, noise, sizes)
    assert relative(loss, expected_loss) < 1e-5
    assert relative(pred, expected_pred) < 1e-5
    assert mask.sum(1).tolist() == [noise.shape[1] - int(noise.shape[1] * (1 - ratio))] * 3


def test_one_level_is_plain_mae():
    model = MaskedAutoencoderMFF(**{**SMALL, 'fuse_layers': (3,)})
    assert not [name for name in model.state_dict() if 'fuse' in name]
    assert model.fusion_weights.tolist() == [1.0]
    reference_of_one_level = {'backbone.proj_weights': torch.ones(1, 1, 1, 1), 'backbone.cls_token': torch.zeros(1)}
    assert convert_state_dict(reference_of_one_level).keys() == {'cls_token'}


def test_encoder_is_timms_vision_transformer():
    """The encoder loads into timm as it is; unmasked, it gives timm's features."""
    torch.manual_seed(0)
    model = MaskedAutoencoderMFF(**{**SMALL, 'fuse_layers': (3,)}).eval()
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0).eval()
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name in vit.state_dict()}
    vit.load_state_dict(encoder)
    imgs = torch.randn(2, 3, 32, 32)
    in_order = torch.arange(16).expand(2, -1) / 16
    assert torch.allclose(model.forward_encoder(imgs, 0.0, in_order)[0], vit.forward_features(imgs), atol=1e-6)
    fused = MaskedAutoencoderMFF(**SMALL).eval()
    vit.load_state_dict({name: fused.state_dict()[name] for name in vit.state_dict()})
    assert torch.allclose(fused.forward_features(imgs), vit.forward_features(imgs), atol=1e-6)


def test_patchify_and_unpatchify():
    model = MaskedAutoencoderMFF(**{**SMALL, 'img_size': (16, 40), 'in_chans': 2})
    imgs = torch.randn(2, 2, 16, 40)
    patches = model.patchify(imgs)
    unfolded = F.unfold(imgs, 8, stride=8).reshape(2, 2, 64, 10).permute(0, 3, 2, 1)  # (N, L, p*p, C)
    assert torch.equal(patches, unfolded.flatten(2))
    assert torch.equal(model.unpatchify(patches), imgs)


def test_position_embedding_of_rectangles():
    """Entry (row, column): [sin row, cos row, sin column, cos column] over 10000 ** (-i / (D / 4))."""
    model = MaskedAutoencoderMFF(**{**SMALL, 'img_size': (16, 40)})
    for i, (row, column) in enumerate((row, column) for row in range(2) for column in range(5)):
        rates = [10000 ** (-i / 6) for i in range(6)]
        expected = [f(x * rate) for x in (row, column) for f in (math.sin, math.cos) for rate in rates]
        assert model.pos_embed[0, 1 + i].tolist() == pytest.approx(expected, abs=1e-5)
    assert model.pos_embed[0, 0].abs().max() == 0


# --- Properties that training relies on -----------------------------------------------------------------------


@pytest.mark.parametrize('name', ['vit_nano_patch4', 'vit_tiny_patch4', 'vit_small_patch16'])
def test_every_parameter_gets_a_gradient_and_one_group(name):
    model = MaskedAutoencoderMFF(**model_sizes(name))
    model(torch.randn(2, 3, *model.patch_embed.img_size))[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    grouped = [id(p) for group in param_groups(model, 0.05) for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_fusion_logits_and_projections_decay():
    model = MaskedAutoencoderMFF(**SMALL)
    decayed = {id(p) for group in param_groups(model, 0.05) if group['weight_decay'] for p in group['params']}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {'fuse_logits', 'fuse_projs.0.weight', 'fuse_projs.1.weight', 'patch_embed.proj.weight'} < names
    assert not [name for name in names if name.endswith('bias') or 'norm' in name or 'token' in name]


def test_sizes():
    """Parameters of the paper's model, of its encoder in timm, and what fusion adds."""
    expected = {'small': (12, 384, 6), 'base': (12, 768, 12), 'large': (24, 1024, 16), 'huge': (32, 1280, 16)}
    for key, values in expected.items():
        (sizes,) = [sizes for name, sizes in MODELS.items() if key in name]
        assert (sizes['depth'], sizes['embed_dim'], sizes['num_heads']) == values
        assert (sizes['img_size'], sizes['mlp_ratio'], sizes['decoder_depth']) == (224, 4.0, 8)
    base, small = MODELS['vit_base_patch16'], MODELS['vit_small_patch16']
    assert base['fuse_layers'] == (0, 2, 4, 6, 8, 11)
    assert (base['decoder_embed_dim'], base['decoder_num_heads']) == (512, 16)
    assert small['fuse_layers'] == (3, 5, 7, 11)
    assert (small['decoder_embed_dim'], small['decoder_num_heads']) == (384, 12)
    assert MODELS['vit_large_patch16']['fuse_layers'] == (0, 4, 8, 12, 16, 20, 23)
    assert MODELS['vit_huge_patch14']['fuse_layers'] == (0, 4, 8, 12, 16, 20, 24, 28, 31)
    with torch.device('meta'):
        count, plain = (
            sum(
                p.numel()
                for p in MaskedAutoencoderMFF(**model_sizes('vit_base_patch16', fuse_layers=layers)).parameters()
            )
            for layers in (None, [11])
        )
        encoder = sum(p.numel() for p in create_encoder(model_sizes('vit_base_patch16')).parameters())
    assert count - plain == 2_952_966
    assert encoder + 1000 * 769 == pytest.approx(86.57e6, rel=1e-4)


def test_sizes_with_changes():
    sizes = model_sizes('mff_vit_base_patch16', img_size=[192, 256], depth=24, num_heads=None)
    assert sizes['img_size'] == (192, 256) and sizes['depth'] == 24 and sizes['num_heads'] == 12
    assert sizes['fuse_layers'] == MODELS['vit_large_patch16']['fuse_layers']
    assert MaskedAutoencoderMFF(**model_sizes('vit_nano_patch4', depth=1)).fusion_weights.tolist() == [1.0]


@pytest.mark.parametrize('depth', range(1, 41))
def test_fused_layers_for_any_depth(depth):
    layers = default_fuse_layers(depth)
    gaps = [b - a for a, b in zip(layers, layers[1:])]
    assert layers[0] == 0 and layers[-1] == depth - 1 and all(1 <= gap <= 6 for gap in gaps)


def test_attention_is_fused():
    assert all(block.attn.fused_attn for block in MaskedAutoencoderMFF(**MODELS['vit_tiny_patch4']).blocks)


@pytest.mark.parametrize('fuse_layers', [(0, 1, 3), (3,)])
def test_grad_checkpointing_changes_no_number_and_keeps_less(fuse_layers):
    torch.manual_seed(0)
    model = MaskedAutoencoderMFF(**{**SMALL, 'fuse_layers': fuse_layers})
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)

    def outcome(enable):
        model.grad_checkpointing, kept = enable, []  # what the graph holds on to
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model(imgs, 0.75, noise)[0]
        count = sum(kept)  # before the second computation keeps it all again
        model.zero_grad()
        loss.backward()
        return count, [loss, *(p.grad for p in model.parameters())]

    (plain, expected), (checkpointed, ours) = outcome(False), outcome(True)
    assert checkpointed < plain / 2
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_loss_is_fp32_under_autocast():
    torch.manual_seed(0)
    model = MaskedAutoencoderMFF(**SMALL)
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    with torch.autocast('cpu', torch.bfloat16):
        loss, pred, mask = model(imgs, 0.75, noise)
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, model.forward_loss(imgs, pred.float(), mask))
    assert loss.item() == pytest.approx(model(imgs, 0.75, noise)[0].item(), rel=1e-2)


def test_mask_keeps_the_smallest_noise_and_differs_by_sample():
    model = MaskedAutoencoderMFF(**SMALL)
    noise = torch.rand(8, 16)
    mask = model.forward_encoder(torch.randn(8, 3, 32, 32), 0.75, noise)[1]
    threshold = noise.sort(1).values[:, 4:5]
    assert torch.equal(mask, (noise >= threshold).float())
    drawn = model.forward_encoder(torch.randn(8, 3, 32, 32), 0.75)[1]
    assert (drawn.sum(1) == 12).all() and len(drawn.unique(dim=0)) > 1


# --- Initialisation -------------------------------------------------------------------------------------------


def test_initialisation():
    """FACTS of the reference: xavier-uniform, zero biases but N(0, 1e-6) in feed-forwards, tokens N(0, 0.02)."""
    torch.manual_seed(0)
    model = MaskedAutoencoderMFF(**MODELS['vit_tiny_patch4'])
    uniform = {'patch_embed.proj.weight': (192, 48), 'decoder_pred.weight': (48, 96), 'decoder_embed.weight': (96, 192)}
    for name, p in model.named_parameters():
        if name.endswith('norm.weight') or '.norm1.weight' in name or '.norm2.weight' in name:
            assert (p == 1).all(), name
        elif name.endswith('weight'):
            fan_out, fan_in = uniform.get(name, p.shape)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert p.abs().max() <= bound and p.abs().max() > 0.98 * bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        elif '.mlp.' in name:
            assert p.abs().max() > 0 and p.std().item() == pytest.approx(1e-6, rel=0.3), name
        elif 'token' in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif name == 'fuse_logits':
            assert (p == 1).all()
        elif name == 'patch_embed.proj.bias':  # the convolution's default
            assert 0 < p.abs().max() <= 1 / math.sqrt(48)
        else:
            assert (p == 0).all(), name
    assert model.fusion_weights.tolist() == pytest.approx([1 / 6] * 6)


# --- Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, message',
    [
        ({'img_size': 30}, 'multiple of patch size 8'),
        ({'img_size': 4}, 'multiple of patch size 8'),
        ({'fuse_layers': (0, 1)}, 'must end with the last block, which is 3'),
        ({'fuse_layers': (0, 4)}, 'must end with the last block, which is 3'),
        ({'fuse_layers': (1, 0, 3)}, 'increasing'),
        ({'fuse_layers': (0, 0, 3)}, 'increasing'),
        ({'fuse_layers': (-1, 3)}, 'increasing'),
        ({'fuse_layers': ()}, 'increasing'),
        ({'embed_dim': 26}, 'multiple of 4'),
        ({'num_heads': 5}, 'num_heads 5'),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoderMFF(**{**SMALL, **change})


def test_unknown_model():
    with pytest.raises(ValueError, match='no model .*vit_base_patch16'):
        model_sizes('mff_vit_colossal')
