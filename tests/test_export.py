"""Weights out: in timm, transformers, ONNX and torch.hub they give what they give here."""

import errno
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from conftest import ROOT
from PIL import Image

import engine_classify
import hubconf
from models_mff import MODELS, MaskedAutoencoderMFF, model_sizes
from tools import export
from util import transforms
from util.args import run_job
from util.images import read_image
from util.weights import load_encoder, load_model, read

FILES = {'config.json', 'model.safetensors', 'README.md'}


def run_export(path, folder, *flags):
    run_job(export.main, export.get_parser(), [str(path), str(folder), *flags])
    return folder


def randomise(path, folder):
    """A copy of a checkpoint, every tensor with its own numbers, so that none can be mistaken."""
    content = torch.load(path, weights_only=True)
    for tensor in filter(torch.is_floating_point, content['model'].values()):
        tensor.mul_(torch.rand_like(tensor) + 0.5).add_(torch.rand_like(tensor) * 0.02)
    torch.save(content, folder / 'checkpoint.pth')
    return folder / 'checkpoint.pth'


def pretrained(folder, **changes):
    """A checkpoint as a run of pre-training writes it, of any size, with random weights."""
    sizes = model_sizes('vit_nano_patch4', **{'img_size': 16, **changes})
    args = {'model': 'vit_nano_patch4', 'input_size': None, 'data_path': '/home/me/secret'}
    args |= {'norm_pix_loss': False, 'mask_ratio': 0.6}
    content = {'model': MaskedAutoencoderMFF(**sizes).state_dict(), 'sizes': sizes, 'args': args}
    content |= {key: [value] * sizes['in_chans'] for key, value in (('mean', 0.4), ('std', 0.3))}
    torch.save(content, folder / 'run.pth')
    return randomise(folder / 'run.pth', folder)


