"""Weights in: files of every known origin, written here by other means, and files that are none."""

import argparse
import http.server
import json
import math
import os
import pickle
import random
import re
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer

from engine_classify import LinearProbe
from models_mff import (
    ENCODER,
    MaskedAutoencoderMFF,
    create_encoder,
    model_sizes,
    random_encoder,
)
from models_upernet import UperNet
from util import weights
from util.errors import InputError

DATA = Path(__file__).parent / 'data'
SIZES = {'patch_size': 8, 'embed_dim': 24, 'depth': 3, 'num_heads': 3}
DECODER_SIZES = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 4}


def randomise(model):
    """Every tensor its own numbers: none can be mistaken for another's, or for an initial value."""
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, model.state_dict().values()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def mae(img_size=32, fuse_layers=(0, 1, 2), seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {**SIZES, **DECODER_SIZES, **sizes}
    return randomise(MaskedAutoencoderMFF(img_size, fuse_layers=fuse_layers, **sizes))


def vit(global_pool='avg', num_classes=5, img_size=32, seed=1, **sizes):
    torch.manual_seed(seed)
    options = {'global_pool': global_pool, 'num_classes': num_classes, **SIZES, **sizes}
    return randomise(VisionTransformer(img_size, **options))


def upernet(num_classes=4, seed=0, **sizes):
    torch.manual_seed(seed)
    heads = {'levels': (0, 1, 2, 3), 'channels': 6, 'aux_channels': 5, 'num_classes': num_classes}
    return randomise(UperNet(**{'img_size': 32, **SIZES, 'depth': 4, **heads, **sizes}))


def probe(num_classes=5, seed=2):
    return randomise(LinearProbe(vit('token', 0, seed=seed), num_classes))


def encoder_of(state):
    left = ('decoder_', 'mask_', 'fuse_')
    return {name: tensor for name, tensor in state.items() if not name.startswith(left)}


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )


@pytest.fixture
def load(tmp_path):
    """load(model, content, ...) -> what weights.load of a file with it says, as a list."""

    def start(model, content, **options):
        path = saved(tmp_path / 'load.pth', content)
        return weights.load(model, weights.read(path), **options).split('; ')[1:]

    return start


# --- Origins --------------------------------------------------------------------------------------


def test_mmpretrain(tmp_path, monkeypatch):
    """With what mmengine puts beside real weights, of classes that are gone when it is read.

    tests/test_classify.py reads its classifiers.
    """
    reference = torch.load(DATA / 'mff_tiny.pt', weights_only=True)
    state = reference['state'] | {'data_preprocessor.mean': torch.ones(3, 1, 1)}
    module = types.ModuleType('mmengine.logging')
    source = 'class HistoryBuffer:\n    def __setstate__(self, state): raise SystemError\n'
    exec(source, module.__dict__)
    with monkeypatch.context() as patch:
        for name in ('mmengine', module.__name__):
            patch.setitem(sys.modules, name, module)
        buffer = module.HistoryBuffer()
        buffer.history, buffer.method = np.array([0.5]), module.HistoryBuffer.__setstate__
        hub = {'loss': buffer, 'seed': np.int64(3), 'names': np.array(['a', 'b'])}
        content = {'meta': {'epoch': 3}, 'message_hub': hub, 'state_dict': OrderedDict(state)}
        saved(tmp_path / 'a.pth', content)
    saved(tmp_path / 'b.pth', state, legacy=True)  # without anything around
    flags = {'num_heads': 3, 'decoder_num_heads': 4, 'fuse_layers': [0, 1, 3]}
    for name in ('a.pth', 'b.pth'):
        file = weights.read(tmp_path / name)
        model = MaskedAutoencoderMFF(**settled(tmp_path / name, **flags).sizes)
        weights.load(model, file, complete=True)
        loss, _, _ = model(reference['imgs'], 0.75, reference['noise'])
        assert loss.item() == pytest.approx(reference['loss'].item(), rel=1e-5)
    assert not [name for name in sys.modules if name.startswith('mmengine')]

    plain = {name: tensor for name, tensor in state.items() if 'proj_layers' not in name}
    plain['backbone.proj_weights'] = torch.ones(1, 1, 1, 1)  # MFF of the last block alone is MAE
    file = weights.read(saved(tmp_path / 'a.pth', plain))
    assert not [name for name in file['model'] if name.startswith('fuse_')]


