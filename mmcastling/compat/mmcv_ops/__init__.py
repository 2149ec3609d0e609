"""mmcv's compiled ops on torch and torchvision."""
