"""Reading, listing, transforms, and which samples a process sees."""

import gzip
import io
import os
import re
import shutil
import struct
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from util import data, files, transforms
from util.args import InputError
from util.shapes import Shapes


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
    image = transforms.read_image(str(path))
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1))


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', 'CMYK', '1', 'YCbCr'])
def test_modes_become_rgb(picture, tmp_path, mode):
    path = tmp_path / ('image.jpg' if mode in ('CMYK', 'YCbCr') else 'image.png')
    Image.fromarray(picture).convert('RGB').convert(mode).save(
        path, **({'quality': 100} if path.suffix == '.jpg' else {})
    )
    image = transforms.read_image(str(path)).permute(1, 2, 0).numpy().astype(int)
    shown = np.array(Image.open(path).convert('RGB')).astype(int)
    assert abs(image - shown).max() <= 1
    assert transforms.read_image(str(path), in_chans=1).shape == (1, 30, 40)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_keep_their_brightness(tmp_path, suffix):
    pixels = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f'image.{suffix}')
    image = transforms.read_image(str(tmp_path / f'image.{suffix}'))
    assert image.shape == (3, 30, 40)
    assert np.abs(image[0].numpy() - pixels / 257).max() <= 0.5


def test_jpeg_decoders_agree(picture, tmp_path, monkeypatch):
    Image.fromarray(picture).save(tmp_path / 'image.jpg')
    fast = transforms.read_image(str(tmp_path / 'image.jpg'))
    monkeypatch.setattr(transforms, 'decode_jpeg', None)
    assert torch.equal(fast, transforms.read_image(str(tmp_path / 'image.jpg')))


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_exif_orientation(picture, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 270 degrees
    Image.fromarray(picture).save(tmp_path / f'image.{suffix}', exif=exif)
    upright = Image.open(tmp_path / f'image.{suffix}').convert('RGB').transpose(Image.Transpose.ROTATE_270)
    image = transforms.read_image(str(tmp_path / f'image.{suffix}'))
    assert torch.equal(image, v2.functional.pil_to_tensor(upright))


@pytest.mark.parametrize('dtype, scale', [(np.uint8, 1), (np.uint16, 65535), (np.float32, 1)])
def test_arrays_of_other_channel_counts(tmp_path, dtype, scale):
    array = (np.random.default_rng(0).uniform(0, 1, (9, 7, 5)) * (255 if dtype == np.uint8 else scale)).astype(dtype)
    np.save(tmp_path / 'image.npy', array)
    image = transforms.read_image(str(tmp_path / 'image.npy'), in_chans=5)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.allclose(image.permute(1, 2, 0).numpy(), array / scale)
    with pytest.raises(ValueError, match=r'\(9, 7, 5\) is not \(H, W, 3\)'):
        transforms.read_image(str(tmp_path / 'image.npy'))


@pytest.mark.parametrize('content', [b'', b'text', b'\xff\xd8\xff\xe0 cut off', b'\x89PNG\r\n\x1a\n cut off'])
def test_broken_files_raise_one_kind_of_error(tmp_path, content):
    for suffix in ('jpg', 'png', 'npy'):
        (tmp_path / f'image.{suffix}').write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            transforms.read_image(str(tmp_path / f'image.{suffix}'))


# --- Sources ----------------------------------------------------------------------------------------------------


def touch(root, *names):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'png')
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(buffer.getvalue())


def names(source):
    return [os.fsdecode(name) for name in source.names]


def test_flat_nested_and_class_folders(tmp_path):
    touch(tmp_path, 'b.png', 'a.JPG', 'deep/er/c.png', '.hidden.png', '.cache/d.png')
    (tmp_path / 'notes.txt').write_text('not an image')
    os.symlink(tmp_path, tmp_path / 'deep/loop')
    source = data.open_source(str(tmp_path), 'train')
    assert names(source) == ['a.JPG', 'b.png', 'deep/er/c.png']
    assert source[0][0].shape == (3, 8, 8)
    assert data.open_source(str(tmp_path), 'val') is None


