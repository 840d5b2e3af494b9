"""A model on disk, on the Hugging Face Hub, as a card and as an exported graph."""

from .card import CardDetails, model_card, write_card
from .commits import Published
from .config import CONFIG_FILE, WEIGHT_FILES, Base, SavedConfig, SavedFile, parse_config, read_config
from .contents import Home, SavedModel, describe_model
from .export import export_model
from .hub import HubRepo
from .pretrained import Pretrained
from .publishing import check_folder, download, publish_folder

__all__ = [
    "CONFIG_FILE",
    "WEIGHT_FILES",
    "Base",
    "CardDetails",
    "Home",
    "HubRepo",
    "Pretrained",
    "Published",
    "SavedConfig",
    "SavedFile",
    "SavedModel",
    "check_folder",
    "describe_model",
    "download",
    "export_model",
    "model_card",
    "parse_config",
    "publish_folder",
    "read_config",
    "write_card",
]
