"""The engines that train on several devices, and what each does with the base, the adapter and the optimizer."""

from plainlora.training.engines.engine import Engine
from plainlora.training.engines.trainer import OnEngine

__all__ = ["Engine", "OnEngine"]
