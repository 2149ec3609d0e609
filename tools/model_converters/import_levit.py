"""Import the weights of a LeViT from another library into CastlingLeViT."""

from mmcastling.run import run_cli
from mmcastling.weights.import_cli import run_importer

if __name__ == "__main__":
    run_cli(lambda: run_importer("levit", __doc__))