@pytest.mark.parametrize('held_out', ['val', 'valid', 'validation', 'test'])
def test_train_and_val_folders(tmp_path, held_out):
    touch(tmp_path, 'train/x/1.png', 'train/y/2.png', f'{held_out}/x/3.png')
    assert names(data.open_source(str(tmp_path), 'train')) == ['x/1.png', 'y/2.png']
    assert names(data.open_source(str(tmp_path), 'val')) == ['x/3.png']


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, 'train/1.png', 'bus/2.png')
    assert names(data.open_source(str(tmp_path), 'train')) == ['bus/2.png', 'train/1.png']


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path, os.fsdecode(b'caf\xe9.png'))
    assert data.open_source(str(tmp_path), 'train')[0][0].shape == (3, 8, 8)


def listed(root):
    """What os.walk finds: links are followed, but not into a folder that they are in."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        above = [os.path.realpath(folder)]
        parent = folder
        while parent != str(root):
            parent = os.path.dirname(parent)
            above.append(os.path.realpath(parent))
        subfolders[:] = [
            name for name in subfolders if name[0] != '.' and os.path.realpath(os.path.join(folder, name)) not in above
        ]
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name[0] != '.' and name.lower().endswith(data.EXTENSIONS)
        ]
    return sorted(map(os.fsencode, found))


@pytest.fixture
def tangle(tmp_path):
    """Folders with links to files and folders, links that lead back, to themselves and nowhere, and odd names."""
    root = tmp_path / 'tangle'
    touch(root, 'a/1.png', 'a/deep/er/2.JPG', 'a-b/3.png', 'a.b/4.png', '.hidden/5.png', 'b/.6.png', 'é/7.png')
    touch(root, os.fsdecode(b'caf\xe9/8.png'), 'with space/new\nline.png', 'b/notes.txt', 'folder.png/9.png', '1.png')
    touch(tmp_path / 'elsewhere', 'x/10.png', '11.png')
    (root / 'empty').mkdir()
    for link, target in {
        'a/deep/loop': root,
        'b/to_a': root / 'a',
        'a/to_b': root / 'b',  # there and back again
        'out': tmp_path / 'elsewhere',
        'out_again': tmp_path / 'elsewhere',
        'linked.png': root / '1.png',
        'self.png': root / 'self.png',
        'nowhere.png': root / 'nothing',
    }.items():
        os.symlink(target, root / link)
    return root


def test_listing_is_that_of_os_walk(tangle):
    found = files.find(str(tangle), data.EXTENSIONS, 'none')
    assert found.dtype.kind == 'S' and found.tolist() == listed(tangle)
    assert {b'b/to_a/deep/er/2.JPG', b'out_again/x/10.png', b'caf\xe9/8.png', b'nowhere.png'} <= set(found.tolist())
    assert not os.path.exists('none')  # quick to list, so not kept


@pytest.fixture
def searches(monkeypatch):
    """Every listing is kept, and the folders that are searched are counted."""
    calls, search = [], files.search
    monkeypatch.setattr(files, 'KEEP_FROM', -1)
    monkeypatch.setattr(files, 'search', lambda *arguments: calls.append(arguments) or search(*arguments))
    return calls


CHANGES = {
    'nothing': lambda root: (root / 'a/1.png').write_bytes(b'other content'),
    'a new file': lambda root: (root / 'a/deep/er/new.png').touch(),
    'a file less': lambda root: (root / 'a-b/3.png').unlink(),
    'a renamed file': lambda root: (root / '1.png').rename(root / '2.png'),
    'a moved file': lambda root: (root / '1.png').rename(root / 'empty/1.png'),
    'a new folder': lambda root: touch(root, 'new/1.png'),
    'a folder less': lambda root: shutil.rmtree(root / 'a/deep'),
    'a renamed folder': lambda root: (root / 'a.b').rename(root / 'a.c'),
    'in a folder elsewhere': lambda root: (root / 'out/x/new.png').touch(),
    'a link elsewhere': lambda root: ((root / 'out').unlink(), (root / 'out').symlink_to(root / 'a')),
    'an exchanged folder': lambda root: (
        (root / 'a.b').rename(root.parent / 'old'),
        touch(root, 'a.b/new.png'),
        [os.utime(root / name, ns=(0, (root.parent / 'old').stat().st_mtime_ns)) for name in ['a.b']],
    ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_kept_listing_holds_until_a_folder_changes(change, tangle, tmp_path, searches, monkeypatch):
    monkeypatch.setattr(files, 'SETTLED', -1)

    def found():
        return files.find(str(tangle), data.EXTENSIONS, str(tmp_path / 'cache')).tolist()

    assert [found(), found()] == [listed(tangle)] * 2 and len(searches) == 1
    time.sleep(0.02)  # file systems give times in ticks
    CHANGES[change](tangle)
    assert [found(), found()] == [listed(tangle)] * 2 and len(searches) == (1 if change == 'nothing' else 2)
    (kept,) = (tmp_path / 'cache').iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])  # killed while writing
    assert found() == listed(tangle) and len(searches) == (2 if change == 'nothing' else 3)


def test_a_listing_of_folders_that_just_changed_is_not_believed(tangle, tmp_path, searches):
    """A change in the same tick of the clock would not show."""
    for count in (1, 2, 3, 3):
        if count == len(searches) + 1 == 3:
            for folder, _, _ in os.walk(tmp_path):
                os.utime(folder, (0, time.time() - 60))
        found = files.find(str(tangle), data.EXTENSIONS, str(tmp_path / 'cache'))
        assert found.tolist() == listed(tangle) and len(searches) == count


def test_another_folder_and_other_files_have_another_index(tangle, tmp_path, searches):
    for root in (tangle, tangle / 'a'):
        for extensions in (data.EXTENSIONS, ('.txt',)):
            expected = [name for name in listed(root) if extensions == data.EXTENSIONS]
            for _ in range(2):
                found = files.find(str(root), extensions, str(tmp_path)).tolist()
                assert [name for name in found if not name.endswith(b'notes.txt')] == expected
    assert len(list(tmp_path.glob('folder-index-*.npz'))) == 4


def test_memory_is_arrays_only(folder):
    """What grows with the number of images are NumPy arrays, which forked workers share."""
    source = data.open_source(str(folder), 'train')
    held = {name: value for name, value in vars(source).items() if hasattr(value, '__len__') and len(value) >= 64}
    assert {name for name in held if name != 'root'} == {'names', 'labels'}
    assert all(value.dtype.kind in 'Si' for name, value in held.items() if name != 'root')


def test_list_of_images(tmp_path):
    touch(tmp_path, 'images/1.png', 'elsewhere/2 with space.png')
    (tmp_path / 'list.txt').write_text(f'# two images\nimages/1.png\n\n{tmp_path}/elsewhere/2 with space.png\n')
    source = data.open_source(str(tmp_path / 'list.txt'), 'train')
    assert len(source) == 2 and source[1][0].shape == (3, 8, 8)


def test_val_path_is_taken_whole(tmp_path):
    touch(tmp_path, 'a/1.png', 'a/2.png', 'b/3.png')
    args = Namespace(data_path=str(tmp_path / 'a'), val_path=str(tmp_path / 'b'), in_chans=3, download_dir='none')
    train, val = data.open_sources(args, (8, 8))
    assert names(train) == ['1.png', '2.png'] and names(val) == ['3.png']


def test_torchvision_sets(tmp_path):
    """A Fashion-MNIST of three images in torchvision's own files, greyscale or RGB."""
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    raw = tmp_path / 'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, 3, 28, 28) + pixels.tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 2049, 3) + bytes([7, 0, 9]))
        for name in ('images-idx3', 'labels-idx1'):  # as downloaded
            (raw / f'{part}-{name}-ubyte.gz').write_bytes(gzip.compress((raw / f'{part}-{name}-ubyte').read_bytes()))
    for split in ('train', 'val'):
        for in_chans in (1, 3):
            source = data.open_source('torch/fashion_mnist', split, in_chans, download_dir=str(tmp_path))
            image, label = source[2]
            assert len(source) == 3 and label == 9
            assert np.array_equal(image.numpy(), np.repeat(pixels[2:], in_chans, 0))


