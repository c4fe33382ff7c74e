"""An image file of any kind, or an .npy array -> a tensor (C, H, W)."""

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

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag

warnings.filterwarnings('ignore', module='PIL')  # odd metadata, large images: each worker would warn of each file


def read_image(path, in_chans=3, background=WHITE):
    """decode_image of a file that a user named. Raises InputError if it cannot be read."""
    with as_input_error(path):
        with open(path, 'rb') as file:
            content = file.read()
    with as_input_error():
        return decode_image(content, str(path), in_chans, background)


def decode_image(content, path, in_chans=3, background=WHITE):
    """Decode the bytes of an image file or an .npy array (H, W, C) or (H, W); path is its name.

    Transparent images are composited on background (R, G, B), 0..255. 16-bit files keep their upper 8 bits. The EXIF
    orientation is applied.

    Returns:
        (in_chans, H, W): uint8, or float32 in 0..1 for arrays of another type.

    Raises:
        ValueError: if the content is damaged, no image, too large to decode safely, or has other channels.
    """
    try:
        if not content:
            raise ValueError('empty')
        if path.lower().endswith('.npy'):
            return array_to_tensor(np.load(io.BytesIO(content), allow_pickle=False), in_chans)
        image = Image.open(io.BytesIO(content))  # reads the header; refuses more than 179 million pixels
        check_aspect(*image.size)
        fast = simplejpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L') and in_chans in (1, 3)
        if fast and image.getexif().get(ORIENTATION, 1) == 1:
            with contextlib.suppress(ValueError):  # PIL accepts more (garbage before the end), or says what is wrong
                pixels = simplejpeg.decode_jpeg(content, 'RGB' if in_chans == 3 else 'GRAY')
                return torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)
        return pil_to_tensor(image, in_chans, background)
    except UnidentifiedImageError:
        raise ValueError(f'{path}: not an image of a known format') from None
    except Exception as error:  # decoders raise many kinds of error for a damaged file
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from None


def check_aspect(width, height):
    """Raise ValueError for an image so narrow that resizing it to cover a square would make a huge one."""
    if max(width, height) > 100 * min(width, height):
        raise ValueError(f'{width} x {height} pixels are too long and narrow')


def pil_to_tensor(image, in_chans=3, background=WHITE):
    """PIL image of any mode -> uint8 (in_chans, H, W), as decode_image describes. Raises ValueError."""
    if in_chans not in (1, 3):
        raise ValueError(f'an image file has 1 or 3 channels; for --in_chans {in_chans} use .npy arrays (H, W, C)')
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':
        image = to_8_bits(image)
    if image.has_transparency_data:
        canvas = Image.new('RGBA', image.size, (*background, 255))
        canvas.alpha_composite(image.convert('RGBA'))
        image = canvas
    return functional.pil_to_tensor(image.convert('RGB' if in_chans == 3 else 'L'))


def to_8_bits(image):
    """PIL image of 16- or 32-bit pixels -> 8 bits, in mode L or LA. PIL's convert would clip at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    check_finite(pixels)
    if image.mode == 'F' and 0 < pixels.max() <= 1:
        raise ValueError('floating-point pixels in 0..1 are read from .npy files only')
    scaled = pixels if image.mode == 'F' else pixels / 257
    result = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    transparent = image.info.get('transparency')  # the value of the pixels that a 16-bit PNG declares transparent
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return result


def check_finite(array):
    if not np.isfinite(array).all():
        raise ValueError('some values are not finite')


def array_to_tensor(array, in_chans):
    """(H, W, C) or (H, W) -> (C, H, W): uint8 as it is, other integers over their largest value, floats as they are.

    Raises ValueError if it has other channels, or values that are not finite.
    """
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != in_chans or not array.size:
        raise ValueError(
            f'an array of shape {array.shape} is not (H, W, {in_chans}); --in_chans says how many channels'
        )
    check_aspect(array.shape[1], array.shape[0])
    if array.dtype != np.uint8:
        scale = np.iinfo(array.dtype).max if np.issubdtype(array.dtype, np.integer) else 1
        array = array.astype(np.float32) / scale
        check_finite(array)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
