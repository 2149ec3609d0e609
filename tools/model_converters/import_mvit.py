"""Import the weights of an MViTv2 from another library into CastlingMViT."""

from mmcastling.run import run_cli
from mmcastling.weights.import_cli import run_importer

if __name__ == "__main__":
    run_cli(lambda: run_importer("mvit", __doc__))