def test_facebookresearch_mae(tmp_path):
    args = argparse.Namespace(model='mae_vit_base_patch16', output_dir=Path('out'), input_size=224)
    rest = {'optimizer': {'state': {}}, 'epoch': 799, 'scaler': {}, 'args': args}
    rest |= {'history': deque([1, 2], 3), 'meters': defaultdict(list, loss=[0.5]), 'sizes': {224}}
    pretrained = mae(fuse_layers=(2,)).state_dict()
    for state in (pretrained, encoder_of(pretrained), vit().state_dict()):
        for legacy, around in ((False, rest), (True, {'epoch': 799})):
            path = saved(tmp_path / 'a.pth', {'model': state, **around}, legacy)
            assert same(weights.read(path)['model'], state)
    model = probe()
    ours = {name.removeprefix('backbone.'): t for name, t in model.state_dict().items()}
    theirs = {  # Sequential(BatchNorm1d, Linear)
        name.replace('head.', 'head.1.').replace('bn.', 'head.0.'): ours[name] for name in ours
    }
    file = weights.read(saved(tmp_path / 'a.pth', {'model': theirs, **rest}))
    assert same(file['model'], ours)
    weights.load(again := probe(seed=3), file, complete=True)
    assert same(again.state_dict(), model.state_dict())


def test_timm(tmp_path):
    """A folder as timm writes it for the hub, whose config.json is used; and a bare file."""
    model = timm.create_model(
        'vit_tiny_patch16_224', num_classes=2, img_size=(32, 64), num_heads=6, depth=2
    )
    cfg = {'mean': [0.1, 0.2, 0.3], 'std': [0.4] * 3, 'crop_pct': 0.95, 'input_size': [3, 32, 64]}
    config = {'architecture': 'vit_tiny_patch16_224', 'label_names': ['a', 'b'], 'num_classes': 2}
    config |= {'global_pool': 'token', 'pretrained_cfg': cfg, 'model_args': {'num_heads': 6}}
    save_file(randomise(model).state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for path in (tmp_path, f'local-dir:{tmp_path}', tmp_path / 'model.safetensors'):
        file = weights.read(path)
        told = weights.settings_of(None, file)
        assert (told.mean, told.std, told.crop_pct) == ((0.1, 0.2, 0.3), (0.4,) * 3, 0.95)
        assert (told.classes, told.global_pool, told.notes) == (['a', 'b'], 'token', ())
        assert told.sizes['num_heads'] == 6 and told.sizes['img_size'] == (32, 64)
    encoder = create_encoder(told.sizes, told.global_pool)
    encoder.reset_classifier(2)
    weights.load(encoder, file, complete=True)
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), model(images))


def run_of(sizes, **content):
    """What a run of pre-training saves."""
    state = randomise(MaskedAutoencoderMFF(**sizes)).state_dict()
    sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in sizes.items()}
    flags = {'model': 'vit_nano_patch4', 'input_size': sizes['img_size'], 'norm_pix_loss': False}
    statistics = {'mean': [0.2] * sizes['in_chans'], 'std': [0.3] * sizes['in_chans']}
    return {'model': state, 'args': flags, 'sizes': sizes, 'step': 7, **statistics, **content}


NANO = model_sizes('vit_nano_patch4', img_size=(16, 24), in_chans=1, embed_dim=48, num_heads=6)
NANO |= {'fuse_layers': (1, 3)}


def test_ours(tmp_path):
    """And an early run, whose flags told the sizes; tests/test_export.py reads exported ones."""
    content = run_of(NANO, optimizer={'state': {}})
    file = weights.read(saved(tmp_path / 'a.pth', content))
    assert same(file['model'], content['model']) and file['step'] == 7 and 'optimizer' not in file
    model, told = weights.load_model(tmp_path / 'a.pth')
    assert told.sizes == NANO and (told.mean, told.std) == ((0.2,), (0.3,))
    assert told.args == content['args'] and not model.norm_pix_loss and told.notes == ()
    assert same(model.state_dict(), content['model'])
    wrapped = {f'module._orig_mod.{name}': t for name, t in content['model'].items()}
    assert same(weights.read(saved(tmp_path / 'b.pth', wrapped))['model'], content['model'])

    sizes = model_sizes('vit_nano_patch4', img_size=(16, 24), fuse_layers=(1, 3))
    early = run_of(sizes)
    early['args'] |= {'model': 'mff_vit_nano_patch4', 'fuse_layers': [1, 3], 'in_chans': 3}
    early['args'] |= {key: early.pop(key) for key in ('mean', 'std')}
    del early['sizes']
    told = weights.settings_of(None, weights.read(saved(tmp_path / 'a.pth', early)))
    assert told.sizes == sizes and (told.mean, told.std) == ((0.2,) * 3, (0.3,) * 3)


