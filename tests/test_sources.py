"""Where images come from: folders, lists, torchvision's data sets, drawn pictures, and a split where there is none."""

import gzip
import io
import os
import struct
import sys
import tarfile
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from util import sources
from util.errors import InputError
from util.folders import EXTENSIONS, Options, find_files
from util.shapes import Shapes
from util.sources import open_source

PNG = io.BytesIO()
Image.new('RGB', (8, 8)).save(PNG, 'png')


def touch(root, *names):
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(PNG.getvalue())


def names(source):
    return [os.fsdecode(source.name(index)) for index in range(len(source))]


def flags(data_path, **changes):
    defaults = {'val_path': None, 'val_share': 0.0, 'background': [255, 255, 255], 'download_dir': 'none'}
    return Namespace(data_path=str(data_path), **defaults | changes)


SIZES = {'in_chans': 3, 'img_size': (8, 8)}


# --- Folders --------------------------------------------------------------------------------------------------


def test_flat_nested_and_class_folders(tmp_path):
    touch(tmp_path, 'b.png', 'a.JPG', 'deep/er/c.png', '.hidden.png', '.cache/d.png')
    (tmp_path / 'notes.txt').write_text('not an image')
    os.symlink(tmp_path, tmp_path / 'deep/loop')
    os.symlink('self', tmp_path / 'self')
    source = open_source(str(tmp_path))
    assert names(source) == ['a.JPG', 'b.png', 'deep/er/c.png']
    assert source[0][0].shape == (3, 8, 8) and source[0][1] == -1 and source.classes is source.labels is None
    assert open_source(str(tmp_path), 'val') is None


def test_arrays_among_8_bit_images(tmp_path):
    """They take the type of the first image, or, where that would cut off their values, cannot be used."""
    touch(tmp_path, 'a.png')
    np.save(tmp_path / 'b.npy', np.full((8, 8, 3), 0.2, np.float32))
    np.save(tmp_path / 'c.npy', np.full((8, 8, 3), 37.5, np.float32))
    source = open_source(str(tmp_path))
    assert source[0][0].dtype == source[1][0].dtype == torch.uint8 and source[1][0].unique().tolist() == [51]
    with pytest.raises(ValueError, match=r'c\.npy: values outside 0\.\.1 among 8-bit images'):
        source[2]


@pytest.mark.parametrize('split', ['train', 'training'])
@pytest.mark.parametrize('held_out', ['val', 'valid', 'validation', 'test'])
def test_train_and_val_folders(tmp_path, split, held_out):
    touch(tmp_path, f'{split}/x/1.png', f'{split}/y/2.png', f'{held_out}/x/3.png', f'{held_out}/y/4.png')
    train, val = sources.open_labelled_sources(flags(tmp_path), SIZES)
    assert names(train) == ['x/1.png', 'y/2.png'] and names(val) == ['x/3.png', 'y/4.png']
    assert train.classes == ['x', 'y'] and train.labels.tolist() == [0, 1] and val[1][1] == 1


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, 'train/1.png', 'bus/2.png')
    assert names(open_source(str(tmp_path))) == ['bus/2.png', 'train/1.png']


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path, os.fsdecode(b'caf\xe9.png'))
    assert open_source(str(tmp_path))[0][0].shape == (3, 8, 8)


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


