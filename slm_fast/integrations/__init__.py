"""Integrations with other libraries and their files. Each module imports its own library; the package imports none."""
