"""Module, data and Trainer from a configuration of Hydra, ``with_hydra.yaml``; pip install 'lightning-imaml[hydra]'.

python examples/with_hydra.py module.inner_solver.steps=10 data.ways=20
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import seed_everything


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces a value of the configuration")
    options = parser.parse_args(args)
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(__file__).resolve().parent), version_base=None):
        config = compose("with_hydra", options.overrides)
    seed_everything(config.seed, verbose=False)
    module, data, trainer = instantiate(config.module), instantiate(config.data), instantiate(config.trainer)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    print(f"Accuracy on {data.hparams['test_tasks']} new tasks: {tested['test/accuracy']:.1%}")
    print(f"Settings, losses and learning rates: {trainer.log_dir}")
    return dict(tested)


if __name__ == "__main__":
    main()
