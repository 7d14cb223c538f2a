"""Lets these tests import the helper modules beside their folder."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
