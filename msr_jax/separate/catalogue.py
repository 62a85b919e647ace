"""Which songs to separate, and where their stems go: files, folders, patterns, lists, and every N-th of them."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from string import Formatter

from msr_jax.audio.headers import AUDIO_SUFFIXES
from msr_jax.audio.io import audio_info
from msr_jax.data.stem_mp4 import SUFFIX
from msr_jax.errors import UserError
from msr_jax.messages import log
from msr_jax.process import parse_shard
from msr_jax.separate.places import find_urls, is_url, local_path, name_of, path_of, read_list
from msr_jax.separate.songs import Task, song_name

SONG_SUFFIXES = frozenset({*AUDIO_SUFFIXES, SUFFIX})  # in folders; of `.stem.mp4` the mixture is separated
FILENAME = "{folder}/{track}/{stem}.{ext}"
# Who one is among how many, as launchers tell it; JAX's own processes first, then `mpirun`, `srun`, a pod's hosts.
RANKS = (
    (("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"), "JAX_NUM_PROCESSES"),
    (("OMPI_COMM_WORLD_RANK",), "OMPI_COMM_WORLD_SIZE"),
    (("SLURM_PROCID",), "SLURM_STEP_NUM_TASKS"),
)


def folder_name(song: Path) -> str:
    """The name of a song's folder of stems: the song's without suffix, or all of it where only dots would be left (`...wav`)."""
    name = song_name(song)
    return name if name.strip(".") else song.name


def find_shard(
    given: str | None, env: Mapping[str, str], processes: int | None, process: int | None
) -> tuple[int, int]:
    """(K, N): this process takes every N-th song from the K-th.

    By --shard K/N, else by --process and --processes, else by what a launcher tells its processes; none of them needs the others.

    Raises:
      UserError: not K of N, or half of it.
    """
    if given is not None:
        return parse_shard(given)
    if (processes is None) != (process is None):
        raise UserError("--processes and --process are given together or not at all")
    if processes is not None and process is not None:
        if not 0 <= process < processes:
            raise UserError(f"process {process} of {processes}: they are counted from 0")
        return process + 1, processes
    for names, count in RANKS:
        rank = next((env[name] for name in names if name in env), None)
        if rank is not None and count in env:
            if not (rank.isdecimal() and env[count].isdecimal() and int(rank) < int(env[count])):
                raise UserError(f"{count} is {env[count]} and this process {rank} of them: they are counted from 0")
            return int(rank) + 1, int(env[count])
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 and env.get("TPU_WORKER_ID", "").isdecimal():
        return int(env["TPU_WORKER_ID"]) + 1, len(hosts)
    return 1, 1


def find_tasks(
    given: Iterable[str | Path], out: Path, listed: str | Path | None = None, filename: str | None = None
) -> list[Task]:
    """The songs, each with a place of its own in `out`.

    Args:
      given: files, whose folders are named after them; folders and patterns (`music/**/*.mp3`), whose songs keep the folders
        that they are in below the one that is common to them. All may be URLs.
      listed: a list of songs, see `read_list`; as a pattern's songs.
      filename: where stems go in `out`, of {folder}, {track}, {stem} and {ext}; None is `FILENAME`.

    Raises:
      UserError: nothing there, an unreadable list, or two songs would share a place.
    """
    tasks: dict[str, Task] = {}
    names = _Names(out, filename or FILENAME)
    for place in map(str, given):
        is_found = True
        if is_url(place):
            urls, folder = find_urls(place, SONG_SUFFIXES)
            if urls == [place]:
                found, is_found = [names.task(place, "")], False
            else:
                urls = _outside(urls, folder or _beginning(place), out)
                found = names.below(folder, urls) if folder else names.below_common(urls)
        elif os.path.isdir(place):
            found = names.below(place, _songs_in(Path(place), out))
            if not found:
                raise UserError(f"{place} holds no audio files; name one that does, or a song")
        elif not os.path.exists(place) and glob.has_magic(place):
            paths = _each_once(p for p in sorted(glob.glob(place, recursive=True)) if not os.path.isdir(p))
            found = names.below_common(_outside(paths, _beginning(place), out))
        else:
            found, is_found = [names.task(place, "")], False
        if not found:
            raise UserError(f"no file is called like {place}")
        _add(tasks, (task._replace(is_found=is_found) for task in found))
    if listed:
        _add(tasks, names.below_common(read_list(str(listed))))
    if not tasks:
        raise UserError("no songs are named; give files, folders, patterns or --list FILE")
    _check_places([task for task in tasks.values() if not task.is_found])
    return list(tasks.values())


def _add(tasks: dict[str, Task], more: Iterable[Task]) -> None:
    """Each file once; one that is named somewhere counts as named."""
    for task in more:
        path = local_path(task.source)
        one = task.source if path is None else os.path.abspath(path)
        before = tasks.setdefault(one, task)
        if before.is_found and not task.is_found:
            tasks[one] = before._replace(is_found=False)


def _check_places(tasks: Sequence[Task]) -> None:
    """Raises UserError if two songs would share a place."""
    by_place: dict[tuple, list[Task]] = {}
    for task in tasks:
        by_place.setdefault((task.folder, task.names), []).append(task)
    shared = [together for together in by_place.values() if len(together) > 1]
    if shared:
        one, other = shared[0][:2]
        is_own = one.names == "{stem}.{ext}"
        place = f"two songs are named {one.folder.name}" if is_own else f"the stems of two songs are {one.names}"
        more = f" (and {len(shared) - 1} more such names)" if len(shared) > 1 else ""
        raise UserError(
            f"{place} and would share a folder: {one.source} and {other.source}{more}; separate them into different folders"
        )


class _Names:
    """Where stems go."""

    def __init__(self, out: Path, filename: str):
        try:
            fields = {field for _, field, form, change in Formatter().parse(filename) if field is not None}
            plain = all(not form and not change for _, _, form, change in Formatter().parse(filename))
        except ValueError:
            fields, plain = set(), False
        if not plain or not {"track", "stem", "ext"} <= fields <= {"folder", "track", "stem", "ext"}:
            raise UserError(
                f"--filename is made of {{track}}, {{stem}} and {{ext}}, and {{folder}} if wanted, as in {FILENAME}; not '{filename}'"
            )
        parts = PurePosixPath(filename).parts
        if PurePosixPath(filename).is_absolute() or ".." in parts or not parts[-1].endswith(".{ext}"):
            raise UserError(f"--filename is a place in the folder of -o that ends in .{{ext}}, not '{filename}'")
        own = next(k for k, part in enumerate(parts) if "{stem}" in part or "{ext}" in part)
        self.out, self.folder, self.names = out, "/".join(parts[:own]), "/".join(parts[own:])
        self.is_shared = "{track}" not in self.folder

    def task(self, song: str, folder: str) -> Task:
        """`folder`: that the song is in, below the common one."""
        path = Path(name_of(song)) if is_url(song) else Path(song)
        told = {"folder": _inside(folder) or ".", "track": _inside(folder_name(path))}
        braced = {name: text.replace("{", "{{").replace("}", "}}") for name, text in told.items()}
        names = self.names.format(**braced, stem="{stem}", ext="{ext}")
        return Task(path, self.out / self.folder.format(**told), names, self.is_shared, song if is_url(song) else None)

    def below(self, folder: str, songs: Iterable[str]) -> list[Task]:
        start = _place(folder)
        return [self.task(song, os.path.relpath(os.path.dirname(_place(song)), start)) for song in songs]

    def below_common(self, songs: Sequence[str]) -> list[Task]:
        if not songs:
            return []
        return self.below(os.path.commonpath([os.path.dirname(_place(song)) for song in songs]), songs)


def _place(song: str) -> str:
    """An absolute path, also of a URL: its parts."""
    path = local_path(song)
    return "/" + _inside(f"{song.partition('://')[0]}/{path_of(song)}") if path is None else os.path.abspath(path)


def _inside(place: str) -> str:
    """A place below another, whatever it is called: in a store `..` is a name as others are, and here it leads out."""
    return "/".join("%2E%2E" if part == ".." else part for part in place.split("/"))


def _beginning(pattern: str) -> str:
    """The folder that a pattern's files are in, or below."""
    parts = pattern.split("/")
    first = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")


