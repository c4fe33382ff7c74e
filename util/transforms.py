"""Images: reading files of every kind, transforms on uint8, normalisation on the device."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2

from util.args import InputError

try:
    from torchvision.io import ImageReadMode, decode_jpeg  # straight to a tensor, and equal to PIL's pixels to the bit
except ImportError:  # deprecated since torchvision 0.29
    decode_jpeg = None

BICUBIC = InterpolationMode.BICUBIC

warnings.filterwarnings('ignore', module='PIL')  # of odd metadata, of large images: by every worker for every such file


# --- Reading -----------------------------------------------------------------------------------------


def read_image(path, in_chans=3):
    """decode_image of a file. Raises OSError if it cannot be read, and ValueError as decode_image does."""
    with open(path, 'rb') as file:
        return decode_image(file.read(), str(path), in_chans)


def decode_image(content, path, in_chans=3):
    """Decode the bytes of an image, or of an .npy array (H, W, C) or (H, W), to (in_chans, H, W); path names it.

    uint8, or float32 in 0..1 for arrays of another type. 16-bit files keep their upper 8 bits, transparency is
    dropped, EXIF orientation is applied.

    Raises:
        ValueError: if it is damaged, no image, too large to be decoded safely, or has other channels.
    """
    try:
        if not content:
            raise ValueError('empty')
        if path.lower().endswith('.npy'):
            return array_to_tensor(np.load(io.BytesIO(content), allow_pickle=False), in_chans)
        image = Image.open(io.BytesIO(content))  # reads the header, and refuses more than 179 million pixels
        check_aspect(*image.size)
        if decode_jpeg and content[:2] == b'\xff\xd8' and in_chans in (1, 3):
            mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
            return decode_jpeg(
                torch.frombuffer(bytearray(content), dtype=torch.uint8), mode, apply_exif_orientation=True
            )
        return pil_to_tensor(image, in_chans)
    except UnidentifiedImageError:
        raise ValueError(f'{path}: no image of a known format') from None
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from None


def check_aspect(width, height):
    """Raise ValueError for an image so narrow that to cover a square it would be resized to a huge one."""
    if max(width, height) > 100 * min(width, height):
        raise ValueError(f'{width} x {height} pixels are too long and narrow')


def read_given_image(path, in_chans=3):
    """read_image of a path that a user typed. Raises InputError if it cannot be read."""
    try:
        return read_image(path, in_chans)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except ValueError as error:
        raise InputError(str(error)) from None


def pil_to_tensor(image, in_chans):
    """PIL image of any mode -> uint8 (in_chans, H, W), as read_image describes."""
    if in_chans not in (1, 3):
        raise ValueError(f'an image file gives 1 or 3 channels; for --in_chans {in_chans} use .npy arrays (H, W, C)')
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':  # 16 or 32 bits: PIL's convert would clip at 255
        pixels = np.asarray(image, dtype=np.float32)
        if image.mode == 'F' and 0 < pixels.max() <= 1:
            raise ValueError('floating-point pixels of 0..1, where files have 0..255; store them as .npy')
        image = Image.fromarray((pixels / 257 if image.mode != 'F' else pixels).round().clip(0, 255).astype(np.uint8))
    return v2.functional.pil_to_tensor(image.convert('RGB' if in_chans == 3 else 'L'))


def array_to_tensor(array, in_chans):
    """(H, W, C) or (H, W) -> (C, H, W): uint8 as it is, other whole numbers over their largest, floats as given."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != in_chans or not array.size:
        raise ValueError(
            f'an array of shape {array.shape} is not (H, W, {in_chans}); --in_chans says how many channels'
        )
    check_aspect(array.shape[1], array.shape[0])
    if array.dtype != np.uint8:
        scale = np.iinfo(array.dtype).max if np.issubdtype(array.dtype, np.integer) else 1
        array = array.astype(np.float32) / scale
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


# --- Transforms -----------------------------------------------------------------------------------------------


