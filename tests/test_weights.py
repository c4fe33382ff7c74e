"""Weights in: every known format, written here by other means, files that are none, and what they tell."""

import argparse
import json
import os
import pickle
import sys
import tempfile
import types
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer

import main_finetune
import main_linprobe
import main_pretrain
from models_mff import MaskedAutoencoderMFF, model_sizes
from models_upernet import UperNet
from util import weights
from util.errors import InputError, as_input_error
from util.loading import adapt_channels
from util.weights import (
    ENCODER,
    convert_state_dict,
    load_encoder,
    load_model,
    load_weights,
    random_encoder,
    settings_of,
    settle,
)

REFERENCE = Path(__file__).parent / 'data' / 'cls_tiny.pt'
SIZES = {'patch_size': 8, 'embed_dim': 24, 'depth': 3, 'num_heads': 3}


def read_weights(path):
    file = weights.read(path)
    return file.state, file.origin


def mae(img_size=32, fuse_layers=(0, 1, 2), seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {**SIZES, 'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 4, **kwargs}
    return randomise(MaskedAutoencoderMFF(img_size, fuse_layers=fuse_layers, **sizes))


def vit(global_pool='avg', num_classes=5, img_size=32, seed=1, **kwargs):
    torch.manual_seed(seed)
    return randomise(
        VisionTransformer(img_size, global_pool=global_pool, num_classes=num_classes, **{**SIZES, **kwargs})
    )


def randomise(model):
    """Every tensor its own numbers, so that none can be mistaken for another's or for an initial value."""
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, model.state_dict().values()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def encoder_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(('decoder_', 'mask_', 'fuse_'))}


def mmpretrain_names(state):
    """mmpretrain's name of each of our parameters, part by part: the inverse of the conversion, written by hand."""
    names = {}
    for name, tensor in state.items():
        words = name.split('.')
        decoder = name.startswith(('decoder_', 'mask_token'))
        if words[0] in ('blocks', 'decoder_blocks'):
            words[0] = 'layers' if words[0] == 'blocks' else 'decoder_blocks'
            if words[2] == 'mlp':
                words[2:4] = ['ffn', 'layers', '0', '0'] if words[3] == 'fc1' else ['ffn', 'layers', '1']
            elif words[2].startswith('norm'):
                words[2] = words[2].replace('norm', 'ln')
        elif words[0] == 'fuse_projs':
            words[0] = 'proj_layers'
        elif words[0] == 'patch_embed':
            words[1] = 'projection'
        else:
            words[0] = {'fuse_logits': 'proj_weights', 'norm': 'ln1', 'decoder_norm': 'ln1', 'fc_norm': 'ln2'}.get(
                words[0], words[0]
            )
        if words[0] == 'head':
            names['.'.join(['head', 'fc', *words[1:]])] = tensor
        else:
            names['.'.join(['neck' if decoder else 'backbone', *words])] = tensor
    return names


@pytest.fixture
def mmengine_extras(monkeypatch):
    """What mmengine puts beside the weights, of classes that are gone when the file is read."""
    module = types.ModuleType('mmengine.logging.history_buffer')
    source = (
        'class HistoryBuffer:\n'
        '    def mean(self): raise SystemError\n'
        '    def __setstate__(self, state): raise SystemError\n'
        '    def __getstate__(self): return self.__dict__\n'
    )
    exec(source, module.__dict__)
    for name in ('mmengine', 'mmengine.logging', module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    buffer = module.HistoryBuffer()
    buffer._log_history, buffer._max_length = np.array([0.5, 0.25]), 1000000
    buffer._statistics_methods = {'mean': module.HistoryBuffer.mean}
    hub = {
        'log_scalars': OrderedDict(loss=buffer),
        'runtime_info': OrderedDict(seed=np.int64(3), best=np.float32(0.5), names=np.array(['a', 'b'])),
    }
    yield {'meta': {'epoch': 300, 'cfg': 'model = dict()', 'dataset_meta': {}}, 'message_hub': hub, 'optimizer': {}}


def saved(path, content, monkeypatch=None, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if monkeypatch:
        for name in [name for name in sys.modules if name.startswith('mmengine')]:
            monkeypatch.delitem(sys.modules, name)
    return path


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


# --- Formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['MFF', 'MAE', 'encoder', 'classifier'])
def test_mmpretrain(kind, tmp_path, mmengine_extras, monkeypatch):
    state = (vit() if kind == 'classifier' else mae(fuse_layers=(2,) if kind == 'MAE' else (0, 1, 2))).state_dict()
    state = encoder_of(state) if kind == 'encoder' else state
    theirs = mmpretrain_names(state)
    if kind == 'MAE':
        theirs['backbone.proj_weights'] = torch.ones(1, 1, 1, 1)
    content = {**mmengine_extras, 'state_dict': OrderedDict(theirs)}
    path = saved(tmp_path / 'a.pth', content, monkeypatch)
    read, origin = read_weights(path)
    assert same(read, state)
    assert (
        origin
        == {
            'MFF': 'mmpretrain MFF pre-training',
            'MAE': 'mmpretrain MAE pre-training',
            'encoder': 'mmpretrain pre-training, encoder only',
            'classifier': 'mmpretrain classifier with 5 classes',
        }[kind]
    )
    assert not [name for name in sys.modules if name.startswith('mmengine')]
    for legacy in (False, True):  # without anything around
        assert same(read_weights(saved(tmp_path / 'b.pth', theirs, legacy=legacy))[0], state)


def test_facebookresearch_mae(tmp_path):
    args = argparse.Namespace(model='mae_vit_base_patch16', output_dir=Path('out'), input_size=224)
    state, fine_tuned = mae(fuse_layers=(2,)).state_dict(), vit().state_dict()
    rest = {'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'epoch': 799, 'scaler': {}, 'args': args}
    rest |= {
        'history': deque([1, 2], 3),
        'meters': defaultdict(list, loss=[0.5]),
        'sizes': {224},
        'at': (None, 1 << 70),
    }
    for model, extra, expected in [
        (state, rest, 'facebookresearch/mae pre-training'),
        (encoder_of(state), {}, 'facebookresearch/mae pre-training, encoder only'),
        (fine_tuned, rest, 'facebookresearch/mae classifier with 5 classes'),
    ]:
        for legacy, around in ((False, extra), (True, {'epoch': 799})):
            read, origin = read_weights(saved(tmp_path / 'a.pth', {'model': model, **around}, legacy=legacy))
            assert same(read, model) and origin == expected
    with pytest.raises(InputError, match=r'calls argparse\.Namespace.*not a zip'):
        read_weights(saved(tmp_path / 'a.pth', {'model': state, **rest}, legacy=True))
    probe = {f'head.{name}': tensor for name, tensor in batch_norm_and_linear().state_dict().items()}
    read, origin = read_weights(saved(tmp_path / 'a.pth', {'model': encoder_of(state) | probe, **rest}))
    assert origin == 'facebookresearch/mae linear probe with 5 classes'
    assert torch.equal(read['bn.running_mean'], probe['head.0.running_mean']) and 'head.weight' in read


def batch_norm_and_linear():
    return randomise(torch.nn.Sequential(torch.nn.BatchNorm1d(24, affine=False, eps=1e-6), torch.nn.Linear(24, 5)))


def test_timm_and_deit(tmp_path):
    state = vit('token').state_dict()
    read, origin = read_weights(saved(tmp_path / 'a.pth', state))
    assert same(read, state) and origin == 'timm classifier with 5 classes'
    assert read_weights(saved(tmp_path / 'a.pth', {'model': state}))[1] == 'DeiT classifier with 5 classes'
    save_file(state, tmp_path / 'a.safetensors')
    read, origin = read_weights(tmp_path / 'a.safetensors')
    assert same(read, state) and origin == 'timm classifier with 5 classes'
    assert read_weights(saved(tmp_path / 'a.pth', encoder_of(vit('token', 0).state_dict())))[1] == 'timm encoder'
    distilled = {**state, 'dist_token': torch.zeros(1, 1, 24), 'head_dist.weight': torch.zeros(5, 24)}
    with pytest.raises(InputError, match='distilled'):
        read_weights(saved(tmp_path / 'a.pth', {'model': distilled}))


def test_this_projects(tmp_path):
    state = mae().state_dict()
    args = {'model': 'mff_vit_tiny_patch4', 'input_size': None}
    path = saved(tmp_path / 'a.pth', {'model': state, 'optimizer': {}, 'step': 1, 'args': args})
    read, origin = read_weights(path)
    assert same(read, state) and origin == "this project's MFF pre-training"
    wrapped = {f'module._orig_mod.{name}': tensor for name, tensor in state.items()}
    assert same(read_weights(saved(tmp_path / 'a.pth', wrapped))[0], state)
    path = saved(tmp_path / 'a.pth', {'model': vit().state_dict(), 'classes': list('abcde'), 'args': args})
    assert read_weights(path)[1] == "this project's classifier with 5 classes"


def test_reference_classifiers():
    reference = torch.load(REFERENCE, weights_only=True)
    fine_tuned, probe = reference['finetune'], reference['linprobe']
    sizes = {'patch_size': 8, 'embed_dim': 24, 'depth': 4, 'num_heads': 3}
    model = vit('avg', 7, **sizes)
    model.load_state_dict(convert_state_dict(fine_tuned['state']))
    with torch.no_grad():
        assert (model(fine_tuned['imgs']) - fine_tuned['logits']).abs().max() < 1e-5
        model = main_linprobe.LinearProbe(vit('token', 0, **sizes), 7).eval()
        assert load(model, probe['state'], complete=True) == 'mmpretrain linear probe with 7 classes'
        assert (model(probe['imgs']) - probe['logits']).abs().max() < 1e-5


# --- Files that are no weights --------------------------------------------------------------------------------


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def third_party(path):
    Path(path).touch()


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'pickle4'])
@pytest.mark.parametrize('call', ['os.system', 'eval', 'open', 'touch', 'third_party', 'torch.hub'])
def test_hostile_file_is_refused_and_nothing_runs(call, form, tmp_path, capfd):
    victim = str(tmp_path / 'victim')
    hostile = {
        'os.system': Hostile(os.system, f'touch {victim}'),
        'eval': Hostile(eval, f'open({victim!r}, "w")'),
        'open': Hostile(open, victim, 'w'),
        'touch': Hostile(Path.touch, Path(victim)),
        'third_party': Hostile(third_party, victim),
        'torch.hub': Hostile(torch.hub.download_url_to_file, 'file:///etc/hostname', victim),
    }[call]
    content, path = {'model': mae().state_dict(), 'epoch': hostile}, tmp_path / 'a.pth'
    if form in ('zip', 'legacy'):
        saved(path, content, legacy=form == 'legacy')
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if form == 'pickle' else 4))
    with pytest.raises(InputError) as error:
        read_weights(path)
    assert '\n' not in str(error.value) and str(error.value).startswith(f'{path}: ')
    if form != 'pickle4':  # torch reads no protocol 4, whatever it calls
        assert 'refused: its pickle calls' in str(error.value)
    assert not Path(victim).exists()
    assert pickle.loads(pickle.dumps(hostile)) is not hostile  # it would have run
    assert Path(victim).exists()


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(share, legacy, tmp_path):
    path = saved(tmp_path / 'a.pth', {'model': mae().state_dict()}, legacy=legacy)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r'a\.pth: [^\n]+$'):
        read_weights(path)


