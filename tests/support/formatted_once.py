"""Has MMEngine format the text of a config once: yapf takes 0.4 s, five times a run."""

from yapf.yapflib import yapf_api

_format, _formatted = yapf_api.FormatCode, {}


def _format_once(text, **options):
    if text not in _formatted:
        _formatted[text] = _format(text, **options)
    return _formatted[text]


yapf_api.FormatCode = _format_once
