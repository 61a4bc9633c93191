"""The shape of a model's Engram: config, hash plan, token map, row formats. No tensors of rows."""

from .rooms import find_modules

find_modules(globals())
