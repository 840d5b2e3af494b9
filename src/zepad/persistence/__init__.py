"""A model on disk, on the Hugging Face Hub, as a card and as an exported graph."""

from .card import CardDetails, model_card, write_card
from .commits import Published
from .config import read_config
from .hub import HubRepo
from .publishing import download, publish_folder

__all__ = [
    "CardDetails",
    "HubRepo",
    "Published",
    "download",
    "model_card",
    "publish_folder",
    "read_config",
    "write_card",
]