@pytest.mark.parametrize(
    'name', ['cifar10', 'cifar100', 'stl10', 'flowers102', 'fashion_mnist', 'oxford_iiit_pet', 'food101']
)
def test_missing_torchvision_sets_say_so(name, tmp_path, monkeypatch):
    from urllib.error import URLError
    from urllib.request import OpenerDirector

    def no_network(*args, **kwargs):
        raise URLError('no network')

    monkeypatch.setattr(OpenerDirector, 'open', no_network)
    with pytest.raises(InputError, match=f'torch/{name}: not found in .* the download failed: .*no network'):
        data.open_source(f'torch/{name}', 'train', download_dir=str(tmp_path))


def test_drawn_images_are_fixed_by_their_index():
    first, second = Shapes('train', (24, 40)), Shapes('train', (24, 40))
    for index in (0, 7, 2047):
        image, label = first[index]
        assert image.shape == (3, 24, 40) and image.dtype == torch.uint8
        assert torch.equal(image, second[index][0]) and label == second[index][1] == index % 10
        assert image.float().std() > 5  # something is to be seen
    assert not torch.equal(first[0][0], first[10][0])
    assert not torch.equal(first[0][0], Shapes('val', (24, 40))[0][0])


# --- Transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(30, 40), (57, 31), (224, 224), (500, 375)])
def test_simple_crop_is_torchvisions(shape):
    """The reference's pipeline: Resize(side), RandomCrop(side, padding 4, reflect), RandomHorizontalFlip()."""
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    ours = transforms.pretrain_transform((32, 32), 'simple')
    theirs = v2.Compose(
        [v2.Resize(32), v2.RandomCrop(32, padding=4, padding_mode='reflect'), v2.RandomHorizontalFlip()]
    )
    for seed in range(5):
        results = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            results.append(transform(image))
        assert results[0].dtype == torch.uint8 and torch.equal(*results)


