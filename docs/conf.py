"""Sphinx: `make docs` writes the pages to build/docs, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import spectral_surgery

project = "spectral_surgery"
copyright = "the contributors to spectral_surgery"
release = spectral_surgery.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "__init__"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields are listed once, and not as members too