def test_mmsegmentations_segmenter(tmp_path):
    """tests/test_segment.py compares what such a model computes."""
    theirs = torch.load(DATA / 'seg_tiny.pt', weights_only=True)['state']
    file = weights.read(saved(tmp_path / 'a.pth', {'state_dict': theirs, 'meta': {}}))
    model = upernet(5, img_size=48, channels=16, aux_channels=12)
    assert weights.load(model, file, complete=True) == str(tmp_path / 'a.pth')
    assert torch.equal(model.aux_head[2].bias, theirs['auxiliary_head.conv_seg.bias'])
    told = weights.settings_of(None, file)
    expected = SIZES | {'img_size': (48, 48), 'in_chans': 3, 'depth': 4, 'mlp_ratio': 4.0}
    assert {name: told.sizes[name] for name in ENCODER} == expected and told.classes is None


# --- transformers ---------------------------------------------------------------------------------


def vit_mae(**changes):
    transformers = pytest.importorskip('transformers')
    sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'patch_size': 4}
    sizes |= {'intermediate_size': 64, 'image_size': 16, 'decoder_hidden_size': 24}
    sizes |= {'decoder_num_hidden_layers': 3, 'decoder_num_attention_heads': 6}
    sizes |= {'decoder_intermediate_size': 48, 'layer_norm_eps': 1e-6, **changes}
    torch.manual_seed(0)
    return randomise(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes)))


@pytest.mark.parametrize('form', ['version 5', 'hub', 'memory', 'shards', 'bin'])
def test_vit_mae(form, tmp_path):
    """Loss, prediction, mask and tokens are transformers' to the last bit."""
    options = {'norm_pix_loss': form in ('hub', 'shards'), 'layer_norm_eps': 1e-3}
    theirs = vit_mae(num_channels=1, **options)
    theirs.save_pretrained(tmp_path, max_shard_size='20KB' if form == 'shards' else '1GB')
    file = tmp_path / 'model.safetensors'
    if form == 'shards':
        assert len(list(tmp_path.glob('model-*.safetensors'))) > 2 and not file.exists()
    if form in ('hub', 'bin'):
        state = weights.read_file(file)
        names = 'decoder.decoder_encoder.layer.', 'decoder.decoder_layers.'  # of version 5, hub
        state = {name.replace(*names): tensor for name, tensor in state.items()}
        file.unlink()
        saved(tmp_path / 'pytorch_model.bin', state) if form == 'bin' else save_file(state, file)
    if form == 'memory':
        save_file(theirs.state_dict(), file)
    model, told = weights.load_model(file if form == 'hub' else tmp_path)
    assert told.sizes['num_heads'] == 4 and told.sizes['decoder_num_heads'] == 6
    images, noise = torch.randn(3, 1, 16, 16), torch.rand(3, 16)
    with torch.no_grad():
        expected = theirs(images, noise=noise)
        loss, pred, mask = model(images, 0.75, noise)
        assert torch.equal(loss, expected.loss) and torch.equal(pred, expected.logits)
        assert torch.equal(mask, expected.mask)
        theirs.vit.config.mask_ratio = 0.0
        tokens = theirs.vit(images, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
        assert torch.equal(model.forward_features(images), tokens)
        encoder = weights.load_encoder(tmp_path)[0]
        assert torch.allclose(encoder.forward_features(images), tokens, atol=1e-6)


def test_vit(tmp_path):
    """A classifier and, without the first part of its names, the encoder alone."""
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=[16, 8], patch_size=4, id2label={0: 'b', 1: 'a', 10: 'c', 2: 'd'},
    )  # fmt: skip
    theirs = randomise(transformers.ViTForImageClassification(config))
    images = torch.randn(3, 3, 16, 8)
    theirs.save_pretrained(tmp_path)
    processor = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.5] * 3}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
    file = weights.read(tmp_path)
    told = weights.settings_of(None, file)
    assert told.sizes['img_size'] == (16, 8) and told.mean == (0.1, 0.2, 0.3)
    assert told.classes == ['b', 'a', 'd', 'c'] and told.global_pool == 'token'
    model = create_encoder(told.sizes, 'token').eval()
    model.reset_classifier(4)
    assert 'LayerNorm 1e-06, not 1e-12' in weights.load(model, file)
    weights.load(model, file, complete=True)
    theirs.vit.save_pretrained(tmp_path)
    encoder, told = weights.load_encoder(tmp_path)
    assert told.classes is None and told.global_pool is None
    with torch.no_grad():
        assert torch.allclose(model(images), theirs(images).logits, atol=1e-6)
        tokens = theirs.vit(images).last_hidden_state
        assert torch.allclose(encoder.forward_features(images), tokens, atol=1e-6)