@pytest.mark.parametrize('crop', ['simple', 'rrc'])
@pytest.mark.parametrize('shape', [(7, 300), (300, 7), (64, 48), (1, 1)])
def test_rectangles_are_covered(crop, shape):
    image = torch.full((3, *shape), 200, dtype=torch.uint8)
    for transform in (transforms.pretrain_transform((24, 40), crop), transforms.centre_transform((24, 40))):
        result = transform(image)
        assert result.shape == (3, 24, 40) and (result == 200).all()


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = v2.Normalize(mean, std)(images.double() / 255)
    assert torch.allclose(transforms.normalise(images, mean, std).double(), expected, atol=1e-6)


# --- Which samples, in which order ------------------------------------------------------------------------------


def stream(rank=0, world_size=1, batch_size=8, start=0, stop=9, num_samples=50, total=16, seed=3):
    return list(data.BatchStream(num_samples, total, batch_size, seed, start, stop, rank, world_size))


def test_every_image_once_an_epoch_and_in_new_order():
    steps = stream(batch_size=16)
    assert len(steps) == 9 and all(len(step) == 16 for step in steps)
    for epoch in range(3):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert len(set(keys)) == 48 and all(key[0] == epoch and 0 <= key[1] < 50 for key in keys)
    assert [index for _, index in steps[0]] != [index for _, index in steps[3]]
    assert steps == stream(batch_size=16) != stream(batch_size=16, seed=4)


@pytest.mark.parametrize('world_size, batch_size', [(1, 4), (2, 4), (4, 4), (2, 8), (4, 2)])
def test_processes_share_each_step(world_size, batch_size):
    shares = [stream(rank, world_size, batch_size) for rank in range(world_size)]
    micro_steps = 16 // batch_size // world_size
    for step, expected in enumerate(stream(batch_size=16)):
        mine = slice(step * micro_steps, (step + 1) * micro_steps)
        seen = [key for share in shares for micro_batch in share[mine] for key in micro_batch]
        assert sorted(seen) == sorted(expected)
    assert len(shares[0]) == len(data.BatchStream(50, 16, batch_size, 3, 0, 9, 0, world_size))


def test_a_stream_goes_on_from_any_step():
    for start in (0, 1, 3, 7):
        assert stream(start=start) == stream()[2 * start :]


def test_fixed_batches_hold_every_sample_once():
    shares = [data.fixed_batches(11, 2, rank, 3) for rank in range(3)]
    assert sorted(key for share in shares for batch in share for key in batch) == [(0, index) for index in range(11)]


def test_samples_depend_on_seed_epoch_and_index_only():
    source = Shapes('train', (20, 20))
    transform = transforms.pretrain_transform((16, 16), 'rrc')
    samples = data.Samples(source, transform, num_patches=16, seed=1)
    keys = [(epoch, index) for epoch in range(2) for index in range(5)]
    forward, backward = [samples[key] for key in keys], [samples[key] for key in reversed(keys)][::-1]
    for (image, noise, _), (image_again, noise_again, _) in zip(forward, backward):
        assert torch.equal(image, image_again) and torch.equal(noise, noise_again)
    all_noise = torch.stack([noise for _, noise, _ in forward])
    assert len(all_noise.unique(dim=0)) == 10 and 0 <= all_noise.min() and all_noise.max() < 1
    other_seed = data.Samples(source, transform, num_patches=16, seed=2)[0, 0]
    assert not torch.equal(other_seed[1], forward[0][1])