def test_other_files(tmp_path):
    save_file(vit().state_dict(), tmp_path / 'a.safetensors')
    content = (tmp_path / 'a.safetensors').read_bytes()
    cases = {
        'not a weights file': b'<html>not found</html>',
        'damaged, or not a weights file': content[: len(content) // 2],
        'No such file': None,
    }
    for message, content in cases.items():
        path = tmp_path / f'{len(message)}.safetensors'
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_weights(path)
    with pytest.raises(InputError, match='a folder; name a weights file, such as .*safetensors'):
        read_weights(tmp_path)
    with pytest.raises(InputError, match='it holds a list'):
        read_weights(saved(tmp_path / 'a.pth', [1, 2]))
    with pytest.raises(InputError, match=r'not the weights of a known ViT .*holds encoder\.'):  # no head of UperNet
        read_weights(
            saved(tmp_path / 'a.pth', {f'encoder.{name}': value for name, value in vit().state_dict().items()})
        )
    with pytest.raises(InputError, match=r'not the weights of a known ViT .*holds conv\.weight'):
        read_weights(saved(tmp_path / 'a.pth', {'state_dict': {'conv.weight': torch.zeros(1)}}))
    path = saved(tmp_path / 'a.pth', {'model': mae().state_dict()})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match='damaged at'):
        read_weights(path)


