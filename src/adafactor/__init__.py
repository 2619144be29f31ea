"""Adafactor for PyTorch: optimizer memory close to nothing, right in bfloat16, proven against the others."""

from importlib.metadata import version as _version

from adafactor import compat as compat
from adafactor import memory as memory
from adafactor import recipes as recipes
from adafactor._optimizer import Adafactor as Adafactor
from adafactor._plan import plan as plan

__version__ = _version("adafactor")