def _outside(songs: Sequence[str], start: str, out: Path) -> list[str]:
    """Without those in `out`, which are stems, unless the search began in there; then see `without_stems`."""
    own = out.resolve()
    is_in_out = lambda place: (path := local_path(place)) is not None and path.resolve().is_relative_to(own)
    return list(songs) if is_in_out(start) else [song for song in songs if not is_in_out(song)]


def _each_once(songs: Iterable[str]) -> list[str]:
    """Each file once, on the way with the fewest links to its folder: a link may lead round in circles."""
    links = cache(lambda folder: sum(map(os.path.islink, (folder, *map(str, Path(folder).parents)))))
    found: dict[tuple[str, str], str] = {}
    for song in sorted(songs, key=lambda song: links(os.path.dirname(song))):
        folder, name = os.path.split(song)
        found.setdefault((os.path.realpath(folder), name), song)
    return sorted(found.values())


def _songs_in(folder: Path, out: Path) -> list[str]:
    """Audio files at any depth, in linked folders too, last; those of hidden names and those in `out` are not for it.

    Raises:
      UserError: the folder cannot be searched. Of those below it that cannot, the log tells.
    """

    def tell(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"{folder} cannot be searched: {error.strerror}") from error
        log.info(f"{error.filename} cannot be searched ({error.strerror}); what is in there is left out")

    found: list[str] = []
    start, own = os.path.realpath(folder), os.path.realpath(out)
    seen = {start, own}  # links may lead round in circles
    is_in_out = lambda real: Path(real).is_relative_to(own)

    def is_new(place: str) -> bool:
        real = os.path.realpath(place)
        if real in seen or (is_in_out(real) and not is_in_out(start)):
            return False
        seen.add(real)
        return True

    starts = [os.fspath(folder)]
    for begin in starts:  # links to folders are added: what is there without them is found first, under its own name
        if begin != starts[0] and not is_new(begin):
            continue
        for place, folders, names in os.walk(begin, onerror=tell):
            shown = [os.path.join(place, n) for n in sorted(folders) if not n.startswith(".")]
            starts += filter(os.path.islink, shown)
            folders[:] = [os.path.basename(p) for p in shown if not os.path.islink(p) and is_new(p)]
            songs = (n for n in sorted(names) if not n.startswith(".") and n.lower().endswith(tuple(SONG_SUFFIXES)))
            found += [os.path.join(place, n) for n in songs]
    return found


