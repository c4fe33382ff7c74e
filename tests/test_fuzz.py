"""Input that nobody thought of: whatever the flags, images, lists, tars and checkpoints, one line or a result."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from util import checkpoint, data, tar
from util.args import InputError
from util.transforms import decode_image

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

PARSERS = {main.__name__: main.get_parser() for main in (main_pretrain, main_finetune, main_linprobe)}
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
    from util.args import run

    path = tmp_path / 'recipe.txt'
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        run(lambda args: exit_with(0), main_pretrain.get_parser(), [f'@{path}'])
    assert exit.value.code in (0, 2)
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
    """With a few files that a list may name by chance."""
    for name in ('a', 'é', '.a'):
        (tmp_path / name).touch()
    (tmp_path / 'list.txt').write_bytes(content)
    try:
        source = data.open_list(str(tmp_path / 'list.txt'), 3)
    except InputError as error:
        assert 'list.txt' in str(error)
    else:
        assert len(source) and all(os.path.exists(source.path(index)) for index in range(len(source)))
        assert source.classes is None or len(source.labels) == len(source)


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
        index = tar.build_index({str(path): ''}, ('.png',))
    except InputError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(index['names']) == len(index['places'])
        assert all(0 <= offset <= offset + size <= len(content) for _, offset, size in index['places'].tolist())


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
