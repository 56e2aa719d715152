"""Recipes for public backbones: one module each, which builds a small network from a checkout of its repository."""