def _places(task: Task, stems: Sequence[str], suffix: str) -> list[str]:
    """Of a song's stems, links to its folder followed. (In text: of a hundred thousand songs paths take ten seconds.)"""
    folder = os.path.realpath(task.folder)
    return [os.path.join(folder, task.names.format(stem=stem, ext=suffix)) for stem in stems]


def _spellings(task: Task) -> set[str]:
    """The places of a song on this machine, links to its folder followed: its own, and that of the file that it is a link to."""
    path = local_path(task.source)
    return set() if path is None else {os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(path)}


def _is_as_long(song: str, stem: str | None) -> bool:
    """Whether a file has the samples and the rate that a stem beside it has; not, where either cannot be read."""
    if stem is None:
        return False
    try:
        one, other = audio_info(song), audio_info(stem)
    except UserError:
        return False
    return one.frames is not None and (one.frames, one.sample_rate) == (other.frames, other.sample_rate)


def without_stems(tasks: Sequence[Task], stems: Sequence[str]) -> list[Task]:
    """Without songs that were found where stems of others go, in whatever format: an earlier run or another process put them there.

    Else a second run into the folder that it searches would separate the first one's stems. In a song's own folder of stems a
    file of another name is one too, a residual or another model's, where it is as long as they are; an album's song is not.

    Args:
      stems: all that the model has, whichever are wanted now.
    """
    if not any(task.is_found for task in tasks):
        return list(tasks)
    is_shared = {place.removesuffix(".wav"): t.is_shared for t in tasks for place in _places(t, stems, "wav")}
    songs = [_spellings(task) if task.is_found else set() for task in tasks]
    place_of = lambda song: os.path.splitext(song)[0]
    beside = {os.path.dirname(s): s for spelled in songs for s in spelled if not is_shared.get(place_of(s), True)}
    is_stem = lambda song: place_of(song) in is_shared or _is_as_long(song, beside.get(os.path.dirname(song)))
    left: list[Task] = []
    dropped: list[Task] = []
    for task, spelled in zip(tasks, songs, strict=True):
        (dropped if any(map(is_stem, spelled)) else left).append(task)
    if dropped:
        log.info(
            f"taken for stems, as they are where those of other songs go: {len(dropped)} files, such as {dropped[0].song}"
        )
    return left


def check_stems(tasks: Sequence[Task], stems: Sequence[str], suffix: str, is_any_format: bool = False) -> None:
    """Raises UserError if a stem would take the place of a song, or two songs would share one.

    `is_any_format`: also one that differs in its suffix alone.
    """
    key = (lambda place: os.path.splitext(place)[0]) if is_any_format else lambda place: place
    songs = {key(song) for task in tasks for song in _spellings(task)}
    for task in tasks:
        for place in _places(task, stems, suffix):
            if key(place) in songs:
                raise UserError(
                    f"the stem {place} would replace a song that is to be separated, unless it is a stem of an earlier run; "
                    "name another folder, or the songs themselves"
                )
    _check_places(tasks)