def test_folders(tmp_path):
    vit_mae().save_pretrained(tmp_path)
    for text, message in (('{"hidden_act": "relu"}', 'not gelu'), ('{', r'config\.json: ')):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(InputError, match=message):
            weights.read(tmp_path)
    (tmp_path / 'config.json').unlink()
    assert 'num_heads 1 assumed' in weights.load_encoder(tmp_path)[1].notes
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(InputError, match=r'model\.safetensors: No such file'):
        weights.read(tmp_path)


# --- The hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for, of server.files: {ORG/NAME: {file: bytes}}."""

    def do_HEAD(self):
        words = self.path.split('?')[0].removeprefix('/api/models').split('/')[1:]
        files, body = self.server.files.get('/'.join(words[:2]), {}), None
        if files and words[2] == 'revision':
            body = {'id': 'org/name', 'sha': 40 * 'a', 'siblings': []}
        elif files and words[2] == 'tree':
            body = [{'type': 'file', 'path': name, 'oid': 40 * 'b', 'size': 9} for name in files]
        body = files[words[-1]] if words[-1] in files else json.dumps(body).encode()
        self.send_response(200 if files else 404)
        headers = {'X-Repo-Commit': 40 * 'a', 'ETag': f'"{words[-1]}"', 'Content-Length': len(body)}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)
            self.server.sent.add(words[-1])

    do_GET = do_HEAD

    def log_message(self, *args): ...


def test_names_on_the_hub(tmp_path, monkeypatch):
    """Read from a server, and from the cache when it is gone."""
    saved(tmp_path / 'model.bin', vit().state_dict())
    config = json.dumps({'mean': [0.1] * 3, 'std': [0.2] * 3}).encode()
    old = {'config.json': config, 'tf_model.h5': b'', 'pytorch_model.bin': b''}
    old['pytorch_model.bin'] = (tmp_path / 'model.bin').read_bytes()
    new = old | {'model.safetensors': save(vit().state_dict())}
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.sent = {'org/new': new, 'org/old': old}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    url = f'{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    assert same(weights.read('hf-hub:org/new')['model'], vit().state_dict())
    assert {'config.json', 'model.safetensors'} == server.sent & new.keys()
    assert weights.read('hf-hub:org/old')['mean'] == (0.1, 0.1, 0.1)
    assert 'pytorch_model.bin' in server.sent and 'tf_model.h5' not in server.sent
    with pytest.raises(InputError, match='hf-hub:org/none: neither cached nor downloaded'):
        weights.read('hf-hub:org/none')
    server.shutdown()
    server.server_close()
    assert weights.read('hf-hub:org/new')['std'] == weights.read('hf-hub:org/old')['std']
    with pytest.raises(InputError, match='hf-hub:org/none: neither cached nor downloaded'):
        weights.read('hf-hub:org/none')


# --- Several ViTs in a file, prefixes, averages ---------------------------------------------------


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def test_prefixes(tmp_path):
    state = encoder_of(vit('token', 0).state_dict())
    head = {'head.mlp.0.weight': torch.ones(2, 24), 'head.last_layer.weight_g': torch.ones(2, 1)}
    beside = {'projector.0.weight': torch.ones(2, 24)}
    for content in (
        {'state_dict': prefixed(state, 'model.')},
        {'state_dict': prefixed(state, 'student.encoder.') | beside},
        {'teacher': prefixed(state, 'module.backbone.') | head, 'optimizer': {'state': {}}},
        {'model': prefixed(state, 'encoder.') | {'decoder.blocks.0.x': torch.ones(1)}},
        prefixed(state, 'backbone.') | beside,
        prefixed(state, 'module.model.backbone.'),
    ):
        file = weights.read(saved(tmp_path / 'a.pth', content))
        assert same(encoder_of({k: v for k, v in file['model'].items() if k not in head}), state)
        weights.load(vit('token', 0, seed=3), file, complete=True)


