"""Import the weights of a vision transformer from another library into CastlingViT."""

from mmcastling.run import run_cli
from mmcastling.weights.import_cli import run_importer

if __name__ == "__main__":
    run_cli(lambda: run_importer("vit", __doc__))
