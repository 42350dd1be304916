"""Bridges to other libraries: each file the only importer of its own."""