def test_safetensors_whatever_the_length_of_the_header(tmp_path):
    """The file starts with that length, whose first byte may be the one that a pickle starts with."""
    path, records = (
        tmp_path / 'a.safetensors',
        {'args': json.dumps({'input_size': [32, 32]}), 'mean': '[0.1, 0.2, 0.3]'},
    )
    first_bytes = set()
    for padding in range(0, 256, 8):
        save_file(mae().state_dict(), path, {**records, 'padding': json.dumps('x' * padding)})
        first_bytes.add(path.read_bytes()[0])
        assert weights.read(path).records['mean'] == (0.1, 0.2, 0.3)
    assert 0x80 in first_bytes


def test_paths_of_python_3_13_run_nothing(tmp_path):
    """It pickles pathlib.Path by a module of another name."""
    paths = types.ModuleType('pathlib._local')
    paths.PosixPath = type(
        'PosixPath', (), {'__module__': 'pathlib._local', '__reduce__': lambda self: (type(self), ())}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'pathlib._local', paths)
        path = saved(tmp_path / 'a.pth', {'model': mae().state_dict(), 'folder': paths.PosixPath()})
    assert set(weights.read(path).content) == {'model', 'folder'}


# --- Into a model ---------------------------------------------------------------------------------------------


def load(model, state, **kwargs):
    """load_weights of a file with this state; the line it gives, without the path."""
    with tempfile.TemporaryDirectory() as folder:
        return load_weights(model, saved(Path(folder) / 'a.pth', state), **kwargs).split(': ', 1)[1]


