"""Weights out: an exported folder gives in timm what the model gives here, and says how to prepare an image for it."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import pil_to_tensor

from models_mff import MaskedAutoencoderMFF, model_sizes
from util import export
from util.args import run_job
from util.weights import load_encoder, load_model, load_weights, read, settings_of

SIZES = {'img_size': (16, 24), 'patch_size': 4, 'embed_dim': 192, 'depth': 2, 'num_heads': 3}


def randomise(model):
    """Every tensor its own numbers, so that none can be mistaken for another's or for an initial value."""
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, model.state_dict().values()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def classifier(global_pool):
    model = VisionTransformer(**SIZES, num_classes=3, global_pool='avg' if global_pool == 'avg' else 'token')
    if global_pool == 'probe':
        model.fc_norm = torch.nn.BatchNorm1d(192, affine=False, eps=1e-6)
        model.fc_norm.running_mean.normal_()
        model.fc_norm.running_var.uniform_(0.5, 2)
    return randomise(model)


def checkpoint(network, sizes=None, **flags):
    """What a run would save: with sizes, mean and std, or, without sizes, as older runs did, by its flags."""
    flags = {'model': 'vit_tiny_patch4', 'input_size': None, 'data_path': '/home/me/secret', **flags}
    state = {'model': network.state_dict(), 'optimizer': {}, 'epoch': 2, 'step': 9, 'args': flags}
    if sizes:
        state['sizes'] = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    return state


def exported(state, folder):
    torch.save(state, folder / 'checkpoint.pth')
    run_job(export.main, export.get_parser(), [str(folder / 'checkpoint.pth'), str(folder / 'out')])
    return folder / 'out'


def from_folder(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def encoder_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(('decoder_', 'mask_', 'fuse_'))}


