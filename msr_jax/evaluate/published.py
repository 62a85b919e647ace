"""Figures that others published, quoted with their sources: the paper's text and its repository's table of checkpoints.

The paper's tables are not available as text; what its text does not give is None here and is not guessed.
"""

from typing import NamedTuple

REPOSITORY = "repository of the paper, table of checkpoints"
PAPER = "text of arXiv 2412.06965"


class Row(NamedTuple):
    """One published system. SI-SDRi and SDR in dB, seconds per segment of the data set, RTF, parameters; None: not given."""

    system: str
    source: str
    si_sdri: float | None = None
    sdr: float | None = None
    sir: float | None = None
    sar: float | None = None
    seconds: float | None = None
    rtf: float | None = None
    parameters: float | None = None
    note: str = ""


# Keyed by the number of channels: Slakh2100 is mono (SI-SDRi by the MSDM convention), MUSDB18-HQ stereo.
PUBLISHED = {
    1: [
        Row("Demucs", PAPER, seconds=0.111, parameters=40e6),
        Row("Demucs + Gibbs (256)", PAPER, seconds=56.0, note="+1.6 dB SI-SDRi over Demucs"),
        Row("MSDM", PAPER, seconds=4.6),
        Row("ISDM", PAPER, seconds=18.4),
        Row("MSG", PAPER),
        Row("Det.", REPOSITORY, 21.384, 10.856, 18.1, 12.2, 0.114, 0.009, 405e6, "SIR, SAR and time from the text"),
        Row("Det. × 2", PAPER, note="between Det. and Det. + Diff."),
        Row("Det. + Diff.", REPOSITORY, 22.747, 11.650, 18.9, 12.6, 0.570, 0.048, None, "SIR, SAR and time from the text"),
        Row("Det. + CD, T = 1", REPOSITORY, 23.073, 11.614, None, None, 0.228, 0.019, None, "time from the text"),
        Row("Det. + CD, T = 2", PAPER, note="about +0.8 dB SI-SDRi, +0.4 dB SDR over Det. + Diff."),
        Row("Det. + CD, T = 4", PAPER, None, None, 20.5, 13.2, 0.570, note="about +2.9 dB SI-SDRi, +1.05 dB SDR over Det."),
    ],
    2: [
        Row("Demucs (s = 10)", PAPER, seconds=1.087),
        Row("Hybrid Demucs", PAPER),
        Row("HT Demucs", PAPER),
        Row("BS-RNN", PAPER),
        Row("MSG", PAPER),
        Row("Det.", REPOSITORY, 15.098, 9.999, 17.46, 10.65, 0.231, None, None, "SIR, SAR and time from the text"),
        Row("Det. × 2", PAPER, note="no better than Det."),
        Row("Det. + Diff.", REPOSITORY, 15.566, 10.581, 17.86, 11.20, note="SIR and SAR from the text"),
        Row("Det. + CD, T = 1", REPOSITORY, 15.610, 10.602, 17.83, 11.29, 1.291, 0.117, None, "SIR, SAR and time from the text"),
        Row("Det. + CD, T = 2", PAPER, seconds=2.351, rtf=0.214, note="no gain over T = 1"),
        Row("Det. + CD, T = 4", PAPER, note="no gain over T = 1"),
    ],
}  # fmt: skip
DATA = {1: "Slakh2100", 2: "MUSDB18-HQ"}