def test_encoder_of_pretraining_into_classifiers():
    source = mae().state_dict()
    model = vit('avg')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load(model, source)
    assert line == (
        "this project's MFF pre-training; left out: decoder, fusion, norm; freshly initialised: fc_norm, "
        'head of 5 classes'
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(('fc_norm', 'head')) else source[name]), name
    model = main_linprobe.LinearProbe(vit('token', 0), 5)
    assert 'left out: decoder, fusion; freshly initialised: bn, head of 5 classes' in load(model, source)
    assert torch.equal(model.backbone.norm.weight, source['norm.weight'])
    model = vit('token', 0)
    assert load(model, source).endswith('left out: decoder, fusion')
    with torch.no_grad():  # K = 1, nothing masked: the encoder is the same function
        source = mae(fuse_layers=(2,))
        load(model, source.state_dict())
        imgs = torch.randn(2, 3, 32, 32)
        latent = source.forward_encoder(imgs, 0.0, torch.arange(16.0).expand(2, -1) / 16)[0]
        assert (model.forward_features(imgs) - latent).abs().max() < 1e-6


def test_classifiers_into_classifiers():
    source = vit('avg').state_dict()
    model = vit('avg', seed=2)
    assert load(model, {'model': source}, complete=True) == 'facebookresearch/mae classifier with 5 classes'
    assert same(model.state_dict(), source)
    line = load(vit('avg', 7), source)
    assert line.endswith('left out: head of 5 classes; freshly initialised: head of 7 classes')
    line = load(vit('avg'), vit('token').state_dict())  # its head was trained on another norm
    assert line.endswith('left out: norm, head of 5 classes; freshly initialised: fc_norm, head of 5 classes')
    with pytest.raises(InputError, match='lacks head of 7 classes, needed here; it has head of 5 classes instead'):
        load(vit('avg', 7), source, complete=True)
    with pytest.raises(InputError, match='lacks norm.weight and norm.bias .fine-tuned'):
        load(vit('token'), source)


def test_continued_pretraining():
    source = mae(seed=3).state_dict()
    model = mae()
    assert load(model, source, complete=True) == "this project's MFF pre-training"
    assert same(model.state_dict(), source)  # position embeddings too
    plain = mae(fuse_layers=(2,)).state_dict()
    assert load(mae(), plain).endswith('pre-training; freshly initialised: fusion')
    assert load(mae(fuse_layers=(2,)), source).endswith('left out: fusion')
    model = mae()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load(model, encoder_of(plain))
    assert line == 'timm encoder; freshly initialised: decoder, fusion'
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name] if name in encoder_of(plain) else fresh[name]), name
    line = load(mae(), vit('avg').state_dict())
    assert line.endswith('left out: fc_norm, head of 5 classes; freshly initialised: decoder, fusion, norm')


def test_never_a_partial_load():
    source = mae().state_dict()

    def without(name):
        return {key: tensor for key, tensor in source.items() if key != name}

    for state, message in [
        (without('blocks.1.attn.proj.bias'), r'lacks blocks\.1\.attn\.proj\.bias$'),
        (without('norm.bias'), r'lacks norm\.bias$'),
        (without('decoder_pred.bias'), r'lacks decoder_pred\.bias$'),
        (without('fuse_projs.0.weight'), r'lacks fuse_projs\.0\.weight'),
        ({**source, 'blocks.0.ls1.gamma': torch.ones(24)}, r'lacks: blocks\.0\.ls1\.gamma$'),
        ({**source, 'mask_token': torch.ones(1, 1, 8)}, r'mask_token \(\(1, 1, 8\) there, \(1, 1, 16\) here\)'),
        ({**source, 'norm.bias': 3}, r'norm\.bias is not a tensor'),
        (mae(patch_size=16).state_dict(), 'patch size 16, but the model has .* patch size 8; without --model'),
        (mae(depth=2, fuse_layers=(0, 1)).state_dict(), 'depth 2 .* depth 3'),
        (mae(embed_dim=48).state_dict(), 'width 48,.* width 24'),
        (mae(decoder_embed_dim=32).state_dict(), 'differs in shape: (decoder|mask)'),
        (mae(fuse_layers=(0, 2)).state_dict(), '--fuse_layers, --fuse_proj and --fusion must be those of the file'),
    ]:
        model = mae(seed=5)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=message) as error:
            load(model, state)
        assert '\n' not in str(error.value)
        assert same(model.state_dict(), before)