@pytest.mark.parametrize('recorded', [True, False])
@pytest.mark.parametrize('size, channels, fuse_layers', [(None, 3, None), ([16, 16], 1, [3]), ([12, 20], 4, [1, 3])])
def test_pretraining(size, channels, fuse_layers, recorded, tmp_path, capsys):
    sizes = model_sizes('vit_nano_patch4', img_size=size, in_chans=channels, fuse_layers=fuse_layers)
    if recorded:  # any size, which no name tells
        sizes |= {'embed_dim': 48, 'num_heads': 6, 'mlp_ratio': 2.5, 'decoder_num_heads': 8}
    model = randomise(MaskedAutoencoderMFF(**sizes))
    flags = {'mean': [0.4] * channels, 'std': [0.3] * channels, 'in_chans': channels, 'input_size': size}
    flags |= {'fuse_layers': fuse_layers, 'norm_pix_loss': True, 'mask_ratio': 0.75, 'model': 'mff_vit_nano_patch4'}
    folder = exported(checkpoint(model, sizes if recorded else None, **flags), tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    assert files == {'model.safetensors', 'pretraining/model.safetensors', 'config.json', 'README.md'}
    assert 'local-dir:' in capsys.readouterr().out

    encoder = from_folder(folder)
    assert same(encoder.state_dict(), encoder_of(model.state_dict()))  # every key, nothing else
    assert encoder.num_classes == 0
    imgs = torch.randn(2, channels, *sizes['img_size'])
    with torch.no_grad():
        assert (encoder(imgs) - model.forward_features(imgs)[:, 0]).abs().max() < 1e-6
    assert tuple(encoder.pretrained_cfg['input_size']) == (channels, *sizes['img_size'])

    again, settings = load_model(folder / 'pretraining/model.safetensors')
    assert same(again.state_dict(), model.state_dict()) and again.fuse_layers == model.fuse_layers
    assert settings.mean == (0.4,) * channels and settings.std == (0.3,) * channels
    kind = 'MAE' if fuse_layers == [3] else 'MFF'
    line = load_weights(again, folder / 'pretraining/model.safetensors', complete=True)
    assert line.endswith(f"this project's {kind} pre-training")
    assert read(folder / 'model.safetensors').origin == "this project's pre-training, encoder only"
    again, settings = load_encoder(folder / 'model.safetensors')
    assert same(again.state_dict(), encoder.state_dict()) and settings.mean == (0.4,) * channels
    with torch.no_grad():
        assert torch.equal(again(imgs), encoder(imgs))  # the number of heads came along
    assert b'secret' not in b''.join(path.read_bytes() for path in folder.rglob('*') if path.is_file())
    card = (folder / 'README.md').read_text()
    assert f'| fused blocks | {", ".join(map(str, model.fuse_layers))} |' in card and '2 epochs' in card
    assert f'({kind})\n' in card and ('mff]' in card) == (kind == 'MFF')


@pytest.mark.parametrize('recorded, row', [(True, 'standardised in each patch'), (False, 'as they are'), (None, None)])
def test_the_card_says_how_pixels_were_predicted_where_it_is_known(recorded, row, tmp_path):
    model = randomise(MaskedAutoencoderMFF(**model_sizes('vit_nano_patch4', img_size=16)))
    flags = {'model': 'vit_nano_patch4', 'input_size': [16, 16], 'norm_pix_loss': recorded, 'crop': ['odd']}
    card = (exported(checkpoint(model, **flags), tmp_path) / 'README.md').read_text()
    assert (f'| pixels predicted | {row} |' in card) if row else 'pixels predicted' not in card
    assert '| crop |' not in card


@pytest.mark.parametrize('global_pool', ['avg', 'token', 'probe'])
def test_classifier(global_pool, tmp_path):
    model, classes = classifier(global_pool), ['cat', 'dog', 'owl']
    (tmp_path / 'out/pretraining').mkdir(parents=True)
    (tmp_path / 'out/pretraining/model.safetensors').write_text('of an earlier export')
    flags = {'input_size': [16, 24], 'mean': [0.1, 0.2, 0.3], 'std': [1.0, 0.9, 0.8], 'crop_pct': 0.6}
    folder = exported({**checkpoint(model, **flags), 'classes': classes}, tmp_path)
    in_timm = from_folder(folder)
    imgs = torch.randn(4, 3, 16, 24)
    with torch.no_grad():
        assert (in_timm(imgs) - model(imgs)).abs().max() < (1e-5 if global_pool == 'probe' else 1e-6)
    if global_pool != 'probe':
        assert same(in_timm.state_dict(), model.state_dict())
    assert tuple(in_timm.pretrained_cfg['label_names']) == ('cat', 'dog', 'owl')
    assert json.loads((folder / 'config.json').read_text())['num_classes'] == 3
    assert not (folder / 'pretraining/model.safetensors').exists()
    assert 'pre-trained with' not in (folder / 'README.md').read_text()  # what it started from is not known
    settings = settings_of(read(folder / 'model.safetensors'))
    assert settings.classes == classes and settings.flags.crop_pct == 0.6
    assert settings.mean == (0.1, 0.2, 0.3) and settings.std == (1.0, 0.9, 0.8)
    assert settings.sizes['img_size'] == (16, 24)


def test_timm_prepares_images_as_the_checkpoint_was_trained(tmp_path):
    """timm's transform from config.json: resized by crop_pct, cropped, normalised with the mean and deviation."""
    model = VisionTransformer(**SIZES | {'img_size': (16, 16)}, num_classes=3)
    mean, std = [0.1, 0.2, 0.3], [0.7, 0.9, 1.1]
    folder = exported(checkpoint(model, input_size=[16, 16], mean=mean, std=std, crop_pct=0.5), tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(from_folder(folder)))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)  # 32 = 16 / 0.5: nothing to resize, the middle is cut out
    middle = pil_to_tensor(image)[:, 8:24, 8:24] / 255
    expected = (middle - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(transform(image), expected, atol=1e-5)


def test_a_run(pretrain, tmp_path):
    output_dir = pretrain('run', '--epochs', '1').output_dir
    run_job(export.main, export.get_parser(), [str(output_dir / 'checkpoint-last.pth'), str(tmp_path / 'out')])
    expected, settings = load_encoder(output_dir / 'checkpoint-last.pth')
    imgs = torch.randn(1, 3, *settings.sizes['img_size'])
    with torch.no_grad():
        assert torch.equal(from_folder(tmp_path / 'out')(imgs), expected(imgs))


def test_mistakes_get_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / 'broken.pth').write_text('nothing')
    state = checkpoint(classifier('avg'), input_size=[16, 24])
    torch.save(state['model'], tmp_path / 'bare.pth')
    torch.save({**state, 'classes': ['a']}, tmp_path / 'classes.pth')
    torch.save({**state, 'sizes': {'num_heads': 7, 'img_size': [16, 24]}}, tmp_path / 'heads.pth')
    torch.save(state, tmp_path / 'good.pth')
    for name, message in [
        ('missing.pth', 'No such file'),
        ('broken.pth', 'not a weights file'),
        ('bare.pth', 'not a checkpoint of pre-training or a classifier of this project'),
        ('classes.pth', 'head has 3 classes, but it names 1'),
        ('heads.pth', 'do not fit'),
        ('good.pth', 'cannot write there'),
    ]:
        out = '/dev/null/out' if name == 'good.pth' else tmp_path / 'new/out'
        with pytest.raises(SystemExit) as exit:
            run_job(export.main, export.get_parser(), [str(tmp_path / name), str(out)])
        printed = capsys.readouterr().err
        assert exit.value.code == 2
        assert re.search(message, printed) and re.fullmatch(r'[^\n]*error: [^\n]+\n', printed), printed
        assert not (tmp_path / 'new').exists()
