"""The bytes of an image file, or of an .npy array -> a tensor (C, H, W)."""

import contextlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from util.errors import InputError

try:
    import simplejpeg  # faster than PIL, and equal to its pixels to the bit
except ImportError:
    simplejpeg = None
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag
NUMPY = b'\x93NUMPY'
KINDS = (
    '.jpg .jpeg .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .avif .jp2 .j2k .heic .heif'
).split()
EXTENSIONS = (*(kind for kind in KINDS if kind in Image.registered_extensions()), '.npy')

warnings.filterwarnings('ignore', module='PIL')  # each worker would warn of each odd file


@contextlib.contextmanager
def reading(path):
    """Turn any error inside into an InputError about path: libraries raise many kinds."""
    try:
        yield
    except UnidentifiedImageError:
        raise InputError(f'{path}: not an image of a known format') from None
    except Exception as error:
        problem = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise InputError(f'{path}: {" ".join(problem.split())}') from None


def read_image(path, in_chans=3, background=WHITE, max_value=None):
    """decode a file that a user named. Raises InputError if it cannot be read."""
    with reading(path), open(path, 'rb') as file:
        return decode(file.read(), in_chans, background, max_value)


def decode(content, in_chans=3, background=WHITE, max_value=None):
    """A PIL image, or the bytes of an image file or of an .npy array (H, W, C) or (H, W).

    The EXIF orientation is applied. Transparent images are put on background (R, G, B), 0..255.
    max_value is white where there are more than 8 bits. None: 65535 in image files of integers
    (their upper 8 bits stay) and 255 in those of floats; in arrays the largest value of an integer
    type, and floats are taken as they are.

    Returns (in_chans, H, W) uint8; float32 for arrays of another type, 1 being white. Raises
    ValueError, or what the decoders raise for damaged content.
    """
    if not isinstance(content, bytes):
        image = pil_to_tensor(content, in_chans, background, max_value)
    elif content[:6] == NUMPY:
        image = array_to_tensor(np.load(io.BytesIO(content)), in_chans, max_value)
    else:
        image = file_to_tensor(content, in_chans, background, max_value)
    height, width = image.shape[1:]
    if max(height, width) > 100 * min(height, width):  # huge once resized to cover a square
        raise ValueError(f'{width} x {height} pixels are too long and narrow')
    return image


def file_to_tensor(content, in_chans, background, max_value):
    image = Image.open(io.BytesIO(content))  # the header; refuses more than 179 million pixels
    fast = simplejpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L')
    if fast and in_chans in (1, 3) and image.getexif().get(ORIENTATION, 1) == 1:
        with contextlib.suppress(ValueError):  # PIL accepts more, or says what is wrong
            pixels = simplejpeg.decode_jpeg(content, 'RGB' if in_chans == 3 else 'GRAY')
            return torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)
    if max_value not in (None, 65535) and is_deep(content) and image.mode[0] not in 'IF':
        raise ValueError('PIL cuts colours of 16 bits to 8; for --max_value save .npy arrays')
    return pil_to_tensor(image, in_chans, background, max_value)


def pil_to_tensor(image, in_chans, background, max_value):
    if in_chans not in (1, 3):
        raise ValueError(f'an image file; --in_chans {in_chans} needs .npy arrays (H, W, C)')
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':
        image = to_8_bits(image, max_value)
    if image.has_transparency_data:
        canvas = Image.new('RGBA', image.size, (*background, 255))
        canvas.alpha_composite(image.convert('RGBA'))
        image = canvas
    return functional.pil_to_tensor(image.convert('RGB' if in_chans == 3 else 'L'))


def to_8_bits(image, max_value):
    """PIL image of 16 bits, 32 bits or floats -> mode L or LA. PIL's convert would clip at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    white = max_value or (255 if image.mode == 'F' else 65535)
    check_values(pixels, 0, white)
    result = Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
    transparent = image.info.get('transparency')  # the value that a 16-bit PNG declares transparent
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return result


def array_to_tensor(array, in_chans, max_value):
    """(H, W, C) or (H, W) -> (C, H, W), as decode describes. Raises ValueError."""
    array = array[..., None] if array.ndim == 2 else array
    kind = array.dtype.kind
    if array.shape[2:] != (in_chans,) or not array.size or kind not in 'buif':
        raise ValueError(f'{array.dtype} {array.shape} are not numbers (H, W, {in_chans})')
    if array.dtype != np.uint8:
        white = max_value or (np.iinfo(array.dtype).max if kind in 'iu' else 1)
        high = max_value or np.finfo(np.float32).max
        array = array.astype(np.float32)
        check_values(array, 0 if max_value else -high, high)
        array = array / white
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def check_values(array, low, high):
    """Raise ValueError if values of an array are not finite, or outside low..high."""
    if not (low <= array.min() and array.max() <= high):  # a NaN is in no range
        raise ValueError(
            f'values {array.min():g}..{array.max():g} are outside {low:g}..{high:g} (--max_value)'
        )


def is_deep(content):
    """Whether a file has more than 8 bits a value, and what is white is not known from its type."""
    if content[:6] == NUMPY:
        dtype = np.load(io.BytesIO(content)).dtype
        return dtype.kind in 'iu' and dtype.itemsize > 1
    image = Image.open(io.BytesIO(content))  # colours of 16 bits open as RGB
    return image.mode[0] in 'IF' or ';16' in str(getattr(image, 'tile', ''))
