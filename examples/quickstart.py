"""Meta-train on the embedded letters and test on letters that were never seen: what ``make demo`` runs.

It runs the command line's ``fit`` and ``test`` on ``configs/quickstart.yaml``:

    lightning-imaml fit --config configs/quickstart.yaml
    lightning-imaml test --config configs/quickstart.yaml --ckpt_path logs/quickstart/…/checkpoints/best.ckpt

Options after the script's name go to ``fit``, for example ``--trainer.max_epochs 2``; ``lightning-imaml fit --help``
lists them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_imaml import cli

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(args: list[str] | None = None) -> dict[str, float]:
    """Fit, then test the checkpoint that was best on the validation letters; return the test metrics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _, options = parser.parse_known_args(args)

    fitted = cli.run(["fit", "--config", str(CONFIG), *options])
    best = fitted.trainer.checkpoint_callback.best_model_path
    folder = fitted.trainer.log_dir
    (tested,) = fitted.trainer.test(fitted.model, datamodule=fitted.datamodule, ckpt_path=best, verbose=False)
    print(f"The best checkpoint: {best}")
    print(f"The learning curve: {Path(folder) / 'learning_curve.png'}")
    return dict(tested)


if __name__ == "__main__":
    main()