def from_timm(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def uniform(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance=1e-6):
    """Whether all differences are small beside the largest value."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


def contents(folder):
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_snippet(folder, image):
    """The names that the code of a model card defines, for one image."""
    code = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.S)[1]
    code = code.replace('hf-hub:USER/NAME', f'local-dir:{folder}').replace('USER/NAME', str(folder))
    names = {}
    with torch.no_grad():
        exec(code.replace('IMAGE', str(image)), names)
    return names


# --- timm, and transformers by its timm wrapper ---------------------------------------------------


@pytest.mark.parametrize(
    'size, channels, fuse_layers', [(16, 3, (0, 1, 3)), (16, 1, (3,)), ((12, 20), 4, (1, 3))]
)
def test_pretraining(size, channels, fuse_layers, tmp_path):
    sizes = {'img_size': size, 'embed_dim': 48, 'num_heads': 6, 'mlp_ratio': 2.5}
    path = pretrained(tmp_path, in_chans=channels, fuse_layers=fuse_layers, **sizes)
    folder = run_export(path, tmp_path / 'out')
    files, whole = contents(folder), 'pretraining/model.safetensors'
    assert files.keys() == FILES | {whole}
    assert not any(b'secret' in content for content in files.values())
    assert ('(MFF)' in files['README.md'].decode()) == (len(fuse_layers) > 1)

    model, encoder = load_model(path)[0], from_timm(folder)
    imgs = uniform(2, *encoder.pretrained_cfg['input_size'])
    in_transformers = transformers.AutoModel.from_pretrained(folder).eval()
    again, settings = load_model(folder / whole)
    with torch.no_grad():
        tokens = model.forward_features(imgs)
        assert torch.equal(encoder(imgs), tokens[:, 0])
        assert torch.equal(in_transformers(imgs).last_hidden_state, tokens)
        assert torch.equal(load_encoder(folder)[0](imgs), tokens[:, 0])
        noise = uniform(2, model.patch_embed.num_patches)
        assert torch.equal(again(imgs, 0.6, noise)[0], model(imgs, 0.6, noise)[0])
    assert settings.mean == (0.4,) * channels and settings.args['mask_ratio'] == 0.6


@pytest.mark.parametrize('kind', ['avg', 'token', 'probe'])
def test_classifier(kind, finetune, linprobe, tmp_path):
    flags = ['--epochs', '1', '--crop_pct', '0.6']
    job, tolerance = (linprobe, 1e-5) if kind == 'probe' else (finetune, 1e-6)
    flags += [] if kind == 'probe' else ['--global_pool', kind]
    path, folder = randomise(job('run', *flags).last, tmp_path), tmp_path / 'out'
    (folder / 'pretraining').mkdir(parents=True)
    (folder / 'pretraining/model.safetensors').write_text('of an earlier export')
    assert contents(run_export(path, folder)).keys() == FILES

    model, settings = engine_classify.load_classifier(SimpleNamespace(init_from=str(path)), 'cpu')
    in_transformers = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    imgs = uniform(4, 3, 16, 16)
    with torch.no_grad():
        logits = model(imgs)
        assert close(from_timm(folder)(imgs), logits, tolerance)
        assert close(in_transformers(imgs).logits, logits, tolerance)
    names = json.loads((folder / 'config.json').read_text())['label_names']
    assert names == settings.classes == list(in_transformers.config.id2label.values())
    assert read(folder / 'model.safetensors')['crop_pct'] == 0.6

    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    by_card = run_snippet(folder, tmp_path / 'image.png')
    prepare = transformers.AutoImageProcessor.from_pretrained(folder)
    image = by_card['image']
    assert torch.equal(prepare(image)['pixel_values'][0], by_card['prepare'](image))
    classify = transformers.pipeline('image-classification', model=str(folder), top_k=10)
    probabilities = by_card['output'].softmax(1)[0].tolist()
    found = {row['label']: row['score'] for row in classify(str(tmp_path / 'image.png'))}
    assert found == pytest.approx(dict(zip(names, probabilities)), abs=1e-6)


def transparent(kind, size):
    """The bytes of an image whose alpha channel hides something."""
    rgba = np.random.default_rng(1).integers(0, 256, (*size, 4), dtype=np.uint8)
    image, options = Image.fromarray(rgba), {'format': 'PNG'}
    if kind == 'colour':  # one that the file declares transparent
        rgba[:, :5] = 7
        image, options['transparency'] = Image.fromarray(rgba[..., :3]), (7, 7, 7)
    elif kind == 'P':
        image = image.quantize(32)
    elif kind == 'turned':  # opaque; EXIF says by 180 degrees
        exif = Image.Exif()
        exif[0x0112] = 3
        image, options = image.convert('RGB'), {'format': 'JPEG', 'exif': exif}
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize('in_chans, mode', [(3, 'crop'), (1, 'crop'), (3, 'pad')])
def test_the_card_prepares_images_as_training_did(in_chans, mode, finetune, tmp_path):
    """Transparent ones, too. Of sizes that no one resizes, whose pixels must be the same."""
    flags = ['--crop_pct', 0.5, '--background', 10, 200, 30, '--resize_mode', mode, '--epochs', 1]
    run = finetune('run', '--in_chans', in_chans, '--aa', 'none', *flags)
    folder = run_export(run.last, tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['background'] == [10, 200, 30]
    settings = load_encoder(run.last)[1]
    prepare = transforms.test_transform(SimpleNamespace(resize_mode=None, crop_pct=None), settings)
    for kind in ('RGBA', 'P', 'colour', 'turned'):
        path = tmp_path / kind
        path.write_bytes(transparent(kind, (32, 32) if mode == 'crop' else (8, 16)))
        pixels = read_image(path, in_chans, (10, 200, 30))
        expected = transforms.normalise(prepare(pixels)[None], settings.mean, settings.std)[0]
        by_card = run_snippet(folder, path)
        assert close(by_card['prepare'](by_card['image']), expected, 1e-5), kind
        assert by_card['output'].shape == (1, 10)


# --- transformers' own classes --------------------------------------------------------------------


def test_plain_mae_for_transformers(tmp_path):
    path = pretrained(tmp_path, fuse_layers=[3], decoder_embed_dim=96, decoder_num_heads=6)
    folder = run_export(path, tmp_path / 'out', '--transformers')
    model, settings = load_model(path)
    imgs, noise = uniform(3, 3, 16, 16), uniform(3, 16)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    encoder = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        loss, pred, mask = model(imgs, 0.6, noise)
        output = theirs(imgs, noise=noise)
        assert close(output.loss, loss) and close(output.logits, pred)
        assert torch.equal(output.mask, mask)
        assert close(encoder(imgs).last_hidden_state, model.forward_features(imgs))
    again = load_model(folder)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())

    (tmp_path / 'image').write_bytes(transparent('RGBA', (18, 30)))
    by_card = run_snippet(folder, tmp_path / 'image')
    prepared = by_card['prepare'](by_card['image'], return_tensors='pt')['pixel_values']
    crop = transforms.centre_transform((16, 16), settings.crop_pct, transforms.BICUBIC)
    pixels = crop(read_image(tmp_path / 'image'))[None]
    expected = transforms.normalise(pixels, settings.mean, settings.std)
    assert close(prepared, expected, 1e-5) and by_card['output'].loss > 0


def test_fused_encoder_for_transformers(tmp_path):
    path = pretrained(tmp_path, img_size=[12, 20], in_chans=4)
    run_export(path, tmp_path / 'out')
    folder = run_export(path, tmp_path / 'out', '--transformers')
    assert contents(folder).keys() == FILES | {'preprocessor_config.json'}
    assert 'the fusion and the decoder are dropped' in (folder / 'README.md').read_text()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    imgs = uniform(2, 4, 12, 20)
    with torch.no_grad():
        expected = load_model(path)[0].forward_features(imgs)
        assert close(theirs(imgs).last_hidden_state, expected)
    encoder, settings = load_encoder(folder)
    assert torch.equal(encoder.forward_features(imgs), expected) and settings.std == (0.3,) * 4


# --- ONNX, torch.hub, pip -------------------------------------------------------------------------


def run_onnx(model, *inputs, **options):
    """Export a model for two images as docs/weights.md shows, and run it for all."""
    few = tuple(value[:2] if isinstance(value, torch.Tensor) else value for value in inputs)
    file = io.BytesIO()
    torch.onnx.export(model, few, dynamo=True, verbose=False, **options).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    tensors = [value.numpy() for value in inputs if isinstance(value, torch.Tensor)]
    names = [node.name for node in session.get_inputs()]
    return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, tensors)))]


@torch.no_grad()
def test_onnx(tmp_path):
    pretrained(tmp_path, depth=2, fuse_layers=[0, 1])
    path = tmp_path / 'run.pth'  # of a fresh model, whose rounding is small
    model, encoder = load_model(path)[0], from_timm(run_export(path, tmp_path / 'out'))
    imgs, noise, batch = uniform(3, 3, 16, 16), uniform(3, 16), {0: 'batch'}
    [found] = run_onnx(encoder, imgs, dynamic_shapes=[batch])
    assert close(found, encoder(imgs))
    found = run_onnx(model, imgs[:2], 0.75, noise[:2])
    assert all(map(close, found, model(imgs[:2], 0.75, noise[:2])))
    model.forward = model.forward_features
    [found] = run_onnx(model, imgs, dynamic_shapes=[batch])
    assert close(found, model.forward_features(imgs))


def run_elsewhere(code, folder):
    """Run Python code in a fresh process in a folder, as a user does; what it prints."""
    process = subprocess.run(
        [sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_torch_hub(tmp_path):
    path = pretrained(tmp_path)
    code = f"""if True:
        import torch
        from functools import partial
        load = partial(torch.hub.load, {str(ROOT)!r}, source='local')
        imgs = torch.rand(2, 3, 16, 16)
        model = load('mff_vit_nano_patch4', weights={str(path)!r})
        encoder = load('mff_vit_nano_patch4_encoder', weights={str(path)!r})
        assert torch.equal(encoder(imgs), model.forward_features(imgs)[:, 0])
        assert encoder.pretrained_cfg['mean'] == (0.4, 0.4, 0.4)
        assert load('mff_vit_tiny_patch4')(torch.rand(2, 3, 32, 32))[0] > 0
        assert load('mff_vit_tiny_patch4_encoder')(torch.rand(2, 3, 32, 32)).shape == (2, 192)
        try:
            load('mff_vit_tiny_patch4', weights={str(path)!r})
        except ValueError as error:
            print(error)
    """
    assert "'embed_dim': 64" in run_elsewhere(code, tmp_path)
    names = {f'mff_{name}{kind}' for name in MODELS for kind in ('', '_encoder')}
    assert names == {name for name in dir(hubconf) if name.startswith('mff_')}


def test_pip_installs_the_models_alone(tmp_path):
    for name in ('pyproject.toml', 'LICENSE', 'util', 'tools', *ROOT.glob('*.py')):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / Path(name).name)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '.']
    subprocess.run(command, cwd=tmp_path, check=True)
    [wheel] = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        archive.extractall(tmp_path / 'site')
    assert names == {'models_mff.py', 'models_upernet.py'}
    [metadata] = (tmp_path / 'site').glob('*/METADATA')
    needed = set(re.findall(r'Requires-Dist: (\w+)', metadata.read_text()))
    assert needed == {'torch', 'torchvision', 'timm'}
    assert run_elsewhere('import models_upernet, models_mff; print(1)', tmp_path / 'site') == '1\n'


# --- Faults ---------------------------------------------------------------------------------------


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch, capsys):
    folder = run_export(pretrained(tmp_path), tmp_path / 'out')
    before, write = contents(folder), Path.write_bytes

    def full(path, content):
        write(path, content[:10])
        if path.name == '2':
            raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(SystemExit):
        run_export(pretrained(tmp_path), folder)
    assert contents(folder) == before
    assert f'{folder}: No space left on device' in capsys.readouterr().err


def test_mistakes_get_one_line_and_code_2(finetune, tmp_path, capsys):
    path, classifier = pretrained(tmp_path), finetune('run', '--epochs', '1').last
    content, out = torch.load(path, weights_only=True), tmp_path / 'out'
    torch.save(content['model'], tmp_path / 'bare.pth')
    for arguments, message in [
        ([tmp_path / 'bare.pth', out], 'bare.pth: not of pre-training or a classifier'),
        ([classifier, out, '--transformers'], 'checkpoint-last.pth: not of pre-training'),
        ([path, '/dev/null/out'], '/dev/null/out: Not a directory'),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_export(*arguments)
        printed = capsys.readouterr().err
        assert exit.value.code == 2 and re.search(message, printed), printed
        assert re.fullmatch(r'[^\n]*error: [^\n]+\n', printed) and not out.exists(), printed