def test_position_embedding_is_resampled():
    source = mae().state_dict()
    model = mae(img_size=(16, 48), seed=3)
    assert load(model, source, complete=True).endswith('position embedding resampled from 4 x 4 to 2 x 6')
    for name in ('pos_embed', 'decoder_pos_embed'):
        patches = source[name][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        patches = torch.nn.functional.interpolate(patches, (2, 6), mode='bicubic').flatten(2).transpose(1, 2)
        expected = torch.cat([source[name][:, :1], patches], 1)
        assert torch.allclose(getattr(model, name), expected, atol=1e-6)


def test_rectangular_source():
    source = mae(img_size=(16, 72)).state_dict()  # 2 x 9 patches
    model = vit(img_size=(72, 16))
    with pytest.raises(InputError, match='18 patches, belongs to an unknown rectangle'):
        load(model, source)
    line = load(model, {'model': source, 'args': {'input_size': [16, 72]}, 'step': 1})
    assert line.endswith('resampled from 2 x 9 to 9 x 2')
    expected = resample_abs_pos_embed(source['pos_embed'], [9, 2], [2, 9], antialias=False)
    assert torch.allclose(model.pos_embed, expected, atol=1e-6)


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_patch_embedding_is_adapted(channels):
    source = mae().state_dict()
    expected = adapt_input_conv(channels, source['patch_embed.proj.weight'])
    model = mae(in_chans=channels, seed=3)
    line = load(model, source)
    assert 'freshly initialised: decoder_pred; patch embedding adapted from 3 to' in line
    assert torch.allclose(model.patch_embed.proj.weight, expected, atol=1e-6)
    back = adapt_channels(expected, 3)
    assert back.shape == (24, 3, 8, 8)


def test_square_of_as_many_patches_as_a_rectangle():
    """timm before 1.0.29 returns such a position embedding as it is."""
    source = mae(img_size=(16, 64)).state_dict()  # 2 x 8 patches
    model = vit(img_size=32)  # 4 x 4
    content = {'model': source, 'args': {'input_size': [16, 64]}}
    assert load(model, content).endswith('resampled from 2 x 8 to 4 x 4')
    patches = source['pos_embed'][:, 1:].reshape(1, 2, 8, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (4, 4), mode='bicubic').flatten(2).transpose(1, 2)
    assert torch.allclose(model.pos_embed[:, 1:], patches, atol=1e-6)


# --- Impossible weights and records ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, change, message',
    [
        (
            'pos_embed',
            lambda t: torch.tensor(1.0),
            r'pos_embed has shape \(\), .* fit \(1, 1 \+ patches, embed_dim\)',
        ),
        ('head.weight', lambda t: torch.tensor(1.0), r'head\.weight has shape \(\)'),
        ('patch_embed.proj.weight', lambda t: t[..., :0, :0], r'patch_embed\.proj\.weight has shape \(24, 3, 0, 0\)'),
        ('patch_embed.proj.weight', lambda t: t[..., :4], r'patch_embed\.proj\.weight has shape \(24, 3, 8, 4\)'),
        ('norm.bias', lambda t: t.to_sparse(), 'norm.bias is not a dense tensor in memory'),
        ('norm.bias', lambda t: t.to('meta'), 'norm.bias is not a dense tensor in memory'),
        ('norm.bias', lambda t: t.to(torch.int8), 'norm.bias holds numbers of type int8'),
        ('norm.bias', lambda t: t.to(torch.complex64), 'norm.bias holds numbers of type complex64'),
        ('norm.bias', lambda t: t / 0, 'norm.bias holds numbers that are not finite'),
        ('norm.bias', lambda t: 0 * t / 0, 'norm.bias holds numbers that are not finite'),
        ('norm.bias', lambda t: 'abc', 'norm.bias is not a tensor'),
        ('fuse_logits', lambda t: 'abc', 'fuse_logits is not a tensor'),
        ('blocks.x.y', lambda t: torch.ones(1), r'it has what this model lacks: blocks\.x\.y'),
    ],
)
def test_tensors_that_are_no_weights(name, change, message, tmp_path):
    state = mae().state_dict() | {'head.weight': torch.ones(5, 24), 'head.bias': torch.ones(5)}
    path = saved(tmp_path / 'a.pth', {'model': {**state, name: change(state.get(name))}})
    model = mae(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=f'a.pth: .*{message}') as error:
        load_weights(model, path)
    assert '\n' not in str(error.value) and same(model.state_dict(), before)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'args': {'input_size': ['a', 'b']}}, r"it records img_size \['a', 'b'\], which is not possible"),
        ({'args': {'input_size': [32, 48]}}, '16 patches, belongs to an unknown rectangle'),
        ({'args': {'input_size': None, 'model': 'vit_nano_patch4', 'fuse_layers': 5}}, 'unknown|block|not possible'),
        ({'sizes': {'num_heads': 0}}, 'it records num_heads 0'),
        (
            {'sizes': {'num_heads': 7, 'fuse_layers': [0, 1, 2]}},
            'embed_dim 24 must be a multiple of 4 .* and of num_heads 7',
        ),
        ({'sizes': {'mlp_ratio': float('nan')}}, 'it records mlp_ratio nan'),
        ({'mean': [0.5]}, r'it records mean \(0\.5,\) and std .* for 3 channels'),
        ({'std': [0.5, 0.5, 0]}, 'it records std'),
        ({'std': torch.ones(3)}, 'it records std'),
        ({'args': {'input_size': None, 'mask_ratio': 1}}, 'it records mask_ratio 1'),
        ({'args': {'input_size': None, 'crop_pct': 0}}, 'it records crop_pct 0'),
        ({'classes': [1, 2]}, 'classes are not a list of names'),
        ({'args': {'input_size': None, 'fusion': 'odd'}}, 'it records a fusion that is none of average, uniform'),
    ],
)
def test_records_that_are_not_possible(change, message, tmp_path):
    content = {'model': mae().state_dict(), 'args': {'input_size': [32, 32]}, **change}
    with pytest.raises(InputError, match=message) as error:
        load_model(saved(tmp_path / 'a.pth', content))
    assert '\n' not in str(error.value)


