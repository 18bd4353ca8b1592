"""Models for other programs: `export_model` writes a checkpoint as a folder that they load.

`exporter` is the way from a source to the folder, `gguf` and `gguf_vocabulary` that of llama.cpp's,
`adapter` that of an adapter alone, `source` what can be exported, `card` the README.md that goes
with it. The reverse is `solollm.importing`.
"""

from solollm.export.exporter import ExportReport, Target, export_model

__all__ = ["ExportReport", "Target", "export_model"]
