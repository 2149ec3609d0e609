"""Spares tests what MMEngine does anew in each run: 2 s of most of them."""

from types import SimpleNamespace

from mmengine.config import utils
from mmengine.dataset import base_dataset
from yapf.yapflib import yapf_api


def _once(function):
    """A function whose first argument says all, called once for each."""
    results = {}

    def call(first, **options):
        if first not in results:
            results[first] = function(first, **options)
        return results[first]

    return call


yapf_api.FormatCode = _once(yapf_api.FormatCode)  # the text of a config, five times
utils.load = _once(utils.load)  # a toolbox's hundred metafiles, for a config of its
base_dataset.gc = SimpleNamespace(collect=lambda: 0)  # of a dataset's annotations