# --- What a file tells of its model ---------------------------------------------------------------------------

NANO = model_sizes('vit_nano_patch4', img_size=(16, 24), in_chans=1, embed_dim=48, num_heads=6, fuse_layers=(1, 3))


def run_of(sizes, model='vit_nano_patch4', **content):
    """What a run of pre-training saves."""
    state = randomise(MaskedAutoencoderMFF(**sizes)).state_dict()
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    flags = {'model': model, 'input_size': sizes['img_size'], 'norm_pix_loss': False, 'mask_ratio': 0.6}
    statistics = {'mean': [0.2] * sizes['in_chans'], 'std': [0.3] * sizes['in_chans']}
    return {'model': state, 'args': flags, 'sizes': sizes, **statistics, **content}


def settled(job, *flags):
    settings = settle(job.get_parser().parse_args(list(map(str, flags))))
    return settings, {key: value for key, value in settings.sizes.items() if job is main_pretrain or key in ENCODER}


def test_settings_follow_the_checkpoint(tmp_path):
    path = saved(tmp_path / 'a.pth', run_of(NANO))
    for job in (main_pretrain, main_finetune, main_linprobe):
        settings, sizes = settled(job, '--init_from', path)
        assert sizes == {key: value for key, value in NANO.items() if key in sizes} and len(sizes) >= 7
        assert (settings.mean, settings.std, settings.notes) == ((0.2,), (0.3,), ())
        assert settled(job, '--init_from', path, '--model', 'mff_vit_nano_patch4')[1] == sizes  # of the same name
    model, settings = load_model(path)
    assert settings.sizes == NANO and settings.flags.mask_ratio == 0.6
    assert model.norm_pix_loss is False and model.fuse_layers == (1, 3)
    encoder = load_encoder(path)[0]
    imgs = torch.randn(2, 1, 16, 24)
    with torch.no_grad():
        assert torch.allclose(encoder.forward_features(imgs), model.forward_features(imgs), atol=1e-6)


def test_flags_win_and_what_differs_is_named(tmp_path):
    path = saved(tmp_path / 'a.pth', run_of(NANO))
    flags = ['--init_from', path, '--input_size', 32, '--in_chans', 3, '--std', 0.1, 0.2, 0.4]
    settings, sizes = settled(main_finetune, *flags)
    assert sizes['img_size'] == (32, 32) and sizes['in_chans'] == 3 and sizes['embed_dim'] == 48
    assert settings.mean == (0.485, 0.456, 0.406) and settings.std == (0.1, 0.2, 0.4)  # the file's are for one channel
    assert 'input_size 32 32, where the checkpoint has 16 24' in settings.notes
    assert 'in_chans 3, where the checkpoint has 1' in settings.notes and len(settings.notes) == 4
    settings, sizes = settled(main_pretrain, '--init_from', path, '--fuse_layers', 0, 3, '--decoder_depth', 2)
    assert sizes == NANO | {'fuse_layers': (0, 3), 'decoder_depth': 2}
    assert settings.notes == (
        'decoder_depth 2, where the checkpoint has 1',
        'fuse_layers 0 3, where the checkpoint has 1 3',
    )
    settings, sizes = settled(main_pretrain, '--init_from', path, '--model', 'vit_small_patch16', '--input_size', 32)
    assert sizes['embed_dim'] == 384 and sizes['in_chans'] == 1 and sizes['fuse_layers'] == (3, 5, 7, 11)
    assert 'embed_dim 384, where the checkpoint has 48' in settings.notes
    with pytest.raises(InputError, match='width 48, depth 4 .* width 384, depth 12 .*; without --model'):
        load_weights(MaskedAutoencoderMFF(**sizes), path)
    assert settled(main_pretrain, '--init_from', path, '--depth', 5)[1]['fuse_layers'] == (0, 1, 2, 4)


