"""Static adversarial examples of public encoders for training: crafted once and kept, or crafted batch by batch."""

from .bank import DAEBank
from .crafting import Crafter
from .static import StaticDAEs, static_daes

__all__ = ["Crafter", "DAEBank", "StaticDAEs", "static_daes"]
