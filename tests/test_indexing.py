"""Rules of the published cuts, where no fixture is at hand."""

import numpy as np

from msr_jax.data.indexing import kept_chunks, musdb_segments, number_of_crops, released_crops
from msr_jax.metrics.si_sdr import is_silent


def test_crops_lie_inside_one_song_whatever_the_shift():
    crop, durations = 1000, np.array([1300, 1000, 5230, 2501])
    items = np.repeat(np.arange(number_of_crops(durations, crop)), crop)
    shifts = np.tile(np.arange(-crop // 2, crop // 2), number_of_crops(durations, crop))
    found = released_crops(durations, crop, items, shifts)
    assert (found.offset >= 0).all() and (found.offset + crop <= durations[found.song]).all()
    assert set(found.song) == {0, 1, 2, 3}


def test_without_shift_a_single_song_is_cut_end_to_end():
    found = released_crops(np.array([3700]), 1000, np.arange(3), np.zeros(3, int))
    assert found.offset.tolist() == [0, 1000, 2000]
    # The last one may end with the song; a sample later it is moved.
    found = released_crops(np.array([3000]), 1000, np.array([2, 2]), np.array([0, 1]))
    assert found.offset.tolist() == [2000, 1501]


def test_the_threshold_of_silence_is_a_norm_over_samples():
    for samples in (1000, 100_000):
        level = 1.5e-5 * np.sqrt(samples)
        assert is_silent(np.full((1, samples), 0.99 * level, np.float32))
        assert not is_silent(np.full((1, samples), 1.01 * level, np.float32))


def test_chunks_need_two_active_stems_and_full_length():
    stems = np.zeros((4, 450), np.float32)
    stems[0, :300] = stems[1, 100:450] = stems[2, 200:300] = 0.1
    assert kept_chunks(stems, 100).tolist() == [1, 2]


def test_the_last_musdb_segment_counts_even_if_cut():
    segment = 11 * 44_100
    assert musdb_segments(np.array([1, segment, segment + 1, 3 * segment])).tolist() == [1, 1, 2, 3]
