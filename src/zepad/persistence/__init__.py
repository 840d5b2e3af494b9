"""A model on disk, on the Hugging Face Hub, as a card and as an exported graph."""

from .card import CardDetails, model_card
from .commits import Published
from .folder import read_config, write_card
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