def test_settings_without_a_checkpoint():
    settings, sizes = settled(main_pretrain)
    assert sizes == model_sizes('vit_base_patch16') and settings.mean == (0.485, 0.456, 0.406)
    settings, sizes = settled(main_pretrain, *'--model mff_vit_tiny_patch4 --in_chans 2 --embed_dim 96'.split())
    assert sizes == model_sizes('vit_tiny_patch4', in_chans=2, embed_dim=96)
    assert settings.mean == settings.std == (0.5, 0.5) and settings.notes == ()
    for flags, message in [
        ('--embed_dim 90', 'embed_dim 90 must be a multiple of 4'),
        ('--embed_dim 768 --num_heads 7', 'of num_heads 7'),
        ('--decoder_embed_dim 100 --decoder_num_heads 3', 'decoder_embed_dim 100 .* decoder_num_heads 3'),
        ('--patch_size 10', 'image size 224 x 224 is not a multiple of patch size 10'),
        ('--depth 5 --fuse_layers 0 11', 'end with the last block, which is 4'),
        ('--mean 0.5', '--mean has 1 numbers, but the images have 3 channels'),
        ('--model resnet', "no model 'resnet'"),
    ]:
        with pytest.raises(InputError, match=message):
            with as_input_error():
                MaskedAutoencoderMFF(**settled(main_pretrain, *flags.split())[1])


@pytest.mark.parametrize('kind', ['fine-tuned', 'probe', 'older'])
def test_settings_of_other_checkpoints_of_ours(kind, tmp_path):
    sizes = NANO | {'in_chans': 3}
    model = vit(**{key: sizes[key] for key in ENCODER if key != 'img_size'}, img_size=sizes['img_size'])
    content = run_of(sizes, classes=list('abcde')) | {'model': model.state_dict()}
    if kind == 'probe':  # main_linprobe's names
        encoder = {f'backbone.{name}': tensor for name, tensor in encoder_of(run_of(sizes)['model']).items()}
        head = {'bn.running_mean': torch.ones(48), 'bn.running_var': torch.ones(48)}
        head |= {'head.weight': torch.ones(5, 48), 'head.bias': torch.ones(5)}
        content['model'] = encoder | head
    if kind == 'older':  # flags alone told, and the name had 'mff_' before it
        sizes = model_sizes('vit_nano_patch4', img_size=(16, 24), fuse_layers=(1, 3))
        content = run_of(sizes, model='mff_vit_nano_patch4')
        content['args'] |= {'fuse_layers': [1, 3], 'mean': [0.2] * 3, 'std': [0.3] * 3, 'in_chans': 3}
        del content['sizes'], content['mean'], content['std']
    settings = settings_of(weights.read(saved(tmp_path / 'a.pth', content)))
    assert settings.sizes == sizes and (settings.mean, settings.std) == ((0.2,) * 3, (0.3,) * 3)
    assert settings.classes == (None if kind == 'older' else list('abcde'))


def test_settings_of_files_whose_shapes_tell(tmp_path):
    sizes = model_sizes('vit_tiny_patch4', patch_size=8, img_size=24, in_chans=4, mlp_ratio=2.0)  # width 192: 3 heads
    mff, single = (MaskedAutoencoderMFF(**sizes | change).state_dict() for change in ({}, {'fuse_layers': (11,)}))
    for state in (mff, mmpretrain_names(mff)):
        settings = settings_of(weights.read(saved(tmp_path / 'a.pth', {'state_dict': state})))
        assert settings.sizes == sizes and settings.mean == (0.5,) * 4
        assert settings.flags.norm_pix_loss is None and settings.flags.mask_ratio == 0.75
    with pytest.raises(InputError, match='it lacks decoder, fusion, needed here'):
        load_model(saved(tmp_path / 'a.pth', {'model': encoder_of(single)}))
    path = saved(tmp_path / 'mae.pth', {'model': single})
    assert settings_of(weights.read(path)).sizes == sizes | {'fuse_layers': (11,)}  # which it is
    assert load_model(path)[0].fuse_layers == (11,)
    assert settled(main_pretrain, '--init_from', path)[1] == sizes  # which pre-training makes of it
    three = MaskedAutoencoderMFF(**sizes | {'fuse_layers': (0, 5, 11)}).state_dict()
    path = saved(tmp_path / 'three.pth', {'model': three})
    for use in (load_model, lambda path: settled(main_pretrain, '--init_from', path)):
        with pytest.raises(InputError, match='it does not record which blocks it fuses'):
            use(path)
    assert settled(main_pretrain, '--init_from', path, '--fuse_layers', 0, 5, 11)[1]['fuse_layers'] == (0, 5, 11)
    assert load_encoder(path)[0].embed_dim == 192  # no one needs to know
    nano = model_sizes('vit_nano_patch4')  # 16 channels per head, in encoder and decoder
    state = MaskedAutoencoderMFF(**nano).state_dict()
    assert settings_of(weights.read(saved(tmp_path / 'a.pth', state))).sizes == nano
    other = vit('token', embed_dim=320, depth=2, num_heads=5).state_dict()
    assert settings_of(weights.read(saved(tmp_path / 'a.pth', other))).sizes['num_heads'] == 5  # 64 channels each


