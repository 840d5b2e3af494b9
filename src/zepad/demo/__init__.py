"""The main job on real images with no network: attack two public encoders, harden them, compare."""

from .run import EPS, DemoResult, Scores, format_table, run_demo

__all__ = ["EPS", "DemoResult", "Scores", "format_table", "run_demo"]
