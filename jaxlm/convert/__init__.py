"""Checkpoints in and out: their files, their names, their layouts."""
