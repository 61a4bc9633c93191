"""Objects that registered ops find by a text: they take tensors and numbers alone, and torch.compile keeps texts."""

from itertools import count
from weakref import WeakValueDictionary


class Registry:
    """Live objects of one kind, which is named in errors, by a number as a text; nothing is kept alive."""

    def __init__(self, kind: str):
        self._kind, self._numbers = kind, count()
        self._objects: WeakValueDictionary[str, object] = WeakValueDictionary()

    def enter(self, thing: object) -> str:
        """The name by which ``thing`` is found from now on."""
        name = str(next(self._numbers))
        self._objects[name] = thing
        return name

    def find(self, name: str):
        """The object of this process with that name; ValueError where it is gone."""
        thing = self._objects.get(name)
        if thing is None:
            raise ValueError(f"hash_lookup: the {self._kind} of this compiled graph is no longer there; keep it")
        return thing
