"""Adapters: one file a method; files with a leading underscore are the engine."""

import peft as _peft  # noqa: F401  # loading peft makes weft's methods known to it, before any of them is used
