"""Input that nobody thought of: whatever the flags, images, lists, tars and checkpoints, one line or a result."""

import functools
import io
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from models_mff import MaskedAutoencoderMFF, create_encoder, model_sizes
from models_upernet import UperNet
from util import checkpoint, export, sources, tar, weights
from util.args import run_job
from util.errors import InputError, as_input_error
from util.images import decode_image

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damaged(draw, whole):
    """Some bytes of `whole`, a list of files, replaced, cut out or put in; rarely none of it is left."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        cut = draw(st.sampled_from([0, 1, 1, 2, 16, len(content)]))
        content[place : place + cut] = draw(st.binary(max_size=4))
    return bytes(content)


# --- Flags ----------------------------------------------------------------------------------------------------

MAINS = (main_pretrain, main_finetune, main_linprobe, main_segment)
PARSERS = {main.__name__: main.get_parser() for main in MAINS}
FLAGS = sorted({flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings})
VALUES = [
    '0',
    '-1',
    '1e400',
    'nan',
    'inf',
    '224',
    '1.5',
    '10min',
    'minmin',
    '2ep',
    'ep',
    '',
    '-',
    '--',
    '=',
    '#',
    '@',
    '²',
]
words = st.one_of(st.sampled_from(FLAGS), st.sampled_from(VALUES), st.text(max_size=8))


@pytest.mark.parametrize('job', PARSERS)
@given(argv=st.lists(words, max_size=8))
@fuzz
def test_flags(job, argv):
    """Accepted, or refused with code 2; argparse prints help or the version with code 0."""
    try:
        PARSERS[job].parse_args([word for word in argv if not word.startswith('@')])
    except SystemExit as exit:
        assert exit.code == 2 or set(argv) & {'-h', '--help'}


@given(
    content=st.one_of(
        st.binary(max_size=60), st.lists(words, max_size=8).map(lambda w: ' '.join(w).encode('utf-8', 'replace'))
    )
)
@fuzz
def test_recipes(content, tmp_path, capsys):
    path = tmp_path / 'recipe.txt'
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        run_job(lambda args: exit_with(75), main_pretrain.get_parser(), [f'@{path}'])
    assert exit.value.code in (0, 2, 75)
    if exit.value.code == 2:
        assert 'error: ' in capsys.readouterr().err.splitlines()[-1]


def exit_with(code):
    raise SystemExit(code)


# --- Images ---------------------------------------------------------------------------------------------------


def encoded():
    """A small image in every format that is read, as (name, bytes)."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 3), dtype=np.uint8)
    files = []
    for extension, mode, options in [
        ('.jpg', 'RGB', {'exif': Image.Exif()}),
        ('.jpg', 'L', {'progressive': True}),
        ('.jpg', 'CMYK', {}),
        ('.png', 'P', {}),
        ('.png', 'RGBA', {}),
        ('.png', 'I;16', {}),
        ('.gif', 'P', {}),
        ('.bmp', 'RGB', {}),
        ('.ppm', 'RGB', {}),
        ('.tif', 'RGB', {'compression': 'tiff_lzw'}),
        ('.tiff', 'F', {}),
        ('.webp', 'RGB', {}),
    ]:
        image = Image.fromarray(pixels)
        image = image.convert('L').convert('I').convert('I;16') if mode == 'I;16' else image.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[extension], **options)
        files.append((extension, buffer.getvalue()))
    for array in (pixels, pixels[..., :1].astype(np.float64) / 255):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.append(('.npy', buffer.getvalue()))
    return files


@pytest.mark.parametrize('extension, whole', encoded(), ids=lambda value: value if isinstance(value, str) else '')
@given(source=st.data())
@fuzz
def test_images(extension, whole, source):
    """A tensor of the channels asked for, or ValueError with a line that names the file."""
    assert decode_image(whole, f'a{extension}', 1 if b'13, 11, 1)' in whole else 3).shape[1:] == (13, 11)
    content = source.draw(st.one_of(damaged([whole]), st.binary(max_size=64)))
    try:
        image = decode_image(content, f'a{extension}', 3)
    except ValueError as error:
        assert str(error).startswith(f'a{extension}: ') and '\n' not in str(error)
    else:
        assert image.shape[0] == 3 and image.numel() and image.dtype in (torch.uint8, torch.float32)


@given(
    content=st.one_of(st.binary(max_size=80), st.text(alphabet='a\t\n #/.\x85é\udcff', max_size=40).map(os.fsencode))
)
@fuzz
def test_lists(content, tmp_path):
    """A file to look for on each line, which may be missing, or one line on the list."""
    (tmp_path / 'list.txt').write_bytes(content)
    try:
        source = sources.open_list(str(tmp_path / 'list.txt'), sources.Options())
    except InputError as error:
        assert 'list.txt' in str(error)
    else:
        assert len(source) and all(source.path(index) for index in range(len(source)))
        assert source.classes is None or len(source.labels) == len(source)
        with pytest.raises(ValueError):
            source[0]


