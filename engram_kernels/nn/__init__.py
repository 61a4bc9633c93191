"""The ``Engram`` module, what puts it in the place of other models' modules, and its warm-up."""
