"""Data modules of one dataset each, and those of a folder, of formulas and of learn2learn."""
