"""Sphinx configuration. Pages are Markdown; what describes code was generated from the code by `_ext/generated.py`."""

import importlib_metadata

project = "ollm"
author = "the ollm developers"
version = release = importlib_metadata.version("ollm-core")

extensions = ["myst_parser"]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"ollm {version}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