def test_several_vits(tmp_path):
    teacher, student = (vit('token', 0, seed=seed).state_dict() for seed in (1, 2))
    nested = {'student': prefixed(student, 'module.backbone.'), 'teacher': teacher}
    flat = prefixed(student, 'student.backbone.') | prefixed(teacher, 'teacher.backbone.')
    for content in (nested, {'state_dict': flat}, flat):
        path = saved(tmp_path / 'a.pth', content)
        for key in ('', ':nobody'):
            with pytest.raises(InputError, match=r'holds .*student\., .*teacher\.; .* FILE:KEY'):
                weights.read(f'{path}{key}')
        outer = 'state_dict.' if 'state_dict' in content else ''
        assert same(weights.read(f'{path}:{outer}teacher')['model'], teacher)
        assert same(weights.read(f'{path}:{outer}student')['model'], student)


def test_averaged_weights_are_taken_and_said(tmp_path):
    plain, averaged = (vit(seed=seed).state_dict() for seed in (1, 2))
    for content, said in [
        ({'state_dict': plain, 'state_dict_ema': averaged, 'epoch': 3}, ':state_dict_ema'),
        ({'model': plain, 'model_ema': averaged}, ':model_ema'),
        ({'model': averaged, 'model_ema': None}, ''),
        ({'state_dict': averaged, 'ema_state_dict': plain}, ''),  # mmengine exchanges them
    ]:
        file = weights.read(path := saved(tmp_path / 'a.pth', content))
        assert same(file['model'], averaged) and file['path'] == f'{path}{said}'
        first = next(iter(content))
        assert same(weights.read(f'{path}:{first}')['model'], content[first])


# --- Files that are no weights --------------------------------------------------------------------


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def third_party(path):
    Path(path).touch()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'pickle4'])
@pytest.mark.parametrize('call', ['system', 'eval', 'touch', 'third_party', 'torch.hub'])
def test_hostile_file_runs_nothing(call, form, tmp_path, capfd):
    """It is refused, or what it would call is inert and the weights are read."""
    victim = str(tmp_path / 'victim')
    hostile = {
        'system': Hostile(os.system, f'touch {victim}'),
        'eval': Hostile(eval, f'open({victim!r}, "w")'),
        'touch': Hostile(Path.touch, Path(victim)),
        'third_party': Hostile(third_party, victim),
        'torch.hub': Hostile(torch.hub.download_url_to_file, 'file:///etc/hostname', victim),
    }[call]
    content, path = {'model': mae().state_dict(), 'epoch': hostile}, tmp_path / 'a.pth'
    if form in ('zip', 'legacy'):
        saved(path, content, legacy=form == 'legacy')
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if form == 'pickle' else 4))
    try:
        file = weights.read(path)
    except InputError as error:
        assert '\n' not in str(error) and str(error).startswith(f'{path}: ')
    else:
        assert form == 'zip' and same(file['model'], content['model'])
    assert not Path(victim).exists()
    pickle.loads(pickle.dumps(hostile))  # it would have run
    assert Path(victim).exists()


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_flipped_bits(tmp_path):
    """Every one in a tensor or in the pickle is noticed. One elsewhere may be in a byte that says
    nothing, such as the padding: then what is read is what was saved."""
    layer = torch.nn.Linear(16, 64)
    content = {'model': layer.state_dict(), 'optimizer': {}, 'scaler': {}, 'step': 7}
    whole = saved(tmp_path / 'a.pth', content).read_bytes()
    start = whole.index(layer.weight.detach().numpy().tobytes())
    records = range(start, start + 4 * layer.weight.numel())
    draw, noticed = random.Random(0), 0
    for place in draw.choices(records, k=200) + draw.choices(range(len(whole)), k=200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / 'b.pth').write_bytes(damaged)
        try:
            assert equal(weights.read_file(tmp_path / 'b.pth'), content) and place not in records
        except InputError as error:
            assert str(error).startswith(f'{tmp_path}/b.pth: ') and '\n' not in str(error)
            noticed += 1
    assert noticed > 300


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(share, legacy, tmp_path):
    path = saved(tmp_path / 'a.pth', {'model': mae().state_dict()}, legacy)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r'a\.pth: [^\n]+$'):
        weights.read(path)


