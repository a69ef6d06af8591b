"""The exported network answers single images as ``predict`` does for the whole query set."""

from __future__ import annotations

import deploy


def test_single_images_are_answered_by_the_exported_program(tmp_path):
    found = deploy.main(["--meta-steps", "30", "--output", str(tmp_path / "letters.pt2")])
    assert found["difference"] < 1e-4
    assert found["accuracy"] > 0.4
