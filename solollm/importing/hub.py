"""Downloading a model from the Hugging Face hub, into the cache that all its programs share.

`huggingface_hub` does it, with its own settings: `HF_HOME` (where), `HF_TOKEN` (as whom),
`HF_HUB_OFFLINE=1` (only what is there already), `HF_ENDPOINT` (from where).
"""

from __future__ import annotations

import re
from pathlib import Path

from solollm.errors import ConfigError, SoloLLMError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Nothing that can hold code: no pickles, no .py. Folders inside a repository hold other formats.
PATTERNS = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def download(hub_id: str, revision: str | None = None) -> Path:
    """The snapshot folder of a model at a branch, tag or commit (default: the main branch).

    Raises:
        ConfigError: no such model or revision, or one that wants a token.
        SoloLLMError: the hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(PATTERNS)))
    except RevisionNotFoundError as error:
        raise ConfigError(f"{hub_id} has no revision {revision!r}", why=_short(error)) from error
    except GatedRepoError as error:
        fix = f"ask for access at its page {hub_id} on the hub, and set HF_TOKEN"
        raise ConfigError(f"{hub_id} is gated", why=_short(error), fix=fix) from error
    except RepositoryNotFoundError as error:
        fix = "check the spelling; for a private model set HF_TOKEN"
        raise ConfigError(f"the hub has no {hub_id}", why=_short(error), fix=fix) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise SoloLLMError(
            f"{hub_id} could not be downloaded",
            why=_short(error),
            fix="check the network and HF_HUB_OFFLINE, then run again; or give a local folder",
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
