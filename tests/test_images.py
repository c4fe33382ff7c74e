"""Reading image files of every kind."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from util import images
from util.errors import InputError


@pytest.fixture
def picture():
    """A smooth RGB picture, uint8 (30, 40, 3)."""
    y, x = np.mgrid[0:30, 0:40]
    return np.stack([x * 6, y * 8, (x + y) * 3], -1).astype(np.uint8)


# --- Formats: every file gives the picture, as PIL shows it -----------------------------------------------------


@pytest.mark.parametrize('suffix', ['jpg', 'JPEG', 'png', 'webp', 'bmp', 'tif', 'ppm'])
def test_rgb_files(picture, tmp_path, suffix):
    path = tmp_path / f'image.{suffix}'
    Image.fromarray(picture).save(path)
    image = images.read_image(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1))


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', 'CMYK', '1', 'YCbCr'])
def test_modes_become_rgb_or_grey(picture, tmp_path, mode):
    path = tmp_path / ('image.jpg' if mode in ('CMYK', 'YCbCr') else 'image.png')
    options = {'quality': 100} if path.suffix == '.jpg' else {}
    Image.fromarray(picture).convert(mode).save(path, **options)
    for in_chans, shown in ((3, 'RGB'), (1, 'L')):
        image = images.read_image(path, in_chans).permute(1, 2, 0).numpy().astype(int)
        expected = np.array(Image.open(path).convert('RGB').convert(shown)).reshape(30, 40, in_chans).astype(int)
        assert abs(image - expected).max() <= 1


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_keep_their_brightness(tmp_path, suffix):
    pixels = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f'image.{suffix}')
    image = images.read_image(tmp_path / f'image.{suffix}')
    assert image.shape == (3, 30, 40)
    assert np.abs(image[0].numpy() - pixels / 257).max() <= 0.5


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(picture, tmp_path, suffix, orientation):
    upright = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a[::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: a[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'image.{suffix}'
    Image.fromarray(picture).save(path, exif=exif)
    stored = np.array(Image.open(path).convert('RGB'))
    assert np.array_equal(images.read_image(path).permute(1, 2, 0).numpy(), upright(stored))


@pytest.mark.parametrize('dtype, scale', [(np.uint8, 1), (np.uint16, 65535), (np.float32, 1)])
def test_arrays_of_other_channel_counts(tmp_path, dtype, scale):
    array = (np.random.default_rng(0).uniform(0, 1, (9, 7, 5)) * (255 if dtype == np.uint8 else scale)).astype(dtype)
    np.save(tmp_path / 'image.npy', array)
    image = images.read_image(tmp_path / 'image.npy', in_chans=5)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.allclose(image.permute(1, 2, 0).numpy(), array / scale)
    with pytest.raises(ValueError, match=r'\(9, 7, 5\) is not \(H, W, 3\)'):
        images.read_image(tmp_path / 'image.npy')


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite(value, tmp_path):
    array = np.full((8, 8), 0.5, np.float32)
    array[3, 4] = value
    np.save(tmp_path / 'image.npy', array)
    Image.fromarray(array * 200).save(tmp_path / 'image.tif')
    for suffix in ('npy', 'tif'):
        with pytest.raises(ValueError, match='not finite'):
            images.read_image(tmp_path / f'image.{suffix}', in_chans=1)


@pytest.mark.parametrize('content', [b'', b'text', b'\xff\xd8\xff\xe0 cut off', b'\x89PNG\r\n\x1a\n cut off'])
def test_broken_files_raise_one_kind_of_error(tmp_path, content):
    for suffix in ('jpg', 'png', 'npy'):
        path = tmp_path / f'image.{suffix}'
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'^{path}: '):
            images.decode_image(content, str(path))
        with pytest.raises(InputError, match=f'^{path}: '):
            images.read_image(path)
    with pytest.raises(InputError, match='nothing.png: No such file'):
        images.read_image(tmp_path / 'nothing.png')


# --- Transparency: composited on the background -----------------------------------------------------------------

COLOURS = np.array([[200, 40, 10], [200, 40, 10], [0, 0, 0], [20, 250, 90]])  # of four pixels in a row
ALPHA = np.array([0, 255, 128, 64])


def png_16_bits(colour_type, samples, chunks=b''):
    """A PNG of one row of 16-bit samples (W, C), written by hand: PIL writes none with alpha."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', len(samples), 1, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b'\0' + np.asarray(samples, dtype='>u2').tobytes())
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunks + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def rgba(path):
    pixels = np.concatenate([COLOURS, ALPHA[:, None]], 1)[None].astype(np.uint8)
    Image.fromarray(pixels).save(path, lossless=True, exact=True)  # options of WebP, which PNG ignores


def palette(path):
    image = Image.new('P', (4, 1))
    image.putpalette(COLOURS.flatten().tolist())
    image.putdata(range(4))
    image.save(path, transparency=bytes(ALPHA.tolist()))


def premultiplied(path):
    """A TIFF whose fourth sample is declared as associated alpha: PIL writes only the other kind."""
    colours = np.round(COLOURS * ALPHA[:, None] / 255)
    Image.fromarray(np.concatenate([colours, ALPHA[:, None]], 1)[None].astype(np.uint8)).save(path)
    tag = struct.pack('<HHI', 338, 3, 1)
    content = path.read_bytes()
    assert content.count(tag + b'\x02') == 1
    path.write_bytes(content.replace(tag + b'\x02', tag + b'\x01'))


