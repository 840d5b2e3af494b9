"""A model on disk, on the Hub and as an exported graph."""
