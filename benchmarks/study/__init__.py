"""Does castling do on real data what the paper says? A study to repeat on a laptop.

python -m benchmarks.study a          # attentions against each other, Fashion-MNIST
python -m benchmarks.study nuclei     # the main ones as detectors, embedded nuclei
python -m benchmarks.study b          # schedules of the mask
python -m benchmarks.study c          # convolution, and other resolutions than trained
python -m benchmarks.study d          # castling a trained network
python -m benchmarks.study time       # training steps of all attentions, in turns
python -m benchmarks.study report     # docs/study.md and its plots from what is stored

Every run is stored when it ends, with its settings; a command that was stopped goes on
where it was, and refuses to mix runs of different settings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for its scripts' modules
