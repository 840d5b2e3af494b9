"""The main job on real images with no network: attack two public encoders, harden them, compare."""

from .run import DemoResult, Scores, format_table, run_demo

__all__ = ["DemoResult", "Scores", "format_table", "run_demo"]
