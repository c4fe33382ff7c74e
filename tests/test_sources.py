"""Where images come from: folders, tars, shards, lists, tables, torchvision's sets, drawings."""

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
import unicodedata
import urllib.error
import urllib.request
import zlib
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import DataLoader

from util import sources
from util.errors import InputError
from util.shapes import Shapes


def colour(name):
    return list(zlib.crc32(os.fsencode(os.path.basename(name))).to_bytes(4, 'big')[:3])


def png(name):
    """A picture of the colour of its name."""
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8), tuple(colour(name))).save(buffer, 'png')
    return buffer.getvalue()


def write(root, *names, content=None):
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(png(name) if content is None else content)
    return root


def write_tar(path, members):
    """members: names of pictures, or {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = members if isinstance(members, dict) else {name: png(name) for name in members}
    with tarfile.open(path, 'w') as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def open_sources(tmp_path):
    """open_sources(path, labelled, only_val, **flags) -> (training source, validation source)."""

    def opened(path, labelled=False, only_val=False, **flags):
        usual = {'val_path': None, 'val_share': 0.0, 'background': [255] * 3, 'max_value': None}
        usual |= {'download_dir': str(tmp_path / 'cache'), 'label_key': 'label'}
        args = Namespace(data_path=str(path), **usual | flags)
        return sources.open_sources(args, {'in_chans': 3, 'img_size': (8, 8)}, labelled, only_val)

    return opened


def names(source):
    return None if source is None else [os.fsdecode(source.name(i)) for i in range(len(source))]


def classes_of(source):
    """The class of each image, None for none."""
    return [None if label < 0 else source.classes[label] for label in source.labels]


def check_images(source):
    """Every image is that of its name, with its label."""
    for index, name in enumerate(names(source)):
        image, label = source[index]
        assert image.shape == (3, 8, 8) and image[:, 3, 4].tolist() == colour(name)
        assert label == (-1 if source.labels is None else source.labels[index])
        assert source.path(index).endswith(name)


# --- Folders, tars and lists ----------------------------------------------------------------------

LAYOUTS = [  # files; names of training images, of validation images; classes
    ('1.png, b.JPG', '1.png, b.JPG', None, None),
    ('a/1.png, a/x/2.png, b/3.png', 'a/1.png, a/x/2.png, b/3.png', None, 'a, b'),
    ('Training/a/1.png, Testing/a/2.png', 'a/1.png', 'a/2.png', 'a'),
    ('training_set/a/1.png, test_set/a/2.png', 'a/1.png', 'a/2.png', 'a'),
    ('train/a/1.png, eval/a/2.png', 'a/1.png', 'a/2.png', 'a'),
    ('Train/a/1.png, dev/a/2.png, test/a/3.png, x/4.png', 'a/1.png', 'a/2.png', 'a'),
    ('train2017/1.png, val2017/2.png, 3.png', '1.png', '2.png', None),
    ('s_train/s_train/a/1.png, s_train/s_train/b/2.png, s_test/a/3.png, s_pred/4.png',
     'a/1.png, b/2.png', 'a/3.png', 'a, b'),
    ('d/e/train/a/1.png, d/e/train/b/2.png, d/e/val/a/3.png',
     'a/1.png, b/2.png', 'a/3.png', 'a, b'),
    ('I/Data/CLS-LOC/train/n1/1.png, I/Data/CLS-LOC/val/2.png, I/Data/CLS-LOC/test/3.png',
     'n1/1.png', '2.png', 'n1'),
    ('d/a/1.png, d/b/2.png', 'a/1.png, b/2.png', None, 'a, b'),
    ('bullet train/1.png, crash test/2.png, train/3.png',
     'bullet train/1.png, crash test/2.png, train/3.png', None, 'bullet train, crash test, train'),
    ('10/1.png, 9/2.png, 1/3.png', '1/3.png, 10/1.png, 9/2.png', None, '1, 9, 10'),
]  # fmt: skip


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('found, train_names, val_names, classes', LAYOUTS)
def test_layouts(found, train_names, val_names, classes, packed, open_sources, tmp_path):
    root = tmp_path / 'data'
    if packed:
        root = write_tar(tmp_path / 'data.tar', found.split(', '))
    else:
        write(root, *found.split(', '), '.hidden.png', '.cache/x.png')
    train, val = open_sources(root)
    assert names(train) == train_names.split(', ')
    assert names(val) == (val_names and val_names.split(', '))
    assert train.classes == (classes and classes.split(', '))
    check_images(train)
    if classes:
        assert classes_of(train) == [name.split('/')[0] for name in names(train)]


def test_both_spellings_of_a_letter_are_one_class(open_sources, tmp_path):
    spelled = [unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD')]
    write(tmp_path, f'{spelled[0]}/1.png', f'{spelled[1]}/2.png', 'z/3.png')
    train, _ = open_sources(tmp_path)
    assert train.classes == ['z', spelled[0]] and sorted(train.labels) == [0, 1, 1]


def test_listing(open_sources, tmp_path):
    """With links to files and folders, back, to themselves and nowhere, and odd names."""
    odd = os.fsdecode(b'caf\xe9/8.png')
    root = write(tmp_path / 'root', 'a/1.png', 'a-b/3.JPG', '.hidden/5.png', odd, 'b/notes.txt')
    links = {'a/loop': '.', 'b/to_a': 'a', 'a/to_b': 'b', 'self.png': 'self.png', 'no.png': 'no'}
    for link, target in links.items():
        os.symlink(root / target, root / link)
    train, _ = open_sources(root)
    assert names(train) == ['a-b/3.JPG', 'a/1.png', 'b/to_a/1.png', odd, 'no.png', 'self.png']
    with pytest.raises(ValueError, match=f'{root}/self.png: Too many levels'):
        train[5]


def test_images_of_12_bits_in_files_of_16(open_sources, tmp_path):
    """Refused if none of the first uses more; a single dark one is ordinary."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for index in range(30):
        Image.fromarray((ramp * 4095).astype(np.uint16)).save(tmp_path / f'{index:02}.png')
    with pytest.raises(InputError, match='use only 6.3% of their range; .*--max_value 4095'):
        open_sources(tmp_path)
    assert open_sources(tmp_path, max_value=4095)[0][0][0].max() == 255
    Image.fromarray((ramp * 40_000).astype(np.uint16)).save(tmp_path / '14.png')
    assert open_sources(tmp_path)[0][0][0].max() == 16


