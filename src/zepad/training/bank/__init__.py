"""Static adversarial examples of public encoders for training: crafted once and kept, or crafted batch by batch."""

from .bank import DAEBank
from .crafting import Crafter
from .static import Banked, StaticDAEs, Streamed, static_daes

__all__ = ["Banked", "Crafter", "DAEBank", "StaticDAEs", "Streamed", "static_daes"]