def rgba_16_bits(path):
    path.write_bytes(png_16_bits(6, np.concatenate([COLOURS, ALPHA[:, None]], 1) * 257))


@pytest.mark.parametrize('background', [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
@pytest.mark.parametrize(
    'save, suffix',
    [(rgba, 'png'), (rgba, 'webp'), (palette, 'png'), (premultiplied, 'tif'), (rgba_16_bits, 'png')],
)
def test_transparent_colours(save, suffix, background, tmp_path):
    path = tmp_path / f'image.{suffix}'
    save(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = images.read_image(path, 3, background)[:, 0].T.numpy()
        grey = images.read_image(path, 1, background)[0, 0].numpy()
    share = ALPHA[:, None] / 255
    expected = COLOURS * share + np.array(background) * (1 - share)
    assert abs(image - expected).max() <= (2 if save is premultiplied else 1)
    assert abs(grey - expected @ [0.299, 0.587, 0.114]).max() <= 2


@pytest.mark.parametrize('bits', [8, 16])
def test_transparent_greys(bits, tmp_path):
    values = np.array([[70, 0], [70, 255], [0, 128], [200, 64]])
    path = tmp_path / 'image.png'
    if bits == 8:
        Image.fromarray(values[None].astype(np.uint8), 'LA').save(path)
    else:
        path.write_bytes(png_16_bits(4, values * 257))
    expected = (values[:, 0] * values[:, 1] + 255 * (255 - values[:, 1])) / 255
    for in_chans in (1, 3):
        image = images.read_image(path, in_chans)[:, 0].numpy()
        assert abs(image - expected).max() <= 1


@pytest.mark.parametrize('bits', [8, 16])
def test_a_transparent_grey_value(bits, tmp_path):
    """The PNG names one value that is transparent."""
    path = tmp_path / 'image.png'
    if bits == 8:
        Image.fromarray(np.array([[70, 0, 200]], np.uint8)).save(path, transparency=0)
    else:
        values = np.array([70, 0, 200])[:, None] * 257
        content = b'tRNS' + struct.pack('>H', 0)
        path.write_bytes(
            png_16_bits(0, values, struct.pack('>I', 2) + content + struct.pack('>I', zlib.crc32(content)))
        )
    assert images.read_image(path, 1, (90, 90, 90)).flatten().tolist() == [70, 90, 200]
    assert images.read_image(path, 3, (90, 80, 70))[:, 0, 1].tolist() == [90, 80, 70]


def test_a_transparent_rgb_value(tmp_path):
    Image.fromarray(COLOURS[None].astype(np.uint8)).save(tmp_path / 'image.png', transparency=(0, 0, 0))
    image = images.read_image(tmp_path / 'image.png', 3, (9, 8, 7))
    assert image[:, 0].T.tolist() == [COLOURS[0].tolist(), COLOURS[1].tolist(), [9, 8, 7], COLOURS[3].tolist()]


@pytest.mark.parametrize('mode', ['RGBa', 'PA'])
def test_modes_that_only_pil_has(mode):
    """Premultiplied, and a palette with alpha: as data sets of PIL images may give them."""
    straight = Image.fromarray(np.array([[[200, 200, 200, 128], [50, 50, 50, 0]]], np.uint8))
    if mode == 'RGBa':
        image = straight.convert('RGBa')
    else:
        image = straight.convert('RGB').convert('P').convert('PA')
        image.putalpha(straight.getchannel('A'))
    pixels = images.pil_to_tensor(image, 3, (0, 255, 0))[:, 0].T.tolist()
    assert np.abs(np.array(pixels) - [[100, 227, 100], [0, 255, 0]]).max() <= 2


# --- The fast JPEG decoder -----------------------------------------------------------------------------------------


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', **options)
    return buffer.getvalue()


# No colours that leave 0..255 on the way: PIL would clip them before it makes them grey.
NOISE = Image.fromarray(np.random.default_rng(0).integers(100, 156, (60, 80, 3), dtype=np.uint8))
JPEGS = {
    'colour': jpeg(NOISE),
    'grey': jpeg(NOISE.convert('L')),
    'CMYK': jpeg(NOISE.convert('CMYK')),
    'progressive': jpeg(NOISE, progressive=True),
    'full chroma': jpeg(NOISE, subsampling=0),
    'trailing bytes': jpeg(NOISE) + bytes(99),
    'garbage before the end': jpeg(NOISE)[:-2] + bytes(50) + b'\xff\xd9',
    'cut off': jpeg(NOISE)[:-300],
    'without an end': jpeg(NOISE)[:-2],
    'header only': jpeg(NOISE)[:150],
}


@pytest.mark.parametrize('in_chans', [1, 3])
@pytest.mark.parametrize('kind', JPEGS)
def test_both_jpeg_decoders_give_the_same(kind, in_chans, monkeypatch):
    def decoded():
        try:
            return images.decode_image(JPEGS[kind], 'a.jpg', in_chans).tolist()
        except ValueError as error:
            return str(error)

    assert images.simplejpeg is not None
    fast = decoded()
    monkeypatch.setattr(images, 'simplejpeg', None)
    slow = decoded()
    if in_chans == 1 and isinstance(fast, list):  # PIL's grey is computed from rounded colours
        assert np.abs(np.array(fast) - np.array(slow)).max() <= 1
    else:
        assert fast == slow
    assert isinstance(fast, str) == (kind in ('cut off', 'without an end', 'header only'))
