"""Adafactor for PyTorch: optimizer memory close to nothing, right in bfloat16, proven against the others."""

from importlib import metadata as _metadata

from adafactor import compat as compat
from adafactor import memory as memory
from adafactor import recipes as recipes
from adafactor._optimizer import Adafactor as Adafactor
from adafactor._plan import plan as plan

try:
    __version__ = _metadata.version("adafactor")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"