def test_timms_vit_tiny(tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', num_classes=7)
    settings, sizes = settled(main_finetune, '--init_from', saved(tmp_path / 'a.pth', model.state_dict()))
    assert (sizes['embed_dim'], sizes['depth'], sizes['num_heads'], sizes['patch_size']) == (192, 12, 3, 16)
    encoder, imgs = load_encoder(tmp_path / 'a.pth')[0], torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(encoder.forward_features(imgs), model.eval().forward_features(imgs), atol=1e-5)


def test_random_encoder_starts_as_pre_training_does():
    sizes = model_sizes('vit_nano_patch4', depth=2)
    torch.manual_seed(3)
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': (1,)}).state_dict()
    torch.manual_seed(3)
    assert same(random_encoder(sizes).state_dict(), encoder_of(start))


# --- Segmentation: into and out of UperNet --------------------------------------------------------------------

HEAD = {'levels': (0, 1, 2, 3), 'channels': 6, 'aux_channels': 5}


def upernet(num_classes=4, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {'img_size': 32, **SIZES, 'depth': 4, **sizes}
    return randomise(UperNet(**sizes, **HEAD, num_classes=num_classes))


@pytest.mark.parametrize('origin', ['MFF', 'mmpretrain', 'classifier'])
def test_pretrained_encoders_into_upernet(origin, tmp_path):
    source = vit('token', depth=4) if origin == 'classifier' else mae(depth=4, fuse_layers=(1, 3))
    state = mmpretrain_names(source.state_dict()) if origin == 'mmpretrain' else source.state_dict()
    model = upernet(img_size=32, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load(model, state)
    assert 'freshly initialised: relative positions and layer scales, pyramid, classifier of 4 classes' in line
    theirs = source.state_dict()
    for name, tensor in model.state_dict().items():
        plain, third = name.removeprefix('encoder.'), 24
        if plain.endswith(('q_bias', 'v_bias')):
            bias = theirs[f'{plain[:-6]}qkv.bias']
            expected = bias[:third] if plain.endswith('q_bias') else bias[-third:]
        elif name.startswith('encoder.') and not plain.endswith(('_table', 'gamma_1', 'gamma_2')):
            expected = theirs[plain]
        else:
            expected = before[name]
        assert torch.equal(tensor, expected), name
    with pytest.raises(InputError, match='lacks relative positions .*, needed here'):
        load(upernet(), state, complete=True)
    line = load(model := upernet(img_size=(16, 48)), state)
    assert line.endswith('position embedding resampled from 4 x 4 to 2 x 6')
    expected = resample_abs_pos_embed(theirs['pos_embed'], [2, 6], [4, 4], antialias=False)
    assert torch.allclose(model.encoder.pos_embed, expected, atol=1e-6)
    assert line.count('encoder') == 0


def test_segmenters(tmp_path):
    source = upernet().state_dict()
    content = {'model': source, 'args': {'input_size': [32, 32], 'model': 'x'}, 'classes': list('abcd')}
    model = upernet(seed=2)
    assert load(model, content, complete=True) == "this project's segmenter with 4 classes"
    assert same(model.state_dict(), source)
    line = load(upernet(7), content)
    assert line.endswith('left out: classifier of 4 classes; freshly initialised: classifier of 7 classes')
    with pytest.raises(InputError, match=r'differs in shape: encoder\.pos_embed'):  # relative positions fix the grid
        load(upernet(img_size=64), content)
    with pytest.raises(InputError, match='segmenter with 4 classes, which only main_segment'):
        load(vit(depth=4), content)
    settings = settings_of(weights.read(saved(tmp_path / 'a.pth', content)))
    assert settings.sizes['num_heads'] == 3 and settings.classes == list('abcd')  # the tables have a column per head


def test_mmsegmentations_segmenters(tmp_path):
    """tests/test_segment.py compares what such a model computes."""
    reference = torch.load(REFERENCE.with_name('seg_tiny.pt'), weights_only=True)
    sizes = {'img_size': 48, 'levels': (0, 1, 2, 3), 'channels': 16, 'aux_channels': 12, 'num_classes': 5}
    model = UperNet(**SIZES | {'depth': 4} | sizes)
    line = load(model, {'state_dict': reference['state'], 'meta': {}}, complete=True)
    assert line == 'mmsegmentation segmenter with 5 classes'
    theirs = reference['state']
    assert torch.equal(model.encoder.blocks[3].mlp.fc2.weight, theirs['backbone.layers.3.ffn.layers.1.weight'])
    assert torch.equal(model.aux_head[2].bias, theirs['auxiliary_head.conv_seg.bias'])
    settings = settings_of(weights.read(saved(tmp_path / 'a.pth', {'state_dict': theirs})))
    told = {name: settings.sizes[name] for name in ENCODER}
    assert told == SIZES | {'img_size': (48, 48), 'in_chans': 3, 'depth': 4, 'mlp_ratio': 4.0}
    assert settings.classes is None and 'num_heads' in settings.known
