"""The model against the reference's tensors and plain formulas; test_export.py: and timm."""

import math
from pathlib import Path

import pytest
import torch
from conftest import our_names

import models_mff
from models_mff import MODELS, MaskedAutoencoderMFF, model_sizes
from util.optim import param_groups
from util.weights import convert_state_dict

SMALL = {
    'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 4, 'num_heads': 3,
    'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 4, 'fuse_layers': (0, 1, 3),
}  # fmt: skip


@pytest.fixture(scope='module')
def reference():
    return torch.load(Path(__file__).parent / 'data/mff_tiny.pt', weights_only=True)


@pytest.fixture
def model(reference):
    c = reference['config']
    model = MaskedAutoencoderMFF(
        c['img'], c['patch'], 3, c['dim'], c['depth'], c['heads'],
        decoder_embed_dim=c['ddim'], decoder_depth=c['ddepth'], decoder_num_heads=c['dheads'],
        fuse_layers=c['out'], norm_pix_loss=c['norm_pix'],
    )  # fmt: skip
    model.load_state_dict(convert_state_dict(reference['state']))
    return model


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def without_key(name, tensor):
    """Of qkv.bias the query's and value's thirds: the key's has no gradient but rounding."""
    if name.endswith('qkv.bias'):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor


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
        ours, expected = (without_key(name, grad) for grad in (parameter.grad, theirs[name]))
        assert relative(ours, expected) < 1e-5, name


def test_ten_optimiser_steps_are_the_reference(reference, model):
    steps = reference['steps']
    groups = param_groups(model, steps['weight_decay'])
    skipped = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    expected = our_names(dict.fromkeys(steps['no_decay']), reference['state']).keys()
    assert {name for name, p in model.named_parameters() if id(p) in skipped} == expected

    optimizer = torch.optim.AdamW(groups, steps['lr'], betas=steps['betas'], fused=True)
    for noise, expected_loss in zip(steps['noise'], steps['losses'], strict=True):
        loss = model(reference['imgs'], reference['config']['mask'], noise)[0]
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = convert_state_dict(steps['final'])
    for name, tensor in model.state_dict().items():
        ours, expected = (without_key(name, t) for t in (tensor, theirs[name]))
        assert (ours - expected).abs().max() < 2e-5, name


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_fusion_and_loss_by_their_formulas(norm_pix_loss):
    """Of rectangles with five channels: z = sum_k softmax(w)_k P_k(x_k), and the masked patches."""
    torch.manual_seed(1)
    sizes = SMALL | {'img_size': (16, 40), 'in_chans': 5, 'norm_pix_loss': norm_pix_loss}
    model, levels = MaskedAutoencoderMFF(**sizes), []
    torch.nn.init.normal_(model.fuse_logits)
    for i in model.fuse_layers:
        model.blocks[i].register_forward_hook(lambda *args: levels.append(args[-1]))
    imgs, noise = torch.randn(3, 5, 16, 40), torch.rand(3, 10)
    loss, pred, mask = model(imgs, 0.6, noise)
    assert torch.equal(mask, (noise >= noise.sort(1).values[:, 4:5]).float())

    w = model.fuse_logits.flatten().exp()
    z = [w[k] * proj(levels[k]) for k, proj in enumerate([*model.fuse_projs, lambda x: x])]
    latent = model.norm(sum(z) / w.sum())
    assert relative(model.forward_encoder(imgs, 0.6, noise)[0], latent) < 1e-5

    patches = torch.nn.functional.unfold(imgs, 8, stride=8).reshape(3, 5, 64, 10)
    patches = patches.permute(0, 3, 2, 1).flatten(2)  # row, column, channel
    assert torch.equal(model.patchify(imgs), patches)
    assert torch.equal(model.unpatchify(patches), imgs)
    errors = []
    for image in range(3):
        for patch in noise[image].argsort()[4:]:
            target = patches[image, patch]
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            errors.append((pred[image, patch] - target).square().mean())
    assert relative(loss, torch.stack(errors).mean()) < 1e-5


