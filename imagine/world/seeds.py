"""Ranges of seeds: people for training, for training the judge, for evaluation and for the demo never overlap."""

TRAIN = range(0, 10_000_000)
JUDGE = range(10_000_000, 20_000_000)
SECOND_JUDGE = range(
    12_000_000, 15_000_000
)  # the part of JUDGE for the second recogniser; the first uses what precedes
HELD_OUT = range(20_000_000, 30_000_000)
DEMO = range(30_000_000, 40_000_000)
