"""Models of others: `import_model` makes a folder that can be trained on out of a foreign one.

`importer` is the way from source to folder; `hub` downloads; `foreign_folder` opens files,
`foreign_config`, `foreign_weights` and `foreign_tokenizer` understand them or refuse. No code that
lies in a model folder is ever run. The reverse is `solollm.export`.
"""

from solollm.importing.importer import ImportReport, import_model

__all__ = ["ImportReport", "import_model"]
