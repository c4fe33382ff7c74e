"""The bytes of an image -> its pixels: kinds of files, transparency, 16 bits, arrays, faults."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from util import images
from util.errors import InputError

Y, X = np.mgrid[0:30, 0:40]
PICTURE = np.stack([X * 6, Y * 8, (X + Y) * 3], -1).astype(np.uint8)  # smooth, (30, 40, 3)


def saved(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def as_shown(content, mode='RGB'):
    return np.array(Image.open(io.BytesIO(content)).convert('RGB').convert(mode))


# --- Formats: as PIL shows them -------------------------------------------------------------------


KINDS = {'JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'PPM', 'GIF', 'AVIF', 'JPEG2000'}
FORMATS = [(kind, 'RGB') for kind in sorted(KINDS & Image.SAVE.keys())]
FORMATS += [('PNG', mode) for mode in ('L', 'P', 'RGBA', 'LA', '1')]
FORMATS += [('JPEG', mode) for mode in ('CMYK', 'YCbCr')]


@pytest.mark.parametrize('kind, mode', FORMATS)
def test_formats_become_rgb_or_grey(kind, mode):
    content = saved(Image.fromarray(PICTURE).convert(mode), kind, quality=100)
    for in_chans, shown in ((3, 'RGB'), (1, 'L')):
        image = images.decode(content, in_chans)
        pixels = image.permute(1, 2, 0).numpy().astype(int)
        expected = as_shown(content, shown).reshape(pixels.shape)
        assert image.dtype == torch.uint8
        assert abs(pixels - expected).max() <= (0 if (mode, in_chans) == ('RGB', 3) else 1)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(PICTURE, kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(images.decode(content).permute(1, 2, 0), np.array(shown))


def jpegs():
    # No colours that leave 0..255 on the way: PIL would clip them before it makes them grey.
    pixels = np.random.default_rng(0).integers(100, 156, (60, 80, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    plain = saved(noise, 'JPEG')
    return {
        'colour': plain,
        'grey': saved(noise.convert('L'), 'JPEG'),
        'CMYK': saved(noise.convert('CMYK'), 'JPEG'),
        'progressive': saved(noise, 'JPEG', progressive=True),
        'garbage before the end': plain[:-2] + bytes(50) + b'\xff\xd9',
        'cut off': plain[:-300],
        'without an end': plain[:-2],
    }


@pytest.mark.parametrize('in_chans', [1, 3])
def test_both_jpeg_decoders_give_the_same(in_chans, monkeypatch):
    def decoded(content):
        try:
            return images.decode(content, in_chans).int()
        except (ValueError, OSError) as error:
            return str(error)

    assert images.simplejpeg is not None
    fast = {kind: decoded(content) for kind, content in jpegs().items()}
    monkeypatch.setattr(images, 'simplejpeg', None)
    for kind, content in jpegs().items():
        slow = decoded(content)
        if kind in ('cut off', 'without an end'):
            assert isinstance(slow, str) and slow == fast[kind]
        else:  # PIL's grey is of rounded colours
            assert (fast[kind] - slow).abs().max() <= (in_chans == 1)


# --- More than 8 bits -----------------------------------------------------------------------------


def png_16_bits(colour_type, samples, chunks=(), size=None):
    """A PNG of one row of 16-bit samples (W, C), written by hand: PIL writes none with alpha.

    size: (W, H) that the header claims.
    """

    def chunk(kind, content):
        checksum = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + checksum

    header = struct.pack('>IIBBBBB', *(size or (len(samples), 1)), 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b'\0' + np.asarray(samples, dtype='>u2').tobytes())
    parts = [(b'IHDR', header), *chunks, (b'IDAT', pixels), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


RAMP = np.linspace(0, 1, 30 * 40).reshape(30, 40)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'JPEG2000'])
def test_16_bits_keep_their_upper_8(kind):
    pixels = (RAMP * 65535).astype(np.uint16)
    image = images.decode(saved(pixels, kind))
    assert image.shape == (3, 30, 40) and np.abs(image[1].numpy() - pixels / 257).max() <= 0.5


@pytest.mark.parametrize(
    'white, dtype', [(4095, np.uint16), (100_000, np.int32), (1, np.float32), (255, np.float32)]
)
def test_max_value_is_white(white, dtype):
    pixels = (RAMP * white).astype(dtype)
    image = images.decode(saved(pixels, 'TIFF'), 1, max_value=white)
    assert np.abs(image[0].numpy() - pixels / white * 255).max() <= 0.51
    array = images.decode(as_npy(pixels), 1, max_value=white)
    assert np.allclose(array[0].numpy(), pixels / white, atol=1e-6)
    for content in (saved(pixels, 'TIFF'), as_npy(pixels)):
        with pytest.raises(ValueError, match='outside 0'):
            images.decode(content, 1, max_value=white / 2)
    if white == 255:  # of floating-point files without the flag
        assert torch.equal(image, images.decode(saved(pixels, 'TIFF'), 1))


def test_files_of_more_than_8_bits():
    deep_rgb = png_16_bits(2, np.full((9, 3), 4095))  # which PIL cuts to 8 bits
    twelve_bits = saved((RAMP * 4095).astype(np.uint16), 'PNG')
    for content in (twelve_bits, deep_rgb, as_npy((RAMP * 65535).astype(np.int32))):
        assert images.is_deep(content)
    for content in (as_npy(PICTURE), as_npy(RAMP), saved(PICTURE, 'PNG'), saved(PICTURE, 'JPEG')):
        assert not images.is_deep(content)
    with pytest.raises(ValueError, match='save .npy arrays'):
        images.decode(deep_rgb, max_value=4095)


# --- Arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, white', [(np.uint8, 1), (np.uint16, 65535), (np.float64, 1)])
def test_arrays_of_other_channel_counts(dtype, white):
    largest = 255 if dtype == np.uint8 else white
    array = np.random.default_rng(0).uniform(0, largest, (9, 7, 5)).astype(dtype)
    image = images.decode(as_npy(array), in_chans=5)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.allclose(image.permute(1, 2, 0).numpy(), array / white)
    with pytest.raises(ValueError, match=r'\(9, 7, 5\) .* \(H, W, 3\)'):
        images.decode(as_npy(array))


# --- Transparency: on the background --------------------------------------------------------------

COLOURS = np.array([[200, 40, 10], [200, 40, 10], [0, 0, 0], [20, 250, 90]])  # of a row of pixels
ALPHA = np.array([0, 255, 128, 64])
RGBA = np.concatenate([COLOURS, ALPHA[:, None]], 1)


def palette():
    image = Image.new('P', (4, 1))
    image.putpalette(COLOURS.flatten().tolist())
    image.putdata(range(4))
    return saved(image, 'PNG', transparency=bytes(ALPHA.tolist()))


def premultiplied():
    """A TIFF whose fourth sample is declared as associated alpha: PIL writes only the other."""
    colours = np.round(COLOURS * ALPHA[:, None] / 255)
    content = saved(np.concatenate([colours, ALPHA[:, None]], 1)[None].astype(np.uint8), 'TIFF')
    tag = struct.pack('<HHI', 338, 3, 1)
    assert content.count(tag + b'\x02') == 1
    return content.replace(tag + b'\x02', tag + b'\x01')


@pytest.mark.parametrize('background', [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
@pytest.mark.parametrize(
    'content',
    [
        saved(RGBA[None].astype(np.uint8), 'PNG'),
        saved(RGBA[None].astype(np.uint8), 'WEBP', lossless=True, exact=True),
        palette(),
        premultiplied(),
        png_16_bits(6, RGBA * 257),
    ],
    ids=['PNG', 'WebP', 'palette', 'premultiplied', '16 bits'],
)
def test_transparent_colours(content, background):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = images.decode(content, 3, background)[:, 0].T.numpy()
        grey = images.decode(content, 1, background)[0, 0].numpy()
    share = ALPHA[:, None] / 255
    expected = COLOURS * share + np.array(background) * (1 - share)
    assert abs(image - expected).max() <= 2
    assert abs(grey - expected @ [0.299, 0.587, 0.114]).max() <= 2


def test_a_value_that_a_png_declares_transparent():
    greys = np.array([[70, 0, 200]], np.uint8)
    sixteen = png_16_bits(0, greys.T.astype(int) * 257, [(b'tRNS', struct.pack('>H', 0))])
    for content in (saved(greys, 'PNG', transparency=0), sixteen):
        assert images.decode(content, 1, (90, 90, 90)).flatten().tolist() == [70, 90, 200]
        assert images.decode(content, 3, (90, 80, 70))[:, 0, 1].tolist() == [90, 80, 70]


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'content, problem',
    [
        (b'', 'not an image'),
        (b'404 Not Found\n', 'not an image of a known format'),
        (jpegs()['cut off'], 'truncated'),
        (saved(PICTURE, 'PNG')[:60], 'truncated'),
        (png_16_bits(2, np.zeros((1, 3)), size=(30_000, 30_000)), 'decompression bomb'),
        (as_npy(np.zeros((1, 2000, 3), np.uint8)), 'too long and narrow'),
        (as_npy(np.array([print], dtype=object)), 'allow_pickle=False'),
        (saved(np.int32([[-5, 70_000]]), 'TIFF'), '-5..70000 are outside 0..65535'),
        (saved(np.float32([[0, 256.5]]), 'TIFF'), '256.5 are outside 0..255'),
        (saved(np.float32([[np.nan]]), 'TIFF'), 'nan..nan are outside'),
        (as_npy(np.full((8, 8, 3), 1j)), 'complex128'),
        (as_npy(PICTURE)[:500], '.'),
    ],
)
def test_what_cannot_be_read_is_one_kind_of_error(content, problem, tmp_path):
    path = tmp_path / 'image.png'
    path.write_bytes(content)
    with pytest.raises(InputError, match=f'^{path}: .*{problem}') as error:
        images.read_image(path)
    assert '\n' not in str(error.value) and str(error.value).count(str(path)) == 1
    with pytest.raises(InputError, match='nothing.png: No such file'):
        images.read_image(tmp_path / 'nothing.png')