def test_loader_gives_normalised_batches():
    source = Shapes('val', (16, 16))
    samples = data.Samples(source, transforms.centre_transform((16, 16)), num_patches=4)
    statistics = ([0.5] * 3, [0.25] * 3)
    for num_workers in (0, 2):
        loader = data.Loader(samples, data.fixed_batches(5, 2), torch.device('cpu'), statistics, num_workers)
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [2, 2, 1]
        expected = (torch.stack([source[i][0] for i in range(5)]) / 255 - 0.5) / 0.25
        assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)


@pytest.mark.parametrize(
    'total, per_device, world_size, expected',
    [(4096, 512, 8, (512, 1)), (4096, 256, 1, (256, 16)), (4096, 64, 16, (64, 4)), (96, None, 2, (48, 1))],
)
def test_total_batch_is_the_product(total, per_device, world_size, expected):
    assert data.split_batch(total, per_device, world_size) == expected


@pytest.mark.parametrize('total, per_device, world_size', [(4096, 48, 8), (100, 64, 1), (16, 32, 1), (10, None, 4)])
def test_total_batch_suggestions_would_do(total, per_device, world_size):
    with pytest.raises(InputError) as error:
        data.split_batch(total, per_device, world_size)
    suggestions = [int(word) for word in str(error.value).split(';')[1].replace(',', ' ').split() if word.isdigit()]
    assert suggestions
    for number in suggestions:
        fits = data.split_batch(total, number, world_size) if per_device else data.split_batch(number, None, world_size)
        assert fits[0] * fits[1] * world_size == (total if per_device else number)


# --- Waiting for data -------------------------------------------------------------------------------------------


def test_waiting_is_counted_within_the_block_only():
    waiting = data.Waiting(torch.device('cpu'))
    for _ in range(3):
        with waiting:
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.06 <= waiting.seconds() < 0.2
    assert waiting.seconds() == 0


def test_a_slow_source_is_said_once(pretrain, monkeypatch, capsys):
    def told(name, *flags):
        shares = [entry['data_wait'] for entry in pretrain(name, *flags).entries if 'data_wait' in entry]
        lines = [line for line in capsys.readouterr().out.splitlines() if 'waits for data' in line]
        return shares, lines

    read = data.ImageFiles.__getitem__
    monkeypatch.setattr(data.ImageFiles, '__getitem__', lambda *key: time.sleep(0.05) or read(*key))
    shares, (line,) = told('slow')
    assert min(shares) > 0.5 and f'waits for data for {shares[1]:.0%} of the time' in line  # not of the first window
    monkeypatch.setattr(data, 'advice', lambda *_: pytest.fail('a single window is no ground for advice'))
    told('short', '--epochs', '1', '--warmup_epochs', '0', '--log_every', '99')


@pytest.mark.parametrize(
    'cores, local_processes, workers, crop, size, expected',
    [
        (8, 1, 0, 'simple', 16, '--num_workers 8 loads them meanwhile'),
        (8, 2, 2, 'simple', 16, '--num_workers 4, one for each CPU core of this process, may help; now they are 2'),
        (64, 1, None, 'rrc', 16, '--num_workers 64, .* now they are 16'),
        (8, 1, None, 'simple', 16, 'python -m util.resize IMAGES COPY --size 16$'),
        (8, 1, 8, 'simple', (16, 12), 'python -m util.resize IMAGES COPY --size 16 12$'),
        (8, 1, 8, 'rrc', 16, 'no CPU core to spare'),
        (8, 1, 8, None, 16, 'no CPU core to spare'),  # fine-tuning has no --crop
        (8, 1, 8, 'simple', 18, 'no CPU core to spare'),  # the size that they have
    ],
)
def test_advice_fits(cores, local_processes, workers, crop, size, expected, folder, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(local_processes))
    args = Namespace(num_workers=workers, data_path='IMAGES', **({'crop': crop} if crop else {}))
    size = size if isinstance(size, tuple) else (size, size)
    source = data.open_source(str(folder), 'train')
    line = data.advice(0.4, source, args, size)
    assert re.search(expected, line) and 'waits for data for 40% of the time' in line and '\n' not in line
    assert 'util.resize' not in data.advice(0.4, Shapes('train', (20, 20)), args, size)
