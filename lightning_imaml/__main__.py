"""Run ``lightning-imaml`` as ``python -m lightning_imaml``."""

from lightning_imaml.cli import main

if __name__ == "__main__":
    main()
