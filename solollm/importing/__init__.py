"""Models of others: `import_model` makes a folder that can be trained on out of a foreign one.

`importer` is the way from source to folder; `hub` downloads; `foreign_folder` opens files,
`foreign_config`, `foreign_weights` and `foreign_tokenizer` understand them or refuse;
`foreign_adapter` does both for an adapter. No code that lies in a model folder is ever run. The
reverse is `solollm.export`.
"""

from solollm.importing.foreign_adapter import AdapterReport, import_adapter, is_adapter_folder
from solollm.importing.importer import ImportReport, import_model

__all__ = ["AdapterReport", "ImportReport", "import_adapter", "import_model", "is_adapter_folder"]