def test_kinds_of_images_in_one_folder(open_sources, tmp_path):
    """Transparent ones are put on the background; floats among 8 bits are bad images."""
    Image.new('RGBA', (8, 8)).save(tmp_path / 'a.png')
    np.save(tmp_path / 'b.npy', np.full((8, 8, 3), 0.2, np.float32))
    source, _ = open_sources(tmp_path, background=[1, 2, 3])
    assert source[0][0].flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r'b\.npy: values of torch.float32 among .* torch.uint8'):
        source[1]


# --- Labels ---------------------------------------------------------------------------------------


def test_what_a_classifier_prints(open_sources, tmp_path, capsys):
    """And validation images that lack a class are numbered as the training images are."""
    write(tmp_path, 'train/a/1.png', 'train/a/2.png', 'train/b/3.png', 'train/c/4.png')
    write(tmp_path, 'val/c/5.png', 'val/b/6.png', '7.xcf', 'a/8.XCF', 'a/9.psd', 'notes')
    train, val = open_sources(tmp_path, labelled=True)
    assert val.classes == train.classes == ['a', 'b', 'c'] and val.labels.tolist() == [1, 2]
    assert [val[index][1] for index in range(2)] == [1, 2]
    out = capsys.readouterr().out
    left_out = out.partition(f'{tmp_path}: left out: ')[2].partition('\n')[0]
    assert set(left_out.split(', ')) == {'2 .xcf', '1 without ending', '1 .psd'}
    assert 'no validation image of 1 classes, a\n' in out
    sizes = '4 images to train on, 2 images to evaluate; 1 of b to 2 of a'
    assert f'3 classes: a, b, c; {sizes}\n' in out


SPLITS = 'train/a/1.png, train/b/2.png, '
LIST = {'data_path': 'list.txt', 'val_path': 'list.txt'}
MISTAKES = [  # files, flags, what the message says
    ('a/1.png, b/2.png, 3.png', {'val_path': ''}, 'no labels.*/3.png'),
    (SPLITS + 'test/3.png', {}, 'no labels.*/test/3.png'),
    (SPLITS + 'val/b/3.png, val/c/4.png', {}, 'classes that the training images lack: c'),
    (SPLITS + 'Training/a/3.png, val/a/4.png', {}, 'Training, train, val'),
    ('a/train/1.png, a/test/2.png, b/train/3.png', {}, 'are a splits'),
    ('f1/a/1.png, f1/b/2.png, f2/a/3.png, f2/b/4.png', {'val_share': 0.1}, 'are f1, f2 splits'),
    ('a/1.png, a/2.png, b/3.png', {'val_share': 0.1}, '0.1 holds out all .*/b/3.png'),
    ('1.png, 2.png', {**LIST, 'text': '1.png\tcat\n2.png\n'}, 'no labels.*/2.png'),
    ('', {**LIST, 'text': '3.png\tcat\n4.png\tdog\n'}, 'no image .*/4.png: No such file'),
]