class Cover(torch.nn.Module):
    """Resize to the smallest size that covers (H, W) at the same aspect: for squares, torchvision's Resize(side)."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image):
        (h, w), (height, width) = image.shape[-2:], self.size
        if h * width <= w * height:  # relatively flat: height decides
            height, width = height, max(width, w * height // h)
        else:
            height, width = max(height, h * width // w), width
        return v2.functional.resize(image, [height, width], self.interpolation, antialias=True)


class PaddedCrop(v2.RandomCrop):
    """RandomCrop(size, padding, padding_mode='reflect'), the same draws and pixels: but torchvision pads all of the
    image, in float32, which takes as long as the resize, and this only what the crop has outside.
    """

    def transform(self, image, params):
        left, top = params['left'] - params['padding'][0], params['top'] - params['padding'][1]
        right, bottom = left + self.size[1], top + self.size[0]
        inside = image.numpy()[:, max(top, 0) : bottom, max(left, 0) : right]
        vertical = max(-top, 0), max(bottom - image.shape[1], 0)
        horizontal = max(-left, 0), max(right - image.shape[2], 0)
        return torch.from_numpy(np.pad(inside, ((0, 0), vertical, horizontal), 'reflect'))


def pretrain_transform(size, crop='simple'):
    """uint8 (C, h, w) -> uint8 (C, H, W). 'simple': the reference's (mmpretrain configs/mff); 'rrc': MAE's."""
    if crop == 'simple':
        if min(size) <= 4:
            raise InputError(f'--input_size {size[0]} {size[1]}: --crop simple pads by 4 pixels and needs more')
        spatial = [Cover(size), PaddedCrop(size, padding=4)]
    else:
        spatial = [v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC, antialias=True)]
    return v2.Compose([*spatial, v2.RandomHorizontalFlip()])


def centre_transform(size, crop_pct=1.0, interpolation=InterpolationMode.BILINEAR):
    """uint8 (C, h, w) -> uint8 (C, H, W), nothing random: resize to size / crop_pct, crop the centre."""
    return v2.Compose([Cover([int(side / crop_pct) for side in size], interpolation), v2.CenterCrop(size)])


class ClippedResizedCrop(v2.RandomResizedCrop):
    """MAE's random resized crop for probing: a box that does not fit is clipped, not drawn anew (its util/crop.py)."""

    def make_params(self, flat_inputs):
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * torch.empty(1).uniform_(*self.scale).item()
        ratio = torch.exp(torch.empty(1).uniform_(*np.log(self.ratio).tolist())).item()
        h, w = min(round((area / ratio) ** 0.5), height), min(round((area * ratio) ** 0.5), width)
        top, left = torch.randint(0, height - h + 1, (1,)).item(), torch.randint(0, width - w + 1, (1,)).item()
        return {'top': top, 'left': left, 'height': h, 'width': w}


def finetune_transform(size, statistics, auto_augment, erase_probability):
    """uint8 (C, h, w) -> uint8 (C, H, W): random resized crop, flip, RandAugment, erasing (MAE's FINETUNE.md)."""
    steps = [v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)]
    steps += [v2.RandomHorizontalFlip()]
    if auto_augment != 'none':
        colour = tuple(round(255 * value) for value in statistics[0])
        options = {
            'translate_const': int(min(size) * 0.45),
            'img_mean': colour,
            'interpolation': Image.Resampling.BICUBIC,
        }
        steps += [v2.ToPILImage(), rand_augment_transform(auto_augment, options), v2.PILToTensor()]
    return v2.Compose([*steps, Erase(erase_probability, statistics)])


class Erase:
    """timm's RandomErasing with normal noise per pixel, on uint8: the noise has the data's mean and deviation."""

    def __init__(self, probability, statistics):
        self.erase = RandomErasing(probability, mode='pixel', device='cpu')
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __call__(self, image):
        erased = self.erase(normalise(image, self.mean, self.std))
        return ((erased * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


def linprobe_transform(size):
    """uint8 (C, h, w) -> uint8 (C, H, W): MAE's random resized crop, flip."""
    crop = ClippedResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


# --- Normalisation ----------------------------------------------------------------------------------------------


def normalise(images, mean, std):
    """uint8, or float in 0..1, (N, C, H, W) -> float, less mean and over std, each per channel."""
    mean, std = (torch.as_tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    floats = images.clone() if images.is_floating_point() else v2.functional.to_dtype(images, torch.float32, scale=True)
    return floats.sub_(mean).div_(std)  # in place: on a CPU new memory would take ten times as long


def pixel_statistics(args):
    """(mean, std) per channel, of pixels in 0..1: --mean and --std, or the defaults. InputError if too few."""
    imagenet = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    default = imagenet if args.in_chans == 3 else ([0.5] * args.in_chans,) * 2
    for name, values in (('--mean', args.mean), ('--std', args.std)):
        if values is not None and len(values) != args.in_chans:
            raise InputError(f'{name} has {len(values)} numbers, but --in_chans is {args.in_chans}')
    return args.mean or default[0], args.std or default[1]
