"""The main job on real images with no network: attack two public encoders, harden them, compare."""

from .run import format_table, run_demo

__all__ = ["format_table", "run_demo"]