def test_safetensors_header_whose_length_starts_like_a_pickle(tmp_path):
    path, firsts, records = tmp_path / 'a', set(), {'args': '{}', 'mean': '[0.1, 0.2, 0.3]'}
    for padding in range(0, 256, 8):
        save_file(mae().state_dict(), path, records | {'format': 'pt', 'x': f'"{"x" * padding}"'})
        firsts.add(path.read_bytes()[0])
        assert weights.read(path)['mean'] == (0.1, 0.2, 0.3)
    assert 0x80 in firsts


MISTAKES = [  # content of a file, what the line says
    (None, 'No such file'),
    (b'<html>not found</html>', 'damaged, or not a weights file'),
    (b'PK\x03\x04 no zip', 'damaged, or not a weights file'),
    ([1, 2], 'damaged, or not a weights file'),
    ({}, 'not one known'),
    ({'state_dict': {'conv.weight': torch.zeros(1)}}, 'not one known.*holds state_dict'),
    ({'norm.bias': torch.ones(24).to_sparse()}, 'not one known'),
    ({'norm.bias': torch.ones(24, device='meta')}, 'not one known'),
    ({'norm.bias': torch.ones(24, dtype=torch.int8)}, 'norm.bias is not .* floating-point'),
    ({'norm.bias': torch.full((24,), math.nan)}, 'norm.bias is not of finite'),
    ({'norm.bias': 'abc'}, 'not one known'),
    ({'cls_token': Path('x')}, 'not one known'),
    ({'pos_embed': torch.tensor(1.0)}, 'not one known'),
    ({'patch_embed.proj.weight': torch.ones(24, 192)}, 'not one known'),
]


@pytest.mark.parametrize('content, message', MISTAKES)
def test_a_mistake_is_one_line(content, message, tmp_path):
    path = tmp_path / 'a.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        is_state = isinstance(content, dict) and content.keys() - {'model', 'state_dict'}
        saved(path, mae().state_dict() | content if is_state else content)
    with pytest.raises(InputError, match=f'a.pth: .*{message}') as error:
        weights.read(path)
    assert '\n' not in str(error.value)


# --- Into a model ---------------------------------------------------------------------------------


DECODER = 'decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred'
UPERNET = 'aux_head, classifier, fuse, gamma_1, gamma_2, laterals, neck, pool_conv, pools, '


