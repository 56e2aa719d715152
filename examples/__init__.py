"""Runnable examples: reference backbones, data loading, the demo and the three-line loop."""