@pytest.mark.parametrize('found, flags, message', MISTAKES)
def test_mistakes(found, flags, message, open_sources, tmp_path):
    write(tmp_path, *filter(None, found.split(', ')))
    if 'text' in flags:
        (tmp_path / 'list.txt').write_text(flags['text'])
    flags = {k: f'{tmp_path}/{v}' if k.endswith('path') else v for k, v in flags.items()}
    with pytest.raises(InputError, match=message) as error:
        open_sources(flags.pop('data_path', tmp_path), labelled=True, **flags)
    assert '\n' not in str(error.value)


def test_validation_alone(open_sources, tmp_path):
    write(tmp_path, 'train/x/1.png', 'val/x/2.png', 'val/y/3.png')
    for path, val_path in ((tmp_path, None), (tmp_path / 'val', None), ('', str(tmp_path))):
        train, val = open_sources(path, labelled=True, only_val=True, val_path=val_path)
        assert train is None and names(val) == ['x/2.png', 'y/3.png']
    train, val = open_sources(tmp_path / 'train', val_path=str(tmp_path / 'val/y'))
    assert names(train) == ['x/1.png'] and names(val) == ['3.png']


def test_a_share_is_held_out_by_class_and_hash_of_the_name(open_sources, tmp_path):
    """The same images from a folder, a tar and a list, in whatever order."""
    images, expected = [], []
    for label, count, held_out in (('a', 40, 4), ('b', 20, 2), ('c', 3, 1)):  # a tenth, or one
        members = [f'{label}/{index}.png' for index in range(count)]
        members.sort(key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
        images += members
        expected += members[:held_out]
    write(tmp_path / 'data', *images)
    write_tar(tmp_path / 'data.tar', [f'top/{name}' for name in images])
    (tmp_path / 'data/list.txt').write_text(''.join(f'{x}\t{x[0]}\n' for x in images))
    for place in ('data', 'data.tar', 'data/list.txt'):
        train, val = open_sources(tmp_path / place, True, val_share=0.1)
        assert set(names(val)) == set(expected)
        assert set(names(train)) == set(images) - set(expected)
        for part in (train, val):
            check_images(part)
            assert classes_of(part) == [name[0] for name in names(part)]
        train, only = open_sources(tmp_path / place, True, only_val=True, val_share=0.1)
        assert train is None and names(only) == names(val)


@pytest.mark.parametrize(
    'text, found, classes',
    [
        ('\ufeff1é.png\n# a comment\n\nx y/2 b.png\r\n', '1é.png, x y/2 b.png', None),
        ('b.png\tdog\na.png\tmy cat\n', 'b.png, a.png', 'dog, my cat'),
        ('b.png,dog\na.png , my cat\n', 'b.png, a.png', 'dog, my cat'),
        ('no ending\tdog.png\na.png \t my cat\n', 'no ending, a.png', 'dog.png, my cat'),
        ('b.png 10\na.png 9\nx y/a.png 9', 'b.png, a.png, x y/a.png', '10, 9, 9'),
        ('path,label\nb.png,dog\na.png,cat\n', 'b.png, a.png', 'dog, cat'),
        ('path\nb.png\na.png copy.png\n', 'b.png, a.png copy.png', None),
    ],
)
def test_lists(text, found, classes, open_sources, tmp_path):
    found = found.split(', ')
    write(tmp_path, *found)
    (tmp_path / 'list.txt').write_text(text, encoding='utf-8')
    train, val = open_sources(tmp_path / 'list.txt')
    assert names(train) == found and val is None
    check_images(train)
    assert (train.classes and classes_of(train)) == (classes and classes.split(', '))


def test_the_official_tars_of_imagenet(open_sources, tmp_path):
    """A tar of tars, and a flat one into which a list leads."""
    inner = {}
    for wnid in ('n01440764', 'n01443537'):
        members = [f'{wnid}_{index}.JPEG' for index in range(2)]
        inner[f'{wnid}.tar'] = write_tar(tmp_path / 'inner.tar', members).read_bytes()
    root = tmp_path / 'imagenet'
    write_tar(root / 'ILSVRC2012_img_train.tar', inner)
    write_tar(root / 'ILSVRC2012_img_val.tar', [f'ILSVRC2012_val_{i}.JPEG' for i in range(4)])
    train, val = open_sources(root)
    assert classes_of(train) == ['n01440764'] * 2 + ['n01443537'] * 2
    assert val.classes is None and len(val) == 4
    check_images(train)
    found = [f'{root}/ILSVRC2012_img_val.tar/ILSVRC2012_val_0.JPEG']  # absolute, relative, wrong
    found += [f'ILSVRC2012_img_val.tar/{name}.JPEG' for name in ('ILSVRC2012_val_3', 'nothing')]
    (root / 'val.txt').write_text(''.join(f'{name}\tn01443537\n' for name in found))
    _, val = open_sources(root, True, val_path=str(root / 'val.txt'))
    assert classes_of(val) == ['n01443537'] * 3
    check_images(sources.Part(val, np.arange(2)))
    with pytest.raises(ValueError, match='val.tar/nothing.JPEG: the tar has no such image'):
        val[2]


def test_folders_of_tars(open_sources, tmp_path):
    """A tar for each split, or for each class."""
    write_tar(tmp_path / 'a/x_train.tar', ['train/a/1.png', 'train/b/2.png'])
    write_tar(tmp_path / 'a/x_val.tar', ['./a/3.png', './b/4.png'])
    for name, images in {'train/a': '1', 'train/b': '2', 'val/a': '3', 'val/b': '4'}.items():
        write_tar(tmp_path / f'b/{name}.tar', [f'{images}.png'])
    for folder in 'ab':
        train, val = open_sources(tmp_path / folder)
        assert names(train) == ['a/1.png', 'b/2.png'] and names(val) == ['a/3.png', 'b/4.png']
        assert train.classes == ['a', 'b'] and train.labels.tolist() == [0, 1]
        check_images(val)


def test_members_of_all_kinds(open_sources, tmp_path):
    """Odd and long names; of equal names the last, as in unpacking; nothing hidden."""
    odd, long = os.fsdecode(b'a/caf\xe9.png'), f'a/{"long" * 50}.png'
    members = {f'./{name}': png(name) for name in (odd, long, 'b/1.png')}
    members |= {'a/twice.png': b'old', '/a/twice.png': png('twice.png'), 'a/notes.txt': b''}
    members |= {'a/._twice.png': b'of a Mac', '.cache/x.png': b''}
    train, _ = open_sources(write_tar(tmp_path / 'x.tar', members))
    assert names(train) == [odd, long, 'a/twice.png', 'b/1.png']
    check_images(train)


def test_the_index_is_kept_until_the_tar_changes(open_sources, tmp_path, capsys):
    def built(*more):
        open_sources(write_tar(path, ['1.png', *more]) if more else path)
        return 'Indexing' in capsys.readouterr().out

    path = write_tar(tmp_path / 'x.tar', ['1.png'])
    assert [built(), built()] == [True, False]
    (kept,) = (tmp_path / 'cache').iterdir()
    kept.write_bytes(kept.read_bytes()[:99])  # killed while writing
    assert [built(), built()] == [True, False]
    assert built('2.png') and len(open_sources(path)[0]) == 2


def test_forked_workers_do_not_disturb_each_other(open_sources, tmp_path):
    source, _ = open_sources(write_tar(tmp_path / 'x.tar', [f'{i}.png' for i in range(99)]))
    check_images(source)  # opens the tar in this process
    order = np.random.default_rng(0).integers(0, 99, 900).tolist()
    workers = {'num_workers': 2, 'multiprocessing_context': 'fork'}
    loader = DataLoader(source, batch_size=None, sampler=order, **workers)
    for index, (image, _) in zip(order, loader, strict=True):
        assert image[:, 0, 0].tolist() == colour(source.path(index))


def test_damaged_tars(open_sources, tmp_path):
    content = write_tar(tmp_path / 'x.tar', [f'{index}.png' for index in range(30)]).read_bytes()
    source, _ = open_sources(tmp_path / 'x.tar')
    os.truncate(tmp_path / 'x.tar', 1550)
    with pytest.raises(ValueError, match='x.tar/1.png: '):
        source[1]
    header = 20 * 1024  # each image takes two blocks
    damaged = content[: header + 3] + b'\xff' + content[header + 4 :]
    for fault in (content[:5700], damaged, gzip.compress(content)):
        write(tmp_path, 'x.tar', content=fault)
        write_tar(tmp_path / 'outer.tar', {'n01.tar': fault, 'n02.tar': content})
        for name in ('x', 'outer'):
            with pytest.raises(InputError, match=f'{name}.tar: not a plain tar, or damaged'):
                open_sources(tmp_path / f'{name}.tar')


# --- WebDataset -----------------------------------------------------------------------------------


def write_shards(root, pattern, labels, **jsons):
    """A shard for each list of labels; NAME.json has jsons[key][index] at each key."""
    for shard, numbers in enumerate(labels):
        members = {}
        for index, label in enumerate(numbers):
            members[f'{index}.png'] = png(f'{index}.png')
            if label is not None:
                members[f'{index}.cls'] = f'{label}\n'.encode()
            content = {key: values[index] for key, values in jsons.items()}
            members[f'{index}.json'] = json.dumps(content).encode()
        write_tar(root / pattern.format(shard), members)


def test_shards(open_sources, tmp_path):
    write_shards(tmp_path / 'x', 'in-train-{:04}.tar', [[10, 9, 0], [0, 10, 9]], kind='012')
    write_shards(tmp_path / 'x', 'in-validation-{:02}.tar', [[9, 0, 10]], kind='012')
    train, val = open_sources(tmp_path / 'x', labelled=True)
    assert train.classes == val.classes == ['0', '9', '10']
    assert classes_of(train) == ['10', '9', '0', '0', '10', '9']
    assert classes_of(val) == ['9', '0', '10'] and names(train)[4] == 'in-train-0001/1.png'
    check_images(train)
    train, val = open_sources(tmp_path / 'x', label_key='kind')
    assert classes_of(train) == list('012012') and classes_of(val) == list('012')
    single, _ = open_sources(tmp_path / 'x/in-train-0001.tar')
    assert classes_of(single) == ['0', '10', '9']
    write_shards(tmp_path / 'y', '{:05}.tar', [[None] * 3], label=['dog', 'cat', None])
    assert classes_of(open_sources(tmp_path / 'y')[0]) == ['dog', 'cat', None]


@pytest.mark.parametrize(
    'pattern', ['{:06}.tar', 'x-{}-of-10.tar', 'train/{:04}.tar', 'n0144{:04}.tar']
)
def test_numbers_of_shards_are_no_classes(pattern, open_sources, tmp_path):
    """But those of ImageNet are."""
    write_shards(tmp_path, pattern, [[None, None], [None, None]])
    classes = ['n01440000', 'n01440001'] if pattern[0] == 'n' else None
    assert open_sources(tmp_path)[0].classes == classes


# --- Tables of the datasets library ---------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch):
    """datasets.Dataset of twelve pictures, the first of them 0.png."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()
    rows = {'image': [{'bytes': png(f'{index}'), 'path': None} for index in range(12)]}
    rows |= {'label': [0, 1, 2] * 4, 'kind': ['even', 'odd'] * 6}
    rows = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
    return rows.cast_column('label', datasets.ClassLabel(names=['z', 'y', 'x']))


def test_tables(table, open_sources, tmp_path):
    import datasets

    (tmp_path / 'parquet/data').mkdir(parents=True)
    parts = {'train': table, 'validation': table.select(range(6))}
    for split, part in parts.items():
        part.to_parquet(tmp_path / f'parquet/data/{split}-00000-of-00001.parquet')
    datasets.DatasetDict(parts).save_to_disk(tmp_path / 'arrow')
    table.save_to_disk(tmp_path / 'one')
    for folder in ('parquet', 'arrow'):
        train, val = open_sources(tmp_path / folder, labelled=True)
        check_images(train)
        assert len(train) == 12 and train.classes == ['z', 'y', 'x']
        assert classes_of(val) == ['z', 'y', 'x'] * 2
        _, val = open_sources(tmp_path / folder, label_key='kind')
        assert classes_of(val) == ['even', 'odd'] * 3
    train, val = open_sources(tmp_path / 'one', val_share=0.25, labelled=True)
    assert (len(train), len(val)) == (9, 3)


@pytest.mark.parametrize('cells', ['bytes', 'paths'])
def test_tables_without_features(cells, table, open_sources, tmp_path):
    """Bytes, or paths relative to the folder; labels that are numbers, and that a row may lack."""
    import datasets

    found = ['.images/0.png', '.images/1.png']
    write(tmp_path, *found)
    rows = {'image': [png(name) for name in found] if cells == 'bytes' else found}
    rows |= {'label': [10, 9], 'some': [1, None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / 'x.parquet')
    train, _ = open_sources(tmp_path)
    assert train.classes == ['9', '10'] and classes_of(train) == ['10', '9']
    assert [image[:, 0, 0].tolist() for image, _ in train] == list(map(colour, found))
    assert classes_of(open_sources(tmp_path, label_key='some')[0]) == ['1', None]


def test_tables_that_cannot_be_had(table, open_sources, tmp_path, monkeypatch):
    table.select_columns('kind').to_parquet(tmp_path / 'x.parquet')
    with pytest.raises(InputError, match="'image'.* not in .*'kind'"):
        open_sources(tmp_path)
    with pytest.raises(InputError, match="^hf/owner/name:config: Couldn't reach"):
        open_sources('hf/owner/name:config')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(InputError, match='hf/owner/name: .*datasets'):
        open_sources('hf/owner/name')


# --- torchvision's data sets ----------------------------------------------------------------------


def test_stl10(open_sources, tmp_path, monkeypatch):
    """'train' and 'unlabeled' for pre-training, 'train' alone where labels are needed."""
    monkeypatch.setattr(torchvision.datasets.STL10, '_check_integrity', lambda self: True)
    pixels = np.arange(30 * 3 * 96 * 96).astype(np.uint8).reshape(30, 3, 96, 96)  # (N, C, W, H)
    for part, count in (('train', 20), ('test', 10), ('unlabeled', 30)):
        images, labels = pixels[:count].tobytes(), bytes(1 + i % 10 for i in range(count))
        write(tmp_path / 'stl10_binary', f'{part}_X.bin', content=images)
        write(tmp_path / 'stl10_binary', f'{part}_y.bin', content=labels)
    write(tmp_path / 'stl10_binary', 'class_names.txt', content='\n'.join('abcdefghij').encode())
    train, val = open_sources('torch/stl10', download_dir=tmp_path)
    assert (len(train), len(val), (train.labels == -1).sum()) == (50, 10, 30)
    assert np.array_equal(train[21][0], pixels[1].transpose(0, 2, 1)) and train.name(21) == b'21'
    train, val = open_sources('torch/STL_10', labelled=True, download_dir=tmp_path)
    assert len(val) == 10 and classes_of(train) == list('abcdefghij') * 2


@pytest.mark.parametrize(
    'name, processes, problem',
    [
        (name, 1, 'no network')
        for name in ('cifar10', 'oxford_iiit_pet', 'food101', 'svhn', 'eurosat')
    ]
    + [('cifar10', 2, 'without torchrun.*not found')]
    + [(name, 1, 'no such data set') for name in ('cifar_11', 'coco_detection')],
)
def test_missing_torchvision_sets(name, processes, problem, open_sources, tmp_path, monkeypatch):
    """Arguments of those there are are known: it comes to the download, by one process alone."""
    fail = mock.Mock(side_effect=urllib.error.URLError('no network'))
    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', fail)
    monkeypatch.setenv('WORLD_SIZE', str(processes))
    with pytest.raises(InputError, match=f'torch/{name}: .*{problem}'):
        open_sources(f'torch/{name}', download_dir=tmp_path)


# --- Drawn pictures -------------------------------------------------------------------------------


def test_drawn_pictures():
    """Fixed by their index; the label's colour stands out where the mask is."""
    shapes, again = Shapes('val', (24, 40)), Shapes('val', (24, 40))
    for index in (0, 7, 18, len(shapes) - 1):
        (picture, label), mask = shapes[index], again.picture_and_mask(index)[1]
        assert picture.shape == (3, 24, 40) and picture.dtype == torch.uint8
        assert label == index % 10 == shapes.labels[index] and torch.equal(picture, again[index][0])
        assert mask.shape == (24, 40) and set(mask.unique().tolist()) == {0, 1 + label}
        assert 0.05 < (mask > 0).float().mean() < 0.7
        assert picture[:, mask > 0].float().mean() > picture[:, mask == 0].float().mean() + 30
    assert not torch.equal(shapes[0][0], shapes[10][0])
    assert not torch.equal(shapes[0][0], Shapes('train', (24, 40))[0][0])
