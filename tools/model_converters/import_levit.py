"""Import the weights of a LeViT from another library into CastlingLeViT."""

from mmcastling.engine import run_cli
from mmcastling.importers.cli import run_importer

if __name__ == "__main__":
    run_cli(lambda: run_importer("levit", __doc__))