def listed(root):
    """What os.walk finds: links are followed, but not into a folder that they are in."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
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
            for name in files
            if name[0] != '.' and name.lower().endswith(EXTENSIONS)
        ]
    return sorted(map(os.fsencode, found))


def test_listing_is_that_of_os_walk(tangle):
    found = find_files(str(tangle), EXTENSIONS)
    assert found == listed(tangle)
    assert {b'b/to_a/deep/er/2.JPG', b'out_again/x/10.png', b'caf\xe9/8.png', b'nowhere.png'} <= set(found)


def test_memory_is_arrays_only(tmp_path):
    """What grows with the number of images are NumPy arrays, which forked workers share."""
    touch(tmp_path, *(f'{index % 2}/{index}.png' for index in range(500)))
    source = open_source(str(tmp_path))
    held = {name: value for name, value in vars(source).items() if hasattr(value, '__len__') and len(value) >= 500}
    assert held.keys() == {'names', 'labels'}
    assert all(value.dtype.kind in 'Si' for value in held.values())


@pytest.mark.parametrize(
    'files, val_path, message',
    [
        (None, None, 'no such folder or file'),
        ([], None, 'no image in it or in the folders below'),
        (['train/a/1.png', 'train/b/1.png'], None, 'no validation images .* --val_share 0.1'),
        (['a/1.png'], '', 'only one class, a'),
        (['1.png'], '', 'no labels; use one folder per class'),
        (['train/a/1.png', 'train/b/1.png', 'val/1.png'], None, 'no labels; use one folder per class'),
        (
            ['train/a/1.png', 'train/b/1.png', 'val/b/1.png', 'val/c/1.png'],
            None,
            'the classes differ: a only in the training images; c only in the validation images',
        ),
    ],
)
def test_what_a_classifier_cannot_use(files, val_path, message, tmp_path):
    root = tmp_path / 'images'
    if files is not None:
        root.mkdir()
        touch(root, *files)
    args = flags(root, val_path=None if val_path is None else str(root / val_path))
    with pytest.raises(InputError, match=message):
        sources.open_labelled_sources(args, SIZES)


# --- Lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_list_of_images(tmp_path, encoding):
    """Relative or absolute, with comments and empty lines; with a byte-order mark as Windows writes it."""
    touch(tmp_path, 'images/1é.png', 'elsewhere/2 with space.png')
    lines = f'images/1é.png\n# a comment\n\n{tmp_path}/elsewhere/2 with space.png\n'
    (tmp_path / 'list.txt').write_text(lines, encoding=encoding)
    source = open_source(str(tmp_path / 'list.txt'))
    assert len(source) == 2 and all(source[index][0].shape == (3, 8, 8) for index in range(2))
    assert source.classes is None and open_source(str(tmp_path / 'list.txt'), 'val') is None


def test_list_with_classes(tmp_path):
    touch(tmp_path, '1.png', '2.png', '3.png')
    (tmp_path / 'list.txt').write_text('2.png\tdog\n1.png\tcat\n3.png\tdog\n')
    source = open_source(str(tmp_path / 'list.txt'))
    assert names(source) == ['2.png', '1.png', '3.png']
    assert source.classes == ['cat', 'dog'] and source.labels.tolist() == [1, 0, 1] and source[0][1] == 1


def test_a_list_asks_the_file_system_for_its_first_images_only(tmp_path, monkeypatch):
    """One that is missing is a bad image like any other."""
    touch(tmp_path, '1.png')
    (tmp_path / 'list.txt').write_text('1.png\n' + ''.join(f'missing/{index}.png\n' for index in range(5000)))
    asked = []
    for name in ('stat', 'open', 'access'):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, original=original, **k: asked.append(a[0]) or original(*a, **k))
    source = open_source(str(tmp_path / 'list.txt'))
    assert len(source) == 5001 and len(asked) < 20
    with pytest.raises(ValueError, match='missing/7.png: No such file'):
        source[8]


def test_a_list_whose_first_images_are_missing(tmp_path):
    (tmp_path / 'list.txt').write_text(''.join(f'{index}.png\n' for index in range(50)))
    with pytest.raises(InputError, match='none of its first 16 images can be read; .*15.png: No such file'):
        open_source(str(tmp_path / 'list.txt'))


def test_val_path_is_taken_whole(tmp_path):
    touch(tmp_path, 'a/1.png', 'a/2.png', 'b/3.png')
    train, val = sources.open_sources(flags(tmp_path / 'a', val_path=str(tmp_path / 'b'), val_share=0.5), SIZES)
    assert names(train) == ['1.png', '2.png'] and names(val) == ['3.png']


def test_validation_alone(tmp_path):
    touch(tmp_path, 'x/1.png', 'y/2.png', 'split/train/x/3.png', 'split/val/x/4.png', 'split/val/y/5.png')
    train, val = sources.open_labelled_sources(flags(tmp_path / 'split'), SIZES, only_val=True)
    assert train is None and names(val) == ['x/4.png', 'y/5.png']
    train, val = sources.open_labelled_sources(flags(tmp_path / 'split/val'), SIZES, only_val=True)
    assert train is None and names(val) == ['x/4.png', 'y/5.png']


def test_the_background_reaches_the_images(tmp_path):
    Image.new('RGBA', (8, 8)).save(tmp_path / 'a.png')
    train, _ = sources.open_sources(flags(tmp_path, background=[1, 2, 3]), SIZES)
    assert train[0][0].flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]


# --- A validation split where the data has none ---------------------------------------------------------------

CLASS_SIZES = {'a': 40, 'b': 20, 'c': 3}


def folder_of(root, changes=()):
    for label, count in (CLASS_SIZES | dict(changes)).items():
        touch(root, *(f'{label}/{index}.png' for index in range(count)))
    return root


def tar_of(root):
    with tarfile.open(root.with_suffix('.tar'), 'w') as archive:
        archive.add(folder_of(root), 'top')
    return root.with_suffix('.tar')


def list_of(root):
    lines = [f'{label}/{index}.png\t{label}\n' for label, count in CLASS_SIZES.items() for index in range(count)]
    folder_of(root)
    (root / 'list.txt').write_text(''.join(reversed(lines)))
    return root / 'list.txt'


@pytest.mark.parametrize('make', [folder_of, tar_of, list_of])
def test_a_share_is_held_out_by_class_and_name(make, tmp_path):
    args = flags(make(tmp_path / 'images'), val_share=0.1, download_dir=str(tmp_path))
    train, val = sources.open_labelled_sources(args, SIZES)
    assert Counter(val.labels.tolist()) == {0: 4, 1: 2, 2: 1}
    everything = open_source(args.data_path, options=Options(download_dir=str(tmp_path)))
    assert sorted(names(train) + names(val)) == sorted(names(everything))
    for part in (train, val):
        assert part.classes == ['a', 'b', 'c'] and len(part) == len(part.labels)
        for index in range(len(part)):
            image, label = part[index]
            assert image.shape == (3, 8, 8) and part.classes[label] == names(part)[index].split('/')[0]
            assert label == part.labels[index] and part.path(index).endswith(names(part)[index])
    # The same images, whatever holds them and in whatever order.
    expected = sources.open_labelled_sources(flags(folder_of(tmp_path / 'again'), val_share=0.1), SIZES)[1]
    assert sorted(names(val)) == sorted(names(expected))


def test_images_keep_their_side_when_others_are_added(tmp_path):
    root = folder_of(tmp_path / 'images')
    before = set(names(sources.open_sources(flags(root, val_share=0.25), SIZES)[1]))
    folder_of(root, {'a': 80, 'b': 40})
    train, val = sources.open_sources(flags(root, val_share=0.25), SIZES)
    assert Counter(val.labels.tolist()) == {0: 20, 1: 10, 2: 1}
    assert len(before & set(names(train))) <= 3  # of 16, at the border


def test_a_share_of_unlabelled_images(tmp_path):
    touch(tmp_path, *(f'{index}.png' for index in range(50)))
    train, val = sources.open_sources(flags(tmp_path, val_share=0.3), SIZES)
    assert (len(train), len(val)) == (35, 15) and not set(names(train)) & set(names(val)) and val[0][1] == -1


def test_a_share_with_an_image_named_twice(tmp_path):
    """Both go to the same side."""
    touch(tmp_path, *(f'{index}.png' for index in range(20)))
    (tmp_path / 'list.txt').write_text(''.join(f'{index}.png\n' for index in range(20)) * 2)
    train, val = sources.open_sources(flags(tmp_path / 'list.txt', val_share=0.1), SIZES)
    assert not set(names(train)) & set(names(val)) and len(train) + len(val) == 40


def test_a_split_that_is_there_is_kept(tmp_path):
    touch(tmp_path, 'train/a/1.png', 'train/b/1.png', 'val/a/2.png', 'val/b/2.png')
    assert [len(part) for part in sources.open_labelled_sources(flags(tmp_path, val_share=0.5), SIZES)] == [2, 2]


def test_only_the_held_out_share_is_evaluated(tmp_path):
    root = folder_of(tmp_path / 'images')
    val = sources.open_labelled_sources(flags(root, val_share=0.1), SIZES)[1]
    train, only = sources.open_labelled_sources(flags(root, val_share=0.1), SIZES, only_val=True)
    assert train is None and names(only) == names(val)


@pytest.mark.parametrize('share, message', [(0.1, 'the class b'), (0.9, 'the class a')])
def test_a_class_with_nothing_left(share, message, tmp_path):
    touch(tmp_path, 'a/1.png', 'a/2.png', 'b/3.png')
    with pytest.raises(InputError, match=f'--val_share {share} leaves no image of {message} to train on'):
        sources.open_sources(flags(tmp_path, val_share=share), SIZES)


# --- torchvision's data sets ----------------------------------------------------------------------------------


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
            options = Options(in_chans=in_chans, download_dir=str(tmp_path))
            source = open_source('torch/fashion_mnist', split, options)
            image, label = source[2]
            assert len(source) == 3 and label == 9 and source.labels.tolist() == [7, 0, 9]
            assert np.array_equal(image.numpy(), np.repeat(pixels[2:], in_chans, 0))
            assert source.classes[9] == 'Ankle boot' and source.path(2) == 'torch/fashion_mnist, image 2'


def test_unlabelled_images_train_no_classifier(tmp_path, monkeypatch):
    """STL-10: 'train' and 'unlabeled' for pre-training, 'train' alone where labels are needed."""
    root = tmp_path / 'stl10_binary'
    root.mkdir()
    monkeypatch.setattr(torchvision.datasets.STL10, '_check_integrity', lambda self: True)
    for part, count in (('train', 20), ('test', 10), ('unlabeled', 30)):
        (root / f'{part}_X.bin').write_bytes(bytes(count * 3 * 96 * 96))
        (root / f'{part}_y.bin').write_bytes(bytes(1 + index % 10 for index in range(count)))
    (root / 'class_names.txt').write_text('\n'.join('abcdefghij'))
    args = flags('torch/stl10', download_dir=str(tmp_path))
    train, val = sources.open_sources(args, SIZES)
    assert (len(train), len(val)) == (50, 10) and train[40][1] == -1 and (train.labels == -1).sum() == 30
    train, val = sources.open_labelled_sources(args, SIZES)
    assert (len(train), len(val)) == (20, 10) and train.labels.tolist() == list(range(10)) * 2
    assert len(train.classes) == 10


def test_a_torchvision_set_without_splits(tmp_path):
    """EuroSAT: all of it, or with --val_share a part."""
    for label in 'AB':
        touch(tmp_path / 'eurosat/2750', *(f'{label}/{index}.jpg' for index in range(10)))
    args = flags('torch/eurosat', download_dir=str(tmp_path))
    assert [source and len(source) for source in sources.open_sources(args, SIZES)] == [20, None]
    args.val_share = 0.2
    train, val = sources.open_labelled_sources(args, SIZES)
    assert train.classes == ['A', 'B'] and Counter(val.labels.tolist()) == {0: 2, 1: 2} and len(train) == 16


@pytest.mark.parametrize(
    'name', ['cifar10', 'cifar100', 'stl10', 'flowers102', 'fashion_mnist', 'oxford_iiit_pet', 'food101', 'caltech101']
)
def test_missing_torchvision_sets(name, tmp_path, monkeypatch):
    from urllib.error import URLError
    from urllib.request import OpenerDirector

    def no_network(*args, **kwargs):
        raise URLError('no network')

    monkeypatch.setattr(OpenerDirector, 'open', no_network)
    with pytest.raises(InputError, match=f'torch/{name}: not found in .* the download failed: .*no network'):
        open_source(f'torch/{name}', options=Options(download_dir=str(tmp_path)))
    monkeypatch.setattr(sources.distributed, 'world', lambda: (0, 2))
    with pytest.raises(InputError, match='start once without torchrun'):
        open_source(f'torch/{name}', options=Options(download_dir=str(tmp_path)))


def test_a_missing_package(tmp_path, monkeypatch):
    """torchvision reads SVHN by scipy, which this project does not require."""
    monkeypatch.setattr(torchvision.datasets.SVHN, '_check_integrity', lambda self: True)
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(InputError, match='torch/svhn: SVHN needs another package: .*scipy'):
        open_source('torch/svhn', options=Options(download_dir=str(tmp_path)))


@pytest.mark.parametrize(
    'name, message',
    [
        ('fashonmnist', 'did you mean torch/fashionmnist?'),
        ('cifar_11', 'did you mean torch/cifar10'),
        ('0000000000000', 'no such data set; it has, for instance, torch/cifar10'),
        ('fake_data', 'cannot be opened as a data set of labelled images'),
        ('coco_detection', 'cannot be opened as a data set of labelled images'),
    ],
)
def test_names_that_torchvision_does_not_have(name, message, tmp_path):
    with pytest.raises(InputError) as error:
        open_source(f'torch/{name}', options=Options(download_dir=str(tmp_path)))
    assert message in str(error.value) and '\n' not in str(error.value)


# --- Drawn pictures -------------------------------------------------------------------------------------------


def test_drawn_pictures_are_fixed_by_their_index():
    first, second = Shapes('train', (24, 40)), Shapes('train', (24, 40))
    for index in (0, 7, len(first) - 1):
        image, label = first[index]
        assert image.shape == (3, 24, 40) and image.dtype == torch.uint8
        assert torch.equal(image, second[index][0]) and label == second[index][1] == index % 10 == first.labels[index]
        assert torch.equal(image, first[index][0])  # kept, or drawn again
        assert image.float().std() > 5  # something is to be seen
    assert not torch.equal(first[0][0], first[10][0])
    assert not torch.equal(first[0][0], Shapes('val', (24, 40))[0][0])


def test_masks_of_drawn_pictures():
    """The label's colour stands out where the mask is, and each class covers some of its pictures."""
    shapes = Shapes('val', (32, 32))
    for index in range(40):
        mask, (picture, label) = shapes.picture_and_mask(index)[1], shapes[index]
        assert mask.shape == (32, 32) and mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) == {0, 1 + label}
        large, around = picture[:, mask > 0].float().mean(), picture[:, mask == 0].float().mean()
        assert 0.05 < (mask > 0).float().mean() < 0.7 and large > around + 30
