"""Songs to evaluate: references from track folders, and estimates that another tool left in folders beside them.

What does not fit is named: small differences are mended and noted, the rest is a problem of that track.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msr_jax.audio.io import audio_info, read_audio, resample
from msr_jax.data import stem_mp4
from msr_jax.data.tracks import (
    LENGTH_TOLERANCE,
    MUSDB,
    SLAKH,
    audio_file,
    child,
    is_audio,
    is_mp4,
    plain,
    read_track,
    to_channels,
    track_name,
)
from msr_jax.errors import UserError

REST = "rest"  # the stem that stands for those that nobody asked for: the mixture less the others


def stems_of(folder: Path) -> list[str]:
    """The stems that a folder of reference tracks has, in the order of its data set.

    Raises:
      UserError: the folder has neither the stems of MUSDB18 nor those of Slakh2100.
    """
    files = list(folder.glob("*/*"))
    if any(plain(f.name) == "metadata.yaml" for f in files):
        return list(SLAKH)
    names = {plain(f.stem) for f in files if is_audio(f)}
    whole = [track for track in sorted(folder.iterdir()) if is_mp4(track)]
    if whole and not names:
        return stem_mp4.streams_of(whole[0])[1:]
    found = [stems for stems in (MUSDB, SLAKH) if names & {stems[2], stems[3]}]
    if len(found) != 1:
        raise UserError(f"{folder} holds neither the stems of MUSDB18 nor those of Slakh2100; name them with --stems")
    return list(found[0])


def others_of(folder: Path, stems: Sequence[str]) -> list[str]:
    """Stems that the tracks of MUSDB18 or Slakh2100 in a folder have beside these: their mixture has them in it all the same.

    Raises:
      UserError: there are such, and one of `stems` is called as they are together.
    """
    if not folder.is_dir():  # which is said where tracks are looked for
        return []
    try:
        known = stems_of(folder)
    except UserError:  # a data set of one's own, whose stems are those that are asked for
        return []
    names = {plain(stem) for stem in stems}
    if names - {REST} - set(map(plain, known)):  # stems of one's own, which may be sums of the set's ("instrumental")
        return []
    files = {plain(f.name if plain(f.name) == "metadata.yaml" else f.stem) for f in folder.glob("*/*")}
    is_whole = "metadata.yaml" in files or not files  # all stems are in each track
    others = [stem for stem in known if plain(stem) not in names and (is_whole or plain(stem) in files)]
    if others and REST in names:
        raise UserError(f"{folder} has {', '.join(others)} too, and a stem called '{REST}' leaves no name for them")
    return others


def check_all_stems(folder: Path, stems: Sequence[str]) -> None:
    """Raises UserError if the tracks in a folder have other stems in their mixture, which `msr evaluate` alone can score."""
    if others := others_of(folder, stems):
        raise UserError(
            f"{folder} has {', '.join(others)} in its mixtures too, which the model does not give; msr evaluate scores such models"
        )


def format_of(folders: Sequence[Path], stems: Sequence[str]) -> tuple[int, int, list[str]]:
    """(sample rate in Hz, channels, files that have others) that most files of reference tracks have; Slakh2100 as distributed
    is mono. Files that cannot be read have no say.

    Raises:
      UserError: no file can be read; what is wrong with the first.
    """
    found: dict[Path, tuple[int, int]] = {}
    wrong = None
    for path in (p for folder in folders for p in _files(folder, stems)):
        try:
            if is_mp4(path):
                found[path] = stem_mp4.format_of(path)
            else:
                info = audio_info(path)
                found[path] = info.sample_rate, info.channels
        except UserError as error:
            wrong = wrong or error
    if not found:
        raise wrong or UserError(f"{folders[0]} holds no audio for any of {', '.join(stems)}")
    (rate, channels), _ = Counter(found.values()).most_common(1)[0]
    odd = [f"{p.parent.name}/{p.name}" for p, kind in found.items() if kind != (rate, channels)]
    return rate, channels, odd


def _files(folder: Path, stems: Sequence[str]) -> list[Path]:
    """Audio files of a reference track."""
    if is_mp4(folder):
        return [folder]
    named = [path for stem in stems if (path := audio_file(folder, stem))]
    return named or [path for path in sorted(child(folder, "stems").glob("*")) if is_audio(path)]


def load_references(
    folder: Path, stems: Sequence[str], sample_rate: int, channels: int, others: Sequence[str] = ()
) -> np.ndarray:
    """Reference stems (stems, channels, samples) float32 at `sample_rate` Hz, as `read_track` has them.

    With `others` the last of `stems` is `REST`, and the sum of these.

    Those that had to be resampled are rounded to 16 bits, as the data sets' own conversion leaves them: a resampler that
    computes in floating point leaves nothing above its pass band, and BSSEval's projections are singular without that noise.

    Raises:
      UserError: as `read_track`.
    """
    read = [*stems[:-1], *others] if others else stems
    track = read_track(folder, read, sample_rate, channels)
    for j, stem in enumerate(read):
        if stem in track.resampled:
            track.audio[j] = np.rint(track.audio[j] * 2**15) / 2**15
    found = track.audio.swapaxes(1, 2)
    named = len(read) - len(others)
    return np.concatenate([found[:named], found[named:].sum(0, keepdims=True)]) if others else found


def load_estimates(
    folder: Path, stems: Sequence[str], references: np.ndarray, sample_rate: int, has_rest: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Estimates of one track, brought to the shape of its references, and notes on what had to be changed.

    Args:
      folder: holds STEM.wav or STEM.flac for every stem.
      has_rest: the last stem is `REST`; without a file it is the mixture less the others.
      references: (stems, channels, samples).

    Raises:
      UserError: a stem is missing, unreadable, NaN, has an unfit number of channels, or differs by more than 0.15 s.
    """
    _, channels, samples = references.shape
    paths = {stem: path for stem in stems if (path := audio_file(folder, stem))}
    missing = [stem for stem in (stems[:-1] if has_rest else stems) if stem not in paths]
    if missing:
        raise UserError(f"{folder} lacks the estimates of {', '.join(missing)}")
    found, notes = np.zeros(references.shape, np.float32), []
    for j, stem in enumerate(stems):
        if stem not in paths:
            found[j] = references.sum(0) - found[:j].sum(0)
            continue
        path = paths[stem]
        audio, rate = read_audio(path)
        if audio.shape[1] != channels:
            notes.append(f"{path.name} has {audio.shape[1]} channels, scores are of {channels}: converted")
        audio = to_channels(audio, channels, path)
        if rate != sample_rate:
            notes.append(f"{path.name} is at {rate} Hz, scores are at {sample_rate} Hz: resampled")
            audio = resample(audio, rate, sample_rate)
        apart = len(audio) - samples
        if abs(apart) > LENGTH_TOLERANCE * sample_rate:
            raise UserError(
                f"{path} lasts {len(audio) / sample_rate:.2f} s, its reference {samples / sample_rate:.2f} s"
            )
        if apart:
            notes.append(
                f"{path.name} is {abs(apart)} samples {'longer: cut' if apart > 0 else 'shorter: zeros added'}"
            )
        length = min(samples, len(audio))
        found[j, :, :length] = audio[:length].T
    return found, notes


def pair_folders(estimates: Path, tracks: Sequence[Path]) -> tuple[dict[str, Path], list[str], list[str]]:
    """Folders of estimates by the name of the reference track.

    Returns:
      ({track: folder of its estimates}, references without estimates, folders of estimates without a reference).

    Raises:
      UserError: there is no such folder, or no name in it matches.
    """
    if not estimates.is_dir():
        raise UserError(f"{estimates} is no folder; name one that holds a folder of estimates for each track")
    folders = [p for p in sorted(estimates.iterdir()) if p.is_dir() and not p.name.startswith((".", "__MACOSX"))]
    names = [track_name(t) for t in tracks]
    exact = {track_name(p): p for p in folders}
    there = {plain(name): p for name, p in exact.items()}
    paired = {n: p for n in names if (p := exact.get(n, there.get(plain(n))))}
    if not paired:
        raise UserError(f"no folder in {estimates} has the name of a reference track, such as {names[0]}")
    return (
        paired,
        [n for n in names if n not in paired],
        [name for name, p in exact.items() if p not in paired.values()],
    )