@pytest.mark.parametrize(
    'model, source, fresh, left_out',
    [
        (mae(seed=2), mae(), '', ''),
        (mae(), mae(fuse_layers=(2,)), 'fuse_logits, fuse_projs', ''),
        (mae(fuse_layers=(2,)), mae(), '', 'fuse_logits, fuse_projs'),
        (mae(fuse_layers=(2,)), vit('token', 0), f'{DECODER}, mask_token', ''),
        (vit('avg'), mae(fuse_layers=(2,)), 'fc_norm, head', f'{DECODER}, mask_token, norm'),
        (probe(), mae(), 'bn, head', f'{DECODER}, fuse_logits, fuse_projs, mask_token'),
        (
            upernet(),
            vit('token', 0, depth=4),
            f'{UPERNET}relative_position_bias_table, smooth',
            'norm',
        ),
    ],
)
def test_what_one_of_both_lacks(model, source, fresh, left_out, load):
    """All that both have is taken; the rest stays as it is, and is named."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = source.state_dict()
    said = {'fresh': fresh, 'left out': left_out}
    assert load(model, expected) == [f'{key}: {said[key]}' for key in said if said[key]]
    for name in [name for name in expected if name.endswith('qkv.bias')]:  # as UperNet has it
        q_bias, _, v_bias = expected[name].chunk(3)
        start = name.removesuffix('qkv.bias')
        expected = expected | {f'{start}q_bias': q_bias, f'{start}v_bias': v_bias}
    for name, tensor in model.state_dict().items():
        plain = re.sub(r'^(backbone|encoder)\.', '', name)
        is_fresh = bool(fresh) and any(part in plain.split('.') for part in fresh.split(', '))
        assert torch.equal(tensor, before[name] if is_fresh else expected[plain]), name
    if fresh:
        with pytest.raises(InputError, match=' is missing in the file, '):
            load(model, source.state_dict(), complete=True)


def test_a_head_is_taken_for_its_classes_behind_its_norm(load):
    names, source = ['a', 'b', 'c', 'd', 'e'], vit('avg').state_dict()
    content = {'model': source, 'classes': names, 'args': {'input_size': [32, 32]}}
    assert load(model := vit('avg', seed=2), content, complete=True, classes=names) == []
    assert same(model.state_dict(), source)
    both = source | encoder_of(mae().state_dict())
    for model, state, classes in (
        (vit('avg', 7), source, None),
        (vit('token'), both, None),
        (probe(), vit('token').state_dict(), None),
        (vit('avg', seed=2), source, ['b', 'a', 'c', 'd', 'e']),
    ):
        before = model.head.weight.clone()
        lines = load(model, content | {'model': state}, classes=classes)
        assert ('its classes have other names' in lines) == bool(classes)
        assert any(line.startswith('fresh: ') and 'head' in line for line in lines)
        assert torch.equal(model.head.weight, before)
        with pytest.raises(InputError, match=r'(head|bn)\.\w+ is '):
            load(model, content | {'model': state}, complete=True, classes=classes)


def test_never_a_partial_load(load):
    source = mae().state_dict()
    distilled = source | {'dist_token': torch.ones(1, 1, 24), 'pos_embed': torch.ones(1, 18, 24)}
    attention = 'blocks.1.attn.proj.bias'
    for state, message in [
        (
            {name: source[name] for name in source if name != attention},
            rf'{attention} is missing in the file',
        ),
        (
            {name: source[name] for name in source if name != 'norm.bias'},
            'norm.bias is missing in the file',
        ),
        (source | {'blocks.0.ls1.gamma': torch.ones(24)}, r'ls1\.gamma is .* missing in the model'),
        (source | {'reg_token': torch.ones(1, 4, 24)}, r'reg_token is .* missing in the model'),
        (distilled, '18 positions, not of one class token'),
        (
            source | {'mask_token': torch.ones(1, 1, 8)},
            r'\(1, 1, 8\) in the file, \(1, 1, 16\) in the model',
        ),
        (mae(patch_size=16).state_dict(), r'patch_embed\.proj\.weight|decoder_pred'),
        (mae(depth=2, fuse_layers=(0, 1)).state_dict(), r'blocks\.2\..* is missing in the file'),
        (mae(embed_dim=48).state_dict(), r'\(48,\) in the file, \(24,\) in the model'),
        (mae(decoder_embed_dim=32).state_dict(), 'decoder.* is '),
        (mae(fuse_layers=(0, 2)).state_dict(), 'fuse_logits is '),
        (vit('avg').state_dict(), 'norm.bias is missing in the file'),
        (upernet(depth=4).state_dict(), 'blocks.* is .* missing in the model'),
    ]:
        model = mae(seed=5)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load(model, state)
        assert same(model.state_dict(), before)


def resampled(pos_embed, old, new):
    patches = pos_embed[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, new, mode='bicubic')
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize(
    'source_size, recorded, size, grids',
    [
        (32, False, (16, 48), ((4, 4), (2, 6))),
        ((16, 72), True, (72, 16), ((2, 9), (9, 2))),
        ((16, 64), True, (32, 32), ((2, 8), (4, 4))),
        ((16, 64), False, (16, 64), None),  # of as many patches as a square, which it is not
        ((16, 72), False, (16, 72), None),
    ],
)
def test_positions(source_size, recorded, size, grids, load, tmp_path):
    source, model = mae(img_size=source_size).state_dict(), mae(img_size=size, seed=3)
    args = {'args': {'input_size': source_size}} if recorded else {}
    lines = load(model, {'model': source, **args}, complete=True)
    assert [line.startswith('positions resampled') for line in lines] == [True] * bool(grids)
    for name in ('pos_embed', 'decoder_pos_embed'):
        expected = resampled(source[name], *grids) if grids else source[name]
        assert torch.allclose(getattr(model, name), expected, atol=1e-6)
        assert grids or torch.equal(getattr(model, name), source[name])
    assert settled(tmp_path / 'load.pth', input_size=[*size]).sizes['img_size'] == size
    if source_size == (16, 72) and not recorded:
        with pytest.raises(InputError, match='19 positions, not of one class token and a square'):
            weights.load_encoder(tmp_path / 'load.pth')


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_channels(channels, load):
    source = mae().state_dict()
    model = mae(in_chans=channels, seed=3)
    said = ['fresh: decoder_pred', 'left out: decoder_pred']
    assert load(model, source)[1:] == said
    expected = adapt_input_conv(channels, source['patch_embed.proj.weight'])
    assert torch.allclose(model.patch_embed.proj.weight, expected, atol=1e-6)
    assert load(mae(), model.state_dict())[1:] == said
    with pytest.raises(InputError, match='decoder_pred'):
        load(mae(), model.state_dict(), complete=True)


def test_segmenters(load, tmp_path):
    source = upernet().state_dict()
    args = {'input_size': [32, 32], 'model': 'x'}
    content = {'model': source, 'args': args, 'classes': ['a', 'b', 'c', 'd']}
    assert load(model := upernet(seed=2), content, complete=True) == []
    assert same(model.state_dict(), source)
    told = settled(tmp_path / 'load.pth')
    assert told.sizes['num_heads'] == 3 and told.classes == ['a', 'b', 'c', 'd']
    assert load(upernet(7), content)[0] == 'fresh: aux_head, classifier'
    with pytest.raises(InputError, match='relative_position_bias_table'):  # they fix the grid
        load(upernet(img_size=64), content)


# --- What a job builds ----------------------------------------------------------------------------


def settled(path, *names, **flags):
    args = SimpleNamespace(**dict.fromkeys(names), **flags)
    return weights.settings_of(args, path and weights.read(path))


def test_flags_win_over_the_file(tmp_path):
    path = saved(tmp_path / 'a.pth', run_of(NANO))
    told = settled(path, input_size=[32, 32], in_chans=3, std=[0.1, 0.2, 0.4], crop_pct=0.8)
    assert told.sizes['img_size'] == (32, 32) and told.sizes['embed_dim'] == 48
    assert told.mean == (0.485, 0.456, 0.406)  # the file's are for one channel
    assert told.std == (0.1, 0.2, 0.4) and told.crop_pct == 0.8
    told = settled(path, fuse_layers=[0, 3], num_heads=3)
    assert told.sizes == NANO | {'fuse_layers': (0, 3), 'num_heads': 3}
    assert 'fuse_layers (0, 3), where the file has (1, 3)' in told.notes and len(told.notes) == 2
    told = settled(path, model='vit_small_patch16')
    assert told.sizes == NANO and 'not of vit_small_patch16' in told.notes[0]


def test_settings_without_a_file():
    told = settled(None, 'model', 'mean', 'init_from', 'fuse_layers')
    assert told.sizes == model_sizes('vit_base_patch16') and told.mean == (0.485, 0.456, 0.406)
    told = settled(None, model='mff_vit_tiny_patch4', in_chans=2, embed_dim=96)
    assert told.sizes == model_sizes('vit_tiny_patch4', in_chans=2, embed_dim=96)
    assert told.mean == told.std == (0.5, 0.5) and told.notes == ()
    with pytest.raises(InputError, match='3 channels'):
        settled(None, mean=[0.5])
    with pytest.raises(InputError, match="no model 'resnet'"):
        settled(None, model='resnet')


def test_sizes_that_shapes_tell(tmp_path):
    sizes = model_sizes('vit_tiny_patch4', patch_size=8, img_size=24, in_chans=4, mlp_ratio=2.0)
    mff, single, other = (
        MaskedAutoencoderMFF(**sizes | {'fuse_layers': layers}).state_dict()
        for layers in (sizes['fuse_layers'], (11,), (0, 5, 11))
    )
    told = settled(saved(tmp_path / 'a.pth', {'state_dict': mff}))
    assert told.sizes == sizes and told.mean == (0.5,) * 4  # width 192: 3 heads
    path = saved(tmp_path / 'b.pth', {'model': single})
    assert weights.load_model(path)[0].fuse_layers == (11,)  # MAE, which it is
    assert settled(path).sizes == sizes  # pre-training starts to fuse
    with pytest.raises(InputError, match=r'decoder.* is missing in the file'):
        weights.load_model(saved(tmp_path / 'c.pth', {'model': encoder_of(single)}))
    path = saved(tmp_path / 'd.pth', other)
    with pytest.raises(InputError, match='fuse_logits'):  # no one can know which are fused
        weights.load_model(path)
    nano = model_sizes('vit_nano_patch4')  # 16 channels per head, in encoder and decoder
    state = MaskedAutoencoderMFF(**nano).state_dict()
    assert settled(saved(tmp_path / 'e.pth', state)).sizes == nano
    wide = mae(embed_dim=320, num_heads=5, decoder_embed_dim=64).state_dict()
    assert settled(saved(tmp_path / 'f.pth', wide)).sizes['num_heads'] == 5  # of 64 channels


def test_random_encoder_starts_as_pre_training_does():
    sizes = model_sizes('vit_nano_patch4', depth=2)
    torch.manual_seed(3)
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': (1,)}).state_dict()
    torch.manual_seed(3)
    assert same(random_encoder(sizes).state_dict(), encoder_of(start))