def small_tar():
    """Two images and a tar of one, in the old and in the extended format."""
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        inner, outer = io.BytesIO(), io.BytesIO()
        for buffer, names in ((inner, ['c.png']), (outer, ['a.png', 'dir/b.png', 'in.tar', 'x' * 120 + 'é.png'])):
            with tarfile.open(fileobj=buffer, mode='w', format=layout) as archive:
                for name in names:
                    content = inner.getvalue() if name == 'in.tar' else b'image'
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        yield outer.getvalue()


@given(content=damaged(list(small_tar())))
@fuzz
def test_tars(content, tmp_path):
    """What the index names lies within the file."""
    path = tmp_path / 'images.tar'
    path.write_bytes(content)
    try:
        names, places = tar.build_index({str(path): ''}, ('.png',))
    except InputError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(names) == len(places)
        assert all(0 <= offset <= offset + size <= len(content) for _, offset, size in places.tolist())


# --- Checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint')
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(5)).sum().backward()
    optimizer.step()
    state = {
        'model': layer.state_dict(),
        'optimizer': optimizer.state_dict(),
        'scaler': {},
        'step': 7,
        'args': {'lr': 1.0},
    }
    checkpoint.save(state, folder)
    return (folder / 'checkpoint-last.pth').read_bytes(), state


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@given(source=st.data())
@settings(fuzz, max_examples=600)
def test_checkpoints(source, run_checkpoint, tmp_path):
    """Refused with a line that names the file, or what was saved: damage is never taken for weights."""
    whole, state = run_checkpoint
    path = tmp_path / 'a.pth'
    path.write_bytes(source.draw(st.one_of(damaged([whole]), st.binary(max_size=64))))
    try:
        loaded = checkpoint.load_run(str(path))
    except InputError as error:
        assert str(error).startswith(f'{path}: ') and '\n' not in str(error)
    else:
        assert equal(loaded, state)


@given(source=st.data())
@fuzz
def test_records_of_a_run(source, run_checkpoint, tmp_path):
    """A run's checkpoint of which one thing is not what it should be: refused before the run starts, or resumed."""
    _, state = run_checkpoint
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    key = source.draw(st.sampled_from(['weight', 'args', 'lr', *state]))
    if key == 'weight':
        state['model'][key] = ODD_TENSORS[source.draw(st.sampled_from(sorted(ODD_TENSORS)))](state['model'][key])
    else:
        plain = ODD_VALUES.filter(lambda value: not isinstance(value, torch.Tensor))
        (state['args'] if key == 'lr' else state)[key] = source.draw(plain)
    path = str(tmp_path / 'a.pth')
    torch.save(state, path)
    model, args = torch.nn.Linear(5, 3), SimpleNamespace(lr=1.0, force_resume=False)
    try:
        state = checkpoint.load_run(path)
        checkpoint.check_same_run(state, args, model, {'num_images': 1, 'batch_size': 1})
    except InputError as error:
        assert '\n' not in str(error)
    else:
        model.load_state_dict(state['model'])
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# --- Weights ----------------------------------------------------------------------------------------------------

TINY = model_sizes('vit_nano_patch4', img_size=8, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1, decoder_embed_dim=8)
UPERNET = {'num_classes': 2, 'levels': (0, 1, 2, 3), 'channels': 4, 'aux_channels': 4}


def classifier():
    model = create_encoder(TINY)
    model.head = torch.nn.Linear(8, 3)
    return model


def segmenter():
    return UperNet(**{name: TINY[name] for name in weights.ENCODER} | UPERNET | {'depth': 4})


