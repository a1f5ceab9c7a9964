"""The engine: the only room that imports DeepSpeed."""

from dynmoe_ds.engine.engine import Engine
from dynmoe_ds.engine.initialize import initialize

__all__ = ["Engine", "initialize"]
