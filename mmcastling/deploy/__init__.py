"""From a training checkpoint to what ships: pruned, verified, plain, exported.

Where torch is not installed, what is left is :mod:`mmcastling.deploy.runtime`.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from mmcastling.deploy.checkpoint import (
        DEPLOY_META_KEY,
        deploy_checkpoint,
        is_deployed,
        select_weights,
    )
    from mmcastling.deploy.config import deploy_config, drop_training_hooks
    from mmcastling.deploy.precision import (
        PRECISIONS,
        check_precision,
        set_precision,
    )
    from mmcastling.deploy.verify import (
        difference_of,
        features,
        largest_difference,
        tensors_in,
    )

    __all__ = [
        "DEPLOY_META_KEY",
        "PRECISIONS",
        "check_precision",
        "deploy_checkpoint",
        "deploy_config",
        "difference_of",
        "drop_training_hooks",
        "features",
        "is_deployed",
        "largest_difference",
        "select_weights",
        "set_precision",
        "tensors_in",
    ]
