"""Tar files as a source: the same images, labels, order and runs as from the folder that was packed."""

import gzip
import io
import multiprocessing
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from conftest import Result, command

from util import sources, tar
from util.errors import InputError
from util.folders import Options


def pack(path, root, top='.'):
    """A tar of the folder root, whose content lies below top in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        archive.add(root, top)


def one_tar(folder, to):
    pack(to / 'all.tar', folder, 'shapes/deep')
    return to / 'all.tar'


def one_tar_in_a_folder(folder, to):
    pack(to / 'all.tar', folder)
    return to


def a_tar_per_split(folder, to):
    pack(to / 'shapes_train.tar', folder / 'train', 'train')
    pack(to / 'shapes_val.tar', folder / 'val')
    return to


def a_tar_per_class(folder, to):
    for path in folder.glob('*/*'):
        pack(to / f'{path.relative_to(folder)}.tar', path)
    return to


def tar_of_tars(folder, to):
    a_tar_per_class(folder, to / 'classes')
    for split in ('train', 'val'):
        pack(to / f'{split}.tar', to / 'classes' / split)
    return to


LAYOUTS = [one_tar, one_tar_in_a_folder, a_tar_per_split, a_tar_per_class, tar_of_tars]


def add(archive, name, content, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    archive.addfile(member, io.BytesIO(content))


def image(folder, number=0):
    return sorted((folder / 'train').rglob('*.png'))[number].read_bytes()


def open_source(path, cache, split='train', **options):
    return sources.open_source(str(path), split, Options(download_dir=str(cache), **options))


# --- Against the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', LAYOUTS)
def test_images_labels_and_order_are_those_of_the_folder(layout, folder, tmp_path):
    path = layout(folder, tmp_path / 'tars')
    for split, count in (('train', 64), ('val', 20)):
        packed, unpacked = open_source(path, tmp_path / 'cache', split), open_source(folder, tmp_path, split)
        assert len(packed) == len(unpacked) == count
        assert packed.classes == unpacked.classes and packed.names.tolist() == unpacked.names.tolist()
        for index in range(count):
            (image, label), (expected, expected_label) = packed[index], unpacked[index]
            assert torch.equal(image, expected) and label == expected_label


def test_two_tars_for_one_split_are_refused(folder, tmp_path):
    a_tar_per_split(folder, tmp_path)
    (tmp_path / 'more_train.tar').write_bytes((tmp_path / 'shapes_train.tar').read_bytes())
    with pytest.raises(InputError, match=r'two tar files for train, \w+_train\.tar and \w+_train\.tar'):
        open_source(tmp_path, tmp_path / 'cache')


@pytest.mark.parametrize('job', ['pretrain', 'finetune', 'linprobe'])
def test_runs_and_resumed_runs_are_those_of_the_folder(job, request, folder, tmp_path, kill_after_saving):
    start = request.getfixturevalue(job)
    path = str((tar_of_tars if job == 'pretrain' else one_tar)(folder, tmp_path / 'tars'))
    flags = ['--epochs', '2', '--data_path', path, '--download_dir', str(tmp_path / 'cache')]
    whole = start('folder', '--epochs', '2')
    for workers in ('0', '1', '3') if job == 'pretrain' else ('1',):
        assert start(f'tar{workers}', *flags, '--num_workers', workers).entries[-1].get('val_loss')
        assert Result(tmp_path / f'tar{workers}').losses == whole.losses
    kill_after_saving(start, 'cut', *flags, '--save_every', '3')
    resumed = start('cut', *flags, '--save_every', '3')
    assert resumed.losses == whole.losses
    for name, tensor in whole.checkpoint['model'].items():
        assert torch.equal(tensor, resumed.checkpoint['model'][name]), name


def test_processes_share_one_index(small_run, pretrain, folder, tmp_path):
    path = one_tar(folder, tmp_path)
    flags = ['--epochs', '1', '--batch_size', '8', '--data_path', str(path), '--num_workers', '1']
    done = command('main_pretrain.py', *small_run('two', *flags, '--download_dir', tmp_path / 'cache'), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Indexing') == 1
    assert Result(tmp_path / 'two').losses == pytest.approx(pretrain('one', '--epochs', '1').losses, rel=1e-5)


def read_often(source, truth, seed, wrong):
    for index in np.random.default_rng(seed).integers(0, len(source), 3000).tolist():
        wrong.value += source.content(index) != truth[index]


def test_forked_workers_do_not_disturb_each_other(folder, tmp_path):
    source = open_source(one_tar(folder, tmp_path), tmp_path)
    truth = [source.content(index) for index in range(len(source))]  # the tar is open before the fork
    assert len(set(truth)) > 1
    context = multiprocessing.get_context('fork')
    counts = [context.Value('i') for _ in range(3)]
    processes = [context.Process(target=read_often, args=(source, truth, *args)) for args in enumerate(counts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [count.value for count in counts] == [0, 0, 0]


# --- What may be in a tar -------------------------------------------------------------------------------------


def test_flat_tar_has_no_labels(folder, tmp_path, pretrain, finetune, capsys):
    path = tmp_path / 'flat.tar'
    with tarfile.open(path, 'w') as archive:
        for index in range(16):
            add(archive, f'all/{index}.png', image(folder, index))
    flags = ['--data_path', str(path), '--download_dir', str(tmp_path), '--epochs', '1']
    assert len(pretrain('run', *flags).losses) == 1
    with pytest.raises(SystemExit) as exit:
        finetune('run2', *flags, '--val_path', str(path))
    assert exit.value.code == 2 and 'no labels; use one folder per class' in capsys.readouterr().err


def test_members_of_all_kinds(folder, tmp_path):
    """Arrays, names that are not UTF-8, long names; of equal names the last, as when unpacking; nothing hidden."""
    buffer = io.BytesIO()
    np.save(buffer, np.full((5, 7, 3), 9, np.uint8))
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        add(archive, './b/array.npy', buffer.getvalue())
        add(archive, 'a/caf\udce9.png', image(folder))
        add(archive, 'a/' + 'long' * 50 + '.png', image(folder))
        add(archive, 'a/twice.png', b'old')
        add(archive, '/a/twice.png', image(folder, 3))
        add(archive, 'a/._twice.png', b'of a Mac')
        add(archive, '.cache/x.png', image(folder))
        add(archive, 'a/notes.txt', b'not an image')
        add(archive, 'a/folder.png', b'', tarfile.DIRTYPE)
    source = open_source(tmp_path / 'x.tar', tmp_path / 'cache')
    assert source.names.tolist() == [b'a/caf\xe9.png', b'a/' + b'long' * 50 + b'.png', b'a/twice.png', b'b/array.npy']
    assert source.classes == ['a', 'b']
    assert source.content(2) == image(folder, 3) and (source[3][0] == 9).all() and source[3][0].shape == (3, 5, 7)


def test_bad_images_in_a_tar_are_named(folder, tmp_path, pretrain):
    path = tmp_path / 'x.tar'
    with tarfile.open(path, 'w') as archive:
        for index in range(15):
            add(archive, f'{index}.png', image(folder, index))
        add(archive, 'bad.png', image(folder)[:50])
    flags = ['--data_path', str(path), '--download_dir', str(tmp_path), '--max_bad', '0.1', '--epochs', '1']
    result = pretrain('run', *flags)
    assert result.entries[0]['bad_images'] == 1
    assert (result.output_dir / 'bad_images.txt').read_text().startswith(f'{path}/bad.png\t')


# --- The index ------------------------------------------------------------------------------------------------


def test_index_is_kept_until_the_tar_changes(folder, tmp_path, capsys):
    path, cache = one_tar(folder, tmp_path), tmp_path / 'cache'

    def built():
        capsys.readouterr()
        source = open_source(path, cache)
        assert source[5][0].shape == (3, 20, 18)
        return 'Indexing' in capsys.readouterr().out, len(source)

    assert [built(), built()] == [(True, 64), (False, 64)]
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])  # killed while writing
    assert [built(), built()] == [(True, 64), (False, 64)]
    with tarfile.open(path, 'a') as archive:
        add(archive, 'shapes/deep/train/new/1.png', image(folder))
    assert [built(), built()] == [(True, 65), (False, 65)]


def test_without_a_place_for_the_index(folder, tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert len(open_source(one_tar(folder, tmp_path), tmp_path / 'file')) == 64
    assert 'the index cannot be cached' in capsys.readouterr().out


def test_memory_is_arrays_only(folder, tmp_path):
    """What grows with the number of images are NumPy arrays, which forked workers share."""
    source = open_source(one_tar(folder, tmp_path), tmp_path)
    held = {name: value for name, value in vars(source).items() if hasattr(value, '__len__') and len(value) >= 64}
    assert held.keys() >= {'names', 'places', 'labels'}
    assert all(
        isinstance(value, np.ndarray) and value.dtype != object for name, value in held.items() if name != 'root'
    )


# --- Faults: one line, code 2 ---------------------------------------------------------------------------------


def damaged(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmembers()[40].offset
    return content[: header + 3] + b'\xff' + content[header + 4 :]


FAULTS = {  # message: name, damage, where --data_path may point
    'cut off, damaged': ('x.tar', lambda content: content[: len(content) // 2 + 700], ['file', 'folder']),
    'damaged header at byte': ('x.tar', damaged, ['file', 'folder']),
    'empty file': ('x.tar', lambda content: b'', ['file', 'folder']),
    'not an uncompressed tar file': ('x.tar', gzip.compress, ['file', 'folder']),
    'images inside a compressed tar cannot be read in place': ('x.tar.gz', gzip.compress, ['file']),
    'no image in it': ('x.tar', lambda content: b'\0' * 10240, ['file', 'folder']),
    'no image in it or in the folders below': ('x.tgz', gzip.compress, ['folder']),
}


@pytest.mark.parametrize('where, message', [(where, message) for message in FAULTS for where in FAULTS[message][2]])
def test_faults_get_one_line_and_code_2(where, message, folder, tmp_path, pretrain, capsys):
    name, damage, _ = FAULTS[message]
    path = one_tar(folder, tmp_path)
    place = tmp_path / 'in'
    place.mkdir()
    (place / name).write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit) as exit:
        pretrain(
            'run',
            '--data_path',
            str(place if where == 'folder' else place / name),
            '--download_dir',
            str(tmp_path / 'c'),
        )
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error and re.fullmatch(r'[^\n]*error: [^\n]+\n', error), error


def test_a_damaged_tar_within_a_tar(folder, tmp_path):
    inner = one_tar(folder, tmp_path).read_bytes()
    for content in (inner[:7000], damaged(inner), b''):
        with tarfile.open(tmp_path / 'outer.tar', 'w') as archive:
            add(archive, 'n01.tar', content)
            add(archive, 'n02.tar', inner)
        with pytest.raises(InputError, match='outer.tar: cut off, damaged, or not an uncompressed tar'):
            open_source(tmp_path / 'outer.tar', tmp_path)


def test_a_negative_size_does_not_hang(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w', format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo('a.png')
        member.pax_headers = {'size': '-1024'}
        archive.addfile(member)
    with pytest.raises(InputError, match='cut off, damaged'):
        open_source(tmp_path / 'x.tar', tmp_path)


def test_a_tar_that_vanishes_or_shrinks(folder, tmp_path):
    path = one_tar(folder, tmp_path)
    source = open_source(path, tmp_path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match='all.tar/shapes/deep/train/'):
        source[20]
    tar.open_tar.cache_clear()
    path.unlink()
    with pytest.raises(ValueError, match='No such file'):
        source[20]
