"""Scripts for those who work on the library; not installed with it."""
