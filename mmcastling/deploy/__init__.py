"""From a trained model to what ships: pruned, verified, plain, in lower precision."""

from mmcastling.deploy.choosing import (
    AUTO,
    PrecisionChoice,
    best_precision,
    fastest,
)
from mmcastling.deploy.deployed_checkpoint import (
    DEPLOY_META_KEY,
    deploy_checkpoint,
    is_deployed,
    select_weights,
)
from mmcastling.deploy.precision import (
    PRECISIONS,
    check_precision,
    computes_in,
    may_gain,
    set_precision,
)
from mmcastling.deploy.verify import (
    difference_of,
    features,
    largest_difference,
    tensors_in,
)

__all__ = [
    "AUTO",
    "DEPLOY_META_KEY",
    "PRECISIONS",
    "PrecisionChoice",
    "best_precision",
    "check_precision",
    "computes_in",
    "deploy_checkpoint",
    "difference_of",
    "fastest",
    "features",
    "is_deployed",
    "largest_difference",
    "may_gain",
    "select_weights",
    "set_precision",
    "tensors_in",
]
