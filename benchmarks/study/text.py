"""The prose of the study's page."""

PREAMBLE = """\
# A study at a small scale: what castling does on real data

Made by `{command} report` from the runs in
`benchmarks/results/study`, one file per run with its
exact settings; each table's command is beside it and, if stopped, goes on from there.
Every sentence with a figure is generated.

**The scale is small.** Classifiers: Fashion-MNIST, the first {train:,} training
images with a border of 2 pixels, {epochs} epochs ({seen:,} images seen, no
augmentation), all {test:,} test images; a plain ViT of 2 layers, 32 channels, 2
heads, patches of 4, 64 tokens, no class token, so that a run takes well under a
minute on a CPU core. These networks are far from the end of training: the table says
who learns faster from little as much as who is better in the end. Detectors: see
below. The model and the data were shrunk to what a laptop repeats, never the seeds.

**How to read it.** An entry is the mean over seeds and the half-width of its 95%
interval (Student's t). Seeds are paired: all variants of a seed see the same batches
and start from the same weights wherever they have the same ones, and a difference is
that of each seed, averaged; its interval is the one to judge by. Each interval holds
at 95% by itself; among the many here one in twenty may miss. With 3 seeds intervals
are wide (t = 4.3): "not told apart" is not "equal".
"""

TIMED = """\
Training time: a step (batch of {batch}, forward, backward and update) timed in turns
with all others, median of {rounds} rounds on {threads} CPU thread (`python -m
benchmarks.study time`); with a branch, at its first threshold. Once the branch is off
a step of the full method takes {decayed} ms. The branch's MACs are those of a forward
pass with it on. Swin's windows have position biases of their own. At 64 tokens no
attention is the bottleneck: this says nothing about speed at detection sizes, see
[the auxiliary branch](auxiliary_branch.md) and [detector
training](detector_training.md).
"""

DETECTORS = """
## (a) Detectors on nuclei, 1,024 tokens

`{command} nuclei`: `configs/mask_rcnn_castling_nano_nuclei.py` as it is
(convolutional stem, 1,024 tokens in training, 4,096 in testing, convolution on the
grid, threshold from 1/N) but {iterations} iterations of its 700, from scratch; AP50
in percent on its 24 validation tiles. The intervals are over training seeds; the
tiles themselves leave a standard error of about 4.5 points on each AP50, which
pairing removes only in part. Training time is CPU seconds of the process on a shared
machine: read it as a rough guide.
"""

SCHEDULES = """
## (b) Schedules of the mask

`{command} b`: the full method of (a), one schedule for another. All begin at
threshold {start:g} (1.28 times uniform attention). Threshold decay raises it to 1,
weight fade lowers the branch's factor to 0, exponentially and until the given
fraction of training; the penalty is `mask_penalty={penalty:g}` at a fixed threshold.
"Pruning costs" is the accuracy before minus after, paired.

"""

RESOLUTIONS = """
## (c) Convolution, and resolutions other than trained

`{command} c`: the full method with the paper's convolution along the line of tokens
(kernel 9) or ours on the grid (3x3), trained at 1x (64 tokens), tested on the same
images enlarged bilinearly 2x (256 tokens) and 4x (1,024 tokens; on the first {few:,}
test images). The position embedding is resized, patches keep their size, so objects
grow in tokens: part of the loss is the network's, not the attention's, as the row of
softmax shows. `reference_tokens=64` scales the linear term by 64/N; at 1x it changes
nothing, so the same weights are tested with and without.

"""

DEFAULTS = """
## What it says about our defaults

An alternative replaces a default only where its whole interval lies above zero.

"""

DECISIONS = {
    "hook": "`MaskDecayHook` has `mode='threshold', finish=0.7`. Against it, pruned: ",
    "convolution": "`local_conv` on the grid against the line; detection and "
    "segmentation configs on a plain ViT have the grid: ",
    "reference": "`reference_tokens` on against off; the CamVid config alone has it, "
    "for frames of 3.5 times its crops' tokens: ",
}

UNKNOWN = """
## What remains unknown

- **ImageNet.** Published gains come from networks of a hundred times the size,
  hundreds of epochs and a strong teacher. Nothing here can confirm or deny them.
- **COCO.** One small set of micrographs with one class and a few hundred test objects
  stands for dense prediction. Whether the full method holds its place at 4,096 tokens
  with large objects and pretrained backbones is not measured.
- **The branch where attention is sharp.** Networks this young attend almost
  uniformly; a trained or pretrained network has sharper attention, and what the
  branch adds may differ.
- **Learning rates.** All variants share one, chosen by a glance at softmax and the
  full method; a peer may do better with its own.
"""
