"""Trains a recall model: `python tools/train_recall.py --out DIR`; run again, it goes on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("tools.recall_model", run_name="__main__")