MODELS = {'mff': lambda: MaskedAutoencoderMFF(**TINY), 'classifier': classifier, 'segmenter': segmenter}
RUN = {'model': 'vit_nano_patch4', 'input_size': [8, 8], 'mask_ratio': 0.75, 'crop_pct': 0.9, 'norm_pix_loss': True}
ODD_VALUES = st.sampled_from(
    [None, True, 0, -1, 2, 7, 300, 2.5, float('nan'), float('inf'), '', 'a', b'a', [], {}, ['a', 'b'], [0, 0], [8, 0]]
    + [[8], [8, 8, 8], [1, 0], [0, 9], [[1], [2]], [None], {'a': 1}, (4, 16), torch.ones(2), torch.tensor(3)]
)
ODD_TENSORS = {
    'no tensor': lambda t: None,
    'text': lambda t: 'abc',
    'list': lambda t: t.tolist(),
    'scalar': lambda t: torch.tensor(1.0),
    'empty': lambda t: t[:0],
    'no patch': lambda t: t[..., :0],
    'transposed': lambda t: t.T if t.ndim == 2 else t[None],
    'flat': lambda t: t.flatten(),
    'doubled': lambda t: torch.cat([t, t]),
    'longer': lambda t: torch.cat([t, t], -1),
    'one more': lambda t: torch.cat([t, t[:, :1]], 1) if t.ndim > 1 else t,
    'sparse': lambda t: t.to_sparse(),
    'meta': lambda t: t.to('meta'),
    'nan': lambda t: t * float('nan'),
    'infinite': lambda t: t + float('inf'),
    'int8': lambda t: t.to(torch.int8),
    'bool': lambda t: t > 0,
    'complex': lambda t: t.to(torch.complex64),
    'half': lambda t: t.half(),
    'expanded': lambda t: t[..., :1].expand_as(t),
}
NAMES = ['blocks.x.y', 'blocks.1', 'blocks.9.attn.qkv.weight', 'pos_embed', 'head.weight', 'fuse_logits', 'norm.weight']
NAMES += ['decoder_embed.weight', 'dist_token', 'encoder.cls_token', 'decode_head.a', 'backbone.a', 'head.0.a', '', '.']


@functools.cache
def contents():
    """Checkpoints of each kind, as {'model': ..., 'args': ..., ...}."""
    torch.manual_seed(0)
    record = {'sizes': TINY, 'mean': [0.5] * 3, 'std': [0.5] * 3, 'step': 1, 'epoch': 1}
    found = {}
    for kind, build in MODELS.items():
        found[kind] = {'model': build().state_dict(), 'args': RUN, **record}
    found['classifier']['classes'] = ['a', 'b', 'c']
    found['segmenter']['sizes'] = TINY | UPERNET | {'depth': 4}
    found['older'] = {'model': found['mff']['model'], 'args': RUN}
    found['foreign'] = {'model': found['mff']['model']}
    return found


def use(path, action):
    """One of the ways in which a file of weights is used."""
    flags = {**dict.fromkeys([*weights.ENCODER, 'model', 'input_size', 'mean', 'std']), 'init_from': path}
    if action == 'settle':
        return weights.settle(SimpleNamespace(**flags, **dict.fromkeys(weights.DECODER)))
    if action == 'fine-tune':
        settings = weights.settle(SimpleNamespace(**flags))
        with as_input_error():
            model = create_encoder(settings.sizes, global_pool='token')
        weights.load_weights(model, path)
        return model
    if action == 'export':
        return export.export(path, f'{path}.export')
    if action in MODELS:
        model = MODELS[action]()
        weights.load_weights(model, path)
        return model
    return {'load_model': weights.load_model, 'load_encoder': weights.load_encoder}[action](path)[0]


ACTIONS = ['settle', 'fine-tune', 'export', 'load_model', 'load_encoder', *MODELS]


def check_use(path, action):
    """One line that names the file, or a model whose weights are finite."""
    try:
        result = use(path, action)
    except InputError as error:
        assert '\n' not in str(error) and (path in str(error) or 'must' in str(error) or 'not a multiple' in str(error))
        return str(error)
    if isinstance(result, torch.nn.Module):
        assert all(tensor.isfinite().all() for tensor in result.state_dict().values())
    return None


@given(source=st.data())
@settings(fuzz, max_examples=300)
def test_weights(source, tmp_path):
    """Checkpoints of which some tensors, names and records are not what they should be."""
    draw = source.draw
    content = contents()[draw(st.sampled_from(sorted(contents())))]
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from(['tensor', 'tensor', 'name', 'record', 'args', 'sizes']))
        if part == 'tensor':
            name = draw(st.sampled_from(sorted(content['model'])))
            value = content['model'][name]
            odd = ODD_TENSORS[draw(st.sampled_from(sorted(ODD_TENSORS)))]
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.numel()
                and value.layout == torch.strided
            ):
                content['model'][name] = odd(value) if value.ndim else torch.ones(1, 1)
        elif part == 'name':
            name = draw(st.sampled_from(sorted(content['model'])))
            content['model'][draw(st.sampled_from(NAMES))] = content['model'].pop(name)
        elif part == 'record':
            content[draw(st.sampled_from(['args', 'sizes', 'mean', 'std', 'classes', 'step', 'model']))] = draw(
                ODD_VALUES
            )
        elif isinstance(content.get(part), dict) and content[part]:
            content[part][draw(st.sampled_from(sorted(content[part])))] = draw(ODD_VALUES)
        if not isinstance(content.get('model'), dict) or not content['model']:
            break
    path = str(tmp_path / 'a.pth')
    torch.save(content, path)
    check_use(path, draw(st.sampled_from(ACTIONS)))
