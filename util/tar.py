"""Tar files read in place, as the folder they would unpack to: an index of the images in them, and reading by it.

A tar may hold tars, and a folder may hold tars, as for timm's ReaderImageInTar. Its code is not used, as run with timm
1.0.31: workers forked after a first read share one file position (53 of 80,000 reads were wrong); its cache, a pickle
beside the data, is believed after the tar has changed; a damaged header silently ends the index; and it holds one
Python object per image. Here the index is arrays, cached in --download_dir, and reading is pread.
"""

import fcntl
import functools
import hashlib
import os
import tarfile

import numpy as np
from tqdm import tqdm

from util.errors import InputError, as_input_error

COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz', '.tar.zst')


def load_index(tars, extensions, cache_dir):
    """Where the files with these extensions are in tars, {path: folder that it stands for}.

    Read from the cache in cache_dir while the tars have not changed; otherwise one process builds the index and
    caches it, while the others wait for it.

    Returns:
        names (M,): as bytes, sorted like those of an unpacked folder; a tar inside a tar is a folder of its name.
        places (M, 3): number of the tar, offset and size in bytes.

    Raises:
        InputError: if a tar cannot be read to its end.
    """
    with as_input_error():
        versions = [(os.path.realpath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in tars]
    key = hashlib.sha256(repr((versions, list(tars.values()), extensions)).encode()).hexdigest()[:16]
    cache = os.path.join(cache_dir, f'tar-index-{key}.npz')
    try:
        os.makedirs(cache_dir, exist_ok=True)
        file = os.fdopen(os.open(cache, os.O_RDWR | os.O_CREAT, 0o644), 'r+b')
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f'{cache}: {error.strerror}; the index cannot be cached (--download_dir)')
        return build_index(tars, extensions)
    with file:
        try:
            with np.load(file, allow_pickle=False) as index:
                return index['names'], index['places']
        except Exception:  # new and empty, or cut off
            pass
        names, places = build_index(tars, extensions)
        try:
            file.seek(0)
            file.truncate()
            np.savez(file, names=names, places=places)
            file.flush()
        except OSError as error:
            print(f'{cache}: {error.strerror}; the index is not cached')
    return names, places


def build_index(tars, extensions):
    """(names, places) as load_index gives them, with a progress bar. Raises InputError."""
    found, done, sizes = {}, 0, [os.path.getsize(path) for path in tars]
    print(f'Indexing {"one tar file" if len(tars) == 1 else f"{len(tars)} tar files"}, {sum(sizes) / 1e9:.2f} GB, once')
    with tqdm(desc='index', total=sum(sizes), unit='B', unit_scale=True, disable=None) as bar:
        for number, (path, folder) in enumerate(tars.items()):
            try:
                with open(path, 'rb') as file:
                    for name, offset, size in members(file):
                        bar.update(done + offset - bar.n)
                        if name.lower().endswith(extensions):
                            place = os.fsencode(os.path.join(folder, name))
                            found[place] = number, offset, size  # of equal names the last, as in unpacking
            except OSError as error:
                raise InputError(f'{path}: {error.strerror}') from None
            except (tarfile.TarError, RecursionError) as error:
                raise InputError(f'{path}: cut off, damaged, or not an uncompressed tar file ({error})') from None
            done += sizes[number]
    names = sorted(found)
    places = np.array([found[name] for name in names], dtype=np.int64).reshape(-1, 3)
    return np.array(names, dtype=bytes), places


def members(file):
    """Yield (name, offset, size) of each regular file in a tar and in the tars within it, except for hidden ones.

    Raises:
        tarfile.TarError: if it is no uncompressed tar, or is cut off or damaged.
    """
    with tarfile.open(fileobj=file, mode='r:') as archive:
        while member := archive.next():
            archive.members.clear()  # it would keep them all
            if member.size < 0:
                raise tarfile.ReadError('a negative size')
            name = os.path.normpath(member.name.lstrip('/'))
            if not member.isreg() or any(part[0] == '.' for part in name.split('/')):
                continue
            if name.lower().endswith('.tar'):
                for inner, offset, size in members(archive.extractfile(member)):
                    yield os.path.join(name[: -len('.tar')], inner), member.offset_data + offset, size
            else:
                yield name, member.offset_data, member.size
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b'\0'):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f'damaged header at byte {archive.offset}')


@functools.lru_cache(256)  # fewer than the files that a process may have open
def open_tar(path):
    return open(path, 'rb', buffering=0)


def read(path, offset, size):
    """size bytes of a file from offset. It moves no file position, so worker processes may share the open file."""
    return os.pread(open_tar(path).fileno(), size, offset)