def test_position_embedding_of_rectangles():
    """(row, column): [sin row, cos row, sin column, cos column] over 10000 ** (-i / (D / 4))."""
    model = MaskedAutoencoderMFF(**{**SMALL, 'img_size': (16, 40)})
    rates = [10000 ** (-i / 6) for i in range(6)]
    places = [(row, column) for row in range(2) for column in range(5)]
    for i, place in enumerate(places):
        expected = [f(x * rate) for x in place for f in (math.sin, math.cos) for rate in rates]
        assert model.pos_embed[0, 1 + i].tolist() == pytest.approx(expected, abs=1e-5)
    assert model.pos_embed[0, 0].abs().max() == 0


def test_grad_checkpointing_keeps_less():
    model, counts = MaskedAutoencoderMFF(**SMALL), []
    imgs = torch.randn(4, 3, 32, 32)
    for model.grad_checkpointing in (False, True):
        kept = []  # what the graph holds on to
        hook = lambda x, kept=kept: kept.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x):
            model(imgs)
        counts.append(sum(kept))
    assert counts[1] < counts[0] / 2


def test_loss_is_fp32_under_autocast():
    model = MaskedAutoencoderMFF(**SMALL)
    imgs = torch.randn(4, 3, 32, 32)
    with torch.autocast('cpu', torch.bfloat16):
        loss, pred, mask = model(imgs)
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, model.forward_loss(imgs, pred.float(), mask))


def test_initialisation():
    """The reference's: xavier-uniform; zero biases, but N(0, 1e-6) in feed-forwards; tokens."""
    model = MaskedAutoencoderMFF(**MODELS['vit_tiny_patch4'])
    for name, p in model.named_parameters():
        if name.endswith('norm.weight') or '.norm1.weight' in name or '.norm2.weight' in name:
            assert (p == 1).all(), name
        elif name.endswith('weight'):
            bound = math.sqrt(6 / sum(p.flatten(1).shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        elif '.mlp.' in name:
            assert p.std().item() == pytest.approx(1e-6, rel=0.3), name
        elif 'token' in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif name == 'fuse_logits':
            assert (p == 1).all()
        elif name == 'patch_embed.proj.bias':  # the convolution's default
            assert 0 < p.abs().max() <= 1 / math.sqrt(48)
        else:
            assert (p == 0).all(), name
    assert model.fusion_weights.tolist() == pytest.approx([1 / 6] * 6)


def test_sizes():
    """Parameters of the paper's model, of its encoder in timm, and what fusion adds."""
    published = {
        'vit_small_patch16': (12, 384, 6, 384, 12, (3, 5, 7, 11)),
        'vit_base_patch16': (12, 768, 12, 512, 16, (0, 2, 4, 6, 8, 11)),
        'vit_large_patch16': (24, 1024, 16, 512, 16, (0, 4, 8, 12, 16, 20, 23)),
        'vit_huge_patch14': (32, 1280, 16, 512, 16, (0, 4, 8, 12, 16, 20, 24, 28, 31)),
    }
    names = 'depth embed_dim num_heads decoder_embed_dim decoder_num_heads fuse_layers'.split()
    for name, values in published.items():
        sizes = model_sizes(name)
        assert tuple(sizes[key] for key in names) == values
        assert (sizes['img_size'], sizes['mlp_ratio'], sizes['decoder_depth']) == ((224,) * 2, 4, 8)
        assert models_mff.default_fuse_layers(sizes['depth']) == values[-1] or 'small' in name
    base = model_sizes('vit_base_patch16')
    with torch.device('meta'):
        fused, plain = (
            sum(p.numel() for p in MaskedAutoencoderMFF(**base | change).parameters())
            for change in ({}, {'fuse_layers': (11,)})
        )
        encoder = sum(p.numel() for p in models_mff.create_encoder(base).parameters())
    assert fused - plain == 2_952_966
    assert encoder + 1000 * 769 == pytest.approx(86.57e6, rel=1e-4)


def test_sizes_with_changes():
    sizes = model_sizes('mff_vit_base_patch16', img_size=[192, 256], depth=24, num_heads=None)
    assert sizes['img_size'] == (192, 256) and sizes['depth'] == 24 and sizes['num_heads'] == 12
    assert sizes['fuse_layers'] == MODELS['vit_large_patch16']['fuse_layers']
