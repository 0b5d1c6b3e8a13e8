"""Sphinx configuration. Pages are Markdown; what describes code is generated from the code by `_ext/generated.py`."""

import sys
from pathlib import Path

import importlib_metadata

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "ollm"
author = "the ollm developers"
version = release = importlib_metadata.version("ollm-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ollm {version}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `code` as Markdown does
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
