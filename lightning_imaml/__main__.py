"""``python -m lightning_imaml`` is ``lightning-imaml``."""

from lightning_imaml.cli import main

if __name__ == "__main__":
    main()
