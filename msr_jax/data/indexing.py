"""Where the published data sets cut their songs: training crops, evaluation chunks, MUSDB segments.

Training here draws its crops from records (see `pipeline`); these rules say what the published numbers were made on.
"""

from typing import NamedTuple

import numpy as np

from msr_jax.metrics.si_sdr import SILENT, is_silent

MUSDB_SECONDS = 11


class Crop(NamedTuple):
    """A training crop: the song's index and the first sample inside it; both int arrays of one shape."""

    song: np.ndarray
    offset: np.ndarray


def released_crops(durations: np.ndarray, crop: int, item: np.ndarray, shift: np.ndarray) -> Crop:
    """Place of the published Slakh2100 training items, songs being laid end to end.

    An item that would cross the end of a song is moved half a crop into it. The item's middle decides the song, so a
    song shorter than a crop must have been left out before, as in the published set (12 s at least, crops of 11.9 s).

    Args:
      durations: (songs,) samples.
      item: number of the item, below `number_of_crops`; any shape.
      shift: drawn from [-crop/2, crop/2), or 0 without shifting; shape of `item`.
    """
    ends = np.cumsum(np.asarray(durations, np.float64))
    half, offset = crop // 2, np.asarray(item, np.int64) * crop + np.asarray(shift, np.int64)
    song = np.searchsorted(ends, offset + half)
    end = ends[song]
    start = end - np.asarray(durations, np.float64)[song]
    late, early = offset > end - crop, offset < start
    moved = np.where(
        late, np.maximum(start, offset - half), np.where(early, np.minimum(end - crop, offset + half), offset)
    )
    return Crop(song, (moved - start).astype(np.int64))


def number_of_crops(durations: np.ndarray, crop: int) -> int:
    """Items of an epoch: the crops that fit into all songs laid end to end."""
    return int(np.sum(durations) // crop)


def kept_chunks(stems: np.ndarray, chunk: int, threshold: float = SILENT) -> np.ndarray:
    """Indices k of the published evaluation chunks [k·chunk, (k+1)·chunk): at least two stems active, no incomplete one.

    Args:
      stems: (stems, samples).
    """
    count = stems.shape[1] // chunk
    cut = stems[:, : count * chunk].reshape(len(stems), count, chunk)
    return np.flatnonzero((~is_silent(cut[:, :, None], threshold)).sum(0) >= 2)


def musdb_segments(samples: np.ndarray, sample_rate: int = 44_100) -> np.ndarray:
    """Number of 11 s segments of MUSDB18 songs of so many samples; the last one is padded with zeros.

    >>> int(musdb_segments(60 * 44_100))
    6
    """
    return -(-np.asarray(samples) // (MUSDB_SECONDS * sample_rate))
