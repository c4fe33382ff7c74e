"""The bytes of an image file, or of an .npy array -> a tensor (C, H, W)."""

import contextlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from util.errors import as_input_error

try:
    import simplejpeg  # faster than PIL, and equal to its pixels to the bit
except ImportError:
    simplejpeg = None
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag
KINDS = (
    '.jpg .jpeg .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .avif .jp2 .j2k .heic .heif'
).split()
EXTENSIONS = (*(kind for kind in KINDS if kind in Image.registered_extensions()), '.npy')

warnings.filterwarnings('ignore', module='PIL')  # each worker would warn of each odd file


def read_image(path, in_chans=3, background=WHITE, max_value=None):
    """decode a file that a user named. Raises InputError if it cannot be read."""
    with as_input_error(path), open(path, 'rb') as file:
        return decode(file.read(), in_chans, background, max_value)


def decode(content, in_chans=3, background=WHITE, max_value=None):
    """The bytes of an image file, or of an .npy array (H, W, C) or (H, W) -> (in_chans, H, W).

    The EXIF orientation is applied. Transparent images are put on background (R, G, B), 0..255.

    Args:
        max_value: what is white in files of more than 8 bits. None: 65535 in image files of
            integers (their upper 8 bits stay) and 255 in those of floats; in arrays the largest
            value of an integer type, and floats are taken as they are.

    Returns:
        uint8; float32 for arrays of another type, 1 being white.

    Raises:
        ValueError: if the content is damaged, no image, too large to decode safely, has other
            channels, or has values that do not fit max_value.
    """
    try:
        if content[:6] == b'\x93NUMPY':
            array = np.load(io.BytesIO(content), allow_pickle=False)
            return array_to_tensor(array, in_chans, max_value)
        image = Image.open(io.BytesIO(content))  # the header; refuses more than 179 million pixels
        check_aspect(*image.size)
        fast = simplejpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L')
        if fast and in_chans in (1, 3) and image.getexif().get(ORIENTATION, 1) == 1:
            with contextlib.suppress(ValueError):  # PIL accepts more, or says what is wrong
                pixels = simplejpeg.decode_jpeg(content, 'RGB' if in_chans == 3 else 'GRAY')
                return torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)
        return pil_to_tensor(image, in_chans, background, max_value)
    except UnidentifiedImageError:
        problem = 'not an image of a known format' if content else 'empty'
        raise ValueError(problem) from None
    except Exception as error:  # decoders raise many kinds of error for a damaged file
        raise ValueError(' '.join(str(error).split()) or type(error).__name__) from None


def check_aspect(width, height):
    """Raise ValueError for an image so narrow that one resized to cover a square is huge."""
    if max(width, height) > 100 * min(width, height):
        raise ValueError(f'{width} x {height} pixels are too long and narrow')


def pil_to_tensor(image, in_chans=3, background=WHITE, max_value=None):
    """PIL image of any mode -> uint8 (in_chans, H, W), as decode describes. Raises ValueError."""
    if in_chans not in (1, 3):
        raise ValueError(f'an image file; --in_chans {in_chans} needs .npy arrays (H, W, C)')
    if max_value not in (None, 65535) and is_deep(image) and image.mode[0] not in 'IF':
        raise ValueError('PIL cuts colours of 16 bits to 8; for --max_value save .npy arrays')
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':
        image = to_8_bits(image, max_value)
    if image.has_transparency_data:
        canvas = Image.new('RGBA', image.size, (*background, 255))
        canvas.alpha_composite(image.convert('RGBA'))
        image = canvas
    return functional.pil_to_tensor(image.convert('RGB' if in_chans == 3 else 'L'))


def is_deep(image):
    """Whether a file has more than 8 bits a value; PIL opens colours of 16 bits as RGB."""
    return image.mode[0] in 'IF' or ';16' in str(getattr(image, 'tile', ''))


def to_8_bits(image, max_value):
    """PIL image of 16 bits, 32 bits or floats -> mode L or LA. PIL's convert would clip at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    white = max_value or (255 if image.mode == 'F' else 65535)
    check_values(pixels, 0, white)
    if image.mode == 'F' and max_value is None and 0 < pixels.max() <= 1:
        raise ValueError('floating-point pixels in 0..1: --max_value 1')
    result = Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
    transparent = image.info.get('transparency')  # the value that a 16-bit PNG declares transparent
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return result


def check_values(array, low, high):
    """Raise ValueError if values of an array are not finite, or outside low..high."""
    if not np.isfinite(array).all():
        raise ValueError('some values are not finite')
    if array.min() < low or array.max() > high:
        raise ValueError(
            f'values {array.min():g}..{array.max():g} are outside {low:g}..{high:g} (--max_value)'
        )


def array_to_tensor(array, in_chans, max_value):
    """(H, W, C) or (H, W) -> (C, H, W), as decode describes. Raises ValueError."""
    array = array[..., None] if array.ndim == 2 else array
    fits = array.ndim == 3 and array.shape[2] == in_chans and array.size
    if not fits or array.dtype.kind not in 'buif':
        raise ValueError(
            f'an array of shape {array.shape} and type {array.dtype} does not hold numbers '
            f'(H, W, {in_chans}); --in_chans says how many channels'
        )
    check_aspect(array.shape[1], array.shape[0])
    if array.dtype != np.uint8:
        white = np.iinfo(array.dtype).max if array.dtype.kind in 'iu' else 1
        array = array.astype(np.float32)
        check_values(array, *((0, max_value) if max_value else (-np.inf, np.inf)))
        array = array / (max_value or white)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def used_range(content):
    """The brightest value of a file of integers of more than 8 bits, over the largest of its type.

    None for other files. Raises as PIL and NumPy do.
    """
    if content[:6] == b'\x93NUMPY':
        array = np.load(io.BytesIO(content), allow_pickle=False)
        deep = array.dtype.kind in 'iu' and array.itemsize > 1
        return array.max() / np.iinfo(array.dtype).max if deep else None
    image = Image.open(io.BytesIO(content))
    if not is_deep(image) or image.mode == 'F':
        return None
    return np.asarray(image).max() / (65535 if image.mode[0] == 'I' else 255)
